"""A folder of meshes rendered by several processes: whole objects, listed failures, a kill and a second run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("mitsuba", reason="needs the extra `mesh`")
trimesh = pytest.importorskip("trimesh", reason="needs the extra `mesh`")

from geolrm_jax.data import mesh_workers  # noqa: E402
from geolrm_jax.data.folder import find_objects, read_channels, read_views  # noqa: E402
from geolrm_jax.data.folder_writing import write_view  # noqa: E402
from geolrm_jax.data.mesh_objects import RenderConfig, object_rig, render_object  # noqa: E402
from geolrm_jax.data.mesh_rendering import choose_variant  # noqa: E402
from geolrm_jax.data.mesh_sets import find_meshes, render_meshes  # noqa: E402
from geolrm_jax.data.mesh_workers import Task, render_all  # noqa: E402
from geolrm_jax.data.record import check_views  # noqa: E402
from geolrm_jax.geometry.cameras import gobjaverse_rig  # noqa: E402

TINY = RenderConfig(size=32, samples=4, views=(0, 3, 24, 25))


def write_box(path, extents=(1.0, 1.0, 1.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box(extents=extents).export(path)


def test_what_is_written_is_what_is_read(tmp_path, rng):
    """Colour, cameras and depth to the bit, normals by GObjaverse's channels: R, G, B = (-nx, nz, -ny)."""
    rig = gobjaverse_rig(size=16)
    normal = rng.normal(size=(16, 16, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    rgba = rng.integers(0, 256, (16, 16, 4), np.uint8)
    depth = rng.uniform(1.0, 3.0, (16, 16)).astype(np.float32)
    for view in (2, 25):
        pose, k = rig.world_from_camera[view], rig.intrinsics[view]
        write_view(tmp_path / "a", view, rgba=rgba, depth=depth, normal=normal, world_from_camera=pose, intrinsics=k)
    views = read_views(tmp_path / "a")
    assert views.view_ids.tolist() == [2, 25]
    np.testing.assert_array_equal(views.rgba[1], rgba)
    np.testing.assert_array_equal(views.depth[1], depth)
    np.testing.assert_array_equal(views.cameras.world_from_camera[1], rig.world_from_camera[25])
    np.testing.assert_allclose(views.cameras.intrinsics[1], rig.intrinsics[25], rtol=1e-6)
    stored = read_channels(tmp_path / "a" / "00002" / "00002_nd.exr", ("R", "G", "B"), 16, 16)
    np.testing.assert_allclose(stored, normal[..., [0, 2, 1]] * (-1.0, 1.0, -1.0), atol=5e-4)


@pytest.mark.parametrize("extents", [(1.0, 1.0, 12.0), (12.0, 1.0, 1.0)])
def test_an_elongated_object_stays_in_the_frame_and_where_it_is(tmp_path, extents):
    """Border pixels are empty in views from all sides, and points from depth lie on the box."""
    write_box(tmp_path / "box.ply", extents)
    seen = []
    config = RenderConfig(size=64, samples=4, views=(0, 5, 25, 26, 30))
    render_object(tmp_path / "box.ply", tmp_path / "out", "d/box", config, choose_variant(), lambda: seen.append(1))
    assert len(seen) == 5 and find_objects(tmp_path / "out") == ["d/box"]
    views = check_views(read_views(tmp_path / "out" / "d" / "box"), "box")
    for border in (views.rgba[:, [0, -1]], views.rgba[:, :, [0, -1]]):
        assert (border[..., 3] == 0).all()
    half = 0.5 * np.array(extents) / 12.0
    for depth, pose, k in zip(views.depth, views.cameras.world_from_camera, views.cameras.intrinsics, strict=True):
        y, x = np.nonzero(depth)
        assert len(y) > 3
        local = np.stack([(x + 0.5 - k[0, 2]) / k[0, 0], (y + 0.5 - k[1, 2]) / k[1, 1], np.ones(len(x))], axis=-1)
        points = (local * depth[y, x, None]) @ pose[:3, :3].T + pose[:3, 3]
        np.testing.assert_allclose(np.max(np.abs(points) / half, axis=-1), 1.0, atol=2e-4)
    rig = object_rig(half * np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1.0]]), size=32, fov=39.6)
    assert rig.world_from_camera.shape == (40, 4, 4)


def test_meshes_whose_objects_would_collide_are_listed(tmp_path):
    for name in ("a.ply", "a.glb", "b/c.obj", "b/c/d.ply", "00012.ply", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "c").mkdir(exist_ok=True)
    found, rejected = find_meshes(tmp_path)
    assert [(task.id, task.mesh.name) for task in found] == [("00012", "00012.ply"), ("a", "a.glb"), ("b/c", "c.obj")]
    assert rejected == {"a.ply": "a.glb has the same name", "b/c/d.ply": "its object would lie within that of b/c"}


