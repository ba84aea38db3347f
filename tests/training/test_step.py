"""The train step: what it changes, what it leaves, what it counts."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geolrm_jax.config import load_config
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.inference import abstract_model
from geolrm_jax.scene import Batch, Cameras, Views
from geolrm_jax.training.guard import GuardConfig
from geolrm_jax.training.step import init_state, make_train_step


@pytest.fixture(scope="module")
def experiment(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


def make_batch(rng, scenes=2, views=3, size=28, grid=8) -> Batch:
    rig = turntable(views, size=size)
    cameras = Cameras(
        *(jnp.array(np.broadcast_to(x, (scenes, *x.shape))) for x in (rig.world_from_camera, rig.intrinsics)),
        size,
        size,
    )
    shape = (scenes, views, size, size)
    alpha = jnp.zeros(shape).at[:, :, 8:20, 8:20].set(1.0)
    rgb = jnp.array(rng.uniform(size=(*shape, 3)), jnp.float32) * alpha[..., None]
    posed = Views(cameras, rgb, alpha, 1.9 * alpha, jnp.ones(shape[:2], bool))
    occupancy = jnp.zeros((scenes, grid, grid, grid), bool).at[:, 2:6, 2:6, 2:6].set(True)
    return Batch(posed, posed, occupancy, jnp.arange(scenes))


def make(experiment, stage, *, accumulation=1, optimizer=None):
    config = experiment.stages[stage]
    model = config.objective.networks(experiment.model)
    optimizer = optimizer or config.optimizer.make(config.steps)
    ema = config.ema_decay
    state = init_state(
        lambda rngs: model.make(rngs, experiment.precision),
        config.objective,
        optimizer,
        jax.random.key(0),
        ema=ema > 0,
        guard=GuardConfig(),
    )
    graphdef, _ = abstract_model(model, experiment.precision)
    step = make_train_step(
        graphdef,
        config.objective,
        optimizer,
        config.optimizer.schedule(config.steps),
        seed=0,
        accumulation=accumulation,
        ema_decay=ema,
        guard=GuardConfig(),
    )
    return step, state


def copy(tree):
    return jax.tree.map(np.array, tree)


def changed(before, after):
    return {
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(a, b)
    }


def test_reconstruction_trains_its_own_network_only(experiment, rng):
    step, state = make(experiment, "reconstruction")
    before = copy(state)
    state, metrics = step(state, None, make_batch(rng))
    assert not changed(before["params"]["proposal"], state["params"]["proposal"])
    assert not changed(before["batch_stats"]["proposal"], state["batch_stats"]["proposal"])
    assert changed(before["batch_stats"]["reconstruction"], state["batch_stats"]["reconstruction"])
    paths = {
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(before["params"]["reconstruction"])
    }
    still = paths - changed(before["params"]["reconstruction"], state["params"]["reconstruction"])
    # These biases move all scores of a softmax alike: it does not see them.
    # And this is DINOv2's own pre-training's.
    unseen = ("['key']['bias']", "['view_logit']['bias']", "['mask_token']")
    assert all(path.endswith(unseen) for path in still), still
    for word, tree in (("parameter", state["params"]["reconstruction"]), ("gradient", None)):
        norms = {n.split(".")[1]: v for n, v in metrics.items() if n.startswith(f"{word}_norm/reconstruction.")}
        assert set(norms) == set(before["params"]["reconstruction"])
        whole = metrics["gradient_norm"] if tree is None else optax.tree.norm(tree)
        np.testing.assert_allclose(np.sqrt(sum(float(v) ** 2 for v in norms.values())), whole, rtol=1e-5)
    moved = jax.tree.map(
        lambda a, b: a - b, copy(state["params"]["reconstruction"]), before["params"]["reconstruction"]
    )
    for part, tree in moved.items():
        # The difference of parameters is rounded as they are.
        np.testing.assert_allclose(metrics[f"update_norm/reconstruction.{part}"], optax.tree.norm(tree), rtol=1e-2)
    parts = ("image", "alpha", "depth", "total_variation")
    np.testing.assert_allclose(metrics["loss"], sum(metrics[p] for p in parts), rtol=1e-6)
    assert state["step"] == 1 and metrics["skipped"] == 0

    decay = experiment.reconstruction.ema_decay
    old, new, mean = (tree["reconstruction"] for tree in (before["params"], copy(state["params"]), state["ema"]))
    expected = jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)
    jax.tree.map(lambda e, m: np.testing.assert_allclose(m, e, rtol=1e-5, atol=1e-7), expected, mean)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(experiment, rng):
    step, state = make(experiment, "proposal")
    before = copy(state)
    batch = make_batch(rng)
    poisoned = dataclasses.replace(
        batch, inputs=dataclasses.replace(batch.inputs, rgb=batch.inputs.rgb.at[0, 0, 0, 0].set(jnp.nan))
    )
    state, metrics = step(state, None, poisoned)
    assert metrics["skipped"] == 1
    assert changed(before, state) == {"['step']", "['guard']['skipped']", "['guard']['norms']"}
    assert np.isnan(state["guard"]["norms"]).all()  # none is known; NaN is unequal to itself
    state, metrics = step(state, None, batch)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_accumulated_gradients_are_the_mean_of_the_parts(experiment, rng):
    plain = optax.sgd(1.0)
    batch = make_batch(rng, scenes=4)
    whole, state = make(experiment, "proposal", accumulation=2, optimizer=plain)
    saved = copy(state)
    summed, _ = whole(state, None, batch)

    part, _ = make(experiment, "proposal", optimizer=plain)
    moves = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        after, _ = part(jax.tree.map(jnp.array, saved), None, jax.tree.map(lambda x: x[half], batch))  # noqa: B023
        moves.append(jax.tree.map(lambda a, b: np.asarray(a) - b, after["params"], saved["params"]))
    expected = jax.tree.map(lambda p, a, b: p + 0.5 * (a + b), saved["params"], *moves)
    jax.tree.map(lambda e, o: np.testing.assert_allclose(o, e, rtol=1e-4, atol=1e-5), expected, summed["params"])


@pytest.mark.slow
def test_the_directional_derivative_is_the_gradients(experiment, rng):
    """Through the step with plain gradient descent: a small move along -g lowers the loss by |g|^2 times its length."""
    step, state = make(experiment, "proposal", optimizer=optax.sgd(1e-4))
    saved = copy(state)
    batch = make_batch(rng)
    after, metrics = step(state, None, batch)
    moved = {**jax.tree.map(jnp.array, saved), "params": after["params"]}
    _, later = step(moved, None, batch)
    fall = float(metrics["loss"]) - float(later["loss"])
    np.testing.assert_allclose(fall, 1e-4 * float(metrics["gradient_norm"]) ** 2, rtol=0.05)


def test_frozen_and_trained_names_are_stable(experiment):
    model = experiment.model
    _, shapes = abstract_model(model, experiment.precision)
    assert set(shapes["params"]) == {"proposal", "reconstruction"}
    alone = replace(model, reconstruction=None)
    assert set(abstract_model(alone, experiment.precision)[1]["params"]) == {"proposal"}
