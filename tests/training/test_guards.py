"""The guard: which steps it skips, and how a stage goes back and on in another order, or stops."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.config import load_config
from geolrm_jax.data.pipeline import record_order
from geolrm_jax.recipe import data_seed
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.runtime.interruption import Preempted, Preemption, WatchConfig
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.runtime.sharding import MeshConfig, batch_sharding
from geolrm_jax.scene import Batch, Cameras, Views
from geolrm_jax.training import loop
from geolrm_jax.training.batches import Batches
from geolrm_jax.training.guard import GuardConfig, init_guard, judge
from geolrm_jax.training.rollback import read_order

NAN = float("nan")


def verdicts(norms, config, losses=None):
    """What the guard says of one step after the other, and its state at the end."""
    guard, said = init_guard(config), []
    run = jax.jit(judge, static_argnums=4)
    for step, norm in enumerate(norms):
        loss = jnp.float32(1.0 if losses is None else losses[step])
        usable, guard, metrics = run(guard, jnp.int32(step), loss, jnp.float32(norm), config)
        said.append((bool(usable), int(metrics["skipped_recently"]), float(metrics["gradient_norm_median"])))
    return said, guard


def test_the_guard_follows_its_definition(rng):
    """Beside the same rule in NumPy, over several windows, with spikes, NaN and infinities in them."""
    config = GuardConfig(spike=3.0, window=8)
    norms = np.exp(rng.normal(size=60)).astype(np.float32)
    norms[[5, 20, 21, 44]] = [NAN, np.inf, 500.0, NAN]
    losses = np.ones(60)
    losses[30] = np.inf
    said, _ = verdicts(norms, config, losses)
    skips = []
    for step in range(60):
        past = [n for n, x in zip(norms[max(0, step - 8) : step], losses[max(0, step - 8) : step], strict=True)]
        finite = [n for n, at in zip(past, range(max(0, step - 8), step), strict=True) if np.isfinite(n + losses[at])]
        spike = len(finite) >= 4 and norms[step] > 3.0 * np.median(finite)
        skips.append(bool(spike or not np.isfinite(norms[step] + losses[step])))
        usable, recently, median = said[step]
        assert usable != skips[-1], step
        assert recently == sum(skips[-8:])
        if finite:
            np.testing.assert_allclose(median, np.median(finite), rtol=1e-6)
    assert sum(skips) > 6


def test_a_level_that_stays_becomes_the_median():
    said, _ = verdicts([1.0] * 10 + [50.0] * 10, GuardConfig(spike=10.0, window=6))
    usable = [verdict[0] for verdict in said]
    assert usable[:10] == [True] * 10 and usable[10:] == [False] * 3 + [True] * 7


def test_gradients_after_zeros_are_no_spikes():
    said, _ = verdicts([0.0] * 5 + [0.5] * 5 + [6.0], GuardConfig(spike=10.0, window=6))
    assert [usable for usable, *_ in said] == [True] * 10 + [False]
    assert [median for *_, median in said[3:6]] == [0.0] * 3


def test_bad_configs_are_refused():
    for wrong in (dict(spike=1.0), dict(window=1), dict(max_rollbacks=-1)):
        with pytest.raises(ValueError, match="expected spike > 1"):
            GuardConfig(**wrong)


class Losses:
    """A data pipeline of an order whose batches hold (loss, gradient's norm) for a step that trains nothing."""

    damaged = ()

    def __init__(self, order, bad):
        self.order, self.bad, self.position = order, bad, 0

    def __next__(self):
        value = self.bad(self.order, self.position)
        self.position += 1
        cameras = Cameras(np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 1, 3, 3), np.float32), 1, 1)
        image = np.full((1, 1, 1, 1), value, np.float32)
        views = Views(cameras, np.repeat(image[..., None], 3, -1), image, image, np.ones((1, 1), bool))
        return Batch(views, views, np.zeros((1, 1, 1, 1), bool), np.full(1, self.order, np.int32))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        pass


