"""Folders with a transforms.json: cameras turned once, at the door, and every broken file named."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from geolrm_jax.data import folder as folders
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.builders.shards import make_record
from geolrm_jax.data.checking import check
from geolrm_jax.data.folder import read_views as read_folder
from geolrm_jax.data.occupancy import check_hull
from geolrm_jax.data.reader import open_split
from geolrm_jax.data.transforms import TransformsSource, read_views
from geolrm_jax.geometry.cameras import gobjaverse_rig, orbit, rays


@pytest.fixture
def folder(tmp_path):
    """Three views of an orbit, written with OpenGL axes; the last image has no alpha."""
    cameras = orbit(np.array([0.0, 90.0, 200.0]), 20.0, 1.9, 50.0, 24)
    frames = []
    for i, pose in enumerate(cameras.world_from_camera.astype(float)):
        image = np.full((24, 24, 4), 40 * i, np.uint8)
        Image.fromarray(image if i < 2 else image[..., :3]).save(tmp_path / f"r_{i}.png")
        pose[:, 1:3] *= -1
        frames.append({"file_path": f"./r_{i}" if i else "r_0.png", "transform_matrix": pose.tolist()})
    write(tmp_path, {"camera_angle_x": np.radians(50.0), "frames": frames})
    return tmp_path, cameras


def write(path, content):
    (path / "transforms.json").write_text(json.dumps(content))


def content(path):
    return json.loads((path / "transforms.json").read_text())


def test_views_are_those_written(folder):
    path, cameras = folder
    views = read_views(path)
    np.testing.assert_allclose(views.cameras.world_from_camera, cameras.world_from_camera, atol=1e-6)
    np.testing.assert_allclose(views.cameras.intrinsics, cameras.intrinsics, rtol=1e-5)
    assert views.rgba[1, 0, 0].tolist() == [40] * 4 and views.rgba[2, 0, 0].tolist() == [80, 80, 80, 255]
    assert not views.depth.any()
    assert read_views(path, [2, 0]).view_ids.tolist() == [2, 0]


def test_intrinsics_in_pixels_of_another_size_are_scaled(folder):
    path, _ = folder
    values = {**content(path), "w": 48, "h": 96, "fl_x": 60.0, "fl_y": 70.0, "cx": 20.0, "cy": 50.0}
    write(path, values)
    k = read_views(path).cameras.intrinsics[0]
    np.testing.assert_allclose(k, [[30.0, 0, 10.0], [0, 17.5, 12.5], [0, 0, 1]])


def without(values, *keys):
    return {k: v for k, v in values.items() if k not in keys}


def with_frame(values, **changes):
    return {**values, "frames": [values["frames"][0], {**values["frames"][1], **changes}]}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda v: without(v, "frames"), "transforms.json is no list of cameras"),
        (lambda v: {**v, "frames": []}, "has 0 frames"),
        (lambda v: without(v, "camera_angle_x"), "frame 0: `camera_angle_x` or `fl_x`"),
        (lambda v: with_frame(v, file_path="none"), "no file .*none.png: expected an image"),
        (lambda v: with_frame(v, file_path=3), "frame 1: `file_path` expected"),
        (lambda v: with_frame(v, file_path="/etc/hostname.png"), "frame 1: `file_path` '/etc/.*leads out"),
        (lambda v: with_frame(v, file_path="a/../../r_0"), "frame 1: `file_path` .*leads out"),
        (lambda v: {**v, "frames": {"a": 1}}, "`frames` must be a list"),
        (lambda v: {**v, "frames": [3]}, "`frames` must be a list of JSON objects"),
        (lambda v: {**v, "w": 0}, "`w` and `h` must be positive"),
        (lambda v: {**v, "camera_angle_x": 10**400}, "frame 0: `camera_angle_x`"),
        (lambda v: {**v, "camera_angle_x": 39.6}, "must lie between 0 and pi radians, got 39.6"),
        (lambda v: {**v, "camera_angle_x": float("nan")}, "must lie between 0 and pi radians"),
        (lambda v: {**v, "k1": 0.5, "p2": -1e-3}, "frame 0: a pinhole .* got k1 = 0.5, p2 = -0.001: undistort"),
        (lambda v: with_frame(v, camera_model="OPENCV_FISHEYE"), "frame 1: .*camera_model = OPENCV_FISHEYE: undistort"),
        (lambda v: {**v, "is_fisheye": True}, "frame 0: a pinhole camera expected, got is_fisheye"),
        (lambda v: with_frame(v, transform_matrix=[[1.0, 2.0]]), "frame 1: `transform_matrix`"),
        (lambda v: with_frame(v, transform_matrix=np.diag([2.0, 1, 1, 1]).tolist()), "frame 1: .* no rotation"),
    ],
)
def test_what_is_wrong_is_named(folder, damage, message):
    path, _ = folder
    write(path, damage(content(path)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_views(path)


def test_a_pinhole_may_say_so(folder):
    path, _ = folder
    write(path, {**content(path), "camera_model": "OPENCV", "k1": 0.0, "k2": 0, "p1": None, "is_fisheye": False})
    assert len(read_views(path).view_ids) == 3


def test_too_much_is_refused_before_it_is_read(folder, monkeypatch):
    path, _ = folder
    (path / "r_1.png").unlink()
    monkeypatch.setattr(folders, "MAX_OBJECT_PIXELS", 2 * 24 * 24)
    with pytest.raises(ValueError, match=r"transforms.json: 3 views of 24 x 24, at most 1152 pixels"):
        read_views(path)
    with (path / "transforms.json").open("w") as file:
        file.truncate(folders.MAX_CAMERA_BYTES + 1)
    with pytest.raises(ValueError, match=r"transforms.json has 16777217 bytes"):
        read_views(path)


def test_a_folder_alone_is_an_object_of_its_name(folder, monkeypatch):
    path, _ = folder
    (path / "inner").mkdir()
    (path / "inner" / "transforms.json").touch()
    monkeypatch.chdir(path)
    for root in (str(path), "."):
        source = TransformsSource(root)
        assert source.listing() == ({"train": [path.name], "test": []}, {})
        assert len(source.read("train", path.name).view_ids) == 3
    with pytest.raises(FileNotFoundError, match=r"inner/nowhere/transforms.json"):
        TransformsSource(str(path / "inner")).read("train", "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        TransformsSource(str(path / "nowhere")).ids("train")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_a_positive_number(scale):
    with pytest.raises(ValueError, match="scale must be a positive number of cube sides"):
        TransformsSource("/nowhere", scale=scale)


def test_missing_file_and_view_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere/transforms.json"):
        read_views(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has 3 frames: no views \[5\]"):
        read_views(folder[0], [5])


def test_lengths_are_scaled_to_cube_sides(folder):
    path, cameras = folder
    scaled = read_views(path, scale=0.5).cameras.world_from_camera
    np.testing.assert_allclose(scaled[:, :3, 3], 0.5 * cameras.world_from_camera[:, :3, 3], atol=1e-6)
    np.testing.assert_allclose(scaled[:, :3, :3], cameras.world_from_camera[:, :3, :3], atol=1e-6)


RADIUS = 0.3


def write_balls(root):
    """A ball seen from 40 sides, in lengths twice ours, four times: one without alpha, one with a picture outside."""
    rig = gobjaverse_rig(size=64)
    origins, directions = (np.asarray(x, np.float64) for x in rays(rig))
    nearest = np.linalg.norm(np.cross(origins[:, None, None], directions), axis=-1)
    frames = []
    for view, pose in enumerate(rig.world_from_camera.astype(float)):
        pose[:, 1:3] *= -1
        pose[:3, 3] *= 2.0
        frames.append({"file_path": f"./r_{view}", "transform_matrix": pose.tolist()})
    for name in ("ball", "other", "opaque", "outside"):
        (root / name).mkdir(parents=True)
        for view, mask in enumerate(nearest < RADIUS):
            image = np.full((64, 64, 4), 255, np.uint8)
            image[..., 3] = 255 * (mask | (name == "opaque"))
            Image.fromarray(image).save(root / name / f"r_{view}.png")
        file_path = "../ball/r_1" if name == "outside" else "./r_1"
        changed = [*frames[:1], {**frames[1], "file_path": file_path}, *frames[2:]]
        write(root / name, {"camera_angle_x": np.radians(39.6), "frames": changed})


def test_a_hull_that_leaves_the_cube_is_refused(tmp_path):
    """Files with lengths twice ours and a diameter of 0.6 in ours: 0.9 cube sides, 1.8 and 3."""
    write_balls(tmp_path / "balls")
    for scale, fits in ((0.75, True), (1.5, False), (2.5, False)):
        config = DataConfig(TransformsSource(str(tmp_path / "balls"), scale=scale), occupancy_grid=16)
        if fits:
            assert make_record(config, "train", "ball").occupancy.any()
        else:
            with pytest.raises(ValueError, match=r"ball does not fit the cube \[-0.5, 0.5\]\^3 \(--scale\?\)"):
                make_record(config, "train", "ball")


@pytest.mark.parametrize("ids", [None, range(0, 24, 3)])
def test_hulls_of_real_objects_fit(real_renders, ids):
    for name in ("basket", "tomato_sauce", "plate", "bbq_sauce"):
        views = read_folder(real_renders / name, ids)
        check_hull(views.rgba[..., 3], views.cameras, name)


def test_a_set_of_silhouettes_has_the_visual_hull(tmp_path):
    """The hull of a ball seen from all sides is the ball, to the width of a pixel and of a voxel."""
    write_balls(tmp_path / "balls")
    source = TransformsSource(str(tmp_path / "balls"), test=("other",), scale=0.5)
    assert (source.ids("train"), source.ids("test")) == (["ball", "opaque", "outside"], ["other"])
    directory = build(DataConfig(source, occupancy_grid=48), tmp_path / "set", processes=1, max_rejected=0.5)
    listed = {e["id"]: e["reason"] for e in map(json.loads, (directory / "rejected.jsonl").read_text().splitlines())}
    assert {*listed} == {"opaque", "outside"}
    assert "no alpha" in listed["opaque"] and "leads out of the folder" in listed["outside"]
    record = open_split(directory, "train")[0]
    assert (record.id, record.occupancy_from, len(record.view_ids)) == ("ball", "silhouettes", 40)
    voxel, pixel = 1.0 / 47, 1.9 * 2 * np.tan(np.radians(19.8)) / 64
    distance = np.linalg.norm(np.argwhere(record.occupancy) * voxel - 0.5, axis=-1)
    assert distance.min() > RADIUS - 2 * voxel - pixel and distance.max() < RADIUS + pixel + 0.02
    # The shell is closed: from the centre, no way through faces leads out.
    regions, _ = label(~record.occupancy)
    assert regions[24, 24, 24] > 0 and regions[24, 24, 24] != regions[0, 0, 0]
    assert check(directory, processes=1).findings == []
