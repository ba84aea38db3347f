"""What a data set is built from: anything that lists objects and reads their posed images."""

import abc
from typing import ClassVar

from geolrm_jax.data.record import OccupancyFrom, PosedImages


class Source(abc.ABC):
    """Members that building a set uses. A fork's own source is a frozen dataclass derived from this."""

    occupancy_from: ClassVar[OccupancyFrom] = "depth"
    """What the true occupancy is made of."""
    on_accelerator: ClassVar[bool] = False
    """Objects are computed by JAX: threads of one process build the set, which share its accelerator."""

    @abc.abstractmethod
    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split, "train" or "test"."""

    @abc.abstractmethod
    def read(self, split: str, id: str) -> PosedImages:
        """The views of one object of `ids(split)`; a ValueError or OSError says why it is left out of the set."""

    def left_out(self) -> dict[str, str]:
        """Objects that are in no split on purpose, with the reason."""
        return {}