@pytest.fixture
def make_trainer(request, tmp_path, monkeypatch):
    """A trainer of a state that counts the steps taken, in which order, under the real guard, loop and checkpoints."""
    tiny = load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))
    guard = GuardConfig(spike=5.0, window=6, max_rollbacks=2)

    def make(bad, steps=20, every=2, max_skipped=3, **changes):
        config = dataclasses.replace(guard, **changes)
        saving = dataclasses.replace(tiny.proposal.checkpoint, every=every, keep=3)
        stage = dataclasses.replace(
            tiny.proposal,
            steps=steps,
            inputs=(1,),
            log_every=1,
            checkpoint=saving,
            guard=config,
            max_skipped=max_skipped,
        )

        @jax.jit
        def step(state, constants, batch):
            loss, order = batch.inputs.depth.ravel()[0], batch.index[0]
            usable, remembered, verdict = judge(state["guard"], state["step"], loss, loss, config)
            taken = state["params"]["taken"].at[order].add(usable)
            metrics = {"loss": loss, "gradient_norm": loss, "order": order, **verdict}
            state = {**state, "params": {"taken": taken}, "guard": remembered, "step": state["step"] + 1}
            return state, metrics

        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = {"params": {"taken": jnp.zeros(4, jnp.int32)}, "batch_stats": {}, "opt_state": {"x": jnp.zeros(1)}}
        state |= {"step": jnp.array(0), "guard": init_guard(config)}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
        prepared = loop.Prepared(
            abstract,
            lambda: jax.tree.map(jnp.copy, state),
            lambda objective: step,
            lambda *_: 0,
            None,
            batch_sharding(MeshConfig().make()),
        )
        monkeypatch.setattr(loop, "prepare", lambda trainer: prepared)
        return loop.Trainer(
            "stage", stage, tiny.model, tiny.precision, tiny.mesh, 0, tmp_path, lambda order: Losses(order, bad)
        )

    return make


def lines(trainer):
    return read_metrics(trainer.directory / "metrics.jsonl")


