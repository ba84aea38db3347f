"""The rasterizer against a dense renderer in NumPy, closed forms, finite differences and its own invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from geolrm_jax.geometry.cameras import orbit
from geolrm_jax.rendering import count_pairs, rasterize
from geolrm_jax.scene import Cameras, Gaussians

DIFFERENTIABLE = ("means", "scales", "quats", "opacities", "colors", "background", "world_from_camera", "intrinsics")


def make_inputs(rng, gaussians, views, height, width, *, scenes=(), scale=0.08, dtype=np.float32):
    """Random Gaussians in the cube and cameras around it, slightly rolled and off-centre."""
    shape = (*scenes, gaussians)
    cameras = orbit(np.linspace(0, 250, views), 25.0, 1.75, 50.0, max(height, width))
    intrinsics = np.array(cameras.intrinsics, np.float64)
    intrinsics[..., :2, 2] = np.array([width, height]) / 2 + rng.uniform(-3, 3, (views, 2))
    inputs = {
        "means": rng.uniform(-0.5, 0.5, (*shape, 3)),
        "scales": scale * rng.uniform(0.1, 1.0, (*shape, 3)),
        "quats": rng.normal(size=(*shape, 4)),
        "opacities": rng.uniform(0.05, 0.95, shape),
        "colors": rng.uniform(size=(*shape, 3)),
        "background": rng.uniform(size=3),
        "world_from_camera": np.broadcast_to(cameras.world_from_camera, (*scenes, views, 4, 4)),
        "intrinsics": np.broadcast_to(intrinsics, (*scenes, views, 3, 3)),
    }
    return {key: np.array(value, dtype) for key, value in inputs.items()}


def draw(inputs, size, **options):
    """`rasterize` of a dictionary of inputs."""
    g = {key: inputs[key] for key in ("means", "scales", "quats", "opacities", "colors")}
    mask = inputs.get("mask", np.ones(inputs["opacities"].shape, bool))
    cameras = Cameras(inputs["world_from_camera"], inputs["intrinsics"], *size)
    return rasterize(Gaussians(**g, mask=mask), cameras, background=inputs["background"], **options)


def dense(inputs, view, size, max_alpha=0.999, eps2d=0.3):
    """rgb, alpha and accumulated depth of one view, from the equations, every Gaussian in every pixel, in float64."""
    g = {key: np.asarray(value, np.float64) for key, value in inputs.items()}
    pose, k = np.linalg.inv(g["world_from_camera"][view]), g["intrinsics"][view]
    height, width = size
    y, x = np.indices(size) + 0.5
    camera = g["means"] @ pose[:3, :3].T + pose[:3, 3]
    rgb, depth, transmittance, finished = np.zeros((*size, 3)), np.zeros(size), np.ones(size), np.zeros(size, bool)
    for i in np.argsort(camera[:, 2], kind="stable"):
        (cx, cy, cz), (fx, fy) = camera[i], (k[0, 0], k[1, 1])
        if cz <= 0.01:
            continue
        margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
        u = np.clip(cx / cz, -k[0, 2] / fx - margin_x, (width - k[0, 2]) / fx + margin_x)
        v = np.clip(cy / cz, -k[1, 2] / fy - margin_y, (height - k[1, 2]) / fy + margin_y)
        jacobian = np.array([[fx, 0, -fx * u], [0, fy, -fy * v]]) / cz
        half = jacobian @ pose[:3, :3] @ Rotation.from_quat(g["quats"][i], scalar_first=True).as_matrix()
        half = half * g["scales"][i]
        q = np.linalg.inv(half @ half.T + eps2d * np.eye(2))
        dx, dy = x - (fx * cx / cz + k[0, 2]), y - (fy * cy / cz + k[1, 2])
        distance = q[0, 0] * dx**2 + 2 * q[0, 1] * dx * dy + q[1, 1] * dy**2
        alpha = np.minimum(max_alpha, g["opacities"][i] * np.exp(-0.5 * distance))
        alpha = np.where((alpha >= 1 / 255) & ~finished, alpha, 0)
        finished |= transmittance * (1 - alpha) <= 1e-4
        alpha = np.where(finished, 0, alpha)
        weight = alpha * transmittance
        rgb, depth = rgb + weight[..., None] * g["colors"][i], depth + weight * cz
        transmittance = transmittance * (1 - alpha)
    return rgb + transmittance[..., None] * g["background"], 1 - transmittance, depth


def assert_close_up_to_flips(ours, expected, tolerance=2e-5):
    """Equal within `tolerance`; a threshold that rounding decides the other way may move a pixel in a thousand."""
    error = np.abs(np.asarray(ours, np.float64) - expected)
    assert error.max() < 5e-3
    assert np.mean(error > tolerance) <= 1e-3


@pytest.mark.parametrize(("size", "views", "scale"), [((40, 56), 2, 0.08), ((17, 33), 3, 0.4), ((5, 7), 1, 0.1)])
def test_equals_dense_renderer(rng, size, views, scale):
    inputs = make_inputs(rng, 150, views, *size, scale=scale)
    rendering = draw(inputs, size)
    assert rendering.rgb.shape == (views, *size, 3)
    assert rendering.overflow == 0
    for view in range(views):
        rgb, alpha, depth = dense(inputs, view, size)
        assert_close_up_to_flips(rendering.rgb[view], rgb)
        assert_close_up_to_flips(rendering.alpha[view], alpha)
        assert_close_up_to_flips(rendering.depth[view], depth, 5e-5)


def test_saturated_and_clamped_pixels_equal_dense_renderer(rng):
    """Opaque layers: alphas at the clamp, pixels that stop early, more Gaussians in a tile than a chunk holds."""
    size = (32, 32)
    inputs = make_inputs(rng, 200, 1, *size, scale=0.5)
    inputs["opacities"] = rng.uniform(0.5, 1.0, 200).astype(np.float32)
    inputs["opacities"][::3] = 1.0
    rendering = draw(inputs, size)
    rgb, alpha, _ = dense(inputs, 0, size)
    assert np.mean(alpha > 0.999) > 0.5
    assert_close_up_to_flips(rendering.rgb[0], rgb)
    assert_close_up_to_flips(rendering.alpha[0], alpha)


def on_axis(distances, opacities, sigma=0.1, focal=50.0, size=24):
    """Isotropic Gaussians on the optical axis of a camera at the origin."""
    count = len(distances)
    return {
        "means": np.stack([np.zeros(count), np.zeros(count), distances], axis=-1).astype(np.float32),
        "scales": np.full((count, 3), sigma, np.float32),
        "quats": np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
        "opacities": np.float32(opacities),
        "colors": np.eye(3, dtype=np.float32)[:count],
        "background": np.zeros(3, np.float32),
        "world_from_camera": np.eye(4, dtype=np.float32)[None],
        "intrinsics": np.float32([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])[None],
    }


def test_gaussians_on_axis_have_the_closed_form():
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


def test_expected_depth_is_accumulated_over_alpha(rng):
    inputs = make_inputs(rng, 30, 1, 24, 24)
    accumulated, expected = (draw(inputs, (24, 24), depth=kind) for kind in ("accumulated", "expected"))
    covered = np.asarray(accumulated.alpha) > 0
    assert 0 < covered.mean() < 1
    ratio = np.asarray(accumulated.depth)[covered] / np.asarray(accumulated.alpha)[covered]
    np.testing.assert_allclose(np.asarray(expected.depth)[covered], ratio, rtol=1e-6)
    assert np.all(np.asarray(expected.depth)[~covered] == 0)


def random_direction(rng, inputs):
    """A random direction of unit scale for every input; of the pose, the 12 upper entries."""
    direction = {key: rng.normal(size=inputs[key].shape) * np.abs(inputs[key]).mean() for key in DIFFERENTIABLE}
    direction["world_from_camera"][..., 3, :] = 0
    direction["intrinsics"] *= np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]]) * 0.1
    return direction


@pytest.mark.parametrize("depth", ["accumulated", "expected"])
def test_gradients_equal_central_differences(rng, depth):
    """In float64, along a random direction of each input."""
    size = (20, 18)
    inputs = make_inputs(rng, 24, 2, *size, scale=0.2, dtype=np.float64)
    inputs["opacities"][:4] = [0.99999, 0.9999, 0.003, 0.5]  # clamped, too faint
    inputs["means"][4] = [5.0, 0.0, 0.0]  # behind a camera
    weights = {key: rng.normal(size=(2, *size)) for key in ("alpha", "depth")} | {"rgb": rng.normal(size=(2, *size, 3))}
    with jax.enable_x64(True):

        @jax.jit
        def total(inputs):
            rendering = draw(inputs, size, depth=depth, capacity=512)
            return sum(jnp.sum(getattr(rendering, key) * weight) for key, weight in weights.items())

        gradients = jax.jit(jax.grad(total))(inputs)
        direction = random_direction(rng, inputs)
        for key in DIFFERENTIABLE:
            step = 1e-6
            ahead, behind = (total(inputs | {key: inputs[key] + sign * step * direction[key]}) for sign in (1.0, -1.0))
            difference = float(ahead - behind) / (2 * step)
            derivative = np.vdot(gradients[key], direction[key])
            assert abs(derivative - difference) < 1e-5 * max(abs(difference), 1e-2), key


@functools.partial(jax.jit, static_argnames=("size", "capacity"))
def gradients_of(inputs, size=(24, 24), capacity=512):
    """Gradients of a fixed mixture of all outputs."""

    def total(inputs):
        rendering = draw(inputs, size, capacity=capacity)
        ramp = jnp.cos(jnp.arange(rendering.depth.size, dtype=jnp.float32)).reshape(rendering.depth.shape)
        return jnp.sum(ramp * (rendering.rgb.sum(-1) + rendering.alpha + 0.5 * rendering.depth))

    return jax.grad(total)(inputs)


def test_same_input_gives_same_bits(rng):
    inputs = make_inputs(rng, 20, 1, 24, 24, scale=0.3)
    first, second = (gradients_of(inputs) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_what_is_not_drawn_has_zero_gradient(rng):
    inputs = make_inputs(rng, 20, 1, 24, 24)
    inputs["means"][0] = 3 * inputs["world_from_camera"][0, :3, 3]  # behind the camera
    inputs["opacities"][1] = 0.003  # under the cut
    inputs["opacities"][2] = 0.0
    inputs["scales"][3] = 0.0  # a point, still drawn by its dilation
    inputs["quats"][4] = 0.0
    inputs["scales"][5] = 1e30  # too large for float32
    gradients = gradients_of(inputs)
    for key in ("means", "scales", "quats", "opacities", "colors"):
        assert np.all(np.isfinite(gradients[key])), key
        assert np.all(np.asarray(gradients[key])[[0, 1, 2, 5]] == 0), key
        assert np.any(np.asarray(gradients[key])[6:] != 0), key
    assert np.any(np.asarray(gradients["colors"])[3] != 0)
    assert np.all(np.isfinite(gradients["world_from_camera"]))


def test_clamped_alpha_has_no_gradient_but_its_colour_has():
    inputs = on_axis([2.0], [1.0], sigma=50.0)  # alpha is at the clamp in every pixel
    gradients = gradients_of(inputs)
    for key in ("means", "scales", "quats", "opacities"):
        if key != "means":  # depth moves with the mean
            assert np.all(np.asarray(gradients[key]) == 0), key
    assert np.all(np.asarray(gradients["means"])[0, :2] == 0)
    assert np.all(np.asarray(gradients["colors"]) != 0)


def test_no_gaussians_leave_the_background(rng):
    inputs = make_inputs(rng, 0, 2, 20, 20)
    rendering = draw(inputs, (20, 20))
    np.testing.assert_array_equal(rendering.rgb, np.broadcast_to(inputs["background"], (2, 20, 20, 3)))
    assert np.all(np.asarray(rendering.alpha) == 0)
    assert gradients_of(inputs, (20, 20))["means"].shape == (0, 3)


def test_masked_gaussians_change_nothing(rng):
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

    masked = {key: value for key, value in padded.items() if key != "mask"}

    def total(inputs):
        return jnp.sum(draw(inputs | {"mask": padded["mask"]}, size, capacity=2048).rgb ** 2)

    gradients = jax.jit(jax.grad(total))(masked)
    for key in ("means", "scales", "quats", "opacities", "colors"):
        assert np.all(np.asarray(gradients[key])[~padded["mask"]] == 0), key
        assert np.any(np.asarray(gradients[key])[padded["mask"]] != 0), key


@pytest.mark.parametrize("field", ["means", "scales", "quats", "opacities", "colors"])
def test_non_finite_gaussian_is_left_out_and_counted(rng, field):
    size = (24, 24)
    inputs = make_inputs(rng, 20, 1, *size)
    broken = {key: value.copy() for key, value in inputs.items()}
    broken[field].reshape(20, -1)[7, 0] = np.inf if field == "scales" else np.nan
    rendering = draw(broken, size)
    without = draw(inputs | {"mask": np.arange(20) != 7}, size)
    assert rendering.invalid == 1
    np.testing.assert_array_equal(rendering.rgb, without.rgb)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients_of(broken)))


def test_overflow_counts_the_pairs_that_did_not_fit(rng):
    size = (40, 40)
    inputs = make_inputs(rng, 50, 2, *size)
    cameras = Cameras(inputs["world_from_camera"], inputs["intrinsics"], *size)
    fields = (inputs[key] for key in ("means", "scales", "quats", "opacities", "colors"))
    pairs = count_pairs(Gaussians(*fields, mask=np.ones(50, bool)), cameras)
    complete = draw(inputs, size, capacity=pairs)
    assert complete.overflow == 0
    np.testing.assert_array_equal(complete.rgb, draw(inputs, size, capacity=2 * pairs).rgb)
    for missing in (1, pairs - 1):
        partial = draw(inputs, size, capacity=pairs - missing)
        assert partial.overflow == missing
        assert np.all(np.isfinite(partial.rgb))
        assert np.any(np.asarray(partial.rgb) != np.asarray(complete.rgb))


def test_equal_depths_keep_the_order_of_the_input():
    inputs = on_axis([2.0, 2.0], [0.9, 0.9])
    centre = np.asarray(draw(inputs, (24, 24)).rgb)[0, 12, 12]
    assert centre[0] > 5 * centre[1] > 0


def test_leading_axes_equal_a_loop(rng):
    """Scenes and views as array axes, vmap, and one call after the other: the same bits."""
    size = (24, 40)
    inputs = make_inputs(rng, 40, 2, *size, scenes=(3,))
    scenes = [{key: value if key == "background" else value[i] for key, value in inputs.items()} for i in range(3)]
    together = draw(inputs, size, capacity=2048)
    one_by_one = [draw(scene, size, capacity=2048) for scene in scenes]
    axes = ({key: None if key == "background" else 0 for key in inputs},)
    mapped = jax.vmap(lambda inputs: draw(inputs, size, capacity=2048), in_axes=axes)(inputs)
    for name in ("rgb", "alpha", "depth"):
        loop = np.stack([getattr(rendering, name) for rendering in one_by_one])
        np.testing.assert_array_equal(getattr(together, name), loop)
        np.testing.assert_array_equal(getattr(mapped, name), loop)


def test_colors_and_background_per_view(rng):
    size = (24, 24)
    inputs = make_inputs(rng, 30, 2, *size)
    colors, background = rng.uniform(size=(2, 30, 5)).astype(np.float32), rng.uniform(size=(2, 5)).astype(np.float32)
    together = draw(inputs | {"colors": colors, "background": background}, size).rgb
    assert together.shape == (2, *size, 5)
    for view in range(2):
        alone = draw(inputs | {"colors": colors[view], "background": background[view]}, size).rgb[view]
        np.testing.assert_array_equal(together[view], alone)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_automatic_capacity_needs_data(rng, transform):
    inputs = make_inputs(rng, 4, 1, 16, 16, scenes=(2,))
    background = inputs.pop("background")

    def total(inputs):
        return jnp.sum(draw(inputs | {"background": background}, (16, 16)).rgb)

    with pytest.raises(ValueError, match="integer `capacity`"):
        transform(total)(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"implementation": "cuda"}, "implementation is 'cuda'.*xla"),
        ({"near": -1.0}, "near is -1"),
        ({"max_alpha": 1.0}, "max_alpha is 1"),
        ({"background": np.zeros(4, np.float32)}, r"background is \(4,\)"),
        ({"colors": np.zeros((3, 4, 3), np.float32)}, r"colors are \(3, 4, 3\)"),
        ({"intrinsics": np.eye(3, dtype=np.float32), "world_from_camera": np.eye(4, dtype=np.float32)}, "cameras must"),
    ],
)
def test_wrong_arguments_are_named(rng, change, message):
    inputs = make_inputs(rng, 4, 1, 16, 16)
    options = {key: value for key, value in change.items() if key not in inputs}
    with pytest.raises(ValueError, match=message):
        draw(inputs | {key: value for key, value in change.items() if key in inputs}, (16, 16), **options)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 0.01, 0.3, 20.0]),
    squash=st.sampled_from([1.0, 1e-4, 0.0]),
    count=st.integers(0, 12),
)
def test_any_gaussians_equal_dense_renderer(seed, scale, squash, count):
    """Random numbers of needles, discs, points and Gaussians that cover everything, and their gradients are finite."""
    rng, size = np.random.default_rng(seed), (20, 36)
    inputs = make_inputs(rng, 12, 1, *size, scale=scale)
    inputs["scales"][:, 0] *= squash
    inputs["mask"] = np.arange(12) < count
    rendering = draw(inputs, size, capacity=256)
    kept = {key: inputs[key][:count] for key in ("means", "scales", "quats", "opacities", "colors")}
    rgb, alpha, _ = dense(inputs | kept, 0, size)
    assert rendering.overflow == 0
    assert_close_up_to_flips(rendering.rgb[0], rgb, 5e-5)
    assert_close_up_to_flips(rendering.alpha[0], alpha, 5e-5)
