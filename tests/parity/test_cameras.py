"""Rays, intrinsics and rigs against the released helpers, which give Blender poses and divided intrinsics."""

import re

import numpy as np

from geolrm_jax.geometry import cameras as geometry
from geolrm_jax.scene import Cameras

TOLERANCE = 1e-5


def same_rig(ours: Cameras, poses, intrinsics=None):
    np.testing.assert_allclose(ours.world_from_camera, geometry.from_opengl(poses), atol=TOLERANCE)
    if intrinsics is not None:
        size = np.array([[ours.width], [ours.height], [1]])
        np.testing.assert_allclose(ours.intrinsics / size, intrinsics, atol=TOLERANCE)


def test_intrinsics_from_fields_of_view(released):
    for key in (k for k in released.vectors.files if k.startswith("cam/fov_")):
        angle = float(key.rsplit("_", 1)[1])
        ours = geometry.intrinsics_from_fov(angle if "rad" in key else np.radians(angle), 1, 1)
        np.testing.assert_allclose(ours, released.vectors[key], atol=TOLERANCE)


def test_rigs_of_the_generators(released):
    vectors = released.vectors
    same_rig(geometry.sv3d_rig(), vectors["cam/sv3d_c2ws"], vectors["cam/sv3d_Ks"])
    same_rig(geometry.zero123plus_rig(), vectors["cam/zero123plus_c2ws_r1.5"], vectors["cam/zero123plus_Ks"])
    four = [0, 2, 4, 5]
    same_rig(geometry.zero123plus_rig(4), vectors["cam/zero123plus_c2ws_r1.5"][four])


def test_orbits(released):
    for key in (k for k in released.vectors.files if k.startswith("cam/orbit_")):
        views, radius, elevation = re.fullmatch(r"cam/orbit_M(\d+)_r([\d.]+)_e(-?[\d.]+)", key).groups()
        ours = geometry.turntable(int(views), size=8, elevation=float(elevation), radius=float(radius), fov=39.6)
        same_rig(ours, released.vectors[key])


def test_look_at(released):
    ours = geometry.look_at(released.vectors["cam/lookat_pos"])
    np.testing.assert_allclose(ours, geometry.from_opengl(released.vectors["cam/lookat_c2w"]), atol=TOLERANCE)


def test_rays(released):
    """Of the first input's pose; the image's size and focal length are read off the file's own rays."""
    origins, directions = released.vectors["cam/rays_o"], released.vectors["cam/rays_d"]
    pose = geometry.from_opengl(released.vectors["in/c2ws"][0, 0])
    local = directions @ pose[:3, :3]
    step = local[1, 0] - local[0, 0]
    width = int(np.argmax(np.abs(local[1:, 1] - local[0, 1]) > 0.5 * step)) + 1
    height, focal = len(local) // width, 1 / step
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    camera = Cameras(pose, intrinsics, height, width)
    ours = np.asarray(geometry.plucker(camera, "depth"))[..., :3]
    np.testing.assert_allclose(ours.reshape(-1, 3), directions, atol=TOLERANCE)
    np.testing.assert_allclose(origins, np.broadcast_to(geometry.rays(camera)[0], origins.shape), atol=TOLERANCE)