def taken(trainer):
    checkpoints = Checkpoints(trainer.directory / "stage" / "checkpoints", trainer.stage.checkpoint, write=False)
    shape = jax.ShapeDtypeStruct((4,), np.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    newest = checkpoints.resolve("latest")
    return newest, checkpoints.restore_model(newest, {"params": {"taken": shape}})["params"]["taken"].tolist()


def test_too_many_skipped_steps_go_back_to_the_last_good_checkpoint_and_on_in_another_order(make_trainer):
    # In the first order everything from batch 9 on is bad: skipped at steps 10, 11 and 12. Step 10's checkpoint has one
    # of them in its window, which is few enough; step 12's is not written.
    trainer = make_trainer(lambda order, position: NAN if order == 0 and position >= 9 else 1.0)
    loop.train(trainer)
    assert taken(trainer) == (20, [9, 10, 0, 0])
    said = lines(trainer)
    assert [line["step"] for line in said] == list(range(1, 21))
    assert [line.get("order") for line in said] == [0] * 9 + [None] + [1] * 10
    skipped = (trainer.directory / "stage" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in skipped] == [10, 11, 12]


def test_checkpoints_amid_skipped_steps_are_no_place_to_go_back_to(make_trainer):
    # Saved at every step: those of steps 11 (two of six skipped) are bad, that of step 10 (one) is good.
    trainer = make_trainer(lambda order, position: 30.0 if order == 0 and position >= 9 else 1.0, every=1)
    loop.train(trainer)
    assert taken(trainer) == (20, [9, 10, 0, 0])
    assert [line.get("order") for line in lines(trainer)] == [0] * 9 + [None] + [1] * 10


def test_a_stage_that_goes_on_failing_stops_with_a_report(make_trainer, capsys):
    trainer = make_trainer(lambda order, position: NAN if position >= 9 else 1.0)
    with pytest.raises(FloatingPointError, match=r"3 of the last 6 steps .* after 2 rollbacks.*skipped\.jsonl"):
        loop.train(trainer)
    assert "rollback 1 of 2" in capsys.readouterr().out
    skipped = (trainer.directory / "stage" / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 3 + 2 + 2  # the window of step 10's checkpoint has its first one
    assert taken(trainer)[0] == 10  # what was good is there still


@pytest.mark.parametrize(("bad_from", "every", "expected"), [(9, 4, [8, 12, 0, 0]), (1, 20, [0, 20, 0, 0])])
def test_a_kill_between_going_back_and_the_next_checkpoint_keeps_the_order(make_trainer, bad_from, every, expected):
    """Back to a checkpoint of the first order, and to the beginning, where there is none."""
    kills = []

    def bad(order, position):
        if order == 1 and not kills:
            kills.append(position)
            raise KeyboardInterrupt
        return NAN if order == 0 and position >= bad_from else 1.0

    trainer = make_trainer(bad, every=every)
    with pytest.raises(KeyboardInterrupt):
        loop.train(trainer)
    loop.train(trainer)
    assert taken(trainer) == (20, expected)
    skipped = (trainer.directory / "stage" / "skipped.jsonl").read_text().splitlines()
    assert kills and len(skipped) == 3  # the first order was not met again


def test_where_every_checkpoint_kept_has_skips_behind_it_the_oldest_is_taken_and_told_of(make_trainer, capsys):
    # Every other step from 10 on is skipped; when step 18 is the fifth, those of steps 15 to 17 are kept, 17 the best.
    trainer = make_trainer(
        lambda order, position: NAN if order == 0 and position >= 9 and position % 2 else 1.0 / (1 + position),
        every=1,
        max_skipped=5,
        window=10,
    )
    loop.train(trainer)
    assert taken(trainer) == (20, [12, 5, 0, 0])
    said = " ".join(capsys.readouterr().out.split())
    assert "amid skipped steps; the oldest, of step 15, has 3 behind it: raise checkpoint.keep" in said


def test_orders_differ_and_a_restart_keeps_its_order():
    assert data_seed(7, 0) == 7 and len({data_seed(7, order) for order in range(5)}) == 5
    first, second = ([record_order([50], [1.0], data_seed(7, order))[p] for p in range(50)] for order in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    batches = Batches(lambda order: Losses(order, lambda order, position: order))
    next(batches)
    state = json.loads(json.dumps(batches.get_state())) | {"order": 2}
    restarted = Batches(lambda order: Losses(order, lambda order, position: order))
    restarted.set_state(state)
    assert restarted.order == 2 and next(restarted).index == 2 and restarted.get_state() == {"order": 2, "position": 2}
    later = Batches(lambda order: Losses(order, lambda order, position: order), order=3)
    later.set_state(state)
    assert later.order == 3 and later.get_state()["position"] == 1


@pytest.mark.parametrize(("steps", "means", "best"), [(10, {4: 2.5, 8: 6.5}, 4), (3, {3: 2.0}, 3)])
def test_a_last_checkpoint_amid_an_interval_is_not_judged_unless_it_is_the_only_one(make_trainer, steps, means, best):
    # The last two of ten steps have the lowest loss, by chance.
    trainer = make_trainer(lambda order, position: 0.5 if position >= 8 else 1.0 + position, steps=steps, every=4)
    loop.train(trainer)
    checkpoints = Checkpoints(trainer.directory / "stage" / "checkpoints", trainer.stage.checkpoint, write=False)
    found = {step: checkpoints.metrics(step).get("loss") for step in checkpoints.steps}
    assert found == dict.fromkeys([steps]) | means
    assert checkpoints.resolve("best") == best and checkpoints.resolve("latest") == steps


def test_the_wait_for_the_other_hosts_ends_before_the_watchdogs_time(make_trainer, monkeypatch):
    order = []
    monkeypatch.setattr(loop.Watchdog, "beat", lambda self, done: order.append(done))
    monkeypatch.setattr(loop.distributed, "barrier", lambda name, seconds: order.append(f"{name}, {seconds:g}"))
    for first, steps in ((0, 2), (2, 3)):
        trainer = make_trainer(lambda order, position: 1.0, steps=steps)
        loop.train(dataclasses.replace(trainer, watch=WatchConfig(hang_seconds=100.0)))
        assert order == [0, first, f"stage: starting from step {first}, 90", *range(first + 1, steps + 1)]
        order.clear()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"order": "second"}'])
def test_a_damaged_order_is_an_error_that_names_its_file(content, tmp_path):
    assert read_order(tmp_path) == 0
    (tmp_path / "order.json").write_text(content)
    with pytest.raises(ValueError, match=r'order\.json: expected {"order": N}'):
        read_order(tmp_path)
    (tmp_path / "order.json").write_text('{"order": 2}')
    assert read_order(tmp_path) == 2


def test_a_notice_at_the_step_that_rolls_back_is_heeded_behind_the_next(make_trainer, monkeypatch):
    trainer = make_trainer(lambda order, position: NAN if order == 0 and position >= 9 else 1.0)
    due, asked = Preemption.due, []

    def signalled(self):
        asked.append(None)
        if len(asked) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return due(self)

    monkeypatch.setattr(Preemption, "due", signalled)
    with pytest.raises(Preempted, match="saved at step 11 of 20"):
        loop.train(trainer)
    assert taken(trainer) == (11, [9, 1, 0, 0])


def test_sigterm_saves_at_once_and_a_second_run_goes_on(make_trainer, monkeypatch):
    trainer = make_trainer(lambda order, position: 1.0 + position, every=10)
    due, calls = Preemption.due, []

    def signalled(self):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return due(self)

    monkeypatch.setattr(Preemption, "due", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step 7 of 20"):
        loop.train(trainer)
    assert taken(trainer) == (7, [7, 0, 0, 0]) and signal.getsignal(signal.SIGTERM) is before
    loop.train(trainer)
    assert taken(trainer) == (20, [20, 0, 0, 0])
    checkpoints = Checkpoints(trainer.directory / "stage" / "checkpoints", trainer.stage.checkpoint, write=False)
    means = {step: checkpoints.metrics(step)["loss"] for step in checkpoints.steps}
    assert means == {10: 5.5, 20: 15.5}  # as without the notice, whose checkpoint has given way
    assert [(line["step"], line["loss"]) for line in lines(trainer)] == [(s, float(s)) for s in range(1, 21)]
