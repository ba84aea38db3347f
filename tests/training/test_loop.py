"""The monitor: what it averages, what it skips, when it grows and when it stops."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.config import load_config
from geolrm_jax.models.geolrm import with_remat
from geolrm_jax.runtime import hardware, logging
from geolrm_jax.runtime.cost import count
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.runtime.sharding import MeshConfig, batch_sharding
from geolrm_jax.scene import Batch, Cameras, Views
from geolrm_jax.training import loop
from geolrm_jax.training.loop import drawn_inputs, with_inputs
from geolrm_jax.training.monitor import DOUBLINGS, RECENT, Diverged, Monitor


@pytest.fixture
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


@pytest.fixture
def stage(tiny):
    return dataclasses.replace(tiny.reconstruction, log_every=2, max_skipped=2, max_growth=2)


def make_monitor(stage, folder, saved=()):
    built = []
    log, bar = logging.RunLogger(folder, "stage"), logging.Progress("stage", 10, 0, "step")
    monitor = Monitor(
        "stage", stage, lambda objective: built.append(objective), lambda *_: 0, log, bar, folder / "stage", dict(saved)
    )
    return monitor, built


def metrics(loss, skipped=False, overflow=0, recently=0):
    values = {"loss": loss, "gradient_norm": loss, "gradient_norm_median": 1.0, "overflow": overflow}
    return {k: jnp.array(v) for k, v in values.items()} | {"skipped": jnp.array(skipped), RECENT: jnp.array(recently)}


def add(monitor, step, values, flush=False, **seconds):
    host = {"inputs": 2.0, "seconds_waiting_for_data": 0.0, "seconds_dispatching": 0.0} | seconds
    monitor.add(step, values, host, damaged=1, flush=flush)


def test_a_line_is_the_mean_of_its_steps(stage, tmp_path):
    monitor, _ = make_monitor(stage, tmp_path)
    for step, loss in enumerate([1.0, 2.0, 5.0, 7.0], start=1):
        add(monitor, step, metrics(loss))
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.5, 6.0]
    assert monitor.since_save(True)["loss"] == 3.75
    assert "loss" not in monitor.since_save(True)


def test_an_interval_that_was_interrupted_has_the_mean_of_all_its_steps(stage, tmp_path, rng):
    losses = rng.uniform(size=8).astype(np.float32)
    means = []
    for folder, stops in (("whole", ()), ("interrupted", (3, 4))):
        monitor, _ = make_monitor(stage, tmp_path / folder)
        for step, loss in enumerate(losses, start=1):
            add(monitor, step, metrics(loss, skipped=step == 2), flush=step in stops)
            if step in stops:
                saved = json.loads(json.dumps(monitor.since_save(False)))
                assert not {"loss", "skipped"} & {*saved}
                monitor, _ = make_monitor(stage, tmp_path / folder, saved)
        means.append(monitor.since_save(True))
    whole, interrupted = ({name: x for name, x in found.items() if "seconds" not in name} for found in means)
    assert whole == interrupted
    assert whole["skipped"] == 1 / 8 and whole["loss"] == pytest.approx(np.delete(losses, 1).mean(), rel=1e-6)


def test_skipped_steps_are_counted_and_left_out_of_means(stage, tmp_path):
    monitor, _ = make_monitor(stage, tmp_path)
    add(monitor, 1, metrics(float("nan"), skipped=True))
    add(monitor, 2, metrics(3.0))
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] == 3.0 and line["skipped"] == 1.0
    with pytest.raises(Diverged, match="2 steps skipped"):
        add(monitor, 3, metrics(float("nan"), skipped=True, recently=2), flush=True)
    told = [json.loads(line) for line in (tmp_path / "stage" / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 3] and told[0]["loss"] == "nan"


def test_a_line_says_where_the_time_goes(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda kind: 1e12)
    monitor, _ = make_monitor(stage, tmp_path)
    monitor.compiled, monitor.flops = lambda state, constants, batch: (state, {}), lambda objective, batch: 10**9
    batch = with_inputs(numbered_batch(), (0, 1))
    for step in (1, 2):
        monitor.step(None, None, batch)
        add(monitor, step, metrics(1.0), seconds_waiting_for_data=0.25, seconds_dispatching=0.5 * step)
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["seconds_waiting_for_data"] == 0.25 and line["seconds_dispatching"] == 0.75
    assert line["samples_per_second"] == pytest.approx(stage.batch / line["seconds_per_step"])
    assert line["mfu"] == pytest.approx(1e9 / line["seconds_per_step"] / 1e12)  # one device
    assert line["damaged_records"] == 1 and line["host_memory"] > 1e7 and "flops" not in line


@pytest.mark.slow
def test_operations_for_mfu_leave_out_what_rematerialisation_does_twice(tiny, tmp_path):
    def views(number, size):
        cameras = Cameras(jnp.zeros((2, number, 4, 4)), jnp.zeros((2, number, 3, 3)), size, size)
        image = jnp.zeros((2, number, size, size))
        return Views(cameras, jnp.zeros((*image.shape, 3)), image, image, jnp.ones((2, number), bool))

    grid = jnp.zeros((2, 8, 8, 8), bool)
    batch = jax.eval_shape(lambda: Batch(views(2, 28), views(3, 28), grid, jnp.zeros(2, jnp.int32)))
    counted, whole = [], []
    for remat in ("full", "dots", "none"):
        model = with_remat(tiny.model, remat)
        trainer = loop.Trainer("proposal", tiny.proposal, model, tiny.precision, tiny.mesh, 0, tmp_path, iter)
        prepared = loop.prepare(trainer)
        counted.append(prepared.flops(tiny.proposal.objective, batch))
        step = prepared.build(tiny.proposal.objective)
        whole.append(count(step, prepared.abstract_state, prepared.constants, batch).total)
    assert {*counted} == {whole[2]} and whole[2] < whole[1] < whole[0]


def test_capacity_doubles_once_for_steps_in_flight_and_is_remembered(stage, tmp_path):
    monitor, built = make_monitor(stage, tmp_path)
    first = stage.objective.pairs_per_gaussian
    add(monitor, 1, metrics(1.0, overflow=5))
    add(monitor, 2, metrics(1.0, overflow=5), flush=True)  # dispatched before the first was looked at
    assert [objective.pairs_per_gaussian for objective in built] == [first, 2 * first]
    saved = monitor.since_save(True)
    assert saved[DOUBLINGS] == 1

    resumed, built = make_monitor(stage, tmp_path / "again", saved)
    assert built[0].pairs_per_gaussian == 2 * first
    add(resumed, 1, metrics(1.0, overflow=1), flush=True)
    with pytest.raises(ValueError, match="doubled 2 times and overflows still"):
        add(resumed, 2, metrics(1.0, overflow=1), flush=True)


def test_an_overflow_of_a_skipped_step_raises_the_capacity_too(stage, tmp_path):
    monitor, built = make_monitor(stage, tmp_path)
    add(monitor, 1, metrics(float("nan"), skipped=True, overflow=5), flush=True)
    assert built[1].pairs_per_gaussian == 2 * built[0].pairs_per_gaussian


def test_an_overflow_in_one_part_of_an_accumulated_step_is_told_in_full(stage, tmp_path, capsys):
    monitor, built = make_monitor(dataclasses.replace(stage, batch=8, accumulation=8), tmp_path)
    add(monitor, 1, metrics(1.0, overflow=3 / 8), flush=True)
    assert "left out 3 (Gaussian, tile) pairs" in capsys.readouterr().out and len(built) == 2


def test_drawn_inputs_cover_the_choices_and_repeat(stage):
    paper = dataclasses.replace(stage, views=8, inputs=(1, 4, 7))
    drawn = [drawn_inputs(paper, 3, step) for step in range(300)]
    assert drawn == [drawn_inputs(paper, 3, step) for step in range(300)]
    assert set(drawn) == {tuple(range(n)) for n in (1, 4, 7)}
    assert min(drawn.count(choice) for choice in set(drawn)) > 70

    released = dataclasses.replace(paper, view_rule="released", inputs=(1, 2, 3, 4), other_inputs=(0, 1, 2, 3))
    drawn = [drawn_inputs(released, 3, step) for step in range(600)]
    ring, others = ([0, 1, 2, 3], [4, 5, 6])
    assert set(drawn) == {(*ring[:n], *others[:m]) for n in (1, 2, 3, 4) for m in range(4)}
    assert released.candidates == 7
    with pytest.raises(ValueError, match="other_inputs"):
        dataclasses.replace(paper, other_inputs=(1,))


def numbered_batch(views=5) -> Batch:
    """Two objects whose views hold their own numbers as depth."""
    cameras = Cameras(np.zeros((2, views, 4, 4), np.float32), np.zeros((2, views, 3, 3), np.float32), 1, 1)
    numbers = np.broadcast_to(np.arange(views, dtype=np.float32)[:, None, None], (2, views, 1, 1))
    pictures = Views(cameras, np.repeat(numbers[..., None], 3, -1), numbers, numbers, np.ones((2, views), bool))
    return Batch(pictures, pictures, np.zeros((2, 1, 1, 1), bool), np.zeros(2, np.int32))


@pytest.mark.parametrize("wanted", [(0, 1, 4), (0, 1, 2)])
def test_only_the_drawn_inputs_are_taken(wanted):
    batch = with_inputs(numbered_batch(), wanted)
    np.testing.assert_array_equal(batch.inputs.depth[:, :, 0, 0], [wanted] * 2)
    assert batch.inputs.cameras.intrinsics.shape == (2, 3, 3, 3) and batch.targets.valid.shape == (2, 5)


class Numbered:
    """Endless batches with a state."""

    damaged = ()

    def __next__(self):
        return numbered_batch()

    def get_state(self):
        return {"position": 0}

    def close(self):
        pass


def test_a_batch_is_sent_before_the_step_before_it_is_waited_for(tiny, tmp_path, monkeypatch):
    """The order of the loop's work, with a step that trains nothing: between lines of the log the device always has a
    step to do while the host waits, reads and sends."""
    order = []

    def noted(name, function):
        def call(*arguments):
            order.append(name(*arguments))
            return function(*arguments)

        return call

    @jax.jit
    def step(state, constants, batch):
        return state, metrics(batch.targets.depth.max())

    state = {name: {"x": jnp.zeros(2)} for name in ("params", "batch_stats", "opt_state")} | {"step": jnp.array(0)}
    prepared = loop.Prepared(
        jax.eval_shape(lambda: state),
        lambda: state,
        lambda objective: noted(lambda *_: "step", step),
        lambda *_: 0,
        None,
        batch_sharding(MeshConfig().make()),
    )
    monkeypatch.setattr(loop, "prepare", lambda trainer: prepared)
    monkeypatch.setattr(loop, "put_batch", noted(lambda *_: "send", loop.put_batch))
    monkeypatch.setattr(Monitor, "_take", noted(lambda monitor, done, *_: f"wait for {done}", Monitor._take))
    saving = dataclasses.replace(tiny.reconstruction.checkpoint, every=4)
    stage = dataclasses.replace(tiny.reconstruction, steps=4, log_every=4, checkpoint=saving)
    loop.train(
        loop.Trainer("stage", stage, tiny.model, tiny.precision, tiny.mesh, 0, tmp_path, lambda order: Numbered())
    )
    expected = "send, step, send, step, wait for 1, send, step, wait for 2, send, step, wait for 3, wait for 4"
    assert order == expected.split(", ")
