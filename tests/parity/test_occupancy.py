"""Depth to occupancy, against the released code's."""

import json

import numpy as np

from geolrm_jax.data.occupancy import occupancy_from_depth
from geolrm_jax.geometry.cameras import from_opengl
from geolrm_jax.scene import Cameras


def test_occupancy_is_the_released_one(parity):
    """The file's depth has its edges dropped already; Blender cameras, intrinsics divided by the image size."""
    grid = json.loads((parity / "geolrm_released.json").read_text())["config"]["ser"]["grid_size"]
    with np.load(parity / "geolrm_released.npz") as arrays:
        depths, expected = arrays["occgt/depths"][:, :, 0], arrays["occgt/occ"] > 0
        poses, intrinsics = from_opengl(arrays["in/c2ws"]), arrays["in/Ks"]
    height, width = depths.shape[-2:]
    scale = np.array([[width], [height], [1]], np.float32)
    for depth, pose, k, truth in zip(depths, poses, intrinsics, expected, strict=True):
        occupancy = occupancy_from_depth(depth, Cameras(pose, k * scale, height, width), grid, "released")
        np.testing.assert_array_equal(occupancy, truth)
