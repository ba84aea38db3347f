"""The procedural source: how often what is drawn, which families stand in which split, and what names and keys cost."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from geolrm_jax.data import sdf
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.procedural import ProceduralSource, object_key
from geolrm_jax.data.procedural_shapes import MAX_PRIMITIVES, UNSEEN_FAMILY, Distribution, draw_object
from geolrm_jax.data.reader import open_split

DRAWN = 800
STATED = Distribution()
STAR = list(sdf.PRIMITIVES).index(UNSEEN_FAMILY)


def draw(distribution=STATED, unseen_family=False):
    """Many objects, not fitted into the cube, as NumPy arrays with a leading axis."""
    keys = jax.random.split(jax.random.key(1), DRAWN)
    return jax.tree.map(np.asarray, jax.vmap(lambda key: draw_object(key, distribution, unseen_family))(keys))


def test_operations_happen_as_often_as_stated():
    shapes = draw()
    carved, hollow = shapes.operation == sdf.DIFFERENCE, shapes.shell > 0
    wire, displaced = shapes.wire > 0, shapes.relief > 0
    usual = np.array([0.45, -0.35, 0.82]) / np.linalg.norm([0.45, -0.35, 0.82])
    shares = {
        "carved": carved[:, 1:],
        "hollow": hollow[~carved],
        "wire": wire[~carved & ~hollow],
        "displaced": displaced[~wire],
        "lit": np.abs(shapes.light[:, :3] - usual).max(-1) > 1e-6,
    }
    for name, happened in shares.items():
        expected = getattr(STATED, name)
        assert abs(happened.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / happened.size), name
    assert not carved[:, 0].any() and not (wire & (carved | hollow | displaced)).any()
    counts = np.bincount(shapes.count, minlength=MAX_PRIMITIVES + 1)
    assert counts[0] == 0 and np.abs(counts[1:] / DRAWN - 1 / 9).max() < 0.05
    np.testing.assert_allclose(np.linalg.norm(shapes.light[:, :3], axis=-1), 1, atol=1e-6)
    assert shapes.light[:, 2].min() > 0.19 and 0.39 < shapes.light[:, 3].min() < shapes.light[:, 3].max() < 0.66


def test_relief_has_orthogonal_waves_which_are_the_finer_the_lower():
    shapes = draw(Distribution(displaced=1.0, wire=0.0))
    k = shapes.waves[..., :3]
    products = k @ k.swapaxes(-1, -2)
    lengths = np.linalg.norm(k, axis=-1)
    cosines = products / (lengths[..., None] * lengths[..., None, :])
    np.testing.assert_allclose(cosines, np.broadcast_to(np.eye(3), cosines.shape), atol=1e-5)
    # Height times the largest wave number is at most 0.15 periods, which bounds the slope.
    assert (shapes.relief * lengths.max(-1)).max() < 0.1501 and shapes.relief.min() > 0


def test_one_family_is_in_no_split_but_its_own():
    seen, unseen = draw(), draw(unseen_family=True)
    assert set(seen.kind.ravel().tolist()) == {*range(len(sdf.PRIMITIVES))} - {STAR}
    assert (unseen.kind[:, 0] == STAR).all() and (unseen.operation[:, 0] == sdf.UNION).all()
    assert abs((unseen.kind[:, 1:] == STAR).mean() - 0.5) < 0.03
    source = ProceduralSource(3, 2, 4)
    for split, of_it in (("train", False), ("test", False), ("unseen_family", True)):
        shapes = source.shapes(split, 1)
        assert (int(shapes.kind[0]) == STAR) == of_it


def test_a_built_set_has_the_split_of_the_unseen_family(tiny_config, tmp_path):
    source = dataclasses.replace(tiny_config.source, train_objects=0, test_objects=1, unseen_family_objects=2)
    directory = build(dataclasses.replace(tiny_config, source=source), tmp_path / "set")
    records = open_split(directory, "unseen_family")
    assert [record.id for record in records] == ["procedural/unseen_family/0", "procedural/unseen_family/1"]
    assert records[0].occupancy.any() and len(open_split(directory, "test")) == 1
    with pytest.raises(ValueError, match="no split 'train', it has test, unseen_family"):
        open_split(directory, "train")


def test_no_object_is_in_two_splits_and_a_seed_decides_all():
    keys = [
        tuple(np.asarray(jax.random.key_data(object_key(seed, split, index))).tolist())
        for seed, split, index in itertools.product((0, 1), ProceduralSource.splits, range(60))
    ]
    assert len(set(keys)) == len(keys)
    a, b = ProceduralSource(seed=3).shapes("test", 1), ProceduralSource(900, 5, seed=3).shapes("test", 1)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_distribution_without_an_operation_has_none_of_it():
    shapes = draw(Distribution((2, 3), carved=0.0, hollow=0.0, wire=0.0, displaced=0.0, lit=0.0))
    assert set(shapes.count.tolist()) == {2, 3}
    assert not (shapes.operation.any() or shapes.shell.any() or shapes.wire.any() or shapes.relief.any())
    assert len(np.unique(shapes.light, axis=0)) == 1


def test_wrong_numbers_are_named():
    for count in ((0, 3), (4, 2), (1, 10)):
        with pytest.raises(ValueError, match=r"primitives: expected 1 <= fewest <= most <= 9, got"):
            Distribution(count)
    with pytest.raises(ValueError, match=r"wire is a probability, got 1\.5"):
        Distribution(wire=1.5)
    with pytest.raises(ValueError, match="train_objects must not be negative, got -1"):
        ProceduralSource(-1)
    with pytest.raises(ValueError, match=r"view_ids: expected distinct numbers from 0 to 39, got \(3, 40\)"):
        ProceduralSource(view_ids=(3, 40))
