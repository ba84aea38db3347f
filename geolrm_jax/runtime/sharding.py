"""The device mesh, and where parameters and batches lie on it."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")

# The first rule whose pattern is found in a parameter's path decides; "fsdp" stands on the axis counted from the end.
# Everything that no rule names, and what does not divide, is replicated.
RULES: tuple[tuple[str, int], ...] = (
    (r"(offsets|logits|view_logit)/", 0),
    (r"(patches|low|upsample)/kernel$", -1),
    (r"kernel$", -2),
    (r"positions$", -1),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis of the mesh; batches are split over both axes, parameters over fsdp."""

    data: int = -1
    """-1: all devices that fsdp leaves."""
    fsdp: int = 1

    def make(self) -> Mesh:
        """The mesh over all devices of all processes.

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        devices = jax.device_count()
        data = devices // self.fsdp if self.data == -1 else self.data
        if data * self.fsdp != devices:
            raise ValueError(f"mesh: data {data} x fsdp {self.fsdp} does not cover the {devices} devices there are")
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.make_mesh((data, self.fsdp), AXES, axis_types=kinds)


def path_of(keys: tuple) -> str:
    """`a/b/c` of a pytree path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def spec_of(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """The PartitionSpec of one array of the state, optimizer moments included: their paths end like the parameter's."""
    for pattern, axis in RULES:
        if re.search(pattern, path):
            if axis and len(shape) >= -axis and shape[axis] % fsdp == 0:
                return P(*("fsdp" if i == len(shape) + axis else None for i in range(len(shape))))
            break
    return P()


def shard_tree(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: NamedSharding(mesh, spec_of(path_of(keys), np.shape(x), fsdp)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices."""
    return NamedSharding(mesh, P(AXES))


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Global arrays of the rows that this process has read; its rows are an equal share of every leaf's first axis."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
