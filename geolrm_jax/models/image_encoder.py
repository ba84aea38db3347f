"""The image encoder (paper, Sec. 3.2): DINOv2 features and a convolution over colours and Plücker rays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.geometry.cameras import plucker
from geolrm_jax.models.dinov2 import PATCH, ViTConfig
from geolrm_jax.models.layers import BatchNorm, torch_default
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Views

INPUT_MULTIPLE = 2 * PATCH  # the ViT needs multiples of 14, the stride-4 convolution multiples of 4
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """The two feature levels of every view."""

    vit: ViTConfig = ViTConfig()
    channels: int = 384
    """Channels of both levels."""

    def make(self, rngs: nnx.Rngs, precision: Precision) -> "ImageEncoder":
        """The module, with fresh parameters."""
        return ImageEncoder(self, rngs=rngs, precision=precision)


class ImageEncoder(nnx.Module):
    """Posed images in, one map per level out: low (H/4, W/4) and high (H/7, W/7), in this order."""

    levels = 2

    def __init__(self, config: ImageEncoderConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.channels = config.channels
        self.vit = config.vit.make(rngs, precision)
        self.upsample = nnx.ConvTranspose(
            config.vit.width,
            config.channels,
            (4, 4),
            (2, 2),
            padding="SAME",
            use_bias=False,
            # torch takes the fan-in of a transposed convolution from its output channels.
            kernel_init=jax.nn.initializers.variance_scaling(1.0 / 3.0, "fan_out", "uniform"),
            dtype=precision.dtype,
            precision=precision.products,
            rngs=rngs,
        )
        self.low = nnx.Conv(
            9,
            config.channels,
            (4, 4),
            (4, 4),
            padding="VALID",
            use_bias=False,
            kernel_init=torch_default,
            dtype=precision.dtype,
            precision=precision.products,
            rngs=rngs,
        )
        self.high_norm = BatchNorm(config.channels, rngs=rngs)
        self.low_norm = BatchNorm(config.channels, rngs=rngs)

    def __call__(self, views: Views, *, train: bool = False) -> tuple[Float[Array, "b v _h_l _w_l c"], ...]:
        """Feature maps of (B, V) views composited on white; `train` uses and updates batch statistics.

        Raises:
          ValueError: if the images' height or width is no multiple of 28.
        """
        check_input_size(views.cameras.height, views.cameras.width)
        scenes = views.rgb.shape[0]
        images = (views.over(1.0) - _MEAN) / _STD
        flat = rearrange(images, "b v h w c -> (b v) h w c")
        valid = rearrange(views.valid, "b v -> (b v)")
        low = jnp.concatenate([images, plucker(views.cameras)], axis=-1)
        low = self.low_norm(self.low(rearrange(low, "b v h w c -> (b v) h w c")), valid, train=train)
        high = self.high_norm(self.upsample(self.vit(flat)), valid, train=train)
        return tuple(rearrange(m, "(b v) h w c -> b v h w c", b=scenes) for m in (low, high))


def check_input_size(height: int, width: int) -> None:
    """Raises a ValueError unless both sides are multiples of 28."""
    if min(height, width) <= 0 or height % INPUT_MULTIPLE or width % INPUT_MULTIPLE:
        raise ValueError(
            f"input_size must be a positive multiple of {INPUT_MULTIPLE} on both sides, got {height} x {width}"
        )
