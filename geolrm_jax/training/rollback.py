"""Going back to a checkpoint that was not saved amid skipped steps, and on with another order of the data."""

import json
from pathlib import Path
from typing import Any

import jax

from geolrm_jax.export.files import written_whole
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.runtime.exclusive import agreed, by_first
from geolrm_jax.training.monitor import RECENT, Diverged

FILE = "order.json"


def read_order(directory: Path) -> int:
    """The order of the data that a stage has come to by going back, 0 for the first; on all processes process 0's.

    Args:
      directory: of the stage.

    Raises:
      ValueError: on all processes, if the file that holds it is damaged.
    """
    file = directory / FILE
    return agreed(by_first(str(file), lambda: _read_order(file)) or 0)


def _read_order(file: Path) -> int:
    if not file.is_file():
        return 0
    try:
        return int(json.loads(file.read_bytes())["order"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected {{"order": N}} of N rollbacks so far, got: {error}') from error


def roll_back(directory: Path, stage: Any, checkpoints: Checkpoints, order: int, diverged: Diverged) -> int:
    """Takes away the checkpoints that were saved amid skipped steps; all processes call it together.

    Args:
      directory: of the stage, which is named as the stage is; gets `order.json`.
      stage: its StageConfig.
      checkpoints: open for writing.
      order: of the data so far.
      diverged: what happened.

    Returns:
      The order to go on with.

    Raises:
      FloatingPointError: if the stage has gone back as often as it may.
    """
    name, guard = directory.name, stage.guard
    skipped = f"{name}: {diverged.skipped} of the last {guard.window} steps skipped at step {diverged.step}"
    if order >= guard.max_rollbacks:
        raise FloatingPointError(
            f"{skipped}, after {order} rollbacks: each is in {diverged.file}; lower optimizer.learning-rate, look at "
            "the data, or raise guard.spike"
        )
    steps = checkpoints.steps
    recent = {step: int(checkpoints.metrics(step).get(RECENT, 0)) for step in steps}
    good = [step for step in steps if recent[step] <= stage.max_skipped // 2]
    back = agreed(max(good or steps[:1], default=0))
    if jax.process_index() == 0:  # first: a run killed from here on must not meet the same batches again
        with written_whole(directory / FILE) as temporary:
            temporary.write_text(json.dumps({"order": order + 1}) + "\n")
    checkpoints.drop_after(back)
    if steps and not good:
        logging.warn(
            f"{name}: every checkpoint kept was saved amid skipped steps; the oldest, of step {back}, has "
            f"{recent[back]} behind it: raise checkpoint.keep, or set checkpoint.keep-every, to have earlier ones"
        )
    logging.warn(
        f"{skipped}: going back to step {back} and on with another order of the data, "
        f"rollback {order + 1} of {guard.max_rollbacks}"
    )
    return order + 1
