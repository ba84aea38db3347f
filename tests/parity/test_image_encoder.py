"""Rays, images and the image encoders against the released program's."""

import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.geometry.cameras import plucker
from geolrm_jax.models.dinov2 import interpolate_positions
from geolrm_jax.models.image_encoder import normalised

TOLERANCE = 2e-5  # absolute


def channel_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def test_rays(released):
    vectors = released.vectors
    rays = plucker(released.views.cameras, "depth", "centred")
    theirs = vectors["enc/ray_embedding"].reshape(
        *vectors["in/images"].shape[:2], *vectors["enc/ray_embedding"].shape[1:]
    )
    np.testing.assert_allclose(np.moveaxis(rays, -1, 2), theirs, atol=TOLERANCE)
    odd = released.odd_views
    theirs = vectors["nonsq/ray_embedding"].reshape(*odd.valid.shape, 6, *odd.alpha.shape[2:])
    np.testing.assert_allclose(np.moveaxis(plucker(odd.cameras, "depth", "centred"), -1, 2), theirs, atol=TOLERANCE)


def test_normalised_images(released):
    ours = normalised(released.views).reshape(-1, *released.views.rgb.shape[2:])
    np.testing.assert_allclose(channel_first(ours), released.vectors["enc/normalised_image"], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["ser", "gen"])
def test_encoder(released, name):
    vectors, encoder = released.vectors, released.network(name).encoder
    images = jnp.array(np.moveaxis(vectors["enc/normalised_image"], 1, -1))
    vit = encoder.vit
    tokens = vit.embed(images)
    np.testing.assert_allclose(tokens, vectors[f"{name}/enc/dino_embeddings"], atol=TOLERANCE)
    depth, x = released.config.proposal.encoder.vit.depth, tokens
    for layer in range(depth):
        x = released.layer(vit.blocks, layer)(x)
        np.testing.assert_allclose(x, vectors[f"{name}/enc/dino_layer{layer}"], atol=TOLERANCE)
    features = vit(images)
    np.testing.assert_allclose(channel_first(features), vectors[f"{name}/enc/dino_feature_map"], atol=TOLERANCE)
    raw = encoder.upsample(features)
    np.testing.assert_allclose(channel_first(raw), vectors[f"{name}/enc/deconv_raw"], atol=TOLERANCE)
    maps = [np.asarray(m).reshape(-1, *m.shape[2:]) for m in encoder(released.views)]
    for ours, level in zip(maps, ("low", "high"), strict=True):
        np.testing.assert_allclose(channel_first(ours), vectors[f"{name}/enc/{level}_level_feature"], atol=TOLERANCE)
    if name == "ser":
        np.testing.assert_allclose(
            released.hierarchy(encoder(released.views)), vectors["ser/enc/hier_feature"], atol=TOLERANCE
        )


def test_images_that_are_not_square(released):
    vectors = released.vectors
    odd = released.odd_views
    features = released.model().proposal.encoder.vit(normalised(odd).reshape(-1, *odd.rgb.shape[2:]))
    np.testing.assert_allclose(channel_first(features), vectors["nonsq/dino_feature_map_fixed"], atol=TOLERANCE)


def test_batch_statistics_after_a_step(released):
    vectors, encoder = released.vectors, released.model().proposal.encoder
    maps = released.hierarchy(encoder(released.views, train=True))
    np.testing.assert_allclose(maps[:, :1], vectors["bn_train/hier_feature_view0"], atol=TOLERANCE)
    for theirs, norm in (("deconv.1", encoder.high_norm), ("low_level_encoder.1", encoder.low_norm)):
        for name, value in (("running_mean", norm.mean), ("running_var", norm.var)):
            np.testing.assert_allclose(value[...], vectors[f"bn_train/{theirs}.{name}"], rtol=1e-5, atol=1e-6)
        assert norm.count[...] == vectors[f"bn_train/{theirs}.num_batches_tracked"]


def test_position_interpolation(released):
    vectors, sizes = released.vectors, released.sizes
    positions = jnp.array(vectors["w/serializer.encoder.model.embeddings.position_embeddings"][0])
    patch = sizes["dino"]["patch_size"]
    rows, columns = sizes["H"] // patch, sizes["W"] // patch
    for rule, key in (("scale_factor", "enc/pos_embed_tf4341"), ("size", "enc/pos_embed_size_semantics")):
        ours = interpolate_positions(positions, rows, columns, rule)
        np.testing.assert_allclose(ours, vectors[key][0], atol=2e-5)
    rows, columns = (side // patch for side in sizes["nonsq"])
    ours = interpolate_positions(positions, rows, columns, "scale_factor")
    np.testing.assert_allclose(ours, vectors["nonsq/pos_embed_tf4341"][0], atol=2e-5)
