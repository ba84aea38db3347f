"""Pictures against a dense renderer in NumPy, closed forms and their own invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geolrm_jax.rendering import count_pairs, rasterize

ALL_ON = {"normals": True, "antialias": True}


def assert_close_up_to_flips(ours, expected, tolerance=2e-5):
    """Equal within `tolerance`; a threshold that rounding decides the other way may move a pixel in a thousand."""
    error = np.abs(np.asarray(ours, np.float64) - expected)
    assert error.max() < 5e-3
    assert np.mean(error > tolerance) <= 1e-3


def assert_equal_pictures(rendering, view, expected, tolerance=2e-5):
    for name in ("rgb", "alpha", "depth", "normal"):
        picture = getattr(rendering, name)
        if picture is not None:
            assert_close_up_to_flips(picture[view], expected[name], 2.5 * tolerance if name == "depth" else tolerance)


@pytest.mark.parametrize(
    ("size", "views", "scale", "channels", "options"),
    [
        ((40, 56), 2, 0.08, 3, {}),
        pytest.param((17, 33), 3, 0.4, 1, {"normals": True}, marks=pytest.mark.slow),
        ((24, 36), 2, 0.03, 32, ALL_ON),  # Gaussians of about a pixel: what antialiasing is for
        pytest.param((5, 7), 1, 0.1, 3, {"antialias": True}, marks=pytest.mark.slow),
        ((30, 30), 1, 0.1, 3, {"near": 1.5, "far": 1.9, "eps2d": 2.0, "max_alpha": 0.6}),
    ],
)
def test_equals_dense_renderer(rng, make_inputs, draw, dense, size, views, scale, channels, options):
    inputs = make_inputs(rng, 150, views, *size, scale=scale, channels=channels)
    rendering = draw(inputs, size, **options)
    assert rendering.rgb.shape == (views, *size, channels)
    assert rendering.overflow == 0
    assert (rendering.normal is None) == ("normals" not in options)
    for view in range(views):
        expected = dense(inputs, view, size, **{k: v for k, v in options.items() if k != "normals"})
        assert_equal_pictures(rendering, view, expected)


def test_saturated_and_clamped_pixels_equal_dense_renderer(rng, make_inputs, draw, dense):
    """Opaque layers: alphas at the clamp, pixels that stop early, more Gaussians in a tile than a chunk holds."""
    size = (32, 32)
    inputs = make_inputs(rng, 200, 1, *size, scale=0.5)
    inputs["opacities"] = rng.uniform(0.5, 1.0, 200).astype(np.float32)
    inputs["opacities"][::3] = 1.0
    expected = dense(inputs, 0, size)
    assert np.mean(expected["alpha"] > 0.999) > 0.5
    assert_equal_pictures(draw(inputs, size), 0, expected)


def test_gaussians_on_axis_have_the_closed_form(on_axis, draw):
    """Variance (f s / z)^2 + 0.3 in the picture; the nearer one hides its share of the farther."""
    sigma, focal, size = 0.1, 50.0, 24
    rendering = draw(on_axis([2.5, 2.0], [0.7, 0.6], sigma, focal, size), (size, size))
    y, x = np.indices((size, size)) + 0.5 - size / 2

    def alpha(opacity, z):
        value = opacity * np.exp(-0.5 * (x**2 + y**2) / ((focal * sigma / z) ** 2 + 0.3))
        return np.where(value >= 1 / 255, value, 0)

    far, near = alpha(0.7, 2.5), alpha(0.6, 2.0)
    np.testing.assert_allclose(rendering.rgb[0, ..., 1], near, atol=1e-6)
    np.testing.assert_allclose(rendering.rgb[0, ..., 0], far * (1 - near), atol=1e-6)
    np.testing.assert_allclose(rendering.depth[0], 2.0 * near + 2.5 * far * (1 - near), atol=4e-6)


@pytest.mark.parametrize("variance", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, 3.0])
def test_antialiasing_keeps_the_light(on_axis, draw, variance):
    """The sum of alpha over the picture is that of the undilated Gaussian, 2 pi o s^2, but for the cut tails."""
    opacity, focal, z = 0.9, 50.0, 2.0
    inputs = on_axis([z], [opacity], np.sqrt(variance) * z / focal, focal)
    light = {antialias: float(draw(inputs, (24, 24), antialias=antialias).alpha.sum()) for antialias in (True, False)}
    peak = opacity * variance / (variance + 0.3)
    np.testing.assert_allclose(light[True], 2 * np.pi * opacity * variance * (1 - 1 / (255 * peak)), rtol=0.02)
    assert light[False] > light[True] * (1 + 0.29 / variance)


def test_normals_are_shortest_axes_towards_the_camera(on_axis, draw):
    """A disc that faces the camera, its mirror image, and a ball: its first axis, seen from the side, is left as it is.

    The camera looks along z; the discs' shortest axes are z and -z.
    """
    for quat, scales, expected in (
        ([1, 0, 0, 0], [0.2, 0.2, 0.01], [0, 0, -1]),
        ([0, 1, 0, 0], [0.2, 0.2, 0.01], [0, 0, -1]),
        ([1, 0, 0, 0], [0.2, 0.2, 0.2], [1, 0, 0]),
    ):
        inputs = on_axis([2.0], [0.8])
        inputs |= {"quats": np.float32([quat]), "scales": np.float32([scales])}
        rendering = draw(inputs, (24, 24), normals=True)
        np.testing.assert_allclose(rendering.normal, rendering.alpha[..., None] * np.array(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("world_from_camera", np.zeros((4, 4))),
        ("world_from_camera", np.diag([1.0, 1.0, 0.0, 1.0])),
        ("world_from_camera", np.full((4, 4), np.nan)),
        ("intrinsics", np.zeros((3, 3))),
        ("intrinsics", np.full((3, 3), np.inf)),
    ],
)
def test_a_broken_camera_is_a_blank_view_that_is_counted(rng, make_inputs, draw, name, broken):
    size = (20, 24)
    inputs = make_inputs(rng, 40, 2, *size)
    with_broken = inputs | {name: np.stack([inputs[name][0], broken]).astype(np.float32)}

    def loss(inputs):
        drawn = draw(inputs, size, capacity=1000)
        return jnp.sum(drawn.rgb**2) + jnp.sum(drawn.depth), drawn

    gradient, drawn = jax.grad(loss, has_aux=True)(with_broken)
    alone = {k: v[:1] if k in ("world_from_camera", "intrinsics") else v for k, v in inputs.items()}
    wanted = draw(alone, size)
    assert drawn.invalid == 1
    assert drawn.overflow == 0
    np.testing.assert_allclose(drawn.rgb[0], wanted.rgb[0], atol=2e-6)
    np.testing.assert_array_equal(drawn.rgb[1], np.broadcast_to(inputs["background"], (*size, 3)))
    assert np.any(np.asarray(gradient["means"]))
    assert all(np.all(np.isfinite(g)) for g in gradient.values())
    assert all(not np.any(np.asarray(gradient[k])[1]) for k in ("world_from_camera", "intrinsics"))


def test_expected_depth_is_accumulated_over_alpha(rng, make_inputs, draw):
    inputs = make_inputs(rng, 30, 1, 24, 24)
    accumulated, expected = (draw(inputs, (24, 24), depth=kind) for kind in ("accumulated", "expected"))
    covered = np.asarray(accumulated.alpha) > 0
    assert 0 < covered.mean() < 1
    ratio = np.asarray(accumulated.depth)[covered] / np.asarray(accumulated.alpha)[covered]
    np.testing.assert_allclose(np.asarray(expected.depth)[covered], ratio, rtol=1e-6)
    assert np.all(np.asarray(expected.depth)[~covered] == 0)


@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_gaussian(rng, make_inputs, draw, dense, count):
    inputs = make_inputs(rng, count, 2, 20, 20, scale=0.3)
    rendering = draw(inputs, (20, 20), **ALL_ON)
    for view in range(2):
        assert_equal_pictures(rendering, view, dense(inputs, view, (20, 20), antialias=True))
    if count == 0:
        np.testing.assert_array_equal(rendering.rgb, np.broadcast_to(inputs["background"], (2, 20, 20, 3)))
        assert np.all(np.asarray(rendering.alpha) == 0)


def test_masked_gaussians_change_nothing(rng, make_inputs, draw):
    size = (40, 40)
    inputs = make_inputs(rng, 60, 2, *size)
    padded = dict(inputs)
    for key in ("means", "scales", "quats", "opacities", "colors"):
        garbage = rng.normal(size=(20, *inputs[key].shape[1:])).astype(np.float32)
        garbage[5:] = np.nan
        padded[key] = np.concatenate([garbage[:10], inputs[key], garbage[10:]])
    padded["mask"] = (np.arange(80) >= 10) & (np.arange(80) < 70)
    plain, with_padding = draw(inputs, size), draw(padded, size)
    jax.tree.map(np.testing.assert_array_equal, plain, with_padding)
    assert with_padding.invalid == 0


@pytest.mark.parametrize("antialias", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_overflow_counts_the_pairs_that_did_not_fit(rng, make_inputs, objects_of, draw, antialias):
    size = (40, 40)
    inputs = make_inputs(rng, 50, 2, *size, scale=0.03)
    pairs = count_pairs(*objects_of(inputs, size), antialias=antialias)
    assert antialias == (pairs < count_pairs(*objects_of(inputs, size)))  # fainter: fewer tiles are reached
    complete = draw(inputs, size, antialias=antialias)
    assert complete.overflow == 0
    for missing in (1,) if antialias else (1, pairs - 1):
        partial = draw(inputs, size, capacity=pairs - missing, antialias=antialias)
        assert partial.overflow == missing
        assert np.all(np.isfinite(partial.rgb))
        assert np.any(np.asarray(partial.rgb) != np.asarray(complete.rgb))


@pytest.mark.slow
def test_automatic_capacity_grows_with_the_data(on_axis, draw):
    """Three dots, then three that cover the picture: the same call holds both."""
    inputs = on_axis([2.0, 2.1, 2.2], [0.9, 0.9, 0.9], sigma=0.001, size=320)
    assert draw(inputs, (320, 320)).overflow == 0
    pictures = draw(inputs | {"scales": np.full((3, 3), 20.0, np.float32)}, (320, 320))
    assert pictures.overflow == 0
    assert np.all(np.asarray(pictures.alpha) > 0.95)


def test_one_pair_too_few_is_the_last_tile_of_the_farthest(on_axis, draw):
    """Three Gaussians that cover 2 x 3 tiles, room for 17 pairs of 18."""
    inputs = on_axis([2.0, 2.1, 2.2], [0.6, 0.6, 0.6], sigma=20.0, size=36) | {"background": np.ones(3, np.float32)}
    inputs["intrinsics"][0, :2, 2] = 18, 10
    complete, without = (draw(inputs | {"mask": np.arange(3) < n}, (20, 36)).rgb for n in (3, 2))
    partial = draw(inputs, (20, 36), capacity=17)
    assert partial.overflow == 1
    expected = np.array(complete)
    expected[:, 16:, 32:] = without[:, 16:, 32:]
    np.testing.assert_array_equal(partial.rgb, expected)


def test_float64_depths_are_ordered_by_all_their_bits(on_axis, draw):
    """The second Gaussian is nearer by less than float32 can tell."""
    with jax.enable_x64(True):
        inputs = {k: np.asarray(v, np.float64) for k, v in on_axis([2.0, 2.0], [0.9, 0.9]).items()}
        inputs["means"][1, 2] -= 1e-12
        centre = np.asarray(draw(inputs, (24, 24)).rgb)[0, 12, 12]
    assert centre[1] > 5 * centre[0] > 0


def test_equal_depths_keep_the_order_of_the_input(on_axis, draw):
    centre = np.asarray(draw(on_axis([2.0, 2.0], [0.9, 0.9]), (24, 24)).rgb)[0, 12, 12]
    assert centre[0] > 5 * centre[1] > 0


def test_colors_and_background_per_view(rng, make_inputs, draw):
    size = (24, 24)
    inputs = make_inputs(rng, 30, 2, *size)
    colors, background = rng.uniform(size=(2, 30, 5)).astype(np.float32), rng.uniform(size=(2, 5)).astype(np.float32)
    together = draw(inputs | {"colors": colors, "background": background}, size).rgb
    assert together.shape == (2, *size, 5)
    for view in range(2):
        alone = draw(inputs | {"colors": colors[view], "background": background[view]}, size).rgb[view]
        np.testing.assert_array_equal(together[view], alone)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_automatic_capacity_needs_data(rng, make_inputs, draw, transform):
    inputs = make_inputs(rng, 4, 1, 16, 16, scenes=(2,))
    background = inputs.pop("background")

    def total(inputs):
        return jnp.sum(draw(inputs | {"background": background}, (16, 16), **ALL_ON).rgb)

    with pytest.raises(ValueError, match="integer `capacity`"):
        transform(total)(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"implementation": "cuda"}, "implementation is 'cuda'.*xla"),
        ({"near": -1.0}, "near is -1"),
        ({"near": 2.0, "far": 1.0}, "near is 2.0 and far 1.0"),
        ({"eps2d": float("nan")}, "eps2d is nan"),
        ({"capacity": 2**40}, "capacity is 1099511627776"),
        ({"max_alpha": 1.0}, "max_alpha is 1"),
        ({"background": np.zeros(4, np.float32)}, r"background is \(4,\)"),
        ({"background": np.zeros((7, 1, 3), np.float32)}, r"background is \(7, 1, 3\); .* \(1, 3\)"),
        ({"colors": np.zeros((3, 4, 3), np.float32)}, r"colors are \(3, 4, 3\)"),
        ({"intrinsics": np.eye(3, dtype=np.float32), "world_from_camera": np.eye(4, dtype=np.float32)}, "cameras must"),
    ],
)
def test_wrong_arguments_are_named(rng, make_inputs, draw, change, message):
    inputs = make_inputs(rng, 4, 1, 16, 16)
    options = {key: value for key, value in change.items() if key not in inputs}
    with pytest.raises(ValueError, match=message):
        draw(inputs | {key: value for key, value in change.items() if key in inputs}, (16, 16), **options)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("scales", (4,)),
        ("scales", (4, 1)),
        ("means", (4, 2)),
        ("quats", (4, 3)),
        ("opacities", (1,)),
        ("mask", ()),
        ("intrinsics", (1, 4, 4)),
        ("world_from_camera", (2, 4, 4)),
    ],
)
def test_wrong_shapes_are_named(rng, make_inputs, objects_of, name, shape):
    """Rebuilt from leaves: constructors are checked in tests, and not in use."""
    scene = objects_of(make_inputs(rng, 4, 1, 16, 16), (16, 16))
    paths, structure = jax.tree.flatten_with_path(scene)
    leaves = [np.ones(shape, leaf.dtype) if path[-1].name == name else leaf for path, leaf in paths]
    assert any(path[-1].name == name for path, _ in paths)
    with pytest.raises(ValueError, match=f"({name} is|means are) "):
        rasterize(*jax.tree.unflatten(structure, leaves), capacity=10)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 0.01, 0.3, 20.0]),
    squash=st.sampled_from([1.0, 1e-4, 0.0]),
    count=st.integers(0, 12),
    broken=st.integers(-1, 11),
    equal_depths=st.booleans(),
    capacity=st.sampled_from([1, 40, 256]),
)
def test_any_gaussians_equal_dense_renderer(
    make_inputs, objects_of, draw, dense, seed, scale, squash, count, broken, equal_depths, capacity
):
    """Random numbers of needles, discs, points and Gaussians that cover everything, one of them perhaps NaN, several
    perhaps at one depth: what fits the capacity equals, what does not is counted.
    """
    rng, size = np.random.default_rng(seed), (20, 36)
    inputs = make_inputs(rng, 12, 1, *size, scale=scale)
    inputs["scales"][:, 0] *= squash
    if equal_depths:
        inputs["means"][:6] = inputs["means"][0]
    if broken >= 0:
        inputs["quats"][broken] = np.nan
    inputs["mask"] = np.arange(12) < count
    valid = inputs["mask"] & (np.arange(12) != broken)
    alone = inputs | {key: inputs[key][valid] for key in ("means", "scales", "quats", "opacities", "colors")}

    rendering = draw(inputs, size, capacity=capacity, normals=True)
    expected = max(0, count_pairs(*objects_of(inputs, size)) - capacity)
    assert abs(rendering.overflow - expected) <= 1  # two programs may round a tile's edge differently
    assert rendering.invalid == np.sum(inputs["mask"]) - np.sum(valid)
    assert np.all(np.isfinite(rendering.rgb))
    if rendering.overflow == 0:
        assert_equal_pictures(rendering, 0, dense(alone, 0, size), 5e-5)
