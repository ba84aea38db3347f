"""Examples: sizes and colours, view choice, batches."""

import itertools
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy.ndimage import zoom

from geolrm_jax.data.examples import choose_views, make_example, premultiply
from geolrm_jax.data.pipeline import training_dataset
from geolrm_jax.data.reader import open_split
from geolrm_jax.geometry.cameras import rays


@pytest.fixture(scope="module")
def train(tiny_set):
    return open_split(tiny_set, "train")


def test_example_has_premultiplied_colours_and_the_records_cameras(train):
    record = train[2]
    example = make_example(record, [8, 0], [25], (32, 32), (32, 32), index=2)
    rgba = record.views([8, 0]).rgba / 255.0
    np.testing.assert_allclose(example.inputs.rgb, rgba[..., :3] * rgba[..., 3:], atol=1e-6)
    np.testing.assert_allclose(example.inputs.alpha, rgba[..., 3], atol=1e-6)
    np.testing.assert_array_equal(example.targets.depth[0], record.views([25]).depth[0])
    np.testing.assert_array_equal(example.targets.cameras.world_from_camera[0], record.world_from_camera[6])
    np.testing.assert_array_equal(example.occupancy, record.occupancy)
    assert example.index == 2 and example.inputs.valid.all()


def test_premultiplication_of_every_value(rng):
    every = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1).astype(np.uint8)
    rgba = np.stack([every[..., 0], every[..., 0][::-1], every[..., 1], every[..., 1]], -1)[None]
    rgb, alpha = premultiply(rgba)
    exact = rgba / 255.0
    np.testing.assert_allclose(rgb, exact[..., :3] * exact[..., 3:], rtol=3e-7)
    np.testing.assert_allclose(alpha, exact[..., 3], rtol=3e-7)
    assert alpha.max() == 1.0 and rgb.max() == 1.0 and rgb.dtype == np.float32


def test_views_in_any_order_are_those_that_were_asked_for(train):
    """Targets that start with the inputs take a shorter way than others."""
    record, every = train[4], train[4].view_ids.tolist()
    whole = make_example(record, every, every, (32, 32), (32, 32))
    for inputs, targets in (([12, 4], [12, 4, 0]), ([0], [20, 0]), ([8, 4], [16, 25])):
        example = make_example(record, inputs, targets, (16, 16), (32, 32))
        rows = [every.index(view) for view in targets]
        np.testing.assert_array_equal(example.targets.rgb, whole.targets.rgb[rows])
        poses = whole.targets.cameras.world_from_camera[[every.index(view) for view in inputs]]
        np.testing.assert_array_equal(example.inputs.cameras.world_from_camera, poses)


def test_resizing_keeps_means_rays_and_depth_values(train):
    record = train[0]
    full = make_example(record, [0], [0], (32, 32), (32, 32)).inputs
    small = make_example(record, [0], [0], (16, 8), (64, 64))
    # Halving by a triangle filter, away from the border, is the weighting 1 3 3 1 of SciPy-free arithmetic.
    weights = np.array([1, 3, 3, 1]) / 8
    rows = np.stack([np.tensordot(weights, full.alpha[0, 2 * i - 1 : 2 * i + 3], 1) for i in range(1, 15)])
    half = make_example(record, [0], [0], (16, 32), (32, 32)).inputs
    np.testing.assert_allclose(half.alpha[0, 1:15], rows, atol=1e-5)
    np.testing.assert_allclose(small.inputs.rgb.mean(), full.rgb.mean(), rtol=2e-2)
    assert set(np.unique(small.inputs.depth)) <= set(np.unique(full.depth))
    np.testing.assert_array_equal(
        small.targets.depth[0], zoom(full.depth[0], 2, order=0, grid_mode=True, mode="nearest")
    )
    # Non-square: the field of view is kept on each axis, so the corners' rays are those of the original.
    edges = [np.asarray(rays(views.cameras)[1])[0] for views in (small.inputs, full)]
    centers = [directions.mean((0, 1)) for directions in edges]
    np.testing.assert_allclose(*centers, atol=2e-3)
    intrinsics = small.inputs.cameras.intrinsics[0]
    np.testing.assert_allclose(intrinsics[:2, 2], [4, 8])


