"""The objectives' choices: backgrounds, compositing, which pixels' depth counts, the frozen proposal's mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.config import load_config
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.scene import Batch, Cameras, Views

SIZE = 28


@pytest.fixture(scope="module")
def experiment(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


@pytest.fixture
def batch(rng):
    rig = turntable(2, size=SIZE)
    leaves = (jnp.array(np.broadcast_to(x, (2, *x.shape))) for x in (rig.world_from_camera, rig.intrinsics))
    alpha = jnp.array(rng.uniform(size=(2, 2, SIZE, SIZE)), jnp.float32)
    rgb = jnp.array(rng.uniform(size=(*alpha.shape, 3)), jnp.float32) * alpha[..., None]
    views = Views(Cameras(*leaves, SIZE, SIZE), rgb, alpha, jnp.where(alpha > 0.5, 1.9, 0.0), jnp.ones((2, 2), bool))
    return Batch(views, views, jnp.zeros((2, 8, 8, 8), bool), jnp.arange(2))


def test_backgrounds(experiment, batch):
    for choice, different in (("scene", True), ("batch", False)):
        objective = dataclasses.replace(experiment.reconstruction.objective, background=choice)
        drawn = np.asarray(objective.draw_background(batch.targets, jax.random.key(0)))
        assert drawn.shape == (2, 2, 3) and (drawn[:, 0] == drawn[:, 1]).all()
        assert (not np.allclose(drawn[0], drawn[1])) == different


def test_compositing_twice_is_the_released_sum(experiment, batch):
    background = jnp.array([0.2, 0.5, 0.9]) * jnp.ones((2, 2, 1, 1, 3))
    alpha = np.asarray(batch.targets.alpha)[..., None]
    once = np.asarray(batch.targets.rgb) + (1 - alpha) * background
    for choice, expected in (("once", once), ("twice", once * alpha + (1 - alpha) * background)):
        objective = dataclasses.replace(experiment.reconstruction.objective, compositing=choice)
        np.testing.assert_allclose(objective.composite(batch.targets, background), expected, atol=1e-6)


def evaluate(model, objective, batch):
    """Losses, and the mean that the proposal's first batch norm keeps afterwards."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        return objective.losses(model, None, batch, jax.random.key(0))[0], model.proposal.encoder.low_norm.mean[...]

    return run(state)


@pytest.mark.slow
def test_depth_pixels_and_the_proposals_mode(experiment, batch):
    """Missing depth pulls only where covered pixels count; the proposal's statistics move only in training mode."""
    losses = {}
    for pixels, mode in (("measured", "evaluation"), ("covered", "training")):
        model = experiment.model.make(nnx.Rngs(0), experiment.precision)
        before = np.asarray(model.proposal.encoder.low_norm.mean[...])
        objective = dataclasses.replace(experiment.reconstruction.objective, depth_pixels=pixels, proposal_mode=mode)
        losses[pixels], after = evaluate(model, objective, batch)
        assert (not np.array_equal(before, after)) == (mode == "training")
    assert losses["covered"]["depth"] != losses["measured"]["depth"]


@pytest.mark.slow
def test_the_metrics_threshold_changes_no_loss(experiment, batch):
    batch = dataclasses.replace(batch, occupancy=batch.occupancy.at[:, 2:5].set(True))
    results = []
    for logit in (-100.0, 100.0):
        model = experiment.model.make(nnx.Rngs(0), experiment.precision)
        objective = dataclasses.replace(experiment.proposal.objective, metric_logit=logit)
        results.append(objective.losses(model, None, batch, jax.random.key(0)))
    (losses, every), (same, none) = results
    assert losses["cross_entropy"] == same["cross_entropy"]
    np.testing.assert_allclose([every["recall"], every["iou"], none["recall"]], [1, 3 / 8, 0])
