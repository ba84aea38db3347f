"""The convolutions of VGG16 (Simonyan and Zisserman 2015, configuration D) with its five taps."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from geolrm_jax.precision import Precision

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
WIDTHS = tuple(block[-1] for block in BLOCKS)
SMALLEST_IMAGE = 2 ** (len(BLOCKS) - 1)

Taps = tuple[Float[Array, "..."], ...]


class VGG16(nnx.Module):
    """Five blocks of 3x3 convolutions and ReLU, with 2x2 max pooling between them, in the compute dtype.

    For a gradient only the images and the five taps are kept; what lies between them is computed again.
    """

    def __init__(self, *, rngs: nnx.Rngs, precision: Precision):
        inputs, blocks = 3, []
        for block in BLOCKS:
            convolutions = []
            for width in block:
                convolution = nnx.Conv(
                    inputs,
                    width,
                    (3, 3),
                    padding=1,
                    dtype=precision.dtype,
                    precision=precision.products,
                    rngs=rngs,
                )
                convolutions.append(convolution)
                inputs = width
            blocks.append(nnx.List(convolutions))
        self.blocks = nnx.List(blocks)

    def __call__(self, images: Float[Array, "*batch h w 3"]) -> Taps:
        """The last activation of each block: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

        Args:
          images: normalised as the weights expect; an odd last row or column is lost in pooling.

        Returns:
          (..., H / 2^l, W / 2^l, width) for blocks l = 0 to 4.

        Raises:
          ValueError: if nothing would be left of the image in the last block.
        """
        height, width = images.shape[-3:-1]
        if min(height, width) < SMALLEST_IMAGE:
            raise ValueError(f"VGG16 needs images of at least {SMALLEST_IMAGE} pixels a side, got {height}x{width}")
        taps = []
        for number, block in enumerate(self.blocks):
            taps.append(_block(block, taps[-1] if taps else images, number > 0))
        return tuple(taps)


@functools.partial(jax.checkpoint, static_argnums=2)
def _block(
    convolutions: Sequence[nnx.Conv], x: Float[Array, "*batch h w c"], pool: bool
) -> Float[Array, "*batch h2 w2 d"]:
    if pool:
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    for convolution in convolutions:
        x = nnx.relu(convolution(x))
    return x
