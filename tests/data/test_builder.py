"""Building a set: complete or not there, the same bytes however it was made, refused where it is another."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from geolrm_jax.data.builders import records, shards
from geolrm_jax.data.builders.config import DataConfig, read_config
from geolrm_jax.data.builders.layout import KINDS, VERSION
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.builders.shards import make_record
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.reader import DamagedRecord, open_split

VIEWS = (0, 6, 12, 18)


@pytest.fixture(scope="module")
def folder_config(real_renders):
    """Six real objects of four views."""
    train = ("basket", "bbq_sauce", "boat", "desk", "milk")
    source = FolderSource(str(real_renders), train=train, test=("plate",), train_views=VIEWS, test_views=VIEWS)
    return DataConfig(source, occupancy_grid=32)


def contents(directory):
    """SHA-256 of every file of a set, and when it was written."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    digests = {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return digests, {str(p.relative_to(directory)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def test_records_come_back_as_they_were_made(tiny_set, tiny_config):
    source = open_split(tiny_set, "test")
    assert [source[i].id for i in range(len(source))] == ["procedural/test/0", "procedural/test/1"]
    made, stored = make_record(tiny_config, "test", "procedural/test/1"), source[1]
    for field in dataclasses.fields(made):
        if field.name != "read_views":
            np.testing.assert_array_equal(getattr(made, field.name), getattr(stored, field.name), err_msg=field.name)
    assert made.read_views([3, 0]) == stored.read_views([3, 0])
    assert stored.occupancy.sum() > 20


def test_train_and_test_objects_differ(tiny_set):
    pictures = [open_split(tiny_set, s)[i].read_views([0])[0].image for s in ("train", "test") for i in range(2)]
    assert len(set(pictures)) == 4


def test_tfds_opens_the_set(tiny_set):
    objects, views = (tfds.builder_from_directory(tiny_set / kind / VERSION) for kind in KINDS)
    assert objects.info.splits["train"].num_examples == 7 and views.info.splits["train"].num_examples == 49
    first = views.as_data_source("train")[0]
    assert (first["id"], first["view_id"], len(first["image"])) == (b"procedural/train/0", 0, 32 * 32 * 4)


def test_same_config_is_reused_and_another_refused(tiny_set, tiny_config, monkeypatch):
    monkeypatch.setattr(records, "run_tasks", lambda *_, **__: pytest.fail("built again"))
    assert build(dataclasses.replace(tiny_config, root="elsewhere"), tiny_set) == tiny_set
    other = dataclasses.replace(tiny_config, occupancy_grid=8)
    with pytest.raises(ValueError, match="occupancy_grid is 16 there, 8 here"):
        build(other, tiny_set)
    built = DataConfig(FolderSource("/nowhere"), occupancy_grid=16, root=str(tiny_set), built=True)
    assert build(built, tiny_set) == tiny_set
    with pytest.raises(ValueError, match="occupancy_grid is 16 there, 64 here"):
        build(dataclasses.replace(built, occupancy_grid=64), tiny_set)


def test_the_first_format_is_refused_by_name(tiny_set, tmp_path):
    (tmp_path / "data_config.json").write_text(json.dumps({**read_config(tiny_set), "format_version": 1}))
    with pytest.raises(ValueError, match="format version 1, this program reads 2: build the set anew"):
        open_split(tmp_path, "train")


