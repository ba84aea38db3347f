"""The commands `geolrm data build` and `geolrm data check`, and what makes a built set unsound."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from geolrm_jax import cli
from geolrm_jax.data.builders.agreement import check_agreement
from geolrm_jax.data.builders.config import DataConfig, read_config
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.checking import check, judge
from geolrm_jax.data.folder import FolderSource, read_views
from geolrm_jax.data.reader import open_split
from geolrm_jax.scene import Cameras

VIEWS = (0, 5, 10, 15, 20, 30)


@pytest.fixture(scope="module")
def built(real_renders, tmp_path_factory):
    """A set of three objects, made by the command."""
    folder = tmp_path_factory.mktemp("check")
    for name in ("basket", "boat", "milk", "desk"):
        for view in VIEWS:
            shutil.copytree(real_renders / name / f"{view:05d}", folder / "source" / "0" / name / f"{view:05d}")
    (folder / "index.json").write_text(json.dumps({f"0/{name}": "" for name in ("basket", "boat", "milk", "desk")}))
    (folder / "captions.json").write_text(json.dumps({"0/desk": "a box with legs"}))
    (folder / "test.txt").write_text("0/milk\n")
    options = ["--index", "index.json", "--captions", "captions.json", "--test", "test.txt"]
    options = [str(folder / option) if "." in option else option for option in options]
    common = ["--grid", "32", "--encoding", "png", "--processes", "1", "--min-views", "6"]
    command = ["data", "build", "gobjaverse", "--source", str(folder / "source"), "--out", str(folder / "set")]
    assert cli.main([*command, *options, *common]) == 0
    return folder / "set"


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_command_builds_what_it_was_asked_for(built):
    assert [open_split(built, "train")[i].id for i in range(2)] == ["0/basket", "0/boat"]
    record = open_split(built, "test")[0]
    assert (record.id, record.grid, record.encoding, record.view_ids.tolist()) == ("0/milk", 32, "png", list(VIEWS))
    [left_out] = [json.loads(line) for line in (built / "rejected.jsonl").read_text().splitlines()]
    assert (left_out["id"], left_out["kind"]) == ("0/desk", "left out")


def test_a_sound_set_passes_and_has_a_page(built, capsys):
    assert cli.main(["data", "check", str(built), "--processes", "1"]) == 0
    told = capsys.readouterr().out
    assert "2 train, 1 test" in told and "1 left out" in told
    page = (built / "check.html").read_text()
    assert page.count("<img") == 3 and "0/milk" in page


def test_what_was_done_to_files_is_found(copy, capsys):
    [missing] = copy.glob("views/*/*-test.array_record*")
    missing.unlink()
    [broken, _] = sorted(copy.glob("objects/*/*-train.array_record*"))
    data = bytearray(broken.read_bytes())
    data[700] ^= 4
    broken.write_bytes(data)
    (copy / "views" / "2.0.0" / "views-train.array_record-00007-of-00008").touch()
    assert cli.main(["data", "check", str(copy), "--processes", "1"]) == 1
    told = capsys.readouterr().err
    for text in (f"{missing.name}: missing", f"{broken.name}: SHA-256", "train[0]: ", "00007-of-00008: not in the"):
        assert text in told
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        check(copy)


def test_metadata_that_disagrees_is_found(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["views"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert any("records a shard" in finding for finding in check(copy, processes=1).findings)
    info = next(copy.glob("views/*/dataset_info.json"))
    info.write_text(info.read_text()[:100])
    with pytest.raises(ValueError, match="TFDS's metadata is damaged"):
        open_split(copy, "train")


@pytest.mark.parametrize("key", ["split", "shard", "objects", "views", "files"])
@pytest.mark.parametrize("value", [None, -1, "x", [], {"a": 1}])
def test_an_edited_manifest_is_named(copy, key, value):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][1][key] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: shards\[\d\].\w+: expected"):
        check(copy, processes=1)


def test_other_edited_files_are_named(copy):
    manifest, config = ((copy / name).read_text() for name in ("manifest.json", "data_config.json"))
    for text in ("[]", '{"shards": 3}', '{"shards": [3]}', "[" * 100_000):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json is damaged"):
            check(copy)
    edited = json.loads(manifest)
    [name, _] = edited["shards"][0]["files"]
    edited["shards"][0]["files"][name] = {"bytes": "3"}
    (copy / "manifest.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"shards\[0\].files\['objects/.*'\]: expected sha256, and bytes"):
        check(copy)
    edited = json.loads(manifest)
    edited["shards"][0]["objects"] += 5
    (copy / "manifest.json").write_text(json.dumps(edited))
    assert any("records a shard" in finding for finding in check(copy, processes=1).findings)
    (copy / "manifest.json").write_text(manifest)
    for line in ("3", '{"id": "a"}', '{"kind": 4}'):
        (copy / "rejected.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"rejected.jsonl is damaged: line 1: a JSON object with kind"):
            check(copy)
    edited = json.loads(config)
    del edited["image_encoding"]
    (copy / "data_config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"data_config.json is damaged: image_encoding expected"):
        check(copy)


def test_what_was_found_is_told_without_a_page(copy, tmp_path, capsys):
    (copy / "check.html").unlink(missing_ok=True)
    (copy / "check.html").mkdir()  # cannot be replaced by a file, as in a folder that cannot be written to
    assert cli.main(["data", "check", str(copy), "--processes", "1", "--every", "9", "--pictured", "1"]) == 0
    told = capsys.readouterr()
    assert "2 train, 1 test" in told.out and "the page of pictures was not written" in told.out + told.err
    page = tmp_path / "elsewhere.html"
    assert check(copy, processes=1, every=9, pictured=1, page=page).page == page and page.is_file()
    for options, message in (({"processes": 0}, "processes must be at least 1"), ({"pictured": -1}, "pictured at")):
        with pytest.raises(ValueError, match=message):
            check(copy, **options)


def test_an_object_may_be_in_two_splits(real_renders, tmp_path):
    source = FolderSource(str(real_renders), train=("milk",), test=("milk",), train_views=VIEWS, test_views=VIEWS)
    directory = build(DataConfig(source, occupancy_grid=16), tmp_path / "set", processes=1)
    assert check(directory, processes=1, pictured=0).findings == []


def test_records_are_judged(built):
    record, config = open_split(built, "train")[0], read_config(built)
    judge(record, config)
    moved = np.packbits(np.roll(record.occupancy, 4, axis=0)).tobytes()
    for changes, message in (
        ({"occupancy_bits": moved}, "0/basket: .* voxels of its occupancy have no counterpart"),
        ({"occupancy_bits": bytes(len(moved))}, "no voxel is occupied"),
        ({"depth_range": record.depth_range[:, ::-1]}, "0 <= near <= far"),
        ({"depth_range": record.depth_range * np.float32(1.3)}, "lie outside the cube|contradicts"),
        ({"occupancy_rounding": "released"}, "occupancy_rounding is released, the set's"),
        ({"world_from_camera": record.world_from_camera[::-1]}, "contradicts|outside the cube"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(dataclasses.replace(record, **changes), config)


@pytest.mark.parametrize("name", ["basket", "wine_rack", "plant"])
def test_one_wrong_view_of_many_is_found(real_renders, name):
    views = read_views(real_renders / name, [*range(0, 24, 2), 25, 26])
    check_agreement(views, name)
    poses, k = views.cameras.world_from_camera, views.cameras.intrinsics
    turn = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)
    world, axes, other, zoom, depth, rgba = (a.copy() for a in (poses, poses, poses, k, views.depth, views.rgba))
    world[5, :3], axes[5, :3, :3], other[5] = turn @ world[5, :3], axes[5, :3, :3] @ turn, poses[7]
    zoom[5, :2, :2] *= 0.8
    depth[5], rgba[5] = 0.0, 0
    size = views.cameras.height, views.cameras.width
    for broken in (
        *(views._replace(cameras=Cameras(pose, k, *size)) for pose in (world, axes, other)),
        views._replace(cameras=Cameras(poses, zoom, *size)),
        views._replace(depth=depth, rgba=rgba),
        views._replace(depth=views.depth.swapaxes(1, 2)),
    ):
        with pytest.raises(ValueError, match=f"{name}, view (10|0|2): "):
            check_agreement(broken, name)
