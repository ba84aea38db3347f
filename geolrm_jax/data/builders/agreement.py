"""Whether what a source says of an object can be true: depth against alpha, against the cube, and view against view.

A camera whose axes were swapped may still be a rotation, and a picture that was transposed still a picture: only the
object's other views tell.
"""

import numpy as np
from jaxtyping import Float

from geolrm_jax.data.occupancy import drop_edges, project_points, unproject_pixels
from geolrm_jax.data.record import PosedImages
from geolrm_jax.scene import Cameras

# Shares above which an object is refused. 16 real objects stay below 0.01 in the last, one wrong view of 38 is above.
OUTSIDE_CUBE, MASKS_DIFFER, VIEWS_DIFFER = 0.05, 0.25, 0.1
MARGIN = 0.05  # cube sides that points may lie outside the cube, for rounding
TOLERANCE = 0.02  # cube sides, beside a pixel's width, by which a view may see past another's point
SAMPLES = 256  # points of each view that the others are asked about


def check_agreement(views: PosedImages, origin: str) -> None:
    """Raises a ValueError that names `origin` and the view unless the views agree.

    Refused are: a view that has more than a quarter of its object in depth but not in alpha, or the other way round;
    one with more than 5 % of its points outside the cube; one whose points the others see through, or that sees
    through theirs, in more than 10 % of cases on the average.
    """
    for i, view in enumerate(views.view_ids.tolist()):
        present, solid, clear = views.depth[i] > 0.0, views.rgba[i, ..., 3] == 255, views.rgba[i, ..., 3] == 0
        share = np.mean((present & clear) | (~present & solid)) / max(np.mean(present | solid), 1e-9)
        if share > MASKS_DIFFER:
            raise ValueError(f"{origin}, view {view}: depth and alpha differ in {share:.0%} of the object's pixels")
    depth = drop_edges(views.depth, views.cameras)
    samples = [_sample(depth[i], views.cameras, i) for i in range(len(depth))]
    for points, view in zip(samples, views.view_ids.tolist(), strict=True):
        outside = np.mean(np.abs(points).max(axis=-1) > 0.5 + MARGIN) if len(points) else 0.0
        if outside > OUTSIDE_CUBE:
            raise ValueError(f"{origin}, view {view}: {outside:.0%} of its points lie outside the cube [-0.5, 0.5]^3")
    shares = contradictions(views.depth, views.cameras, samples)
    if len(shares) > 1:
        worst = shares.sum(axis=0) + shares.sum(axis=1)
        i, count = int(worst.argmax()), len(shares) - 1
        share = max(shares[i].sum(), shares[:, i].sum()) / count
        if share > VIEWS_DIFFER:
            raise ValueError(f"{origin}, view {views.view_ids[i]}: contradicts the other views in {share:.0%} of cases")


def _sample(depth: Float[np.ndarray, "h w"], cameras: Cameras, view: int) -> Float[np.ndarray, "n 3"]:
    """At most SAMPLES world points of a view, evenly spread over its pixels."""
    present = np.flatnonzero(depth)
    chosen = present[np.linspace(0, len(present) - 1, min(SAMPLES, len(present))).astype(int)]
    sparse = np.zeros(depth.size, depth.dtype)
    sparse[chosen] = depth.reshape(-1)[chosen]
    camera = Cameras(cameras.world_from_camera[[view]], cameras.intrinsics[[view]], cameras.height, cameras.width)
    return unproject_pixels(sparse.reshape(1, *depth.shape), camera)


def contradictions(
    depth: Float[np.ndarray, "v h w"], cameras: Cameras, samples: list[Float[np.ndarray, "_ 3"]]
) -> Float[np.ndarray, "v v"]:
    """Entry (i, j): the share of view i's points, as far as they are in view j's picture, that j sees through.

    Seen through is a point if all depths of the 3 x 3 pixels around it lie behind it, by more than TOLERANCE and a
    pixel's width, or none of them has a depth.
    """
    owner = np.repeat(np.arange(len(samples)), [len(points) for points in samples])
    points = np.concatenate(samples)
    shares = np.zeros((len(samples), len(samples)))
    for j in range(len(samples)):
        row, column, z = project_points(points, cameras, j)
        inside = (row >= 1) & (column >= 1) & (row < cameras.height - 1) & (column < cameras.width - 1)
        around = [depth[j, row[inside] + dy, column[inside] + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        nearest = np.min(np.where(np.array(around) > 0.0, around, np.inf), axis=0)
        through = nearest > z[inside] * (1.0 + 1.0 / cameras.intrinsics[j, 0, 0]) + TOLERANCE
        counts = np.bincount(owner[inside], minlength=len(samples))
        shares[:, j] = np.bincount(owner[inside], through, minlength=len(samples)) / np.maximum(counts, 1)
    np.fill_diagonal(shares, 0.0)
    return shares