def test_interrupted_build_goes_on_and_gives_the_same_bytes(folder_config, tmp_path, monkeypatch):
    whole = build(folder_config, tmp_path / "whole", processes=1)
    working = shards.make_record

    def interrupted(config, split, id):
        if id == "desk":
            raise KeyboardInterrupt
        return working(config, split, id)

    monkeypatch.setattr(shards, "make_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(folder_config, tmp_path / "set", processes=1)
    assert not (tmp_path / "set").exists()
    _, before = contents(tmp_path / "set.unfinished")
    finished = [name for name in before if "/objects-train" in name and "/." not in name]
    assert len(finished) == 3
    with pytest.raises(ValueError, match=r"occupancy_grid is 32 there, 16 here: delete .*set.unfinished"):
        build(dataclasses.replace(folder_config, occupancy_grid=16), tmp_path / "set")

    asked = []
    monkeypatch.setattr(shards, "make_record", lambda config, split, id: asked.append(id) or working(config, split, id))
    build(folder_config, tmp_path / "set", processes=1)
    assert asked == ["desk", "milk", "plate"]
    digests, after = contents(tmp_path / "set")
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert digests == contents(whole)[0] and len(digests) == 2 * 6 + 2 * 2 + 3
    assert not (tmp_path / "set.unfinished").exists()


PROGRAM = """
import sys
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.folder import FolderSource
if __name__ == "__main__":
    source = FolderSource(sys.argv[1], train={train!r}, test=("plate",), train_views={views!r}, test_views={views!r})
    build(DataConfig(source, occupancy_grid=32), sys.argv[2], processes=2)
"""


def test_a_build_killed_before_its_last_step_needs_no_more_than_that(tiny_set, tiny_config, tmp_path, monkeypatch):
    shutil.copytree(tiny_set, tmp_path / "set.unfinished")
    (tmp_path / "set.unfinished" / "shards").mkdir()
    (tmp_path / "set.unfinished" / "plan.json").write_text("{}")
    monkeypatch.setattr(records, "run_tasks", lambda *_, **__: pytest.fail("built again"))
    with pytest.raises(ValueError, match="occupancy_grid is 16 there, 8 here"):
        build(dataclasses.replace(tiny_config, occupancy_grid=8), tmp_path / "set")
    build(tiny_config, tmp_path / "set")
    assert contents(tmp_path / "set")[0] == contents(tiny_set)[0] and not (tmp_path / "set.unfinished").exists()


@pytest.mark.slow
def test_killed_processes_leave_a_set_that_goes_on(folder_config, real_renders, tmp_path):
    """kill -9 of a build by two processes: its workers end too, finished shards stay as they are, the bytes agree."""
    (tmp_path / "program.py").write_text(PROGRAM.format(train=folder_config.source.train, views=VIEWS))
    command = [sys.executable, str(tmp_path / "program.py"), str(real_renders), str(tmp_path / "set")]
    unfinished = tmp_path / "set.unfinished"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not list(unfinished.glob("shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if unfinished.exists():  # else it was faster than the kill
        time.sleep(1.0)
        _, before = contents(unfinished)
        time.sleep(0.5)
        assert contents(unfinished)[1] == before, "a worker process goes on writing"
    subprocess.run(command, check=True, timeout=300)
    _, after = contents(tmp_path / "set")
    if (tmp_path / "set").exists() and "before" in locals():
        marked = [name for name in before if name.startswith("shards/")]
        stems = [f"{name[7:-11]}.array_record-{name[-10:-5]}" for name in marked]
        kept = [name for name in after if any(stem in name for stem in stems)]
        assert len(kept) == 2 * len(marked) and all(after[name] == before[name] for name in kept)
    whole = build(folder_config, tmp_path / "whole", processes=1)
    assert contents(whole)[0] == contents(tmp_path / "set")[0]


def test_what_is_no_set_is_named(tmp_path, tiny_set):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for call in (lambda: build(DataConfig(), tmp_path / "other"), lambda: open_split(tmp_path / "other", "train")):
        with pytest.raises(FileNotFoundError, match=r"other is no built data set: data_config.json expected"):
            call()
    with pytest.raises(ValueError, match="no split 'validation', it has train, test"):
        open_split(tiny_set, "validation")
    empty = DataConfig(source=ProceduralSource(train_objects=0, test_objects=0))
    with pytest.raises(ValueError, match="an empty data set"):
        build(empty, tmp_path / "empty")
    assert not [path for path in tmp_path.iterdir() if "empty" in path.name]
    with pytest.raises(ValueError, match="expected max_rejected"):
        build(empty, tmp_path / "empty", max_rejected=2.0)


def test_rejected_objects_are_listed_and_stop_the_build_past_a_share(folder_config, tmp_path):
    source = dataclasses.replace(folder_config.source, train=(*folder_config.source.train[:3],), test_views=(0, 77))
    config = DataConfig(source, occupancy_grid=16, image_encoding="png")
    with pytest.raises(ValueError, match=r"1 of 4 objects were rejected, more than 10%.*plate has no views \[77\]"):
        build(config, tmp_path / "set", processes=1)
    with pytest.raises(ValueError, match="no object of test is sound"):
        build(config, tmp_path / "set", processes=1, max_rejected=0.5)
    source = dataclasses.replace(source, test=("plate", "milk"), test_views=VIEWS, train=("boat", "boat", "desk"))
    source = dataclasses.replace(source, min_views=4, train_views=None, captions=str(tmp_path / "captions.json"))
    (tmp_path / "captions.json").write_text(json.dumps({"desk": "a Boxy desk", "milk": "a cube of milk"}))
    directory = build(DataConfig(source, occupancy_grid=16), tmp_path / "other", processes=1)
    listed = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    assert [(e["split"], e["id"], e["kind"]) for e in listed] == [
        ("train", "boat", "left out"),
        ("train", "desk", "left out"),
    ]
    assert listed[0]["reason"] == "listed 2 times, stored once" and "'box'" in listed[1]["reason"]
    assert (len(open_split(directory, "train")), len(open_split(directory, "test"))) == (1, 2)


def test_a_flipped_bit_is_a_damaged_record(folder_config, tmp_path):
    directory = build(folder_config, tmp_path / "set", processes=1)
    for kind, read in (("objects", lambda s: s[0]), ("views", lambda s: s[0].views([0]))):
        [path] = directory.glob(f"{kind}/*/*-test.array_record-00000-of-00001")
        data = bytearray(path.read_bytes())
        data[500] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedRecord, match="hash mismatch"):
            read(open_split(directory, "test"))
        data[500] ^= 1
        path.write_bytes(data)
    assert open_split(directory, "test")[0].views([0]).rgba.any()


def test_tensorflow_is_not_imported(tiny_set):
    program = (
        "import sys; from geolrm_jax.data.reader import open_split;"
        f"open_split({str(tiny_set)!r}, 'train')[0].views(); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ}, cwd=Path(__file__).parent)
