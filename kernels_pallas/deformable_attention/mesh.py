"""Division of a kernel's work among the devices of the ambient mesh: XLA cannot split a kernel's call by itself."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas.mesh import free_axes, split_axes


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
    mesh, free = free_axes()
    if not free:
        return function((), *arrays)
    scenes, heads = split_axes(mesh, free, weights.shape[0], weights.shape[2])

    def spec(axis):
        return P(scenes) if axis is None else P(scenes, *[None] * (axis - 1), heads)

    in_specs, out_specs = (jax.tree.map(spec, axes, is_leaf=lambda x: x is None) for axes in (heads_in, heads_out))
    mapped = jax.shard_map(
        lambda *arrays: function(heads, *arrays),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return mapped(*arrays)
