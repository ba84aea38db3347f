"""From built records to batches: order, shares of processes, decoding ahead and resuming, by Grain.

What a run sees is a pure function of (seed, position): position p of the endless order of records, shuffled anew for
every epoch, and random numbers drawn for p. Step k holds positions kB to (k + 1)B - 1 of it, B objects over all
processes; of those, each process reads some of n equal parts, so that row r of the global batch is the same whoever
reads it. An iterator's state is its position alone, the same on every process, whatever the number of processes, worker
processes and threads that it was saved or is restored with.
"""

import bisect
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from geolrm_jax.data.augmentation import Augmentation
from geolrm_jax.data.examples import ViewRule, choose_views, make_example
from geolrm_jax.data.on_demand import Records, RenderedSource
from geolrm_jax.data.reader import open_split
from geolrm_jax.data.record import DamagedRecord
from geolrm_jax.scene import Batch

_ATTEMPTS = 100  # records tried for one position before a set counts as unreadable
_POSITION = "position"


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a stage reads its data."""

    augmentation: Augmentation = Augmentation()
    mixed: tuple[tuple[str, float], ...] = ()
    """Other built sets that are mixed in, each a folder and its weight; the run's own set has the weight 1."""
    max_damaged: float = 0.01
    """Share of an epoch's records that may be damaged; one more and the run stops with their list. A run that goes on
    from a checkpoint counts anew."""
    threads: int = 2
    """Batches that are decoded at the same time, in this process or in each worker process; as many wait decoded."""
    processes: int = 0
    """Worker processes; 0 decodes in the training process, whose threads do not wait for each other: decoding leaves
    the interpreter. Workers hand batches over in shared memory, which costs about as much as decoding."""

    def __post_init__(self):
        if self.threads < 1 or self.processes < 0:
            raise ValueError(f"expected threads >= 1 and processes >= 0, got {self.threads} and {self.processes}")
        if not 0.0 <= self.max_damaged <= 1.0:
            raise ValueError(f"max_damaged is a share, expected 0 to 1, got {self.max_damaged}")
        if any(weight <= 0.0 for _, weight in self.mixed):
            raise ValueError(f"mixed: weights must be positive, got {self.mixed}")

    def absolute(self) -> "PipelineConfig":
        """The same with absolute folders."""
        return dataclasses.replace(self, mixed=tuple((os.path.abspath(root), weight) for root, weight in self.mixed))


