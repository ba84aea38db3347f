"""Records: what goes in comes out, to the stated error; what is unsound is refused by name."""

import dataclasses
import pickle
import resource

import numpy as np
import pytest

from geolrm_jax.data.reader import open_split
from geolrm_jax.data.record import DamagedRecord, PosedImages, Record, check_views
from geolrm_jax.geometry.cameras import orbit
from geolrm_jax.scene import Cameras


@pytest.fixture
def views(rng):
    depth = rng.uniform(1.2, 2.4, (3, 10, 10)).astype(np.float32) * (rng.random((3, 10, 10)) < 0.7)
    depth[2] = 0.0
    rgba = rng.integers(0, 256, (3, 10, 10, 4), dtype=np.uint8)
    return PosedImages(
        np.array([4, 0, 9], np.int32), rgba, depth.astype(np.float32), orbit([0, 50, 90], 10, 1.9, 40.0, 10)
    )


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_encoded_views_come_back(views, encoding, rng):
    occupancy = rng.random((9, 9, 9)) < 0.3
    record = Record.encode("a/b", views, occupancy, occupancy_rounding="voxel", encoding=encoding)
    back = record.views([9, 4])
    np.testing.assert_array_equal(back.view_ids, [9, 4])
    np.testing.assert_array_equal(back.rgba, views.rgba[[2, 0]])
    np.testing.assert_array_equal(back.depth == 0, views.depth[[2, 0]] == 0)
    span = views.depth[0].max() - views.depth[0][views.depth[0] > 0].min()
    assert np.abs(back.depth - views.depth[[2, 0]]).max() <= span / 131068 + 3e-7
    np.testing.assert_array_equal(back.cameras.world_from_camera, views.cameras.world_from_camera[[2, 0]])
    np.testing.assert_array_equal(record.occupancy, occupancy)


def test_reading_some_views_decodes_only_those(views):
    record = Record.encode("a", views, np.ones((2, 2, 2), bool), occupancy_rounding="voxel", encoding="png")
    asked = []

    def read_views(rows):
        asked.extend(rows)
        return record.read_views(rows)

    watched = dataclasses.replace(record, read_views=read_views)
    assert watched.views([9]).rgba.shape == (1, 10, 10, 4) and asked == [2]
    with pytest.raises(ValueError, match=r"a: no views \[7\]"):
        record.views([4, 7])


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize(
    "damage, reason",
    [
        ({"image": b"no picture"}, "a: "),
        ({"depth": b""}, "a: "),
        ({"view_id": 9}, "a: view 4 is stored as view 9 of a"),
        ({"id": "b"}, "a: view 4 is stored as view 4 of b"),
    ],
)
def test_a_damaged_view_is_one_kind_of_error_that_names_its_object(views, encoding, damage, reason):
    record = Record.encode("a", views, np.ones((2, 2, 2), bool), occupancy_rounding="voxel", encoding=encoding)
    [first] = record.read_views([0])
    broken = dataclasses.replace(record, read_views=lambda rows: [first._replace(**damage)] * len(rows))
    with pytest.raises(DamagedRecord, match=reason) as caught:
        broken.views([4])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.id, str(again)) == ("a", str(caught.value))


def test_a_picture_of_another_size_is_damage(views):
    record, small = (
        Record.encode("a", v, np.ones((2, 2, 2), bool), occupancy_rounding="voxel", encoding="png")
        for v in (views, cropped(views))
    )
    broken = dataclasses.replace(record, read_views=small.read_views)
    with pytest.raises(DamagedRecord, match=r"a picture of \(8, 10\), expected \(10, 10\)"):
        broken.views([4])


def cropped(views):
    cameras = Cameras(views.cameras.world_from_camera, views.cameras.intrinsics, 8, 10)
    return views._replace(rgba=views.rgba[:, :8], depth=views.depth[:, :8], cameras=cameras)


def changed(views, **fields):
    cameras = views.cameras
    pose = fields.pop("world_from_camera", cameras.world_from_camera)
    return views._replace(cameras=Cameras(pose, cameras.intrinsics, cameras.height, cameras.width), **fields)


def test_unsound_views_are_refused(views):
    sheared = views.cameras.world_from_camera.copy()
    sheared[1, 0, 1] += 0.1
    mirrored = views.cameras.world_from_camera * np.array([-1, 1, 1, 1], np.float32)
    not_a_number = views.depth.copy()
    not_a_number[2, 3, 3] = np.nan
    for broken, message in (
        (changed(views, world_from_camera=sheared), "it, view 0: the camera matrix is no rotation"),
        (changed(views, world_from_camera=mirrored), "it, view 4: the camera matrix is no rotation"),
        (changed(views, depth=not_a_number), "it, view 9: depth"),
        (changed(views, depth=views.depth[:, :5]), r"it: depth has shape \(3, 5, 10\), expected \(3, 10, 10\)"),
        (changed(views, view_ids=np.array([4, 4, 9], np.int32)), "distinct view numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            check_views(broken, "it")
    assert check_views(views, "it") is views


@pytest.mark.parametrize("text", ["open() failed: Too many open files; opening x", "Cannot allocate memory"])
def test_a_short_machine_is_no_damage(views, text):
    def read_views(rows):
        raise RuntimeError(text)

    record = Record.encode("a/b", views, np.ones((2, 2, 2), bool), occupancy_rounding="voxel", encoding="raw")
    with pytest.raises(OSError, match=f"a/b: {text}".replace("()", r"\(\)")):
        dataclasses.replace(record, read_views=read_views).views()


def test_shards_may_be_open_all_at_once(tiny_set, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        source = open_split(tiny_set, "train")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 200 + sum(map(len, source.shard_lengths))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 250))
    with pytest.raises(OSError, match=r"files of shards need `ulimit -n \d+`; this process may open 250"):
        open_split(tiny_set, "train")
