"""What a data set is built from: anything that lists objects and reads their posed images."""

import abc
from typing import ClassVar

from geolrm_jax.data.record import OccupancyFrom, PosedImages


class Source(abc.ABC):
    """Members that building a set uses. A fork's own source is a frozen dataclass derived from this."""

    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    """Splits that there may be."""
    occupancy_from: ClassVar[OccupancyFrom] = "depth"
    """What the true occupancy is made of."""
    on_accelerator: ClassVar[bool] = False
    """Objects are computed by JAX: threads of one process build the set, which share its accelerator."""

    @abc.abstractmethod
    def listing(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Names of the objects of every split, and those that are in none on purpose, with the reason."""

    @abc.abstractmethod
    def read(self, split: str, id: str) -> PosedImages:
        """The views of one object of `ids(split)`; a ValueError or OSError says why it is left out of the set."""

    def ids(self, split: str) -> list[str]:
        """Names of the objects of a split; raises as `listing` does."""
        return self.listing()[0][split]
