"""Building a set: complete or not there, reused when it is the same, refused when it is another."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from geolrm_jax.data.builders import records
from geolrm_jax.data.builders.records import DataConfig, build, make_record
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.pipeline import open_split
from geolrm_jax.data.procedural import ProceduralSource


def test_records_come_back_as_they_were_made(tiny_set, tiny_config):
    source = open_split(tiny_set, "test")
    assert [source[i].id for i in range(len(source))] == ["procedural/test/0", "procedural/test/1"]
    made, stored = make_record(tiny_config, "test", "procedural/test/1"), source[1]
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(made, field.name), getattr(stored, field.name), err_msg=field.name)
    assert stored.occupancy.sum() > 20


def test_train_and_test_objects_differ(tiny_set):
    pictures = [open_split(tiny_set, split)[i].images[0] for split in ("train", "test") for i in range(2)]
    assert len(set(pictures)) == 4


def test_same_config_is_reused_and_another_refused(tiny_set, tiny_config, monkeypatch):
    monkeypatch.setattr(records, "make_record", lambda *_: pytest.fail("built again"))
    assert build(dataclasses.replace(tiny_config, root="elsewhere"), tiny_set) == tiny_set
    other = dataclasses.replace(tiny_config, occupancy_grid=8)
    with pytest.raises(ValueError, match="occupancy_grid is 16 there, 8 here"):
        build(other, tiny_set)


def test_interrupted_build_leaves_nothing_that_looks_complete(tiny_config, tmp_path, monkeypatch):
    working = records.make_record

    def interrupted(config, split, id):
        if id == "procedural/train/4":
            raise KeyboardInterrupt
        return working(config, split, id)

    monkeypatch.setattr(records, "make_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_config, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(records, "make_record", working)
    assert len(open_split(build(tiny_config, tmp_path / "set"), "train")) == 7


def test_what_is_no_set_is_named(tmp_path, tiny_set):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for call in (lambda: build(DataConfig(), tmp_path / "other"), lambda: open_split(tmp_path / "other", "train")):
        with pytest.raises(FileNotFoundError, match=r"other is no built data set: data_config.json expected"):
            call()
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        open_split(tiny_set, "validation")
    empty = DataConfig(source=ProceduralSource(train_objects=0, test_objects=0))
    with pytest.raises(ValueError, match="an empty data set"):
        build(empty, tmp_path / "empty")


def test_folder_source_is_built_and_a_broken_object_named(real_renders, tmp_path):
    source = FolderSource(
        root=str(real_renders), train=("plate",), test=("plate",), train_views=(0, 6), test_views=(3,)
    )
    directory = build(DataConfig(source=source, occupancy_grid=16, image_encoding="png"), tmp_path / "set")
    [record] = open_split(directory, "test")
    assert (record.id, record.view_ids.tolist(), record.size) == ("plate", [3], (256, 256))
    missing = dataclasses.replace(source, train_views=(0, 77))
    with pytest.raises(FileNotFoundError, match=r"plate has no views \[77\]"):
        build(DataConfig(source=missing), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_tensorflow_is_not_imported(tiny_set):
    program = (
        "import sys; from geolrm_jax.data.pipeline import open_split;"
        f"open_split({str(tiny_set)!r}, 'train')[0]; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
