"""The device mesh, and where parameters, optimizer state and batches lie on it.

Four axes. Rows of a batch are split over `data` and `fsdp`; parameters, with all that the optimizer keeps of them, over
`fsdp` and `tensor`, by the rules of models/splitting.py; views and anchors over `context` (Jacobs et al. 2023: heads in
self-attention, tokens elsewhere).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from geolrm_jax.models.splitting import FSDP, path_of, spec_of
from kernels_pallas.mesh import CONTEXT, TENSOR

ROWS = ("data", FSDP)
AXES = (*ROWS, CONTEXT, TENSOR)
VIEWS = (CONTEXT, TENSOR)  # axes over which the views of a scene are drawn: each draws with all of its Gaussians


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis of the mesh."""

    data: int = -1
    """Splits rows. -1: all devices that the other axes leave."""
    fsdp: int = 1
    """Splits rows too, and parameters with their optimizer state."""
    context: int = 1
    """Splits the views and anchors of a row; divides the heads and the number of anchors."""
    tensor: int = 1
    """Splits the heads and hidden channels of every layer; divides the heads."""

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and (name, size) != ("data", -1):
                raise ValueError(f"mesh.{name}: expected a number of devices of at least 1, got {size}")

    def shape(self, devices: int) -> dict[str, int]:
        """Devices per axis, of so many.

        Raises:
          ValueError: if the axes do not multiply to that number.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        if self.data == -1:
            sizes["data"] = devices // math.prod(sizes[name] for name in AXES[1:])
        if math.prod(sizes.values()) != devices:
            asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1 or name == "data")
            raise ValueError(f"mesh: {asked} does not cover the {devices} devices there are")
        return sizes

    def rows(self, devices: int) -> int:
        """Parts that a batch is split into on so many devices."""
        sizes = self.shape(devices)
        return math.prod(sizes[name] for name in ROWS)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over these devices, or over all of all processes; neighbours on it are neighbours in the machine.

        TPU slices, or hosts of GPUs, that only a network joins are set apart along `data` where it is a multiple of
        their number.

        Raises:
          ValueError: if the axes do not multiply to their number, or, for slices, `data` not to a multiple of theirs.
        """
        devices = jax.devices() if devices is None else devices
        sizes = tuple(self.shape(len(devices)).values())
        slices = len({getattr(device, "slice_index", 0) for device in devices})  # for JAX a host of GPUs is one too
        apart = sizes[0] % slices == 0
        if not apart and devices[0].platform == "tpu":
            raise ValueError(f"mesh.data {sizes[0]} must be a multiple of the {slices} slices that the devices form")
        if slices > 1 and apart:
            within, outer = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
            placed = mesh_utils.create_hybrid_device_mesh(within, outer, devices, allow_split_physical_axes=True)
        else:
            placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def shard_tree(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: NamedSharding(mesh, spec_of(path_of(keys), np.shape(x), sizes)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def row_share(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """(parts, count): a batch has so many equal parts, one for each place along `ROWS`; this process reads these.

    They need not follow each other: on a TPU a host's chips lie apart in the mesh. Processes whose devices hold the
    same rows, along `context` or `tensor`, read the same parts.

    Raises:
      ValueError: if the processes' rows overlap without being the same.
    """
    count = math.prod(mesh.shape[name] for name in ROWS)
    of_process: dict[int, set[int]] = {}
    for device, (index,) in batch_sharding(mesh).devices_indices_map((count,)).items():
        of_process.setdefault(device.process_index, set()).add(index.start or 0)
    shares = {frozenset(parts) for parts in of_process.values()}
    if sum(map(len, shares)) != count or len({len(parts) for parts in shares}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: the rows of {len(of_process)} processes overlap; choose context x tensor so "
            "that it divides the devices of a process, or is a multiple of them"
        )
    return tuple(sorted(of_process[jax.process_index()])), count


def padded(batch: Any, mesh: Mesh) -> Any:
    """A Batch (NumPy leaves) whose views can be split over `context` and drawn over `VIEWS`.

    What is added repeats the last view and is not valid: it changes no loss, and no statistic.
    """

    def pad(views, multiple: int):
        missing = -views.valid.shape[1] % multiple
        if not missing:
            return views
        more = jax.tree.map(lambda x: np.concatenate([x, *[x[:, -1:]] * missing], axis=1), views)
        more.valid[:, -missing:] = False
        return more

    targets = math.prod(mesh.shape[name] for name in VIEWS)
    inputs, targets = pad(batch.inputs, mesh.shape[CONTEXT]), pad(batch.targets, targets)
    return dataclasses.replace(batch, inputs=inputs, targets=targets)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Where the leaves of a padded Batch lie: rows over `ROWS`, input views over `context`, targets over `VIEWS`."""
    specs = {"inputs": P(ROWS, CONTEXT), "targets": P(ROWS, VIEWS)}

    def place(keys, _):
        return NamedSharding(mesh, specs.get(path_of(keys).split("/")[0], P(ROWS)))

    return jax.tree_util.tree_map_with_path(place, batch)


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Global arrays of a Batch from the rows that this process has read: its share, see `row_share`.

    Args:
      batch: NumPy leaves, whose first axis has this process's rows in the order of the global batch.
      sharding: of the rows, as `batch_sharding` gives it.
    """
    mesh = sharding.mesh
    batch, (parts, count) = padded(batch, mesh), row_share(mesh)

    def place(x, where):
        return jax.make_array_from_process_local_data(where, x, (x.shape[0] // len(parts) * count, *x.shape[1:]))

    return jax.tree.map(place, batch, batch_shardings(batch, mesh))
