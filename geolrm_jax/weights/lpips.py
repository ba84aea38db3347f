"""The weights of LPIPS: torchvision's VGG16 and the published linear heads, combined in one safetensors file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx, traverse_util

from geolrm_jax.export.files import written_whole
from geolrm_jax.losses.lpips import Lpips
from geolrm_jax.models.vgg import BLOCKS
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import logging
from geolrm_jax.weights.files import TensorFile, open_tensors
from geolrm_jax.weights.names import CONVOLUTION, SAME, Layout, Leaf, check

FLOAT32 = Precision()
HEAD = Layout("1 c 1 1 -> c")
IGNORED = "classifier."  # the fully connected layers of VGG16

# By index of our blocks and convolutions, the position in torchvision's list, which counts a ReLU after each
# convolution and a pool after each block.
POSITIONS = tuple(
    tuple(sum(2 * len(before) + 1 for before in BLOCKS[:number]) + 2 * k for k in range(len(block)))
    for number, block in enumerate(BLOCKS)
)


def load_lpips(path: Path | str, precision: Precision = FLOAT32) -> tuple[Lpips, str]:
    """The metric with the weights of one file, as `combine` writes it, and the file's SHA-256, which is shown too.

    Args:
      path: torchvision's VGG16 (`features.N.weight`, `features.N.bias`) and the heads of the published metric
        (`lin0.model.1.weight` to `lin4.model.1.weight`) under their own names and shapes.
      precision: the convolutions' dtype.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not readable, or keys are missing, unexpected or have another shape: all are listed.
    """
    file = open_tensors(path)
    leaves = _leaves()
    check(leaves.values(), _without_classifier(file), str(path))
    params = traverse_util.unflatten_dict({k: jnp.asarray(leaf.load(file.read)) for k, leaf in leaves.items()})
    graphdef = nnx.split(nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=precision)))[0]
    logging.notice(f"LPIPS: {path}, SHA-256 {file.sha256}")
    return nnx.merge(graphdef, params), file.sha256


def combine(vgg: Path | str, heads: Path | str, out: Path | str) -> dict[str, str]:
    """Writes the file that `load_lpips` reads from the two that are published.

    Args:
      vgg: torchvision's `vgg16-….pth`; its `classifier.*` is left out.
      heads: `weights/v0.1/vgg.pth` of the `lpips` package.
      out: the safetensors file, whose metadata carry the digests of both sources.

    Returns:
      SHA-256 of the sources and of the result: `{"vgg16": …, "heads": …, "combined": …}`.

    Raises:
      FileNotFoundError: if a source is not there.
      ValueError: if one is not readable, or its keys are missing, unexpected or of another shape: all are listed.
    """
    sources = {"vgg16": open_tensors(vgg), "heads": open_tensors(heads)}
    leaves = _leaves()
    check([leaf for path, leaf in leaves.items() if path[0] == "vgg"], _without_classifier(sources["vgg16"]), str(vgg))
    check([leaf for path, leaf in leaves.items() if path[0] == "heads"], sources["heads"].shapes, str(heads))
    tensors = {}
    for path, leaf in leaves.items():
        (key,) = leaf.keys
        tensors[key] = np.ascontiguousarray(sources["vgg16" if path[0] == "vgg" else "heads"].read(key), np.float32)
    digests = {name: file.sha256 for name, file in sources.items()}
    with written_whole(out) as temporary:
        safetensors.numpy.save_file(tensors, temporary, {f"{k}_sha256": digest for k, digest in digests.items()})
    return digests | {"combined": open_tensors(out).sha256}


def _leaves() -> dict[tuple[str | int, ...], Leaf]:
    """Every array of the metric with its name in the files, by its path in the module."""
    model = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=FLOAT32))
    arrays = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {path: _leaf(path, array) for path, array in arrays.items()}


def _leaf(path: tuple[str | int, ...], array: jax.ShapeDtypeStruct) -> Leaf:
    if path[0] == "heads":
        key, layout = f"lin{path[1]}.model.1.weight", HEAD
    else:
        _, _, block, convolution, name = path
        tensor, layout = {"kernel": ("weight", CONVOLUTION), "bias": ("bias", SAME)}[name]
        key = f"features.{POSITIONS[block][convolution]}.{tensor}"
    dotted = ".".join(map(str, path))
    return Leaf("params", dotted, array.shape, np.dtype(array.dtype), (key,), layout, stacked=False)


def _without_classifier(file: TensorFile) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in file.shapes.items() if not key.startswith(IGNORED)}
