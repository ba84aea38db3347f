"""Damaged records: replaced, counted, told, and past the limit the end of the run."""

import itertools

import numpy as np
import pytest

from geolrm_jax.data.pipeline import PipelineConfig, record_order, training_dataset
from geolrm_jax.data.reader import RecordSource, open_split
from geolrm_jax.data.record import DamagedRecord


class WithDamage(RecordSource):
    """A split some of whose records cannot be read."""

    broken: tuple[int, ...] = ()

    def __getitem__(self, index):
        if index in self.broken:
            raise DamagedRecord(f"object {index}", "truncated")
        return super().__getitem__(index)


@pytest.fixture
def train(tiny_set):
    return WithDamage(tiny_set, "train")


def iterator(source, told, index=0, count=1, views=3, **config):
    arguments = dict(batch=4, views=views, inputs=1, input_size=(28, 28), render_size=(28, 28), seed=5)
    config = PipelineConfig(**config)
    return iter(training_dataset(source, share=((index,), count), config=config, report=told.append, **arguments))


def numbers(batches, steps):
    return np.concatenate([batch.index for batch in itertools.islice(batches, steps)])


def test_a_damaged_record_is_replaced_and_the_others_keep_their_places(train):
    train.broken, told = (2, 5), []
    seen = numbers(iterator(train, told, max_damaged=1.0), 14)  # eight epochs
    order = record_order([7], [1.0], seed=5)
    meant = np.array([order[p] for p in range(len(seen))])
    damaged = np.isin(meant, train.broken)
    np.testing.assert_array_equal(seen[~damaged], meant[~damaged])
    assert damaged.sum() == 16 and not np.isin(seen, train.broken).any()
    assert len(set(seen[damaged].tolist())) > 2  # not always the same stand-in


def test_the_replacement_does_not_depend_on_the_processes(train):
    train.broken = (2, 5)
    alone = numbers(iterator(train, [], max_damaged=1.0), 6).reshape(6, 4)
    halves = [numbers(iterator(train, [], index, 2, max_damaged=1.0), 6).reshape(6, 2) for index in range(2)]
    np.testing.assert_array_equal(alone, np.concatenate(halves, axis=1))
    restored = iterator(train, [], max_damaged=1.0)
    restored.set_state({"position": 12})
    np.testing.assert_array_equal(alone[3:], numbers(restored, 3).reshape(3, 4))


def test_each_is_told_once_an_epoch_by_its_id(train):
    train.broken, told = (2,), []
    batches = iterator(train, told, max_damaged=0.5)
    numbers(batches, 7)  # four epochs of seven
    assert len(told) == 4 and all("object 2" in line and "truncated" in line for line in told)
    assert "1 in epoch 0" in told[0] and "1 in epoch 3" in told[3]
    assert batches.damaged == {"object 2": "truncated"}


def test_past_the_limit_the_run_stops_with_the_list(train):
    train.broken, told = (1, 2, 5), []
    numbers(iterator(train, told, max_damaged=3 / 7), 8)
    with pytest.raises(ValueError, match=r"3 of this process's 7 records of epoch 0 are damaged.*max_damaged") as stop:
        numbers(iterator(train, told, max_damaged=2.5 / 7), 8)
    for number in train.broken:
        assert f"object {number}: truncated" in str(stop.value)
    train.broken = (1,)
    with pytest.raises(ValueError, match="1 of this process's"):
        numbers(iterator(train, told, max_damaged=0.0), 8)


def test_a_set_without_a_sound_record_ends_the_run(train):
    train.broken = tuple(range(7))
    with pytest.raises(ValueError, match=r"all damaged: .*object 6: truncated"):
        next(iterator(train, [], max_damaged=1.0))


def test_records_with_too_few_views_count_as_damaged(train):
    told = []
    with pytest.raises(ValueError, match=r"procedural/train/.* has 7 views, 8 are to be drawn"):
        next(iterator(train, told, views=8))


def test_damaged_bytes_are_met_and_replaced(tiny_set, damaged_set):
    sound, told = open_split(tiny_set, "train"), []
    batches = iterator(open_split(damaged_set, "train"), told, views=7, max_damaged=1.0)
    seen = list(itertools.islice(batches, 7))  # four epochs
    assert list(batches.damaged) == ["procedural/train/2"] and len(told) == 4
    assert set(np.concatenate([batch.index for batch in seen]).tolist()) == {0, 1, 3, 4, 5, 6}
    for batch in seen:
        for row, index in enumerate(batch.index.tolist()):
            np.testing.assert_array_equal(batch.occupancy[row], sound[index].occupancy)


@pytest.mark.slow
def test_worker_processes_report_too(tiny_set):
    told, source = [], open_split(tiny_set, "train")
    with pytest.raises(ValueError, match="has 7 views, 8 are to be drawn"):
        next(iterator(source, told, views=8, processes=1))
