"""Procedural objects as records that are rendered when they are drawn: training without a set on disk.

An object costs one pass of depth through all its views, from which occupancy is made, and colour for the views that are
asked for. It is what a set built of the same source with raw encoding holds.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from geolrm_jax.data.builders.config import DataConfig, stored_config
from geolrm_jax.data.occupancy import drop_edges, occupancy_from_depth
from geolrm_jax.data.procedural import draw_colors, draw_depth, object_id
from geolrm_jax.data.reader import RecordSource, open_split
from geolrm_jax.data.record import DamagedRecord, Record, StoredView, quantize_depth
from geolrm_jax.data.sdf import Shapes


class RenderedSource:
    """Random access to the objects of one split, as `RecordSource` gives those of a built set.

    Objects are dealt to the process's devices in turn; several threads may ask at the same time. Not for worker
    processes: there the accelerator is another's.

    Attributes:
      data: what is rendered; its source is procedural.
      split: which objects.
      config: as that of a set built of them.
    """

    def __init__(self, data: DataConfig, split: str):
        self.data, self.split, self.config = data, split, stored_config(data)

    def __len__(self) -> int:
        return self.data.source.count(self.split)

    def __getitem__(self, index: int) -> Record:
        """The record in a place; colours are rendered when views are asked for.

        Raises:
          IndexError: if there is no such object.
          DamagedRecord: if no surface is left to make occupancy from.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has {len(self)} objects, no object {index}")
        source, id = self.data.source, object_id(self.split, int(index))
        cameras, device = source.cameras(), jax.local_devices()[index % jax.local_device_count()]
        with jax.default_device(device):
            shapes = source.shapes(self.split, int(index))
            depth = draw_depth(shapes, cameras)
        surface = drop_edges(depth, cameras)
        occupancy = occupancy_from_depth(surface, cameras, self.data.occupancy_grid, self.data.occupancy_rounding)
        if not occupancy.any():
            raise DamagedRecord(id, "no usable depth in its views; occupancy cannot be made")
        steps, limits = zip(*(quantize_depth(view) for view in depth), strict=True)
        return Record(
            id=id,
            view_ids=np.array(source.view_ids, np.int32),
            depth_range=np.array(limits, np.float32),
            world_from_camera=cameras.world_from_camera,
            intrinsics=cameras.intrinsics,
            size=(cameras.height, cameras.width),
            occupancy_bits=np.packbits(occupancy).tobytes(),
            grid=self.data.occupancy_grid,
            occupancy_from="depth",
            occupancy_rounding=self.data.occupancy_rounding,
            encoding="raw",
            read_views=functools.partial(self._render_views, id, shapes, [step.tobytes() for step in steps], device),
        )

    def _render_views(
        self, id: str, shapes: Shapes, depth: list[bytes], device: jax.Device, rows: Sequence[int]
    ) -> list[StoredView]:
        """The views in positions `rows`, coloured."""
        numbers = self.data.source.view_ids
        with jax.default_device(device):
            rgba = draw_colors(shapes, self.data.source.cameras(rows))
        return [StoredView(id, numbers[row], x.tobytes(), depth[row]) for row, x in zip(rows, rgba, strict=True)]

    def __repr__(self) -> str:
        return f"RenderedSource({self.data.source}, {self.split})"


Records = RecordSource | RenderedSource


def open_data(config: DataConfig, directory: Path, split: str) -> Records:
    """The records of a split: rendered on demand where the config says so, else of the built set in `directory`.

    Raises:
      ValueError, FileNotFoundError: as `reader.open_split` does; if there are no objects to render.
    """
    if not config.on_demand:
        return open_split(directory, split)
    if split not in config.source.splits or not config.source.count(split):
        raise ValueError(
            f"data.source has no objects of split {split!r}; it may have {', '.join(config.source.splits)}"
        )
    return RenderedSource(config, split)
