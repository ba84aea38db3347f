#!/bin/bash
# GeoLRM on a Slurm cluster of GPUs, one process per GPU:  sbatch launch/slurm.sh [overrides of the config]
#
# Resubmit it as often as you like: a run goes on from its newest checkpoint.
#SBATCH --job-name=geolrm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8        # not --gpus-per-task: JAX takes the GPU with the task's local number
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300        # to all tasks, 300 s before the time is over: they save and end with code 75

# JAX finds the processes by Slurm's variables. Data and work directory must lie on a file system that all nodes share.
# A task that dies ends the others within --heartbeat seconds, and --hang-exit ends those that hang. srun must not kill
# when the first task ends with 75, while others still finish their save: they have --wait seconds for it.
# srun does not take --cpus-per-task from the job (Slurm 22.05 and later).
work="${WORKDIR:-$PWD/workdir/geolrm}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(dirname "$work")/programs}"
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" geolrm train \
  --config geolrm \
  --workdir "$work" \
  --data.root "${DATA:-$PWD/data/gobjaverse}" \
  --heartbeat 60 --save-seconds 240 --hang-exit \
  "$@"
code=$?

# 75: told to stop, saved, not done. 76: told to stop, not saved in time; it goes on from the checkpoint before.
if [ "$code" -eq 75 ] || [ "$code" -eq 76 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