def test_missing_views_are_named(train):
    with pytest.raises(ValueError, match=r"procedural/train/0: no views \[1\]"):
        make_example(train[0], [0], [1], (32, 32), (32, 32))


def test_view_rules():
    ids = np.array([v for v in range(40) if v not in (24, 39)], np.int32)
    drawn = [choose_views(ids, 8, "paper", np.random.default_rng(i), "a") for i in range(400)]
    assert all(len(set(d)) == 8 for d in drawn)
    counts = np.bincount(np.ravel(drawn), minlength=40)[ids]
    assert counts.min() > 0.6 * counts.mean()

    for i in range(50):
        released = choose_views(ids, 8, "released", np.random.default_rng(i), "a")
        assert len(set(released)) == 8
        assert released[:4] == [(released[0] + 6 * k) % 24 for k in range(4)] and released[0] < 24
    with pytest.raises(ValueError, match="a has 38 views, 39 are to be drawn"):
        choose_views(ids, 39, "paper", np.random.default_rng(0), "a")


def dataset(source, **changes):
    arguments = dict(batch=2, views=4, inputs=2, input_size=(28, 28), render_size=(32, 32), seed=5)
    return training_dataset(source, **{**arguments, **changes})


def test_batches(train):
    batch = next(iter(dataset(train)))
    assert batch.inputs.rgb.shape == (2, 2, 28, 28, 3) and batch.targets.depth.shape == (2, 4, 32, 32)
    assert batch.occupancy.shape == (2, 16, 16, 16) and batch.inputs.cameras.height == 28
    # The inputs are the first targets.
    np.testing.assert_array_equal(
        batch.inputs.cameras.world_from_camera, batch.targets.cameras.world_from_camera[:, :2]
    )
    for row, index in enumerate(batch.index.tolist()):
        np.testing.assert_array_equal(batch.occupancy[row], train[index].occupancy)


def test_inputs_of_the_targets_size_are_the_first_targets(train):
    same, other = (next(iter(dataset(train, input_size=(size, size)))) for size in (32, 28))
    np.testing.assert_array_equal(same.inputs.rgb, same.targets.rgb[:, :2])
    assert same.inputs.rgb.shape == (2, 2, 32, 32, 3) and same.inputs.cameras.height == 32
    jax.tree.map(np.testing.assert_array_equal, same.targets, other.targets)


def test_every_epoch_holds_every_record_in_another_order(train):
    batches = itertools.islice(dataset(train, batch=1), 21)
    seen = np.concatenate([batch.index for batch in batches]).reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) > 1


def test_records_can_be_sent_to_worker_processes(train):
    assert pickle.loads(pickle.dumps(train))[3].id == train[3].id


_READ_A_BATCH = """
import sys
from geolrm_jax.data.augmentation import Augmentation
from geolrm_jax.data.pipeline import PipelineConfig, training_dataset
from geolrm_jax.data.reader import open_split

sizes = dict(input_size=(28, 28), render_size=(24, 24))
config = PipelineConfig(augmentation=Augmentation(roll=5.0, color=0.1))
dataset = training_dataset(open_split(sys.argv[1], "train"), batch=2, views=3, inputs=2, seed=0, config=config, **sizes)
print(next(iter(dataset)).targets.rgb.shape)
"""


def test_reading_leaves_the_accelerator_alone(tiny_set):
    """A worker process that touched it would take its memory; a TPU would not let it in. Here any touch is an error."""
    environment = {**os.environ, "JAX_PLATFORMS": "absent"}
    command = [sys.executable, "-c", _READ_A_BATCH, str(tiny_set)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout == "(2, 3, 24, 24, 3)\n", ended.stderr


def test_impossible_requests_are_refused(train):
    with pytest.raises(ValueError, match="inputs=5, views=4"):
        dataset(train, inputs=5)
    with pytest.raises(ValueError, match="3 objects cannot be split into 2 equal parts"):
        dataset(train, batch=3, share=((0,), 2))
    with pytest.raises(ValueError, match="has 7 views, 8 are to be drawn"):
        next(iter(dataset(train, views=8)))
