"""How parameters are split over a device mesh, by their names: one table for their storage and for their use."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.mesh import TENSOR

FSDP = "fsdp"
STACKED = "blocks"  # name of the modules that are scanned

# The first rule whose pattern is found in a parameter's path decides, by the mesh axes of the parameter's last axes:
# over `tensor` what makes heads or hidden channels is split by its outputs, and what ends them by its inputs (Shoeybi
# et al. 2019). What no rule names is on every device, and so is an axis that its mesh axis does not divide.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(^|/)(query|key|value|w1|w3|fc1|hidden|offsets|logits)/kernel$", (FSDP, TENSOR)),
    (r"(^|/)(query|key|value|fc1|hidden|offsets|logits)/bias$", (TENSOR,)),
    (r"(^|/)(out|w2|fc2)/kernel$", (TENSOR, FSDP)),
    (r"(^|/)(patches|low|upsample)/kernel$", (FSDP,)),
    (r"(^|/)positions$", (FSDP,)),
)


def path_of(keys: tuple) -> str:
    """`a/b/c` of a pytree path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def spec_of(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """The PartitionSpec of one array of the state, optimizer moments included: their paths end like the parameter's.

    Args:
      path: names with slashes between them.
      shape: of the array.
      sizes: devices per axis of the mesh; an axis that is not there has one.
    """
    for pattern, names in RULES:
        if re.search(pattern, path):
            if len(shape) < len(names):
                return P()  # what an optimizer keeps by rows or columns
            last = zip(shape[len(shape) - len(names) :], names, strict=True)
            split = [name if sizes.get(name, 1) > 1 and length % sizes[name] == 0 else None for length, name in last]
            return P(*[None] * (len(shape) - len(names)), *split) if any(split) else P()
    return P()


def whole(parameters: Any, *, without: str | None = None) -> Any:
    """Parameters gathered over `fsdp`, as products of a device's own rows need them; each gradient is scattered again.

    Left alone, the compiler may gather the rows instead, whatever is smaller. Where the ambient mesh does not split
    parameters over `fsdp` they are returned as they are.

    Args:
      parameters: a pytree whose paths end in the parameters' names.
      without: name of a part that is left as it is: `STACKED`, whose layers are gathered one at a time, when used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if FSDP not in mesh.axis_names or FSDP in mesh.manual_axes or mesh.shape[FSDP] == 1:
        return parameters

    def gather(keys, x):
        path, sizes = path_of(keys).removesuffix("/value"), dict(mesh.shape)  # of a module, or of a dict
        if without in path.split("/") or not hasattr(x, "shape"):
            return x
        split, used = spec_of(path, x.shape, sizes), spec_of(path, x.shape, {**sizes, FSDP: 1})
        return x if split == used else _relaid(NamedSharding(mesh, split), NamedSharding(mesh, used), x)

    return jax.tree_util.tree_map_with_path(gather, parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _relaid(stored: NamedSharding, used: NamedSharding, x: jax.Array) -> jax.Array:
    """`x` laid out for its use, its gradient for its storage."""
    return jax.lax.with_sharding_constraint(x, used)


def _relaid_forward(stored, used, x):
    return _relaid(stored, used, x), None


def _relaid_backward(stored, used, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_relaid.defvjp(_relaid_forward, _relaid_backward)
