"""The networks: sizes, padding, masks, gradients, numbers of views."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.models.dinov2 import ViTConfig
from geolrm_jax.models.gaussian_decoder import GaussianDecoderConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.geolrm import GeoLRMConfig, ReconstructionConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.layers import SwiGLU, scan_blocks, stack
from geolrm_jax.models.proposal import ProposalConfig, dense_anchors, select_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Cameras, Views

ENCODER = ImageEncoderConfig(ViTConfig(width=24, depth=2, heads=2, pretrained_grid=3), channels=12)
TRANSFORMER = TransformerConfig(width=24, depth=2, heads=2, points=2)
CONFIG = GeoLRMConfig(
    ProposalConfig(ENCODER, TRANSFORMER, coarse_grid=3, fine_grid=6),
    ReconstructionConfig(ENCODER, TRANSFORMER, GaussianDecoderConfig(gaussians_per_anchor=2)),
)


def make_views(rng, count=3, height=56, width=28, scenes=2):
    rig = turntable(count, size=width)
    poses = np.broadcast_to(rig.world_from_camera, (scenes, count, 4, 4))
    intrinsics = np.broadcast_to(rig.intrinsics, (scenes, count, 3, 3))
    cameras = Cameras(jnp.array(poses), jnp.array(intrinsics), height, width)
    shape = (scenes, count, height, width)
    rgb = jnp.array(rng.uniform(size=(*shape, 3)), jnp.float32)
    return Views(cameras, rgb, jnp.ones(shape), jnp.ones(shape), jnp.ones(shape[:2], bool))


@pytest.fixture(scope="module")
def model():
    return CONFIG.make(nnx.Rngs(0), Precision())


def test_one_forward_pass_from_views_to_gaussians(model, rng):
    gaussians, logits = model(make_views(rng), max_anchors=20, key=jax.random.key(0))
    assert logits.shape == (2, 6, 6, 6)
    assert gaussians.means.shape == (2, 40, 3) and gaussians.colors.shape == (2, 40, 3)
    expected = np.minimum(np.asarray((logits > 0).sum((1, 2, 3))), 20) * 2
    np.testing.assert_array_equal(gaussians.mask.sum(-1), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gaussians))
    assert (np.asarray(gaussians.scales) < 0.02).all() and (np.asarray(gaussians.scales) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(gaussians.quats, axis=-1), 1, rtol=1e-5)


def without_view(views, index, **garbage):
    """`views` with one view marked absent and filled with garbage."""
    valid = views.valid.at[:, index].set(False)
    return dataclasses.replace(views, valid=valid, rgb=views.rgb.at[:, index].set(garbage.get("rgb", 0.3)))


@pytest.mark.parametrize("train", [False, True])
def test_padded_views_change_nothing(model, rng, train):
    views = make_views(rng, count=3)
    fewer = jax.tree.map(lambda x: x[:, :2], views)
    for garbage in (0.3, 17.0):
        padded = without_view(views, 2, rgb=garbage)
        # A copy each: in training, batch statistics are updated in place.
        logits = [nnx.clone(model).proposal(v, train=train) for v in (fewer, padded)]
        np.testing.assert_allclose(logits[1], logits[0], atol=2e-5)


def test_padded_anchors_change_nothing(model, rng):
    views = make_views(rng)
    logits = jnp.array(rng.normal(size=(2, 6, 6, 6)) - 1.0, jnp.float32)
    counts = np.asarray((logits > 0).sum((1, 2, 3)))
    few, many = (select_anchors(logits, n, jax.random.key(0)) for n in (int(counts.max()), int(counts.max()) + 9))
    many = dataclasses.replace(many, positions=jnp.where(many.mask[..., None], many.positions, 3.7))
    a, b = model.reconstruction(few, views), model.reconstruction(many, views)
    size = a.means.shape[1]
    for name in ("means", "scales", "colors", "opacities"):
        kept = np.asarray(a.mask)
        ours, theirs = np.asarray(getattr(a, name))[kept], np.asarray(getattr(b, name))[:, :size][kept]
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    np.testing.assert_array_equal(b.mask.sum(-1), a.mask.sum(-1))


def test_results_do_not_depend_on_the_order_of_views(model, rng):
    views = make_views(rng, count=4)
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[:, order], views)
    np.testing.assert_allclose(model.proposal(shuffled), model.proposal(views), atol=2e-5)


@pytest.mark.slow
def test_scenes_of_a_batch_are_independent(model, rng):
    views = make_views(rng)
    alone = jax.tree.map(lambda x: x[:1], views)
    np.testing.assert_allclose(model.proposal(views)[:1], model.proposal(alone), atol=2e-5)


def test_the_views_cameras_matter(model, rng):
    views = make_views(rng)
    poses = views.cameras.world_from_camera
    swapped = dataclasses.replace(views, cameras=dataclasses.replace(views.cameras, world_from_camera=poses[:, ::-1]))
    assert np.abs(model.proposal(swapped) - model.proposal(views)).max() > 1e-3


def test_input_size_must_be_a_multiple_of_28(model, rng):
    with pytest.raises(ValueError, match=r"multiple of 28.*42 x 28"):
        model.proposal(make_views(rng, height=42))


def test_anchor_selection(rng):
    logits = jnp.array(rng.normal(size=(3, 8, 8, 8)), jnp.float32).at[2].set(-1.0)
    occupied = np.asarray(logits > 0)
    every = select_anchors(logits, 400, jax.random.key(0))
    for scene in range(3):
        voxels = np.asarray(every.voxels[scene])[np.asarray(every.mask[scene])]
        np.testing.assert_array_equal(voxels, np.argwhere(occupied[scene]))  # all of them, in C order
        assert not np.asarray(every.mask[scene])[len(voxels) :].any()
    np.testing.assert_allclose(every.positions[0, 0], np.asarray(every.voxels[0, 0]) / 7 - 0.5, atol=1e-6)

    chosen = [select_anchors(logits, 100, jax.random.key(k)) for k in range(200)]
    times = np.zeros((8, 8, 8))
    for anchors in chosen:
        voxels = np.asarray(anchors.voxels[0])
        assert anchors.mask[0].all() and len(np.unique(voxels, axis=0)) == 100
        assert occupied[0][tuple(voxels.T)].all()
        times[tuple(voxels.T)] += 1
    share = times[occupied[0]] / 200
    expected = 100 / occupied[0].sum()
    # Binomial: five standard deviations, for every voxel.
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 200)


def test_dense_anchors_index_the_fine_grid():
    anchors = dense_anchors(16, 128, 2)
    assert anchors.positions.shape == (2, 4096, 3)
    np.testing.assert_array_equal(anchors.voxels[1, :16, 2], [i * 127 // 15 for i in range(16)])
    np.testing.assert_allclose(anchors.positions[0, [0, -1]], [[-0.5] * 3, [0.5] * 3])


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_only_theirs(model, rng):
    views = make_views(rng)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    # Offsets and logits start at zero, where no gradient passes them: away from there.
    params = jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.05, x.shape), x.dtype), nnx.to_pure_dict(params))
    stats = nnx.to_pure_dict(stats)
    direction = jnp.array(rng.normal(size=(2, 6, 6, 6)), jnp.float32)

    def through_proposal(params):
        return jnp.vdot(nnx.merge(graphdef, params, stats).proposal(views, train=True), direction)

    gradient = jax.grad(through_proposal)(params)
    for path, value in jax.tree_util.tree_leaves_with_path(gradient["proposal"]):
        unused = "mask_token" in jax.tree_util.keystr(path)  # DINOv2's own pre-training's
        assert (np.abs(value).max() > 0) != unused, jax.tree_util.keystr(path)
    assert all(not np.abs(value).max() for value in jax.tree.leaves(gradient["reconstruction"]))


def test_batch_statistics_are_torchs(model, rng):
    copy = nnx.clone(model)
    norm = copy.proposal.encoder.low_norm
    x = jnp.array(rng.normal(2.0, 3.0, (4, 5, 6, 12)), jnp.float32)
    y = norm(x, jnp.ones(4, bool), train=True)
    flat = np.asarray(x).reshape(-1, 12)
    np.testing.assert_allclose(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_changes_no_gradient(rng, remat):
    blocks = stack(lambda r: SwiGLU(8, rngs=r, precision=Precision()), 3, nnx.Rngs(0))
    structure, parameters = nnx.split(blocks)
    x = jnp.array(rng.normal(size=(2, 5, 8)), jnp.float32)

    def gradient(remat):
        def loss(parameters):
            return jnp.sum(scan_blocks(nnx.merge(structure, parameters), x, remat=remat) ** 2)

        return jax.grad(loss)(parameters)

    kept = jax.tree.map(np.asarray, gradient("none"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient(remat), kept)


def test_bfloat16_stays_close(rng):
    views = make_views(rng)
    full = CONFIG.make(nnx.Rngs(0), Precision()).proposal(views)
    half = CONFIG.make(nnx.Rngs(0), Precision("bfloat16")).proposal(views)
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


def test_the_papers_parameter_counts():
    shapes = nnx.eval_shape(lambda: GeoLRMConfig().make(nnx.Rngs(0), Precision()))
    counts = {
        name: sum(x.size for x in jax.tree.leaves(nnx.state(part, nnx.Param)))
        for name, part in (
            ("proposal", shapes.proposal),
            ("reconstruction", shapes.reconstruction),
            ("vit", shapes.proposal.encoder.vit),
            ("blocks", shapes.proposal.transformer.blocks),
            ("deep blocks", shapes.reconstruction.transformer.blocks),
        )
    }
    assert counts["vit"] == 86_580_480
    assert counts["blocks"] == 14_174_214
    assert counts["deep blocks"] == 136_925_200
    assert counts["proposal"] == 105_728_003
    assert counts["reconstruction"] == 228_828_301
