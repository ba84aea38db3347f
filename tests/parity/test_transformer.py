"""Parts of the geometry-aware transformer against the released model's tensors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.models.attention import SelfAttention
from geolrm_jax.models.deformable_attention import DeformableCrossAttention, Features, ring_offsets
from geolrm_jax.models.dinov2 import interpolate_positions
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors
from kernels_pallas.deformable_attention import deformable_attention

LAYER = "w/serializer.transformer.layers.0."


@pytest.fixture(scope="module")
def vectors(parity):
    return np.load(parity / "geolrm_released.npz")


@pytest.fixture(scope="module")
def sizes(parity):
    return json.loads((parity / "geolrm_released.json").read_text())["config"]


def close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def levels(value, shapes, heads):
    """The released layout (batch, all cells, channels) as one map per level."""
    ends = np.cumsum([h * w for h, w in shapes])[:-1]
    parts = np.split(value, ends, axis=-2)
    return tuple(jnp.array(p.reshape(*p.shape[:-2], h, w, -1)) for p, (h, w) in zip(parts, shapes, strict=True))


def test_rope(vectors):
    x, voxels = jnp.array(vectors["rope/in"]), jnp.array(vectors["rope/idx"], jnp.int32)
    close(rope3d(x, voxels), vectors["rope/out"])


def test_self_attention_among_tokens(vectors, sizes):
    x, voxels = jnp.array(vectors["sa/in"]), jnp.array(vectors["sa/idx"], jnp.int32)
    module = SelfAttention(x.shape[-1], sizes["ser"]["transformer_heads"], rngs=nnx.Rngs(0), precision=Precision())
    for ours, theirs in (("query", "wq"), ("key", "wk"), ("value", "wv"), ("out", "wo")):
        getattr(module, ours).kernel[...] = vectors[f"{LAYER}self_attention.{theirs}.weight"].T
    anchors = Anchors(jnp.zeros(voxels.shape), voxels, jnp.ones(voxels.shape[:2], bool))
    close(module(x, anchors), vectors["sa/out_flash_fp32"])


def test_deformable_sampling(vectors):
    value, weights = vectors["msda/value"], jnp.array(vectors["msda/attn"])
    heads, channels = value.shape[-2:]
    flat = value.reshape(*value.shape[:2], -1)
    maps = tuple(m.reshape(*m.shape[:3], heads, channels) for m in levels(flat, vectors["msda/spatial_shapes"], heads))
    out = deformable_attention(maps, jnp.array(vectors["msda/loc"]), weights)
    close(out.reshape(*out.shape[:2], -1), vectors["msda/out"])


def test_deformable_cross_attention(vectors, sizes):
    config, query = sizes["ser"], jnp.array(vectors["dca/query"])
    maps = levels(vectors["dca/value"], vectors["dca/spatial_shapes"], config["transformer_heads"])
    module = DeformableCrossAttention(
        query.shape[-1],
        config["transformer_heads"],
        maps[0].shape[-1],
        len(maps),
        config["num_deform_points"],
        rngs=nnx.Rngs(0),
        precision=Precision(),
    )
    names = {
        "offsets": "deformable_attention.sampling_offsets",
        "logits": "deformable_attention.attention_weights",
        "value": "deformable_attention.value_proj",
        "view_logit": "cross_view_weight",
        "out": "output_proj",
    }
    for ours, theirs in names.items():
        getattr(module, ours).kernel[...] = vectors[f"{LAYER}cross_attention.{theirs}.weight"].T
        getattr(module, ours).bias[...] = vectors[f"{LAYER}cross_attention.{theirs}.bias"]
    reference = jnp.array(vectors["dca/ref"])
    features = Features(maps, reference, jnp.ones(reference.shape[:3], bool))
    anchors = Anchors(
        jnp.zeros((*query.shape[:2], 3)), jnp.zeros((*query.shape[:2], 3), jnp.int32), jnp.ones(query.shape[:2], bool)
    )
    # The released module adds its own residual, the query.
    close(module(query, anchors, features) + query, vectors["dca/out"])


def test_initial_offsets_are_the_ring_of_deformable_detr(vectors, sizes):
    # The released file's weights are trained or perturbed; the ring is checked by its own geometry.
    ring = ring_offsets(8, 2, 4).reshape(8, 2, 4, 2)
    np.testing.assert_allclose(np.abs(ring).max(-1), np.broadcast_to(np.arange(1, 5), (8, 2, 4)), rtol=1e-6)
    np.testing.assert_allclose(np.arctan2(ring[1, 0, :, 1], ring[1, 0, :, 0]), np.pi / 4, rtol=1e-5)


def test_position_interpolation(vectors, sizes):
    positions = jnp.array(vectors["w/serializer.encoder.model.embeddings.position_embeddings"][0])
    patch = sizes["dino"]["patch_size"]
    rows, columns = sizes["H"] // patch, sizes["W"] // patch
    for rule, key in (("scale_factor", "enc/pos_embed_tf4341"), ("size", "enc/pos_embed_size_semantics")):
        ours = interpolate_positions(positions, rows, columns, rule)
        np.testing.assert_allclose(ours, vectors[key][0], atol=2e-5)
    rows, columns = (side // patch for side in sizes["nonsq"])
    ours = interpolate_positions(positions, rows, columns, "scale_factor")
    np.testing.assert_allclose(ours, vectors["nonsq/pos_embed_tf4341"][0], atol=2e-5)
