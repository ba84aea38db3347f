"""Public functions: shapes are checked here and an implementation is chosen."""

import math
from typing import Literal

from jaxtyping import Array, Bool, Float

from kernels_pallas.deformable_attention import reference

Implementation = Literal["auto", "xla"]


def deformable_attention(
    features: tuple[Float[Array, "..."], ...],
    locations: Float[Array, "..."],
    weights: Float[Array, "..."],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "..."]:
    """Weighted bilinear samples of multi-level feature maps (Deformable DETR, Eq. 2, one view per leading index).

    Args:
      features: one (..., H_l, W_l, K, C) map per level; bfloat16 or float32.
      locations: (..., N, K, L, P, 2) x, y in [0, 1]; u reads at u · W_l - 0.5, outside reads zero.
      weights: (..., N, K, L, P), normalised by the caller.
      implementation: `"xla"`, which `"auto"` chooses everywhere.

    Returns:
      (..., N, K, C) in the features' dtype, accumulated in at least float32.

    Raises:
      ValueError: if levels, heads or leading axes disagree; the message names both shapes.
    """
    _check(implementation)
    lead, (count, heads, levels, points) = weights.shape[:-4], weights.shape[-4:]
    if locations.shape != (*weights.shape, 2):
        raise ValueError(f"locations {locations.shape} must be those of weights {weights.shape} with a last axis of 2")
    if len(features) != levels:
        raise ValueError(f"{len(features)} feature maps for weights {weights.shape} of {levels} levels")
    for maps in features:
        if maps.shape[:-4] != lead or maps.shape[-2] != heads:
            raise ValueError(f"features {maps.shape} do not match weights {weights.shape} in leading axes and heads")
    size = math.prod(lead)
    out = reference.deformable_attention(
        tuple(m.reshape(size, *m.shape[-4:]) for m in features),
        locations.reshape(size, count, heads, levels, points, 2),
        weights.reshape(size, count, heads, levels, points),
    )
    return out.reshape(*lead, count, heads, out.shape[-1])


def multiview_deformable_attention(
    features: tuple[Float[Array, "b v _h_l _w_l k c"], ...],
    reference_points: Float[Array, "b v n 2"],
    offsets: Float[Array, "b n k l p 2"],
    logits: Float[Array, "b n k l p"],
    view_valid: Bool[Array, "b v n"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b v n k c"]:
    """Deformable attention of N queries into all views, with offsets and logits that do not depend on the view.

    Args:
      features: one map per level; bfloat16 or float32.
      reference_points: x, y of each query in each view, as fractions of the image.
      offsets: from the reference point, in cells of each level's map.
      logits: softmax over levels and points, per head.
      view_valid: where False the result is zero and no gradient flows, whatever the reference point holds.
      implementation: `"xla"`, which `"auto"` chooses everywhere.

    Returns:
      Samples per view in the features' dtype, accumulated in at least float32.

    Raises:
      ValueError: if levels, heads, queries or views disagree; the message names both shapes.
    """
    _check(implementation)
    batch, views, count = view_valid.shape
    heads, levels = logits.shape[2:4]
    expected = {
        "reference_points": (reference_points.shape, (batch, views, count, 2)),
        "offsets": (offsets.shape, (*logits.shape, 2)),
        "logits": (logits.shape[:2], (batch, count)),
        "features": (tuple(m.shape[:2] + m.shape[4:5] for m in features), ((batch, views, heads),) * levels),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ValueError(
                f"{name}: expected {wanted}, got {got} (view_valid {view_valid.shape}, logits {logits.shape})"
            )
    return reference.multiview_deformable_attention(features, reference_points, offsets, logits, view_valid)


def _check(implementation: str) -> None:
    if implementation not in ("auto", "xla"):
        raise ValueError(f"implementation must be 'auto' or 'xla', got {implementation!r}")
