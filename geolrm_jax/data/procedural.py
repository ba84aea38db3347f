"""The procedural source: objects from integers, rendered on whatever device there is. Nothing is downloaded."""

import dataclasses

import jax
import numpy as np

from geolrm_jax.data.procedural_shapes import random_object
from geolrm_jax.data.record import PosedImages
from geolrm_jax.data.sphere_tracing import render
from geolrm_jax.geometry.cameras import gobjaverse_rig
from geolrm_jax.scene import Cameras

SPLITS = ("train", "test")
OBJECT = 2  # purpose of random numbers, folded into the seed first; training has others


@dataclasses.dataclass(frozen=True)
class ProceduralSource:
    """Signed-distance objects with procedural textures, rendered by sphere tracing."""

    train_objects: int = 200
    """Objects to train on."""
    test_objects: int = 16
    """Objects kept for evaluation; no object is in both splits."""
    seed: int = 0
    """Another seed gives other objects."""
    size: int = 128
    """Height and width of the pictures, in pixels."""
    view_ids: tuple[int, ...] = tuple(range(24))
    """Views of the GObjaverse rig to render: 0-23 upper ring, 25 top, 26 bottom, 27-38 lower ring."""
    radius: float = 1.9
    """Distance of the cameras from the object's centre, in cube sides."""
    fov: float = 39.6
    """Field of view in degrees."""

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split: "procedural/SPLIT/NUMBER"."""
        count = {"train": self.train_objects, "test": self.test_objects}[split]
        return [f"procedural/{split}/{index}" for index in range(count)]

    def read(self, split: str, id: str) -> PosedImages:
        """Renders one object of `ids(split)`."""
        return render_views(object_key(self.seed, split, int(id.rsplit("/", 1)[1])), self.cameras(), self.view_ids)

    def cameras(self) -> Cameras:
        """The rig's cameras for `view_ids`."""
        rig, rows = gobjaverse_rig(size=self.size, radius=self.radius, fov=self.fov), list(self.view_ids)
        return Cameras(rig.world_from_camera[rows], rig.intrinsics[rows], rig.height, rig.width)


def object_key(seed: int, split: str, index: int) -> jax.Array:
    """The key of one object; numbers of the two splits interleave, so that they cannot meet."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), OBJECT), len(SPLITS) * index + SPLITS.index(split)
    )


def render_views(key: jax.Array, cameras: Cameras, view_ids: tuple[int, ...]) -> PosedImages:
    """The object of `key` seen by `cameras` (V,), colours rounded to 8 bits."""
    chunk, block = (256, 4096) if jax.default_backend() == "cpu" else (8192, 1 << 20)
    rgba, depth, _ = render(random_object(key), cameras, chunk=chunk, block=block)
    quantized = np.rint(np.asarray(rgba) * 255.0).astype(np.uint8)
    return PosedImages(np.array(view_ids, np.int32), quantized, np.asarray(depth), cameras)
