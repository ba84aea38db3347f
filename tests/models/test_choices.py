"""Every difference between paper, release and ours that the parity vectors do not decide: what each choice does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from geolrm_jax.geometry.cameras import camera_from_world, plucker, turntable
from geolrm_jax.geometry.voxels import released_indices
from geolrm_jax.models.deformable_attention import Features, look, ring_offsets
from geolrm_jax.models.dinov2 import ViTConfig
from geolrm_jax.models.gaussian_decoder import GaussianDecoderConfig
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.models.layers import dropout
from geolrm_jax.models.proposal import select_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Cameras, Views

SIZE = 28
ENCODER = ImageEncoderConfig(ViTConfig(width=12, depth=1, heads=2, pretrained_grid=2), channels=6)
TRANSFORMER = TransformerConfig(width=12, depth=2, heads=2, points=2)


def make_views(rng, count=2, shift=0.0):
    """One scene; the principal point is `shift` pixels right of the centre."""
    rig = turntable(count, size=SIZE)
    intrinsics = jnp.array(rig.intrinsics).at[..., 0, 2].add(shift)[None]
    cameras = Cameras(jnp.array(rig.world_from_camera)[None], intrinsics, SIZE, SIZE)
    ones = jnp.ones((1, count, SIZE, SIZE))
    rgb = jnp.array(rng.uniform(size=(*ones.shape, 3)), jnp.float32)
    return Views(cameras, rgb, ones, ones, jnp.ones((1, count), bool))


def make_anchors(rng, count=9):
    positions = jnp.array(rng.uniform(-0.4, 0.4, (1, count, 3)), jnp.float32)
    voxels = jnp.array(rng.integers(0, 16, positions.shape), jnp.int32)
    return Anchors(positions, voxels, jnp.ones((1, count), bool))


def make_transformer(**rules):
    config = dataclasses.replace(TRANSFORMER, **rules)
    return config.make(6, 2, nnx.Rngs(0), Precision())


def make_maps(rng):
    return tuple(jnp.array(rng.normal(size=(1, 2, n, n, 6)), jnp.float32) for n in (7, 4))


@pytest.mark.slow
@pytest.mark.parametrize("levels", [("low", "high"), ("low",), ("high",)])
def test_levels_of_the_encoder(rng, levels):
    encoder = dataclasses.replace(ENCODER, levels=levels).make(nnx.Rngs(0), Precision())
    assert [m.shape[2] for m in encoder(make_views(rng))] == [{"low": 7, "high": 4}[level] for level in levels]
    parts = {"low": {"low", "low_norm"}, "high": {"vit", "upsample", "high_norm"}}
    assert set(nnx.to_pure_dict(nnx.state(encoder, nnx.Param))) == set().union(*(parts[level] for level in levels))


def test_wrong_levels_are_refused():
    with pytest.raises(ValueError, match="levels must be"):
        dataclasses.replace(ENCODER, levels=("high", "low"))


def test_without_rays_the_low_level_does_not_see_the_camera(rng):
    encoder = dataclasses.replace(ENCODER, plucker=False).make(nnx.Rngs(0), Precision())
    here, there = make_views(rng), make_views(np.random.default_rng(0), shift=5.0)
    there = dataclasses.replace(there, rgb=here.rgb)
    np.testing.assert_array_equal(encoder(here)[0], encoder(there)[0])
    with_rays = ENCODER.make(nnx.Rngs(0), Precision())
    assert not np.allclose(with_rays(here)[0], with_rays(there)[0])


def test_ray_choices(rng):
    cameras = make_views(rng, shift=5.0).cameras
    unit, deep, centred = (
        np.asarray(plucker(cameras, *choice)) for choice in (("unit",), ("depth",), ("unit", "centred"))
    )
    np.testing.assert_allclose(np.linalg.norm(unit[..., :3], axis=-1), 1, rtol=1e-5)
    rotation = np.asarray(camera_from_world(cameras))[..., :3, :3]
    local = np.einsum("bvij,bvhwj->bvhwi", rotation, deep[..., :3])
    np.testing.assert_allclose(local[..., 2], 1, rtol=1e-5)
    np.testing.assert_allclose(deep / np.linalg.norm(deep[..., :3], axis=-1, keepdims=True), unit, atol=1e-5)
    np.testing.assert_allclose(centred, plucker(make_views(rng).cameras), atol=1e-6)


def test_mirrored_projection_is_blenders_flipped(rng):
    """u = 1 - (fx x / z + cx) along Blender's axes, where x keeps its sign and z turns."""
    views, anchors = make_views(rng, shift=5.0), make_anchors(rng)
    mirrored, plain = (look((), views, anchors, "visible", p).reference_points for p in ("mirrored", "camera"))
    pose = np.asarray(camera_from_world(views.cameras)) * np.array([1, -1, -1, 1.0])[:, None]
    local = np.einsum("bvij,bnj->bvni", pose[..., :3, :3], anchors.positions) + pose[..., None, :3, 3]
    k = np.asarray(views.cameras.intrinsics)[..., None, :, :] / SIZE
    u = 1 - (k[..., 0, 0] * local[..., 0] / local[..., 2] + k[..., 0, 2])
    np.testing.assert_allclose(mirrored[..., 0], u, atol=1e-5)
    np.testing.assert_array_equal(mirrored[..., 1], plain[..., 1])
    assert np.abs(mirrored - plain).max() > 0.3
    centred = make_views(rng)
    both = [look((), centred, anchors, "visible", p).reference_points for p in ("mirrored", "camera")]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_bfloat16_coordinates_are_rounded_at_every_operation(rng):
    """Against the same steps in NumPy with ml_dtypes; and the error that the paper's mixed precision met."""
    views, anchors = make_views(rng), make_anchors(rng)
    points = look((), views, anchors, coordinates="bfloat16").reference_points

    def r(x):
        return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)

    pose, k = r(camera_from_world(views.cameras)), r(views.cameras.intrinsics)[..., None, :, :]
    local = r(np.einsum("bvij,bnj->bvni", pose[..., :3, :3], r(anchors.positions)) + pose[..., None, :3, 3])
    xy = r(local[..., :2] / local[..., 2:])
    expected = r(r(k[..., [0, 1], [0, 1]] * xy + k[..., :2, 2]) / SIZE)
    np.testing.assert_allclose(points, expected, atol=2**-8)  # one rounding of a sum in another order
    assert np.mean(np.asarray(points) == expected) > 0.9
    np.testing.assert_array_equal(points, r(points))
    errors = np.abs(points - look((), views, anchors).reference_points) * 448
    assert 0.5 < errors.max() < 20