def test_meshes_with_odd_names_are_listed(tmp_path):
    for name in (".hidden/a.ply", "b/.c.ply", "new\nline.ply", "back\\slash.ply", "campos_512_v4/d.ply", "ä b.ply"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, rejected = find_meshes(tmp_path)
    assert [task.id for task in found] == ["ä b"] and len(rejected) == 5
    assert "hidden" in rejected["b/.c.ply"] and "is no name of an object" in rejected["new\nline.ply"]


def test_an_object_neither_surrounds_nor_enters_one_that_is_there(tmp_path):
    """A first run made a/b and c; in a second one there are meshes a and c/d too."""
    write_box(tmp_path / "meshes" / "a.ply")
    write_box(tmp_path / "meshes" / "c" / "d.ply")
    for folder in ("a/b/00000", "c/00000"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    report = render_meshes(tmp_path / "meshes", tmp_path / "out", TINY, processes=1)
    assert (report.rendered, report.finished, {*report.rejected}) == (0, 0, {"a.ply", "c/d.ply"})
    assert "holds something else" in report.rejected["a.ply"] and "within" in report.rejected["c/d.ply"]
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        render_meshes(tmp_path / "meshes", tmp_path / "out", TINY, processes=0)


def test_a_run_that_was_killed_goes_on(tmp_path):
    """The command, killed when an object is whole and another half made; the next run makes the rest alone."""
    meshes, out = tmp_path / "meshes", tmp_path / "out"
    for name in ("a.glb", "b.ply", "dict/c.obj"):
        write_box(meshes / name)
    (meshes / "damaged.glb").write_bytes(b"glTF but not really")
    trimesh.PointCloud(np.eye(3)).export(meshes / "points.ply")
    command = [sys.executable, "-m", "geolrm_jax.cli", "data", "render", "--meshes", str(meshes), "--out", str(out)]
    command += ["--size", "32", "--samples", "4", "--views", "0,3,24,25", "--processes", "1"]
    run = subprocess.Popen([*command[:-4], "--views", "0,3,24,25", "--processes", "1"], stdout=subprocess.DEVNULL)
    while not (out / "a").is_dir():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    made = {path: path.stat().st_mtime_ns for path in (out / "a").rglob("*")}
    report = render_meshes(meshes, out, TINY, processes=2)
    assert report.finished >= 1 and report.rendered + report.finished == 3
    assert {path: path.stat().st_mtime_ns for path in (out / "a").rglob("*")} == made
    assert find_objects(out) == ["a", "b", "dict/c"] and not (out / ".unfinished").exists()
    for name in ("a", "b", "dict/c"):
        views = check_views(read_views(out / name, TINY.views), name)
        np.testing.assert_array_equal(views.rgba[0], views.rgba[2])  # view 24 repeats view 0
        assert (views.depth > 0).any(axis=(1, 2)).all()
    rejected = json.loads((out / "rejected.json").read_text())
    assert rejected == report.rejected and sorted(rejected) == ["damaged.glb", "points.ply"]
    assert "no readable mesh" in rejected["damaged.glb"] and "no triangle" in rejected["points.ply"]
    assert (out / "contact_sheet.png").is_file()
    with pytest.raises(ValueError, match="rendered otherwise: samples is 4 there, 9 here"):
        render_meshes(meshes, out, RenderConfig(size=32, samples=9, views=TINY.views))


def test_renderers_start_side_by_side(tmp_path, monkeypatch):
    """Both are started before either is ready; a third is not, for two tasks."""
    started = []
    start = mesh_workers._start

    def counted(*arguments):
        started.append(start(*arguments))
        assert not any(worker.connection.poll() for worker in started)
        return started[-1]

    monkeypatch.setattr(mesh_workers, "_start", counted)
    tasks = [Task(name, tmp_path / "nowhere.ply") for name in ("a", "b")]
    events = list(render_all(tasks, tmp_path / "out", TINY, "scalar_rgb", 3))
    assert sorted((event.task.id, event.kind) for event in events) == [("a", "rejected"), ("b", "rejected")]
    assert len(started) == 2 and not any(worker.process.is_alive() for worker in started)


def test_a_renderer_that_does_not_start_ends_the_run(tmp_path, monkeypatch):
    start = mesh_workers._start

    def killed(*arguments):
        worker = start(*arguments)
        worker.process.kill()
        return worker

    monkeypatch.setattr(mesh_workers, "_start", killed)
    with pytest.raises(OSError, match=r"Mitsuba \(scalar_rgb\) does not start: its process ended, killed by SIGKILL"):
        list(render_all([Task("a", tmp_path / "a.ply")], tmp_path / "out", TINY, "scalar_rgb", 1))


def test_a_renderer_that_dies_costs_its_object_alone(tmp_path):
    for name in ("a.ply", "b.ply"):
        write_box(tmp_path / name)
    tasks = [Task(name, tmp_path / f"{name}.ply") for name in ("a", "b")]
    events, config = [], RenderConfig(size=32, samples=64, views=tuple(range(12)))  # long enough to be hit at work
    for event in render_all(tasks, tmp_path / "out", config, "scalar_rgb", 1):
        if not events:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
        events.append(event)
    ends = [(event.task.id, event.kind, event.reason) for event in events if event.kind != "view"]
    assert ends == [("a", "rejected", "its renderer ended, killed by SIGKILL"), ("b", "rendered", "")]
    assert (tmp_path / "out" / "b").is_dir() and not (tmp_path / "out" / "a").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    import fcntl

    write_box(tmp_path / "meshes" / "a.ply")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run writes into"):
            render_meshes(tmp_path / "meshes", tmp_path / "out", TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size and samples must be positive"),
        ({"views": (0, 40)}, "views must be distinct numbers from 0 to 39"),
        ({"views": ()}, "views must be distinct"),
        ({"fov": 180.0}, "fov must lie between"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RenderConfig(**options)


def test_folders_without_meshes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no mesh below"):
        render_meshes(tmp_path, tmp_path / "out", TINY)
    with pytest.raises(FileNotFoundError, match="no folder"):
        render_meshes(tmp_path / "nowhere", tmp_path / "out", TINY)
