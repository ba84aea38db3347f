"""Kernels on a device mesh and inside `shard_map`: XLA cannot split a kernel's call, nor tell how its result varies."""

import math

import jax
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array


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
    """Axes that split the scenes, like a batch over all that divide it, and of the rest those that split the heads."""
    found: dict[str, tuple[str, ...]] = {"scenes": (), "heads": ()}
    for name in free:
        for part, length in (("scenes", scenes), ("heads", heads)):
            if length % math.prod(mesh.shape[n] for n in (*found[part], name)) == 0:
                found[part] += (name,)
                break
    return found["scenes"], found["heads"]


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