def test_view_mask(rng):
    views = make_views(rng)
    views = dataclasses.replace(views, valid=views.valid.at[0, 1].set(False))
    behind = 3.0 * views.cameras.world_from_camera[0, 0, :3, 3]
    anchors = make_anchors(rng)
    anchors = dataclasses.replace(anchors, positions=anchors.positions.at[0, 4].set(behind))
    masked, free = (look((), views, anchors, mask) for mask in ("visible", "none"))
    assert not masked.view_valid[0, 1].any() and masked.view_valid[0, 0].sum() == 8 and not masked.view_valid[0, 0, 4]
    assert free.view_valid.all() and np.isfinite(free.reference_points).all()


def test_without_points_maps_are_read_at_the_projection(rng):
    network = make_transformer(points=0)
    attention = jax.tree.map(lambda x: x[0], network.blocks).cross_attention
    assert set(nnx.to_pure_dict(nnx.state(attention, nnx.Param))) == {"value", "view_logit", "out"}
    maps, count = make_maps(rng), 5
    points = rng.uniform(0.2, 0.8, (1, 2, count, 2)).astype(np.float32)
    features = Features(maps, jnp.array(points), jnp.ones((1, 2, count), bool))
    ours = attention.sampled(jnp.array(rng.normal(size=(1, count, 12)), jnp.float32), features)
    theirs = 0.0
    for m in maps:
        values = np.asarray(attention.value(m))[0]
        at = (points[0, ..., ::-1] * m.shape[2] - 0.5).astype(np.float64)
        sampled = [
            [ndimage.map_coordinates(view[..., c], xy.T, order=1, mode="grid-constant") for c in range(12)]
            for view, xy in zip(values, at, strict=True)
        ]
        theirs += 0.5 * np.moveaxis(np.array(sampled), 1, 2)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


def test_residual_of_the_cross_attention(rng):
    maps, views, anchors = make_maps(rng), make_views(rng), make_anchors(rng)
    features, x = look(maps, views, anchors), jnp.array(rng.normal(size=(1, 9, 12)), jnp.float32)
    blocks = {
        residual: jax.tree.map(lambda p: p[0], make_transformer(cross_attention_residual=residual).blocks)
        for residual in ("stream", "normed")
    }
    for residual, block in blocks.items():
        after = x + block.self_attention(block.norm1(x), anchors)
        normed = block.norm2(after)
        h = (after if residual == "stream" else normed) + block.cross_attention(normed, anchors, features)
        np.testing.assert_allclose(block(x, anchors, features), h + block.mlp(block.norm3(h)), atol=1e-5)
    assert not np.allclose(*(block(x, anchors, features) for block in blocks.values()))


