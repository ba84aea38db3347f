"""The batches of a stage, in an order that may be changed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from geolrm_jax.scene import Batch

_ORDER = "order"


class Batches:
    """This process's share of a stage's batches, in one of many orders.

    Args:
      make: a Grain iterator of the given order; 0 is the first, every rollback takes the next.
      order: the lowest that is wanted.
    """

    def __init__(self, make: Callable[[int], Iterator[Any]], order: int = 0):
        self._make, self.order, self._iterator = make, order, make(order)

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def damaged(self) -> int:
        """Damaged records that this process has met in the epoch."""
        return len(self._iterator.damaged)

    def get_state(self) -> dict[str, Any]:
        """The order and the position in it: JSON, the same on every process."""
        return {_ORDER: self.order, **self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved position, in the order that it was saved in or a later one that was asked for."""
        position = {key: value for key, value in state.items() if key != _ORDER}
        order = max(self.order, state.get(_ORDER, 0))  # states had no order before there were rollbacks
        if order != self.order:
            self._iterator.close()
            self.order, self._iterator = order, self._make(order)
        self._iterator.set_state(position)

    def close(self) -> None:
        """Stops decoding ahead."""
        self._iterator.close()
