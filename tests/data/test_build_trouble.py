"""Builds where not the objects are at fault: a full disk, a folder gone, two at once, odd names, a power cut."""

import dataclasses
import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from geolrm_jax.data.builders import shards
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.layout import count_objects, read_rejected
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.checking import check
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.reader import open_split

VIEWS = (0, 6, 12, 18)
OBJECTS = ("basket", "boat", "desk")


@pytest.fixture
def linked(real_renders, tmp_path) -> Path:
    """The real renders under a path of our own."""
    (tmp_path / "renders").symlink_to(real_renders)
    return tmp_path / "renders"


@pytest.fixture
def config(linked):
    source = FolderSource(str(linked), train=OBJECTS, test=("plate",), train_views=VIEWS, test_views=VIEWS)
    return DataConfig(source, occupancy_grid=16)


def before(monkeypatch, wanted, action):
    """Calls `action()` before the object `wanted` is made."""
    working = shards.make_record

    def make_record(config, split, id):
        if id == wanted:
            action()
        return working(config, split, id)

    monkeypatch.setattr(shards, "make_record", make_record)


def test_of_two_builds_at_once_the_second_waits_and_finds_the_set(config, tmp_path, monkeypatch):
    began, results = threading.Event(), []
    go_on = threading.Event()
    before(monkeypatch, "boat", lambda: (began.set(), go_on.wait(60)))
    first = threading.Thread(target=lambda: results.append(build(config, tmp_path / "set", processes=1)))
    first.start()
    assert began.wait(60)
    threading.Timer(1.0, go_on.set).start()
    with pytest.warns(UserWarning, match="another process builds there, waiting for it"):
        results.append(build(config, tmp_path / "set", processes=1))
    first.join()
    assert results == [tmp_path / "set"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["renders", "set"]
    assert count_objects(tmp_path / "set") == {"train": 3, "test": 1}


def test_a_full_disk_is_one_error_and_is_left_as_it_was(config, tmp_path):
    """A limit on the size of files stands for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="is the disk full"):
            build(config, tmp_path / "set", processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*array_record*"))
    assert count_objects(build(config, tmp_path / "set", processes=1)).total() == 4


def test_a_source_that_goes_away_ends_the_build_and_costs_no_object(
    config, linked, real_renders, tmp_path, monkeypatch
):
    before(monkeypatch, "desk", linked.unlink)
    with pytest.raises(OSError, match="renders is gone"):
        build(config, tmp_path / "set", processes=1, max_rejected=1.0)
    monkeypatch.undo()
    linked.symlink_to(real_renders)
    directory = build(config, tmp_path / "set", processes=1)
    assert read_rejected(directory) == [] and count_objects(directory).total() == 4


def test_a_marker_that_a_power_cut_left_empty_means_that_its_shard_is_built_again(config, tmp_path, monkeypatch):
    before(monkeypatch, "desk", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path / "set", processes=1)
    monkeypatch.undo()
    [first, _] = sorted((tmp_path / "set.unfinished" / "shards").iterdir())
    first.write_text("")
    (tmp_path / "set.unfinished" / ".rejected.77.jsonl").touch()  # as a process killed while it wrote leaves one
    asked = []
    working = shards.make_record
    monkeypatch.setattr(shards, "make_record", lambda c, split, id: asked.append(id) or working(c, split, id))
    directory = build(config, tmp_path / "set", processes=1)
    assert asked == ["basket", "desk", "plate"]
    assert not list(directory.rglob(".*"))


def test_reasons_may_hold_any_name(config, linked, tmp_path):
    names = ["a\u2028b", "c\x85d", "\udcffe", "f\ng"]
    (tmp_path / "index.json").write_text(json.dumps([*names, *OBJECTS, "plate"]))
    source = dataclasses.replace(config.source, train=None, index=str(tmp_path / "index.json"))
    directory = build(dataclasses.replace(config, source=source), tmp_path / "set", processes=1, max_rejected=1.0)
    assert sorted(entry["id"] for entry in read_rejected(directory)) == sorted(names)
    assert check(directory, processes=1).findings == []


def test_stray_depths_do_not_widen_the_steps_of_a_view(config, tmp_path, monkeypatch):
    """A pixel whose depth no point of the cube has becomes missing; the others keep the stated error."""
    working = FolderSource.read

    def with_stray_pixels(self, split, id):
        views = working(self, split, id)
        depth = views.depth.copy()
        depth[:, 0, 0] = 5e4
        return views._replace(depth=depth)

    monkeypatch.setattr(FolderSource, "read", with_stray_pixels)
    record = open_split(build(config, tmp_path / "set", processes=1), "test")[0]
    true = working(config.source, "test", "plate").depth
    stored = record.views(list(VIEWS)).depth
    assert (stored[:, 0, 0] == 0.0).all()
    np.testing.assert_allclose(stored, true, atol=1.4e-5)


@pytest.mark.slow
def test_a_program_without_a_main_guard_is_told_so(config, tmp_path):
    (tmp_path / "program.py").write_text(
        f"from geolrm_jax.data.builders.config import DataConfig\n"
        f"from geolrm_jax.data.builders.records import build\n"
        f"from geolrm_jax.data.folder import FolderSource\n"
        f"source = FolderSource({config.source.root!r}, train={OBJECTS!r}, train_views=(0, 6))\n"
        f"build(DataConfig(source, occupancy_grid=16), {str(tmp_path / 'set')!r}, processes=2)\n"
    )
    ended = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "if __name__ == '__main__':" in ended.stderr
