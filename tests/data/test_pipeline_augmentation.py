"""Augmentation: what is drawn stays a true picture of some object."""

import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.data.augmentation import Augmentation, Drawn, color_matrix, roll
from geolrm_jax.data.examples import make_views
from geolrm_jax.data.pipeline import PipelineConfig, training_dataset
from geolrm_jax.data.reader import open_split
from geolrm_jax.geometry.cameras import orbit, project
from geolrm_jax.scene import Views

SIZE = 96
POINTS = np.array([[0.1, 0.2, -0.1], [-0.2, 0.1, 0.2], [0.0, -0.25, 0.1]], np.float32)


def dots(cameras) -> Views:
    """Soft white dots where `POINTS` are seen, over nothing, at their depth."""
    pixels, z = (np.asarray(x) for x in project(cameras, jnp.asarray(POINTS)))
    y, x = np.mgrid[: cameras.height, : cameras.width] + 0.5
    squared = (x - pixels[..., 0, None, None]) ** 2 + (y - pixels[..., 1, None, None]) ** 2
    alpha = np.exp(-squared / 18.0).max(1).astype(np.float32)
    nearest = squared.argmin(1)
    depth = np.where(alpha > 0.5, np.take_along_axis(z[:, :, None, None], nearest[:, None], 1)[:, 0], 0.0)
    rgb = np.repeat(alpha[..., None], 3, -1)
    return Views(cameras, rgb, alpha, depth.astype(np.float32), np.ones(len(pixels), bool))


@pytest.mark.parametrize("shape", ["square", "stretched"])
def test_a_rolled_view_is_what_the_rolled_camera_sees(shape):
    """Compared with dots drawn anew where the turned camera's projection has them."""
    cameras = orbit([20.0, 200.0], [10.0, -30.0], 1.9, 39.6, SIZE)
    if shape == "stretched":  # other pixels, and a principal point off the centre
        scale = np.array([[1.2, 0.0, 3.0], [0.0, 0.9, -2.0], [0.0, 0.0, 1.0]], np.float32)
        cameras = type(cameras)(cameras.world_from_camera, scale @ cameras.intrinsics, SIZE, SIZE)
    turned = roll(dots(cameras), np.radians([12.0, -7.0]))
    expected = dots(turned.cameras)
    assert np.abs(expected.alpha - dots(cameras).alpha).max() > 0.5  # the dots have moved
    np.testing.assert_allclose(turned.alpha, expected.alpha, atol=0.05)
    np.testing.assert_allclose(turned.rgb, expected.rgb, atol=0.05)
    both = (turned.depth > 0) & (expected.depth > 0)
    np.testing.assert_allclose(turned.depth[both], expected.depth[both], atol=1e-6)
    assert both.sum() > 0.8 * (expected.depth > 0).sum()


def test_roll_keeps_the_cameras_place_and_axis():
    cameras = orbit([20.0, 200.0], [10.0, -30.0], 1.9, 39.6, 32)
    turned = roll(dots(cameras), np.radians([12.0, -7.0])).cameras
    np.testing.assert_allclose(turned.world_from_camera[:, :, 2:], cameras.world_from_camera[:, :, 2:], atol=1e-6)
    rotation = turned.world_from_camera[:, :3, :3]
    np.testing.assert_allclose(rotation.transpose(0, 2, 1) @ rotation, np.tile(np.eye(3), (2, 1, 1)), atol=1e-6)
    cosines = np.sum(turned.world_from_camera[:, :3, 0] * cameras.world_from_camera[:, :3, 0], -1)
    np.testing.assert_allclose(np.degrees(np.arccos(cosines)), [12.0, 7.0], atol=0.05)


def test_colours_change_as_straight_colours_do(rng):
    alpha, straight = rng.random((1, 8, 8)).astype(np.float32), rng.random((1, 8, 8, 3)).astype(np.float32)
    cameras = orbit([0.0], [0.0], 1.9, 39.6, 8)
    views = Views(cameras, straight * alpha[..., None], alpha, np.zeros_like(alpha), np.ones(1, bool))
    changed = Drawn(None, color_matrix(1.2, 0.7))(views)
    luma = (straight * [0.2126, 0.7152, 0.0722]).sum(-1, keepdims=True)
    expected = np.clip(1.2 * (luma + 0.7 * (straight - luma)), 0.0, 1.0)
    np.testing.assert_allclose(changed.rgb, expected * alpha[..., None], atol=1e-5)
    np.testing.assert_array_equal(changed.alpha, alpha)


def test_off_by_default_and_drawn_anew_for_each_object(tiny_set):
    source = open_split(tiny_set, "train")
    arguments = dict(batch=7, views=2, inputs=1, input_size=(28, 28), render_size=(32, 32), seed=5)

    def first(**augmentation):
        config = PipelineConfig(augmentation=Augmentation(**augmentation))
        return next(iter(training_dataset(source, config=config, **arguments)))

    plain, rolled, colored = first(), first(roll=15.0), first(color=0.3)
    assert (plain.index == rolled.index).all() and (plain.index == colored.index).all()
    for row, index in enumerate(plain.index.tolist()):
        record = source[index]
        pose = plain.targets.cameras.world_from_camera[row, 0]
        [place] = np.flatnonzero((record.world_from_camera == pose).all((1, 2))).tolist()
        drawn = make_views(record.views([record.view_ids.tolist()[place]]), (32, 32))
        np.testing.assert_array_equal(plain.targets.rgb[row, 0], drawn.rgb[0])
    # Each camera turns by an angle of its own, within the limit; places stay.
    axes = [batch.targets.cameras.world_from_camera[..., :3, 0] for batch in (plain, rolled)]
    angles = np.degrees(np.arccos(np.clip(np.sum(axes[0] * axes[1], -1), -1.0, 1.0)))
    assert angles.max() <= 15.1 and angles.max() > 5.0 and len(np.unique(angles.round(1))) > 7
    np.testing.assert_array_equal(
        plain.inputs.cameras.world_from_camera[..., 3], rolled.inputs.cameras.world_from_camera[..., 3]
    )
    # Colours change per object, coverage and depth do not.
    np.testing.assert_array_equal(plain.targets.alpha, colored.targets.alpha)
    np.testing.assert_array_equal(plain.targets.depth, colored.targets.depth)
    covered = plain.targets.alpha.sum((1, 2, 3))
    ratios = colored.targets.rgb.sum((1, 2, 3, 4)) / plain.targets.rgb.sum((1, 2, 3, 4))
    assert covered.min() > 0 and len(np.unique(ratios.round(3))) > 4 and (colored.targets.rgb <= 1.0).all()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="roll must lie between 0 and 180"):
        Augmentation(roll=-1.0)
    with pytest.raises(ValueError, match="color must be at least 0 and below 1"):
        Augmentation(color=1.0)