def record_order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless order of records of one or several sets: `order[p]` is the number of the record in position p.

    Args:
      lengths: of the sets; numbers count through them, the first set's first.
      weights: relative, one per set, rounded to 1 in 100 of the smallest; of any first positions each set has its
        share, to within as many records as there are sets.
      seed: of the shuffling. A set is gone through in an order of its own, shuffled anew each time.
    """
    ends = list(itertools.accumulate(lengths))
    orders = [
        grain.MapDataset.range(end - length, end).seed(seed + i).shuffle().repeat()
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def training_dataset(
    source: Records,
    *,
    batch: int,
    views: int,
    inputs: int,
    input_size: tuple[int, int],
    render_size: tuple[int, int],
    seed: int,
    share: tuple[Sequence[int], int] = ((0,), 1),
    view_rule: ViewRule = "paper",
    config: PipelineConfig = PipelineConfig(),
    report: Callable[[str], None] = print,
) -> grain.IterDataset:
    """Endless batches of one process.

    Args:
      source: a split's records.
      batch: objects of a step, over all processes.
      views: views drawn of each object; all are targets.
      inputs: how many of them are inputs too, the first ones.
      input_size, render_size: (H, W) of inputs and targets.
      seed: of everything random.
      share: which parts of a batch this process reads, in ascending order, of how many equal ones; row r of the global
        batch does not depend on either.
      view_rule: see `choose_views`.
      config: sets to mix in, augmentation, damaged records, threads and processes.
      report: called with a line for each damaged record.

    Returns:
      A Grain dataset of `Batch` (objects of the process's parts, NumPy leaves, not to be written to); its iterator has
      `get_state` and `set_state`, and `damaged`, this process's damaged records of the epoch, reasons by id. It raises
      a ValueError with all of them when they are more than `config.max_damaged` of its share of an epoch.

    Raises:
      ValueError: if there are fewer views than inputs, no records, a batch that the processes cannot share, or sets
        whose occupancy grids differ.
    """
    if not 0 < inputs <= views:
        raise ValueError(f"expected 0 < inputs <= views, got inputs={inputs}, views={views}")
    parts, count = share
    if batch % count:
        raise ValueError(f"a batch of {batch} objects cannot be split into {count} equal parts")
    if config.processes and isinstance(source, RenderedSource):
        raise ValueError(
            f"objects are rendered on demand in the training process: processes must be 0, got {config.processes}"
        )
    sources = [source, *(open_split(root, "train") for root, _ in config.mixed)]
    _check_sources(sources)
    reader = _ReadBatch(
        sources=tuple(sources),
        order=record_order([len(s) for s in sources], [1.0, *(weight for _, weight in config.mixed)], seed),
        rows=tuple(part * batch // count + row for part in parts for row in range(batch // count)),
        views=views,
        inputs=inputs,
        input_size=input_size,
        render_size=render_size,
        seed=seed,
        view_rule=view_rule,
        augmentation=config.augmentation,
    )
    return _TrainingDataset(reader, batch, config, report)


def _check_sources(sources: Sequence[Records]) -> None:
    """Raises a ValueError unless every set has records and all have one occupancy grid."""
    for source in sources:
        if len(source) == 0:
            raise ValueError(f"{source!r} is empty")
    grids = {repr(source): source.config["occupancy_grid"] for source in sources}
    if len(set(grids.values())) > 1:
        raise ValueError(f"sets that are mixed need one occupancy_grid, got {grids}")


class Damage(NamedTuple):
    """A damaged record, met at a position of the order and replaced there."""

    position: int
    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _ReadBatch(grain.transforms.Map):
    """Reads this process's rows of the batch that starts at a position; runs in threads and worker processes."""

    sources: tuple[Records, ...]
    order: grain.MapDataset
    rows: tuple[int, ...]
    views: int
    inputs: int
    input_size: tuple[int, int]
    render_size: tuple[int, int]
    seed: int
    view_rule: ViewRule
    augmentation: Augmentation

    def map(self, element: int) -> tuple[dict[str, Any], list[Damage]]:
        """Fields of the batch whose first row stands in position `element`, and the damaged records met on the way.

        Inputs that are the first targets at the targets' size are left out: they need not travel twice.
        """
        damaged, batch = [], None
        names = ("targets", "occupancy", "index") + (() if self.input_size == self.render_size else ("inputs",))
        for place, row in enumerate(self.rows):
            example = self.read(int(element) + row, damaged)
            fields = {name: getattr(example, name) for name in names}
            if batch is None:
                batch = jax.tree.map(lambda x: np.empty((len(self.rows), *np.shape(x)), x.dtype), fields)
            # Copied at once, not stacked at the end: an example's memory serves for the next one. New memory costs
            # page faults, which took half of the time.
            for out, x in zip(jax.tree.leaves(batch), jax.tree.leaves(fields), strict=True):
                out[place] = x
        return batch, damaged

    def assemble(self, batch: dict[str, Any]) -> Batch:
        """The batch of the fields that `map` gives."""
        inputs = batch.get("inputs") or jax.tree.map(lambda x: x[:, : self.inputs], batch["targets"])
        return Batch(inputs, batch["targets"], batch["occupancy"], batch["index"])

    def read(self, position: int, damaged: list[Damage]) -> Batch:
        """The example of a position. A damaged record is noted and replaced by a random one of its set.

        What replaces it depends on nothing but (seed, position): were it dropped, all later positions would move, and
        every process would have to know what all others met.
        """
        number = int(self.order[position])
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng((self.seed, position, attempt))
            first, source = self.locate(number)
            if attempt:
                number = first + int(rng.integers(len(source)))
            try:
                return self.decode(source, number - first, number, rng)
            except DamagedRecord as error:
                damaged.append(Damage(position, error.id, error.reason))
        raise ValueError(
            f"{self.sources}: {_ATTEMPTS} records tried for one example, all damaged: {_listed(_reasons(damaged))}"
        )

    def locate(self, number: int) -> tuple[int, Records]:
        """The set that a record belongs to, and the number of its first record."""
        ends = list(itertools.accumulate(len(source) for source in self.sources))
        which = bisect.bisect_right(ends, number)
        return ends[which] - len(self.sources[which]), self.sources[which]

    def decode(self, source: Records, row: int, number: int, rng: np.random.Generator) -> Batch:
        """One record as an example."""
        record = source[row]
        try:
            ids = choose_views(record.view_ids, self.views, self.view_rule, rng, record.id)
        except ValueError as error:
            raise DamagedRecord(record.id, str(error)) from error
        change = self.augmentation.draw(len(ids), rng)
        return make_example(record, ids[: self.inputs], ids, self.input_size, self.render_size, number, change)


class _TrainingDataset(grain.IterDataset):
    """What `training_dataset` returns.

    Not Grain's ElasticIterator: that deals positions out one by one, so that the rows of a global batch change places
    with the number of processes, and with them what a step draws at random for each row.
    """

    def __init__(self, reader: _ReadBatch, batch: int, config: PipelineConfig, report: Callable[[str], None]):
        super().__init__()
        self.reader, self.batch, self.config, self.report = reader, batch, config, report

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch: as many as there are records."""
        return sum(len(source) for source in self.reader.sources)

    def starting_at(self, position: int) -> grain.IterDataset:
        """Batches and their damaged records, from a position on."""
        threads, workers = self.config.threads, self.config.processes
        positions = grain.MapDataset.range(position, sys.maxsize, self.batch)
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        dataset = positions.map(self.reader).to_iter_dataset(ahead)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which a program without absl never parses
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return dataset

    def __iter__(self) -> "_TrainingIterator":
        return _TrainingIterator(self)


class _TrainingIterator(grain.DatasetIterator):
    """Gives batches, knows the position, and counts damaged records where they can be counted: in one place."""

    def __init__(self, dataset: _TrainingDataset):
        super().__init__()
        self._dataset, self._position, self._batches = dataset, 0, None
        self._epoch, self.damaged = 0, {}

    def __next__(self) -> Batch:
        self.start_prefetch()
        fields, damaged = next(self._batches)
        for damage in damaged:
            self._count(damage)
        self._position += self._dataset.batch
        return self._dataset.reader.assemble(fields)

    def _count(self, damage: Damage) -> None:
        epoch = damage.position // self._dataset.epoch_length
        if epoch != self._epoch:
            self._epoch, self.damaged = epoch, {}
        if damage.id in self.damaged:
            return
        self.damaged[damage.id] = damage.reason
        share = self._dataset.epoch_length * len(self._dataset.reader.rows) // self._dataset.batch
        limit = self._dataset.config.max_damaged
        self._dataset.report(
            f"damaged record {damage.id} replaced by another: {damage.reason} "
            f"({len(self.damaged)} in epoch {epoch}; the run stops past {limit:.2%} of {share})"
        )
        if len(self.damaged) > limit * share:
            raise ValueError(
                f"{len(self.damaged)} of this process's {share} records of epoch {epoch} are damaged, more than "
                f"max_damaged {limit:.2%}: {_listed(self.damaged)}"
            )

    def get_state(self) -> dict[str, int]:
        """The position of the next batch: all that is needed to go on."""
        return {_POSITION: self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position that any process, of any number of them, has saved."""
        if state.keys() != {_POSITION}:
            raise ValueError(f"the state of another data pipeline: expected {{{_POSITION!r}: int}}, got {state}")
        self._stop()
        self._position = state[_POSITION]

    def start_prefetch(self) -> None:
        """Starts decoding ahead."""
        self._assert_not_closed()
        if self._batches is None:
            self._batches = iter(self._dataset.starting_at(self._position))
            self._batches.start_prefetch()

    def close(self) -> None:
        """Stops decoding ahead, and the worker processes."""
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None


def _reasons(damaged: Sequence[Damage]) -> dict[str, str]:
    return {damage.id: damage.reason for damage in damaged}


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{id}: {reason}" for id, reason in reasons.items())
