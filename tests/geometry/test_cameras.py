"""Cameras: projection against unprojection, rigs, resizing, conventions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geolrm_jax.geometry import cameras as geometry
from geolrm_jax.scene import Cameras

RIGS = {
    "gobjaverse": (geometry.gobjaverse_rig(size=16), 40),
    "turntable": (geometry.turntable(7, size=16), 7),
    "sv3d": (geometry.sv3d_rig(), 21),
    "zero123plus": (geometry.zero123plus_rig(), 6),
}


def random_cameras(rng, views=3, height=12, width=20):
    positions = rng.normal(size=(views, 3))
    positions *= 2.0 / np.linalg.norm(positions, axis=-1, keepdims=True)
    poses = geometry.look_at(positions, target=rng.uniform(-0.2, 0.2, 3))
    intrinsics = np.stack(
        [
            [[rng.uniform(15, 30), 0, rng.uniform(8, 12)], [0, rng.uniform(15, 30), rng.uniform(4, 8)], [0, 0, 1]]
            for _ in range(views)
        ]
    )
    return Cameras(poses.astype(np.float32), intrinsics.astype(np.float32), height, width)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_project_inverts_unproject(seed):
    rng = np.random.default_rng(seed)
    cameras = random_cameras(rng)
    depth = rng.uniform(0.5, 3.0, (3, 12, 20)).astype(np.float32)
    points = np.asarray(geometry.unproject(cameras, jnp.array(depth)))
    for view in range(3):
        one = Cameras(cameras.world_from_camera[view : view + 1], cameras.intrinsics[view : view + 1], 12, 20)
        pixels, z = geometry.project(one, jnp.array(points[view].reshape(-1, 3)))
        np.testing.assert_allclose(z[0].reshape(12, 20), depth[view], rtol=1e-4)
        centers = np.asarray(geometry.pixel_centers(12, 20)).reshape(-1, 2)
        np.testing.assert_allclose(pixels[0], centers, atol=5e-3)


def test_rays_pass_through_the_unprojected_points(rng):
    cameras = random_cameras(rng)
    origins, directions = geometry.rays(cameras)
    points = geometry.unproject(cameras, jnp.full((3, 12, 20), 1.5))
    away = points - origins[:, None, None]
    distance = np.linalg.norm(np.cross(away, directions), axis=-1)
    np.testing.assert_allclose(distance, 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, rtol=1e-5)


def test_plucker_moment_does_not_depend_on_the_point_of_the_ray(rng):
    cameras = random_cameras(rng)
    plucker = geometry.plucker(cameras)
    points = geometry.unproject(cameras, jnp.full((3, 12, 20), 0.7))
    np.testing.assert_allclose(plucker[..., 3:], np.cross(points, plucker[..., :3]), atol=1e-5)


def test_resizing_keeps_rays(rng):
    cameras = random_cameras(rng, height=12, width=20)
    larger = geometry.resize(cameras, 36, 100)
    assert (larger.height, larger.width) == (36, 100)
    # Blocks of 3 x 5 small pixels share their centre pixel with the large one.
    _, directions = geometry.rays(larger)
    np.testing.assert_allclose(directions[:, 1::3, 2::5], geometry.rays(cameras)[1], atol=1e-5)


@pytest.mark.parametrize("name", RIGS)
def test_rigs_look_at_the_origin(name):
    rig, views = RIGS[name]
    assert rig.world_from_camera.shape == (views, 4, 4)
    pixels, z = geometry.project(rig, jnp.zeros((1, 3)))
    np.testing.assert_allclose(pixels[:, 0], np.full((views, 2), rig.width / 2), atol=2e-3)
    assert (np.asarray(z) > 0).all()
    rotation = rig.world_from_camera[:, :3, :3]
    np.testing.assert_allclose(
        rotation.transpose(0, 2, 1) @ rotation, np.broadcast_to(np.eye(3), rotation.shape), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)


@pytest.mark.parametrize("name", RIGS)
def test_up_in_the_world_is_up_in_the_image(name):
    rig, _ = RIGS[name]
    level = np.abs(rig.world_from_camera[:, 2, 2]) < 0.99  # not straight up or down
    pixels, _ = geometry.project(rig, jnp.array([[0.0, 0, 0], [0, 0, 0.1]]))
    assert (np.asarray(pixels)[level, 1, 1] < np.asarray(pixels)[level, 0, 1]).all()


def test_gobjaverse_rig_is_that_of_real_files(real_renders):
    import json

    folder = sorted(p for p in real_renders.iterdir() if p.is_dir())[0]
    rig = geometry.gobjaverse_rig(size=16)
    for view in (0, 5, 13, 24, 25, 26, 27, 30, 39):
        camera = json.loads((folder / f"{view:05d}" / f"{view:05d}.json").read_text())
        rotation = np.stack([camera["x"], camera["y"], camera["z"]], axis=-1)
        np.testing.assert_allclose(rig.world_from_camera[view, :3, :3], rotation, atol=1e-5)


def test_points_behind_the_camera_stay_finite():
    rig = geometry.turntable(1, size=16)
    pixels, z = geometry.project(rig, jnp.array([[10.0, 0, 0], [1.9, 0, 0.5]]))
    assert (np.asarray(z) <= 1e-5).all() and np.isfinite(np.asarray(pixels)).all()


def test_rigs_that_do_not_exist():
    with pytest.raises(ValueError, match="no rig of 5 views"):
        geometry.zero123plus_rig(5)
    with pytest.raises(ValueError, match=r"1\.1"):
        geometry.zero123plus_rig(version="1.1")
