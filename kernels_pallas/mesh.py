"""Operations on a device mesh and inside `shard_map`: XLA cannot split a kernel's call, nor tell how its result varies.

An operation reads the ambient mesh. Two of its axes are known by their names; any other splits scenes, like a batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

CONTEXT = "context"  # splits the tokens and the views of a scene
TENSOR = "tensor"  # splits heads, and what is made of them


def obstacle_of_mesh() -> str:
    """Why a kernel's call cannot be split over the ambient mesh; empty if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    _, free = free_axes()
    if any(name in mesh.explicit_axes for name in free):
        return "the ambient mesh has axes of type Explicit; kernels are split over those of type Auto"
    if free and in_checked_shard_map():
        return "inside shard_map over a part of the mesh it needs check_vma=False"
    return ""


def in_checked_shard_map() -> bool:
    """Whether this is traced inside a `shard_map` that checks over which axes values vary."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and bool(jax.typeof(lax.pcast(0.0, manual, to="varying")).manual_axis_type.varying)


def free_axes() -> tuple[AbstractMesh, tuple[str, ...]]:
    """The ambient mesh, and its axes over which a call may be split: none where they hold one device."""
    mesh = jax.sharding.get_abstract_mesh()
    free = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    return mesh, free if math.prod(mesh.shape[name] for name in free) > 1 else ()


def split_axes(
    mesh: AbstractMesh, free: tuple[str, ...], scenes: int, heads: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes that split the scenes, like a batch over all that divide it, and those of the rest that split the heads.

    The axis `TENSOR` splits heads if it divides them.
    """
    found: dict[str, tuple[str, ...]] = {"scenes": (), "heads": ()}
    for name in free:
        parts = (("scenes", scenes), ("heads", heads))
        for part, length in reversed(parts) if name == TENSOR else parts:
            if length % math.prod(mesh.shape[n] for n in (*found[part], name)) == 0:
                found[part] += (name,)
                break
    return found["scenes"], found["heads"]


def context_shards() -> int:
    """Shards that a scene's tokens or views are in here: more than one inside of `over_context`, if `CONTEXT` is."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[CONTEXT] if CONTEXT in mesh.manual_axes else 1


def over_context(function: Callable, arguments: tuple, specs: tuple, result: P) -> Any:
    """`function(*arguments)`, on every device for its own tokens or views if the ambient mesh has the axis `CONTEXT`.

    The function is written for any number of them; where they meet it asks `context_shards`. What is not split has its
    gradient summed over the devices here, once, however often the function uses it.

    Args:
      function: of the arguments; all other axes of the mesh are left to the compiler.
      arguments: pytrees.
      specs: for each argument, or part of it, which axis is split: `P(None, CONTEXT)`, or `P()` for none.
      result: the same of the result.

    Raises:
      ValueError: if the mesh axis does not divide what it splits.
    """
    mesh, free = free_axes()
    if CONTEXT not in free or mesh.shape[CONTEXT] == 1:
        return function(*arguments)

    def check(spec, tree):
        for leaf in jax.tree.leaves(tree) if CONTEXT in spec else ():
            if leaf.shape[axis := spec.index(CONTEXT)] % mesh.shape[CONTEXT]:
                raise ValueError(
                    f"mesh axis {CONTEXT!r} of {mesh.shape[CONTEXT]} devices must divide the {leaf.shape[axis]} "
                    f"anchors or views of shape {leaf.shape}"
                )

    jax.tree.map(check, specs, arguments, is_leaf=lambda x: isinstance(x, P))
    # Unchecked: kernels inside do not say over which axes their results vary.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=result, axis_names=frozenset({CONTEXT}), check_vma=False
    )
    return mapped(*arguments)


def apart(function: Callable, *arrays: Any, shared: Any = (), views: bool = False) -> Any:
    """`function(shared, *arrays)`, whose rows have nothing to do with each other, on every device for its own rows.

    The compiler, left alone, gathers the rows of all devices for a sort, and images for a convolution.

    Args:
      function: its results have rows too.
      *arrays: pytrees with rows (scenes) along the first axis.
      shared: a pytree that every row needs whole.
      views: the same holds for the second axis, split over `CONTEXT` and `TENSOR`.
    """
    mesh, free = free_axes()
    shape, taken = jax.tree.leaves(arrays)[0].shape, (CONTEXT, TENSOR)
    rows, _ = split_axes(mesh, tuple(name for name in free if name not in taken), shape[0], 1)
    across, _ = split_axes(mesh, tuple(name for name in free if name in taken), shape[1], 1) if views else ((), ())
    if not (rows or across):
        return function(shared, *arrays)
    split = P(rows, across)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(), *[split] * len(arrays)),
        out_specs=split,
        axis_names=frozenset(free),
        check_vma=False,
    )
    return mapped(shared, *arrays)


def varying_alike(tree):
    """The same arrays, inside `shard_map` all typed as varying over every axis over which one of them does."""
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))

    def cast(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, tree)


def output_like(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
    """A kernel's output that, inside `shard_map`, varies over the devices as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
