"""LPIPS (Zhang et al. 2018): distances of VGG16 activations, weighted as people judge similarity."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Bool, Float

from geolrm_jax.losses.photometric import mean_over_views
from geolrm_jax.models.vgg import BLOCKS, VGG16, WIDTHS, Taps
from geolrm_jax.precision import Precision, full
from geolrm_jax.scene import AnyArray

# ImageNet's mean and deviation, moved from [0, 1] to the range [-1, 1] and rounded as in the published metric.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
FLOAT32 = Precision()


class Lpips(nnx.Module):
    """The metric with its weights, which are never trained; images are (..., H, W, 3) in [-1, 1].

    The convolutions run in the compute dtype, normalisation and distances in at least float32.
    """

    def __init__(self, *, rngs: nnx.Rngs, precision: Precision):
        self.vgg = VGG16(rngs=rngs, precision=precision)
        self.heads = nnx.List([nnx.Param(jnp.full(width, 1.0 / width)) for width in WIDTHS])

    def features(self, images: Float[AnyArray, "*batch h w 3"]) -> Taps:
        """The five activations, each pixel's vector of unit length."""
        images = full(jnp.asarray(images))
        scaled = (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)
        return tuple(_unit(full(tap)) for tap in self.vgg(scaled))

    def target_features(self, images: Float[AnyArray, "*batch h w 3"]) -> Taps:
        """Features of the pictures compared with, without gradient; computed once, whatever is compared."""
        return jax.lax.stop_gradient(self.features(jax.lax.stop_gradient(images)))

    def distance(self, images: Float[AnyArray, "*batch h w 3"], target_features: Taps) -> Float[Array, "*batch"]:
        """LPIPS of every image: weighted squared differences (their Eq. 1), mean over pixels, sum over activations."""
        parts = zip(self.features(images), target_features, self.heads, strict=True)
        return sum(jnp.mean(jnp.sum(head[...] * (a - b) ** 2, axis=-1), axis=(-2, -1)) for a, b, head in parts)

    def between(
        self, images: Float[Array, "b v h w 3"], targets: Float[Array, "b v h w 3"], valid: Bool[Array, "b v"]
    ) -> Float[Array, ""]:
        """The loss term: mean LPIPS of valid views, for images in [0, 1]; no gradient to the targets."""
        return mean_over_views(self.distance(2.0 * images - 1.0, self.target_features(2.0 * targets - 1.0)), valid)


def _unit(x: Float[Array, "*batch h w c"]) -> Float[Array, "*batch h w c"]:
    """x / (|x| + 1e-10) over channels. Where x is all zero the gradient is NaN, which the ReLU before it discards."""
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)


def load_lpips(path: Path | str, precision: Precision = FLOAT32) -> tuple[Lpips, str]:
    """The metric with the weights of one safetensors file, and the file's SHA-256.

    Args:
      path: torchvision's VGG16 (`features.N.weight`, `features.N.bias`) and the heads of the published metric
        (`lin0.model.1.weight` to `lin4.model.1.weight`) under their own names and shapes; other keys are not read.
      precision: the convolutions' dtype.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no safetensors file, or keys are missing or have another shape: all are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LPIPS weights file")
    data = path.read_bytes()
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    model = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=precision))
    graphdef, _ = nnx.split(model)
    return nnx.merge(graphdef, _parameters(path, tensors)), hashlib.sha256(data).hexdigest()


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the weights file; a convolution's weight is (out, in, 3, 3)."""
    shapes, inputs = {}, 3
    for index, width in zip(_indices(), np.concatenate(BLOCKS).tolist(), strict=True):
        shapes |= {f"features.{index}.weight": (width, inputs, 3, 3), f"features.{index}.bias": (width,)}
        inputs = width
    return shapes | {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(WIDTHS)}


def _indices() -> list[int]:
    """Positions of the convolutions in torchvision's list, which counts a ReLU after each and a pool after a block."""
    indices, position = [], 0
    for block in BLOCKS:
        indices += [position + 2 * k for k in range(len(block))]
        position += 2 * len(block) + 1
    return indices


def _parameters(path: Path, tensors: dict[str, np.ndarray]) -> dict:
    wrong = []
    for key, shape in expected_shapes().items():
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif tensors[key].shape != shape:
            wrong.append(f"{key} has shape {tensors[key].shape}, expected {shape}")
    if wrong:
        raise ValueError(f"{path}: not the weights of VGG16 with LPIPS heads: " + "; ".join(wrong))
    values = {key: jnp.asarray(tensors[key], jnp.float32) for key in expected_shapes()}
    indices = iter(_indices())
    blocks = {}
    for number, block in enumerate(BLOCKS):
        blocks[number] = {}
        for k in range(len(block)):
            key = f"features.{next(indices)}"
            kernel = values[f"{key}.weight"].transpose(2, 3, 1, 0)  # (out, in, y, x) to (y, x, in, out)
            blocks[number][k] = {"kernel": kernel, "bias": values[f"{key}.bias"]}
    heads = {k: values[f"lin{k}.model.1.weight"].reshape(-1) for k in range(len(WIDTHS))}
    return {"vgg": {"blocks": blocks}, "heads": heads}
