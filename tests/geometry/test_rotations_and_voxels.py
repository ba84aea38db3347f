"""Quaternions against SciPy; voxel positions against their inverse and the released indices."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.transform import Rotation

from geolrm_jax.geometry.rotations import matrix_from_quaternion, normalize
from geolrm_jax.geometry.voxels import grid_indices, nearest_voxels, voxel_positions


def test_matrices_are_scipys(rng):
    quats = rng.normal(size=(50, 4)).astype(np.float32)
    expected = Rotation.from_quat(quats, scalar_first=True).as_matrix()
    np.testing.assert_allclose(matrix_from_quaternion(jnp.array(quats)), expected, atol=1e-5)


def test_a_zero_quaternion_has_a_finite_gradient():
    gradient = jax.grad(lambda q: matrix_from_quaternion(q).sum())(jnp.zeros(4))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(normalize(jnp.zeros(4)), 0)


def test_every_voxel_is_nearest_to_its_own_position():
    for grid in (2, 16, 31, 128):
        axis = np.stack([np.arange(grid)] * 3, axis=-1)
        positions = np.asarray(voxel_positions(jnp.array(axis), grid))
        assert positions.min() == -0.5 and positions.max() == 0.5
        np.testing.assert_array_equal(nearest_voxels(positions, grid), axis)


def test_points_outside_go_to_the_border_voxels():
    points = np.array([[-3.0, 0.0, 3.0]])
    np.testing.assert_array_equal(nearest_voxels(points, 8)[0, [0, 2]], [0, 7])


def test_grid_order_is_that_of_a_flattened_array():
    volume = np.arange(27).reshape(3, 3, 3)
    x, y, z = np.asarray(grid_indices(3)).T
    np.testing.assert_array_equal(volume[x, y, z], np.arange(27))
