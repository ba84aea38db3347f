"""Parts of the geometry-aware transformer against the released program's tensors."""

import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.models.deformable_attention import Features
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.scene import Anchors
from kernels_pallas.deformable_attention import deformable_attention

TOLERANCE = 1e-5  # of the tensor's largest value


def levels(value, shapes):
    """The released layout (batch, all cells, channels) as one map per level."""
    ends = np.cumsum([h * w for h, w in shapes])[:-1]
    parts = np.split(value, ends, axis=-2)
    return tuple(jnp.array(p.reshape(*p.shape[:-2], h, w, -1)) for p, (h, w) in zip(parts, shapes, strict=True))


def first_block(released, **rules):
    return released.layer(released.network("ser", **rules).transformer.blocks, 0)


def test_rope(released):
    x, voxels = released.vectors["rope/in"], released.vectors["rope/idx"]
    ours = rope3d(jnp.array(x), jnp.array(voxels, jnp.int32))
    released.close(ours, released.vectors["rope/out"], TOLERANCE)


@pytest.mark.parametrize(
    "attention, suffix, turned",
    [
        ("tokens", "flash_fp32", True),
        ("released_heads", "headaxis_fp32", True),
        ("released_heads", "headaxis_fp32_idx0", False),
    ],
)
def test_self_attention(released, attention, suffix, turned):
    x, voxels = jnp.array(released.vectors["sa/in"]), jnp.array(released.vectors["sa/idx"], jnp.int32)
    anchors = Anchors(jnp.zeros(voxels.shape), voxels * turned, jnp.ones(voxels.shape[:2], bool))
    ours = first_block(released, self_attention=attention).self_attention(x, anchors)
    released.close(ours, released.vectors[f"sa/out_{suffix}"], TOLERANCE)


def test_deformable_sampling(released):
    vectors = released.vectors
    value, weights = vectors["msda/value"], jnp.array(vectors["msda/attn"])
    heads, channels = value.shape[-2:]
    maps = levels(value.reshape(*value.shape[:2], -1), vectors["msda/spatial_shapes"])
    maps = tuple(m.reshape(*m.shape[:3], heads, channels) for m in maps)
    out = deformable_attention(maps, jnp.array(vectors["msda/loc"]), weights)
    released.close(out.reshape(*out.shape[:2], -1), vectors["msda/out"], TOLERANCE)


def test_deformable_cross_attention(released):
    vectors, module = released.vectors, first_block(released).cross_attention
    query, reference = jnp.array(vectors["dca/query"]), jnp.array(vectors["dca/ref"])
    maps = levels(vectors["dca/value"], vectors["dca/spatial_shapes"])
    features = Features(maps, reference, jnp.ones(reference.shape[:3], bool))
    voxels = jnp.zeros((*query.shape[:2], 3), jnp.int32)
    anchors = Anchors(voxels.astype(jnp.float32), voxels, jnp.ones(query.shape[:2], bool))
    sampled = np.asarray(module.sampled(query, features))
    released.close(sampled.reshape(-1, *sampled.shape[2:]), vectors["dca/msda_out"], TOLERANCE)
    released.close(module.view_logit(jnp.array(sampled)), vectors["dca/view_logits"], TOLERANCE)
    # The released module adds its own residual, the query.
    released.close(module(query, anchors, features) + query, vectors["dca/out"], TOLERANCE)
