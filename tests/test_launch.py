"""The launch files are sound, and what they start are real commands with real options."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from geolrm_jax import cli, recipe
from geolrm_jax.runtime.interruption import NOT_SAVED, PREEMPTED

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture
def parse(monkeypatch):
    """What `geolrm` makes of a command line: the experiment, the work directory and how it is watched."""
    seen = []
    monkeypatch.setattr(recipe, "run", lambda *arguments: seen.append(arguments))

    def parse(words):
        assert words[0] == "geolrm" and cli.main(words[1:]) == 0
        return seen.pop()

    return parse


def check_batches(experiment, devices):
    """Every part of a batch is split evenly."""
    for stage in experiment.stages.values():
        assert stage.batch // stage.accumulation % experiment.mesh.rows(devices) == 0, stage


def test_the_slurm_script(parse):
    script = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    command = re.search(r"^srun .*?(geolrm (?:.*\\\n)*.*)$", text, re.M).group(1).replace("\\\n", " ")
    words = [word for word in shlex.split(command) if word != "$@"]
    experiment, _, watch = parse(words)
    assert experiment.name == "geolrm" and watch.hang_exit
    nodes, gpus = (int(re.search(rf"--{option}=(\d+)", text).group(1)) for option in ("nodes", "gpus-per-node"))
    check_batches(experiment, nodes * gpus)
    limit = int(re.search(r"--signal=TERM@(\d+)", text).group(1))
    assert watch.save_seconds < limit
    assert f'"$code" -eq {PREEMPTED} ' in text and f'"$code" -eq {NOT_SAVED} ' in text
    # At 1, srun kills the tasks that still save when the first has ended with 75, and the job is not requeued.
    assert "srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task=" in text


@pytest.mark.parametrize("name", ["jobset-tpu.yaml", "jobset-gpu.yaml"])
def test_the_job_sets(name, parse):
    tree = yaml.safe_load((LAUNCH / name).read_text())
    [job] = tree["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    experiment, _, watch = parse([*container["command"], *container["args"]])
    assert experiment.name == "geolrm"
    assert watch.save_seconds < pod["terminationGracePeriodSeconds"]
    [chips] = container["resources"]["limits"].values()
    check_batches(experiment, chips * spec["parallelism"])
    [rule] = spec["podFailurePolicy"]["rules"]
    assert (
        rule["onExitCodes"]["values"] == [PREEMPTED, NOT_SAVED]
        and rule["onExitCodes"]["containerName"] == container["name"]
    )
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
    cache = environment.pop("JAX_COMPILATION_CACHE_DIR")
    assert any(cache.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])
    if environment:
        first = f"{tree['metadata']['name']}-{job['name']}-0-0.{tree['metadata']['name']}:"
        assert environment["JAX_COORDINATOR_ADDRESS"].startswith(first)
        assert int(environment["JAX_NUM_PROCESSES"]) == spec["parallelism"]
