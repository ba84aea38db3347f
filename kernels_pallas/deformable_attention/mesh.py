"""Division of a kernel's work among the devices of the ambient mesh: XLA cannot split a kernel's call by itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


def on_mesh(function: Callable, weights: Float[Array, "b n k l p"], arrays: tuple, heads_in: tuple, heads_out: Any):
    """`function(axes, *arrays)`, on every device for its own scenes and heads.

    Scenes are split like a batch, over all axes of the mesh that divide them, and heads over those that are left.

    Args:
      function: gets the names of the axes over which heads are split, then its part of the arrays.
      weights: whose first axis is scenes, and whose third is heads.
      arrays: pytrees of arrays, all with scenes first.
      heads_in: for each of `arrays` which axis is heads, None if it has none.
      heads_out: the same for each result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    if math.prod(mesh.shape[name] for name in free) == 1:
        return function((), *arrays)
    scenes, heads = [], []
    for name in free:
        for axes, length in ((scenes, weights.shape[0]), (heads, weights.shape[2])):
            if length % math.prod(mesh.shape[n] for n in (*axes, name)) == 0:
                axes.append(name)
                break

    def spec(axis):
        return P(tuple(scenes)) if axis is None else P(tuple(scenes), *[None] * (axis - 1), tuple(heads))

    in_specs, out_specs = (jax.tree.map(spec, axes, is_leaf=lambda x: x is None) for axes in (heads_in, heads_out))
    mapped = jax.shard_map(
        lambda *arrays: function(tuple(heads), *arrays),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return mapped(*arrays)
