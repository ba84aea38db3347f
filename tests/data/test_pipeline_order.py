"""The global order: the same for any number of processes, and for any iterator that was saved and restored."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from geolrm_jax.data.pipeline import PipelineConfig, record_order, training_dataset
from geolrm_jax.data.reader import open_split

BATCH = 4  # of all processes together


@pytest.fixture(scope="module")
def train(tiny_set):
    return open_split(tiny_set, "train")


def iterator(source, *share, **config):
    """With one part of so many, or with several."""
    *parts, count = share or (0, 1)
    return iter(
        training_dataset(
            source,
            batch=BATCH,
            views=3,
            inputs=1,
            input_size=(28, 28),
            render_size=(32, 32),
            seed=5,
            share=(parts, count),
            config=PipelineConfig(**config),
        )
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def take_together(iterators, count):
    """Global batches of the processes, rows in the processes' order."""
    shares = [take(batches, count) for batches in iterators]
    return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *step) for step in zip(*shares, strict=True)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def sequence(train):
    """Ten global batches, read by one process without a stop: more than five epochs."""
    return take(iterator(train), 10)


def test_the_order_is_that_of_the_positions(train, sequence):
    order = record_order([len(train)], [1.0], seed=5)
    np.testing.assert_array_equal(np.concatenate([b.index for b in sequence]), [order[p] for p in range(10 * BATCH)])


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_reads_the_same_batches(train, sequence, count):
    assert_same(sequence, take_together([iterator(train, i, count) for i in range(count)], 10))


def test_the_parts_of_a_process_need_not_follow_each_other(train, sequence):
    first, second = (take(iterator(train, *parts, 4), 10) for parts in ((0, 2), (1, 3)))
    assert_same(
        sequence,
        [
            jax.tree.map(lambda x, y: np.stack([x, y], 1).reshape(-1, *x.shape[1:]), *pair)
            for pair in zip(first, second, strict=True)
        ],
    )


@pytest.mark.parametrize("saved_at", [0, 1, 3, 4])
def test_a_state_of_any_step_goes_on_with_any_number_of_processes(train, sequence, saved_at):
    """Saved with 1, 2 and 4 processes, restored with each of them; the state is JSON, the same on every process."""
    states = []
    for count in (1, 2, 4):
        for index in range(count):
            batches = iterator(train, index, count)
            take(batches, saved_at)
            states.append(json.dumps(batches.get_state()))
            batches.close()
    assert len(set(states)) == 1
    for count in (1, 2, 4):
        restored = [iterator(train, index, count) for index in range(count)]
        for batches in restored:
            take(batches, 1)  # a state may be set at any time
            batches.set_state(json.loads(states[0]))
        assert_same(sequence[saved_at : saved_at + 3], take_together(restored, 3))


@pytest.mark.parametrize("case", ["one set", "two sets", "two sets, damaged"])
def test_a_run_that_changes_its_processes_sees_the_same_sequence(case, tiny_set, other_set, damaged_set):
    """Saved with 1, then 2, then 4 processes, at every step of more than four epochs; damage is met on the way."""
    source = open_split(damaged_set if "damaged" in case else tiny_set, "train")
    config = dict(mixed=((str(other_set), 0.5),) if "two" in case else (), max_damaged=1.0)
    sequence = take(iterator(source, **config), 11)
    alone = iterator(source, **config)
    for step in range(8):
        state, seen = alone.get_state(), []
        take(alone, 1)
        for count in (2, 4, 1):
            processes = [iterator(source, index, count, **config) for index in range(count)]
            for batches in processes:
                batches.set_state(state)
            seen += take_together(processes, 1)
            state = processes[-1].get_state()
        assert_same(sequence[step : step + 3], seen)
    assert list(alone.damaged) == (["procedural/train/2"] if "damaged" in case else [])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_states(train, sequence):
    workers = iterator(train, processes=2)
    assert_same(sequence[:5], take(workers, 5))
    assert workers.get_state() == {"position": 5 * BATCH}
    restored = [iterator(train, index, 2, processes=index) for index in range(2)]  # one process with a worker
    for batches in restored:
        batches.set_state(workers.get_state())
    workers.close()
    assert_same(sequence[5:8], take_together(restored, 3))


def test_another_seed_gives_other_batches(train, sequence):
    arguments = dict(batch=BATCH, views=3, inputs=1, input_size=(28, 28), render_size=(32, 32))
    other = take(iter(training_dataset(train, seed=6, **arguments)), 2)
    again = take(iter(training_dataset(train, seed=5, **arguments)), 2)
    assert_same(sequence[:2], again)
    assert not np.array_equal(other[0].targets.cameras.world_from_camera, sequence[0].targets.cameras.world_from_camera)


def test_the_views_of_a_record_change_from_epoch_to_epoch(sequence):
    poses = {}
    for batch in sequence:
        for index, pose in zip(batch.index, batch.targets.cameras.world_from_camera, strict=True):
            poses.setdefault(int(index), []).append(pose[:, :3, 3].tobytes())
    assert all(len(set(drawn)) > 1 for drawn in poses.values())


def test_states_of_another_pipeline_are_refused(train):
    with pytest.raises(ValueError, match="state of another data pipeline"):
        iterator(train).set_state({"next_index": 3})


@pytest.mark.parametrize("weights", [(1.0, 0.5), (1.0, 0.3, 0.7), (1.0, 0.25, 3.0, 0.1)])
def test_a_mixture_has_its_shares_at_every_position_and_keeps_each_sets_order(weights):
    lengths = [50, 20, 11, 5][: len(weights)]
    order = record_order(lengths, weights, seed=3)
    numbers = np.array([order[p] for p in range(1500)])
    ends = np.cumsum(lengths)
    belongs = np.searchsorted(ends, numbers, side="right")[:, None] == np.arange(len(weights))
    shares = np.arange(1, 1501)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(np.cumsum(belongs, 0) - shares).max() < len(weights)
    for which, length in enumerate(lengths):
        own = numbers[belongs[:, which]] - (ends[which] - length)
        whole = own[: len(own) // length * length].reshape(-1, length)
        assert len(whole) > 1 and (np.sort(whole) == np.arange(length)).all()
        assert (whole[0] != whole[1]).any()


def test_sets_are_mixed_and_deal_out_like_one(train, other_set):
    mixed = ((str(other_set), 0.5),)
    alone = take(iterator(train, mixed=mixed), 6)
    numbers = np.concatenate([batch.index for batch in alone])
    assert np.sum(numbers >= len(train)) == 8  # a third of 24
    other = open_split(other_set, "train")
    for batch in alone:
        for row, number in enumerate(batch.index.tolist()):
            record = train[number] if number < len(train) else other[number - len(train)]
            np.testing.assert_array_equal(batch.occupancy[row], record.occupancy)
    assert_same(alone, take_together([iterator(train, i, 2, mixed=mixed) for i in range(2)], 6))


def test_sets_of_different_grids_are_not_mixed(tiny_set, train, tmp_path):
    fine = shutil.copytree(tiny_set, tmp_path / "fine")
    config = json.loads((fine / "data_config.json").read_text())
    (fine / "data_config.json").write_text(json.dumps({**config, "occupancy_grid": 32}))
    with pytest.raises(ValueError, match="one occupancy_grid"):
        iterator(train, mixed=((str(fine), 1.0),))
    for wrong in (dict(mixed=(("a", 0.0),)), dict(threads=0), dict(max_damaged=1.5)):
        with pytest.raises(ValueError, match=r"expected|positive"):
            PipelineConfig(**wrong)
