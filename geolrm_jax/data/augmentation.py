"""Random changes of an example's views that leave it a true picture of some object; off unless asked for.

The background is none of them: pictures travel premultiplied, and the objective lays targets over a random colour.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image

from geolrm_jax.scene import Cameras, Views

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is changed at random, by how much at most; 0 leaves it alone."""

    roll: float = 0.0
    """Degrees that each camera turns about its optical axis, to either side. What leaves the frame is lost and what
    enters it is empty: objects must lie within the circle that the frame holds."""
    color: float = 0.0
    """Relative change of brightness and of saturation, one draw for all views of an object."""

    def __post_init__(self):
        if not 0.0 <= self.roll <= 180.0:
            raise ValueError(f"augmentation.roll must lie between 0 and 180 degrees, got {self.roll}")
        if not 0.0 <= self.color < 1.0:
            raise ValueError(f"augmentation.color must be at least 0 and below 1, got {self.color}")

    def draw(self, views: int, rng: np.random.Generator) -> "Drawn":
        """One object's values, for its `views` views."""
        angles = np.radians(rng.uniform(-self.roll, self.roll, views))
        brightness, saturation = rng.uniform(1.0 - self.color, 1.0 + self.color, 2)
        return Drawn(angles if self.roll else None, color_matrix(brightness, saturation) if self.color else None)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Values drawn for one object; None changes nothing."""

    angles: Float[np.ndarray, "v"] | None
    colors: Float[np.ndarray, "3 3"] | None

    def __call__(self, views: Views) -> Views:
        """The views (V,), at any size, with NumPy leaves."""
        if self.colors is not None:
            # Straight colours are clipped to [0, 1], which is premultiplied colours to [0, alpha].
            views = dataclasses.replace(views, rgb=np.clip(views.rgb @ self.colors.T, 0.0, views.alpha[..., None]))
        return views if self.angles is None else roll(views, self.angles)


def color_matrix(brightness: float, saturation: float) -> Float[np.ndarray, "3 3"]:
    """The map of a colour c with luma l to brightness (l + saturation (c - l)); linear, so premultiplied colours may
    be mapped too."""
    grey = np.broadcast_to(_LUMA, (3, 3))
    return (brightness * (grey + saturation * (np.eye(3) - grey))).astype(np.float32)


def roll(views: Views, angles: Float[np.ndarray, "v"]) -> Views:
    """Views (V,) of cameras turned about their optical axes by `angles` radians, x towards y; depth is unchanged by it.

    Colours and coverage are interpolated bilinearly, depth is the nearest pixel's; outside the old frame all is empty.
    """
    cameras, (height, width) = views.cameras, views.alpha.shape[-2:]
    turns = np.broadcast_to(np.eye(4), (len(angles), 4, 4)).copy()
    turns[:, 0, 0] = turns[:, 1, 1] = np.cos(angles)
    turns[:, 0, 1], turns[:, 1, 0] = -np.sin(angles), np.sin(angles)
    poses = (cameras.world_from_camera @ turns).astype(np.float32)
    # A pixel p of the new camera shows what pixel K R K^-1 p of the old one showed.
    k = cameras.intrinsics.astype(np.float64)
    old_from_new = k @ turns[:, :3, :3] @ np.linalg.inv(k)

    def sample(image: np.ndarray, view: int, how: Image.Resampling) -> np.ndarray:
        values = tuple(old_from_new[view, :2].ravel())
        channel = Image.fromarray(np.ascontiguousarray(image, np.float32))
        return np.asarray(channel.transform((width, height), Image.Transform.AFFINE, values, how))

    rgb, alpha, depth = (np.empty_like(x) for x in (views.rgb, views.alpha, views.depth))
    for view in range(len(angles)):
        alpha[view] = sample(views.alpha[view], view, Image.Resampling.BILINEAR)
        depth[view] = sample(views.depth[view], view, Image.Resampling.NEAREST)
        for channel in range(3):
            rgb[view, ..., channel] = sample(views.rgb[view, ..., channel], view, Image.Resampling.BILINEAR)
    return Views(Cameras(poses, cameras.intrinsics, height, width), rgb, alpha, depth, views.valid)
