"""The image encoder (paper, Sec. 3.2): DINOv2 features and a convolution over colours and Plücker rays."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from geolrm_jax.geometry.cameras import RayIntrinsics, RayLength, plucker
from geolrm_jax.models.dinov2 import PATCH, ViTConfig
from geolrm_jax.models.layers import BatchNorm, torch_default
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Views
from kernels_pallas.mesh import CONTEXT, over_context

INPUT_MULTIPLE = 2 * PATCH  # the ViT needs multiples of 14, the stride-4 convolution multiples of 4
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """The two feature levels of every view."""

    vit: ViTConfig = ViTConfig()
    channels: int = 384
    """Channels of both levels."""
    levels: tuple[Literal["low", "high"], ...] = ("low", "high")
    """Feature levels, in this order; the ablations leave one out."""
    plucker: bool = True
    """The low level sees the rays beside the colours."""
    ray_length: RayLength = "unit"
    """Rays of unit length, or of unit camera z (released)."""
    ray_intrinsics: RayIntrinsics = "camera"
    """Rays of the camera, or of one with fx on both axes and a centred principal point (released)."""

    def __post_init__(self):
        if self.levels not in (("low", "high"), ("low",), ("high",)):
            raise ValueError(f"levels must be ('low', 'high'), ('low',) or ('high',), got {self.levels}")

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "ImageEncoder":
        """The module, with fresh parameters."""
        return ImageEncoder(self, rngs=rngs, precision=precision)


class ImageEncoder(nnx.Module):
    """Posed images in, one map per level out: low (H/4, W/4) and high (H/7, W/7), in this order."""

    def __init__(self, config: ImageEncoderConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.config = config
        common = dict(use_bias=False, dtype=precision.dtype, precision=precision.products, rngs=rngs)
        if "high" in config.levels:
            self.vit = config.vit.make(rngs, precision)
            self.upsample = nnx.ConvTranspose(
                config.vit.width,
                config.channels,
                (4, 4),
                (2, 2),
                padding="SAME",
                # torch takes the fan-in of a transposed convolution from its output channels.
                kernel_init=jax.nn.initializers.variance_scaling(1.0 / 3.0, "fan_out", "uniform"),
                **common,
            )
            self.high_norm = BatchNorm(config.channels, rngs=rngs)
        if "low" in config.levels:
            inputs = 9 if config.plucker else 3
            self.low = nnx.Conv(
                inputs, config.channels, (4, 4), (4, 4), padding="VALID", kernel_init=torch_default, **common
            )
            self.low_norm = BatchNorm(config.channels, rngs=rngs)

    def __call__(self, views: Views, *, train: bool = False) -> tuple[Float[Array, "b v _h_l _w_l c"], ...]:
        """Feature maps of (B, V) views composited on white; `train` uses and updates batch statistics.

        Raises:
          ValueError: if the images' height or width is no multiple of 28.
        """
        check_input_size(views.cameras.height, views.cameras.width)
        images = normalised(views)
        return tuple(getattr(self, f"{level}_level")(images, views, train) for level in self.config.levels)

    def low_level(self, images: Float[Array, "b v h w 3"], views: Views, train: bool) -> Float[Array, "b v _h4 _w4 c"]:
        """A convolution over colours and rays."""
        if self.config.plucker:
            rays = plucker(views.cameras, self.config.ray_length, self.config.ray_intrinsics)
            images = jnp.concatenate([images, rays], axis=-1)
        return self.low_norm(by_picture((self.low,), images), views.valid, train=train)

    def high_level(self, images: Float[Array, "b v h w 3"], views: Views, train: bool) -> Float[Array, "b v _h7 _w7 c"]:
        """DINOv2's patch tokens, twice as dense."""
        return self.high_norm(by_picture((self.vit, self.upsample), images), views.valid, train=train)


def by_picture(modules: tuple, images: Float[Array, "b v h w c"]) -> Float[Array, "b v _h _w _c"]:
    """Modules one after the other on every picture, on a mesh that splits views on the device that has it."""

    def local(modules, images):
        maps = rearrange(images, "b v h w c -> (b v) h w c")
        for module in modules:
            maps = module(maps)
        return rearrange(maps, "(b v) h w c -> b v h w c", b=images.shape[0])

    by_view = P(None, CONTEXT)
    return over_context(local, (modules, images), (P(), by_view), by_view)


def normalised(views: Views) -> Float[Array, "b v h w 3"]:
    """The pictures over white, with ImageNet's mean and deviation."""
    return (views.over(1.0) - _MEAN) / _STD


def check_input_size(height: int, width: int) -> None:
    """Raises a ValueError unless both sides are multiples of 28."""
    if min(height, width) <= 0 or height % INPUT_MULTIPLE or width % INPUT_MULTIPLE:
        raise ValueError(
            f"input_size must be a positive multiple of {INPUT_MULTIPLE} on both sides, got {height} x {width}"
        )
