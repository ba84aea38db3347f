"""One mesh into one object of the GObjaverse layout: where the cameras stand, and what is written (extra `mesh`)."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from geolrm_jax.data.folder_writing import write_view
from geolrm_jax.data.mesh_files import UpAxis, read_mesh, used_vertices
from geolrm_jax.data.mesh_rendering import Light, MeshScene, Variant
from geolrm_jax.geometry.cameras import gobjaverse_rig
from geolrm_jax.scene import Cameras

RIG_VIEWS = 40
UNFINISHED = ".unfinished"
_REPEATS = {24: 0, 39: 27}  # views of the rig that repeat others
_SMALLEST_RADIUS = 1.4  # GObjaverse's
_FILLED = 0.95  # share of the frame's width that an object may span


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How meshes are rendered: all that decides the pictures but their noise."""

    size: int = 512
    """Height and width in pixels."""
    samples: int = 64
    """Per pixel; rounded up to a grid where it is no square."""
    views: tuple[int, ...] = tuple(range(RIG_VIEWS))
    """Numbers in the rig: 0-23 upper ring, 25 top, 26 bottom, 27-38 lower ring; 24 and 39 repeat 0 and 27."""
    light: Light = "studio"
    """See `mesh_rendering.MeshScene`."""
    up: UpAxis = "file"
    """Axis of the meshes that points up; see `mesh_files.read_mesh`."""
    fov: float = 39.6
    """Field of view in degrees."""

    def __post_init__(self):
        if self.size < 1 or self.samples < 1:
            raise ValueError(f"size and samples must be positive, got {self.size} and {self.samples}")
        if not self.views or len({*self.views}) != len(self.views) or not {*self.views} <= {*range(RIG_VIEWS)}:
            raise ValueError(f"views must be distinct numbers from 0 to {RIG_VIEWS - 1}, got {list(self.views)}")
        if not 1.0 <= self.fov <= 120.0:
            raise ValueError(f"fov must lie between 1 and 120 degrees, got {self.fov}")


def object_rig(points: Float[np.ndarray, "n 3"], *, size: int, fov: float) -> Cameras:
    """The GObjaverse rig (40,) as near as GObjaverse's (1.4) or as far as it takes to have all points in every frame.

    A point p is in the frame of a camera at r d if |p . right| and |p . down| are at most t (r - p . d), where t is the
    tangent of half the field of view, less a margin. That bounds r from below; the largest bound is the radius.
    """
    poses = gobjaverse_rig(size=size, radius=1.0, fov=fov).world_from_camera.astype(np.float64)
    t = _FILLED * np.tan(np.radians(0.5 * fov))
    radius = _SMALLEST_RADIUS
    for pose in poses:
        local = points @ pose[:3, :3]
        radius = max(radius, float((np.abs(local[:, :2]).max(axis=-1) / t - local[:, 2]).max()))
    return gobjaverse_rig(size=size, radius=radius, fov=fov)


def render_object(
    mesh: Path, out: Path, id: str, config: RenderConfig, variant: Variant, view_done: Callable[[], None]
) -> None:
    """Renders a mesh as `out/id`, which gets its name when all its views are written; nothing where it is there.

    Args:
      view_done: called after each view.

    Raises:
      ValueError, OSError: if the mesh cannot be used or the views not be written; nothing of them is left.
    """
    parts = read_mesh(mesh, config.up)
    rig = object_rig(used_vertices(parts), size=config.size, fov=config.fov)
    scene = MeshScene(
        parts,
        size=config.size,
        fov=np.radians(config.fov),
        samples=config.samples,
        light=config.light,
        variant=variant,
    )
    # Not an object's name, and no other process's: one that outlives a killed run cannot write into another's folder.
    stage = out / UNFINISHED / str(os.getpid())
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        repeated = {}
        for view in config.views:
            twin = _REPEATS.get(view, view)
            picture = repeated.get(twin) or scene.render(rig.world_from_camera[twin], seed=twin)
            if twin in _REPEATS.values():
                repeated[twin] = picture
            write_view(
                stage,
                view,
                **picture._asdict(),
                world_from_camera=rig.world_from_camera[view],
                intrinsics=rig.intrinsics[view],
            )
            view_done()
        (out / id).parent.mkdir(parents=True, exist_ok=True)
        if not (out / id).exists():
            stage.rename(out / id)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