@pytest.mark.parametrize("index", ["voxel", "released", "none"])
def test_rope_index(rng, index):
    network = make_transformer(rope_index=index, rope_grid=16)
    anchors, maps, views = make_anchors(rng), make_maps(rng), make_views(rng)
    indices = network.config.rope_indices(anchors).voxels
    expected = released_indices(anchors.positions, 16, 0.5) if index == "released" else anchors.voxels
    np.testing.assert_array_equal(indices, expected)
    other = dataclasses.replace(anchors, voxels=jnp.flip(anchors.voxels, axis=1))
    same = np.allclose(network(anchors, views, maps), network(other, views, maps), atol=1e-6)
    assert same == (index != "voxel")


def test_rope_scale_belongs_to_the_released_rule():
    with pytest.raises(ValueError, match=r"rope_scale 1\.0 needs"):
        dataclasses.replace(TRANSFORMER, rope_scale=1.0)


def test_dropout_keeps_the_mean_and_needs_a_key(rng):
    x = jnp.ones((200, 200))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.02)
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("attention", ["tokens", "released_heads"])
def test_dropout_in_the_transformer(rng, attention):
    network = make_transformer(dropout=0.3, self_attention=attention)
    anchors, maps, views = make_anchors(rng), make_maps(rng), make_views(rng)
    plain = make_transformer(self_attention=attention)(anchors, views, maps)
    np.testing.assert_array_equal(network(anchors, views, maps), plain)
    once, again, other = (network(anchors, views, maps, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, other) and not np.allclose(once, plain)


def test_padding_at_the_origin(rng):
    logits = jnp.full((1, 8, 8, 8), -1.0).at[0, 1:3, 2, 5].set(1.0)
    anchors = select_anchors(logits, 5, jax.random.key(0), "origin")
    assert anchors.mask.all()
    np.testing.assert_array_equal(anchors.positions[0, 2:], 0.0)
    np.testing.assert_array_equal(anchors.voxels[0, 2:], released_indices(jnp.zeros((3, 3)), 8, 0.5))
    masked = select_anchors(logits, 5, jax.random.key(0))
    np.testing.assert_array_equal(masked.mask[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(anchors.positions[0, :2], masked.positions[0, :2])


@pytest.mark.parametrize("offset, low", [("one_sided", 0.0), ("symmetric", -0.2)])
def test_offsets_of_the_decoder(rng, offset, low):
    decoder = GaussianDecoderConfig(50, offset=offset).make(12, nnx.Rngs(0), Precision())
    decoder.out.kernel[...] = 30.0 * decoder.out.kernel[...]
    anchors = make_anchors(rng)
    means = decoder(jnp.array(rng.normal(size=(1, 9, 12)) * 20, jnp.float32), anchors).means
    away = np.asarray(means.reshape(1, 9, 50, 3) - anchors.positions[:, :, None])
    np.testing.assert_allclose([away.min(), away.max()], [low, 0.2], atol=1e-3)


def test_initial_offsets_are_the_ring_of_deformable_detr():
    ring = ring_offsets(8, 2, 4).reshape(8, 2, 4, 2)
    np.testing.assert_allclose(np.abs(ring).max(-1), np.broadcast_to(np.arange(1, 5), (8, 2, 4)), rtol=1e-6)
    np.testing.assert_allclose(np.arctan2(ring[1, 0, :, 1], ring[1, 0, :, 0]), np.pi / 4, rtol=1e-5)


def test_a_padded_view_without_a_camera_stays_finite(rng):
    views, anchors = make_views(rng), make_anchors(rng)
    cameras = dataclasses.replace(views.cameras, world_from_camera=views.cameras.world_from_camera.at[0, 1].set(0.0))
    views = dataclasses.replace(views, cameras=cameras, valid=views.valid.at[0, 1].set(False))
    for mask in ("visible", "none"):
        assert np.isfinite(make_transformer(view_mask=mask)(anchors, views, make_maps(rng))).all()


def test_released_heads_have_float32_scores(rng):
    """The bfloat16 model's scores, and what is normalised, are no coarser than float32."""
    network = dataclasses.replace(TRANSFORMER, self_attention="released_heads").make(
        6, 2, nnx.Rngs(0), Precision("bfloat16")
    )
    block = jax.tree.map(lambda x: x[0], network.blocks)
    q = jnp.array(rng.normal(size=(1, 9, 2, 6)), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda q: block.self_attention.mix(q, q, q, make_anchors(rng), None))(q)
    exponentials = [e for e in traced.eqns if e.primitive.name == "exp"]
    dots = [e for e in traced.eqns if e.primitive.name == "dot_general"]
    assert exponentials and all(e.outvars[0].aval.dtype == jnp.float32 for e in exponentials)
    assert dots[0].outvars[0].aval.dtype == jnp.float32
