"""What an evaluation measures on: which views, which sizes, which objects, and the two trivial baselines."""

import dataclasses
import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from einops import einsum
from jaxtyping import Array, Float, Int

from geolrm_jax.models.image_encoder import check_input_size
from geolrm_jax.scene import Cameras, Views

RING = tuple(range(24))  # the upper ring of the GObjaverse layout


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The choices behind every number of a report. The defaults are the paper's, in the GObjaverse layout."""

    targets: tuple[int, ...] = (3, 9, 15, 21)
    """Numbers of the views that are predicted and compared."""
    inputs: int = 6
    """How many views the network sees."""
    candidates: tuple[int, ...] = RING
    """Views that inputs are chosen from, less the targets and the duplicates; empty: all views."""
    duplicates: tuple[int, ...] = (24, 39)
    """Views that repeat another one, never inputs."""
    input_size: int = 504
    """Side of the input images in pixels, a multiple of 28."""
    render_size: int = 512
    """Side of the compared images in pixels."""
    max_anchors: int = 16_384
    """Anchors per object; of more occupied voxels a random subset is used."""
    surface_points: int = 16_000
    """Points sampled from each surface for Chamfer distance and F-score."""
    surface_scale: float = 2.0
    """Factor on all points before they are compared: the object cube becomes [-1, 1]^3."""
    surface_opacity: float = 0.5
    """Gaussians fainter than this are no surface."""
    fscore_thresholds: tuple[float, ...] = (0.2, 0.05, 0.02, 0.01)
    """Distances, after scaling, under which a point counts as matched; 0.2 is the paper's."""
    split: str = "test"
    """Split of the set whose objects are evaluated: "test", or another that the set has."""

    def __post_init__(self):
        check_input_size(self.input_size, self.input_size)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets: expected at least one view and none twice, got {self.targets}")
        if self.inputs < 1:
            raise ValueError(f"inputs: expected at least 1, got {self.inputs}")


def choose_inputs(protocol: Protocol, view_ids: Int[np.ndarray, "v"], cameras: Cameras) -> tuple[int, ...]:
    """Numbers of the input views, in farthest-point order on azimuth.

    The first is the lowest candidate; each next one is farthest, around the z axis, from its nearest predecessor, ties
    to the lowest number. The order does not depend on how many are asked for: fewer inputs are a prefix of more.

    Args:
      view_ids: numbers of the object's views.
      cameras: those views (V,).

    Raises:
      ValueError: if a target does not exist or too few other views are left.
    """
    row_of = {int(view): row for row, view in enumerate(view_ids)}
    absent = [view for view in protocol.targets if view not in row_of]
    if absent:
        raise ValueError(f"targets: views {absent} do not exist, the object has {sorted(row_of)}")
    excluded = {*protocol.targets, *protocol.duplicates}
    candidates = sorted((set(protocol.candidates) or set(row_of)) & set(row_of) - excluded)
    if len(candidates) < protocol.inputs:
        raise ValueError(f"inputs: {protocol.inputs} views asked for, {len(candidates)} are left beside the targets")
    rows = [row_of[view] for view in candidates]
    x, y, _ = np.moveaxis(np.asarray(cameras.world_from_camera, np.float64)[rows, :3, 3], -1, 0)
    azimuths = np.degrees(np.arctan2(y, x))
    apart = np.abs((azimuths[:, None] - azimuths + 180) % 360 - 180)
    apart = apart.round(3)  # float32 poses: what differs by rounding is a tie
    chosen = [0]
    while len(chosen) < protocol.inputs:
        nearest = apart[:, chosen].min(axis=1)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return tuple(candidates[index] for index in chosen)


def object_list_hash(ids: Iterable[str]) -> str:
    """SHA-256 of the ids, one per line: `sha256sum` of the list's file."""
    return hashlib.sha256("".join(f"{name}\n" for name in ids).encode()).hexdigest()


def white_baseline(targets: Views) -> Float[Array, "*batch h w 3"]:
    """The white picture: what a model that draws nothing scores."""
    return jnp.ones(targets.rgb.shape, jnp.float32)


def nearest_view_baseline(inputs: Views, targets: Views) -> Float[Array, "*batch h w 3"]:
    """For every target the input picture taken from the closest direction, on white, at the targets' size."""
    nearest = nearest_views(inputs, targets.cameras)
    pictures = jnp.take_along_axis(jnp.asarray(inputs.over(1.0)), nearest[..., None, None, None], axis=-4)
    resized = jax.image.resize(pictures, targets.rgb.shape, "linear", antialias=True)
    return jnp.clip(resized, 0.0, 1.0)


def nearest_views(inputs: Views, targets: Cameras) -> Int[Array, "*batch t"]:
    """Index of the valid input whose camera centre lies in the direction closest to each target's, from the origin."""
    cosine = einsum(_directions(targets), _directions(inputs.cameras), "... t c, ... v c -> ... t v")
    return jnp.argmax(jnp.where(jnp.asarray(inputs.valid)[..., None, :], cosine, -jnp.inf), axis=-1)


def _directions(cameras: Cameras) -> Float[Array, "*batch v 3"]:
    centers = jnp.asarray(cameras.world_from_camera)[..., :3, 3]
    return centers / jnp.linalg.norm(centers, axis=-1, keepdims=True)
