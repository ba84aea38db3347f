"""The monitor: what it averages, what it skips, when it grows and when it stops."""

import dataclasses

import jax.numpy as jnp
import pytest

from geolrm_jax.config import load_config
from geolrm_jax.runtime import logging
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.training.loop import DOUBLINGS, Monitor, drawn_inputs


@pytest.fixture
def stage(request):
    tiny = load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))
    return dataclasses.replace(tiny.reconstruction, log_every=2, max_skipped=2, max_growth=2)


def make_monitor(stage, folder, doublings=0):
    built = []
    log, bar = logging.RunLogger(folder, "stage"), logging.Progress("stage", 10, 0, "step")
    return Monitor("stage", stage, lambda objective: built.append(objective), log, bar, doublings), built


def metrics(loss, skipped=False, overflow=0):
    return {"loss": jnp.array(loss), "skipped": jnp.array(skipped), "overflow": jnp.array(overflow)}


def test_a_line_is_the_mean_of_its_steps(stage, tmp_path):
    monitor, _ = make_monitor(stage, tmp_path)
    for step, loss in enumerate([1.0, 2.0, 5.0, 7.0], start=1):
        monitor.add(step, metrics(loss), 2, 0.0, flush=False)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.5, 6.0]
    assert monitor.since_save()["loss"] == 3.75
    assert "loss" not in monitor.since_save()


def test_skipped_steps_are_counted_and_left_out_of_means(stage, tmp_path):
    monitor, _ = make_monitor(stage, tmp_path)
    monitor.add(1, metrics(float("nan"), skipped=True), 2, 0.0, flush=False)
    monitor.add(2, metrics(3.0), 2, 0.0, flush=False)
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] == 3.0 and line["skipped"] == 1.0
    with pytest.raises(FloatingPointError, match="as many as max_skipped"):
        monitor.add(3, metrics(float("nan"), skipped=True), 2, 0.0, flush=True)


def test_capacity_doubles_once_for_steps_in_flight_and_is_remembered(stage, tmp_path):
    monitor, built = make_monitor(stage, tmp_path)
    first = stage.objective.pairs_per_gaussian
    monitor.add(1, metrics(1.0, overflow=5), 2, 0.0, flush=False)
    monitor.add(2, metrics(1.0, overflow=5), 2, 0.0, flush=True)  # dispatched before the first was looked at
    assert [objective.pairs_per_gaussian for objective in built] == [first, 2 * first]
    assert monitor.since_save()[DOUBLINGS] == 1

    resumed, built = make_monitor(stage, tmp_path / "again", doublings=1)
    assert built[0].pairs_per_gaussian == 2 * first
    resumed.add(1, metrics(1.0, overflow=1), 2, 0.0, flush=True)
    with pytest.raises(ValueError, match="doubled 2 times and overflows still"):
        resumed.add(2, metrics(1.0, overflow=1), 2, 0.0, flush=True)


def test_drawn_inputs_cover_the_choices_and_repeat():
    drawn = [drawn_inputs((1, 4, 7), 3, step) for step in range(300)]
    assert drawn == [drawn_inputs((1, 4, 7), 3, step) for step in range(300)]
    assert all(70 < drawn.count(choice) < 130 for choice in (1, 4, 7))
