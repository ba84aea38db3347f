"""Gradients against central differences, and where they must be zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

DIFFERENTIABLE = ("means", "scales", "quats", "opacities", "colors", "background", "world_from_camera", "intrinsics")
ALL_ON = {"depth": "expected", "normals": True, "antialias": True}


def directions(rng, inputs):
    """(input, direction) pairs: a random one of every input's scale, and every entry of poses and intrinsics alone."""
    for key in DIFFERENTIABLE:
        direction = rng.normal(size=inputs[key].shape) * np.abs(inputs[key]).mean()
        if key in ("world_from_camera", "intrinsics"):
            rows = 3 if key == "world_from_camera" else 2
            entries = [(i, j) for i in range(rows) for j in range(4)] if rows == 3 else [(0, 0), (1, 1), (0, 2), (1, 2)]
            for entry in entries:
                alone = np.zeros_like(direction)
                alone[..., *entry] = direction[..., *entry]
                yield key, alone
        else:
            yield key, direction


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        ("accumulated", {}),
        ("expected", {"normals": True, "antialias": True}),
        pytest.param("accumulated", {"normals": True, "antialias": True}, marks=pytest.mark.slow),
        pytest.param("expected", {}, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_central_differences(rng, make_inputs, draw, depth, options):
    """In float64, along random directions of each input and each entry of the cameras."""
    size, step = (20, 18), 2e-7  # larger ones carry a pixel over a threshold now and then
    inputs = make_inputs(rng, 24, 2, *size, scale=0.2, dtype=np.float64)
    inputs["opacities"][:4] = [0.99999, 0.9999, 0.003, 0.5]  # clamped, too faint
    inputs["means"][4] = [5.0, 0.0, 0.0]  # behind a camera
    shapes = {"rgb": (2, *size, 3), "alpha": (2, *size), "depth": (2, *size), "normal": (2, *size, 3)}
    weights = {key: rng.normal(size=shape) for key, shape in shapes.items() if key != "normal" or options}
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def total(inputs):
            rendering = draw(inputs, size, depth=depth, capacity=512, **options)
            return sum(jnp.sum(getattr(rendering, key) * weight) for key, weight in weights.items())

        gradients = total(inputs)[1]
        for key, direction in directions(rng, inputs):
            ahead, behind = (total(inputs | {key: inputs[key] + sign * step * direction})[0] for sign in (1.0, -1.0))
            difference = float(ahead - behind) / (2 * step)
            derivative = np.vdot(gradients[key], direction)
            print(key, derivative, abs(derivative - difference) / abs(difference))
            assert abs(derivative - difference) < 1e-5 * max(abs(difference), 1e-2), key


@pytest.fixture(scope="module")
def gradients_of(draw):
    """Gradients of a fixed mixture of all pictures in some of the pixels, of some of the Gaussians."""

    @functools.partial(jax.jit, static_argnames="everything")
    def gradients(inputs, mask, pixels, everything):
        def total(inputs):
            rendering = draw(inputs | {"mask": mask}, pixels.shape[-2:], capacity=512, **(ALL_ON if everything else {}))
            ramp = pixels * jnp.cos(jnp.arange(pixels.size, dtype=jnp.float32)).reshape(pixels.shape)
            normal = rendering.normal @ jnp.array([0.3, -0.5, 0.8]) if everything else 0.0
            return jnp.sum(ramp * (rendering.rgb.sum(-1) + rendering.alpha + 0.5 * rendering.depth + normal))

        return jax.grad(total)(inputs)

    def call(inputs, size=(24, 24), *, mask=None, pixels=None, everything=False):
        mask = np.ones(inputs["opacities"].shape, bool) if mask is None else mask
        pixels = np.ones((*inputs["intrinsics"].shape[:-2], *size), bool) if pixels is None else pixels
        return gradients(inputs, mask, pixels, everything)

    return call


def test_same_input_gives_same_bits(rng, make_inputs, gradients_of):
    inputs = make_inputs(rng, 20, 1, 24, 24, scale=0.3)
    first, second = (gradients_of(inputs, everything=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("everything", [False, True])
def test_what_is_not_drawn_has_zero_gradient(rng, make_inputs, gradients_of, everything):
    inputs = make_inputs(rng, 20, 1, 24, 24)
    inputs["means"][0] = 3 * inputs["world_from_camera"][0, :3, 3]  # behind the camera
    inputs["opacities"][1] = 0.003  # under the cut
    inputs["opacities"][2] = 0.0
    inputs["scales"][3] = 0.0  # a point, still drawn by its dilation if that adds light
    inputs["quats"][4] = 0.0
    inputs["scales"][5] = 1e30  # too large for float32
    inputs["scales"][6, :2] = 0.0  # a needle
    inputs["scales"][7] = 1e-22  # whose square is no float32
    gradients = gradients_of(inputs, everything=everything)
    for key in ("means", "scales", "quats", "opacities", "colors"):
        assert np.all(np.isfinite(gradients[key])), key
        assert np.all(np.asarray(gradients[key])[[0, 1, 2, 5]] == 0), key
        assert np.any(np.asarray(gradients[key])[8:] != 0), key
    assert np.all((np.asarray(gradients["colors"])[[3, 6, 7]] == 0) == everything)
    assert np.all(np.isfinite(gradients["world_from_camera"]))
    assert np.all(np.isfinite(gradients["intrinsics"]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-22, 1e-6, 0.3, 20.0, 1e12]),
    squash=st.sampled_from([1.0, 1e-4, 0.0]),
    shrink=st.sampled_from([1.0, 1e-30, 0.0]),
    broken=st.integers(-1, 19),
)
def test_gradients_of_any_gaussians_are_finite(make_inputs, gradients_of, seed, scale, squash, shrink, broken):
    """Needles, discs, points, Gaussians that cover everything or are too large; short quaternions; one perhaps NaN."""
    inputs = make_inputs(np.random.default_rng(seed), 20, 1, 24, 24, scale=scale)
    inputs["scales"][:, 0] *= squash
    inputs["quats"] *= shrink
    inputs["means"][:6] = inputs["means"][0]
    if broken >= 0:
        inputs["opacities"][broken] = np.nan
    gradients = gradients_of(inputs, everything=True)
    assert all(np.all(np.isfinite(g)) for g in gradients.values())
    assert broken < 0 or all(np.all(np.asarray(gradients[key])[broken] == 0) for key in DIFFERENTIABLE[:5])


def test_empty_pixels_have_zero_gradient(rng, make_inputs, draw, gradients_of):
    """A loss that looks only where nothing is drawn, in all pictures, moves nothing but the background."""
    inputs = make_inputs(rng, 20, 1, 24, 24)
    empty = np.asarray(draw(inputs, (24, 24), **ALL_ON).alpha) == 0
    assert 0.1 < empty.mean() < 1
    gradients = gradients_of(inputs, pixels=empty, everything=True)
    assert np.all(np.asarray(gradients.pop("background")) != 0)
    assert all(np.all(np.asarray(g) == 0) for g in gradients.values())


def test_clamped_alpha_has_no_gradient_but_its_colour_has(on_axis, gradients_of):
    inputs = on_axis([2.0], [1.0], sigma=50.0)  # alpha is at the clamp in every pixel
    gradients = gradients_of(inputs)
    for key in ("scales", "quats", "opacities"):
        assert np.all(np.asarray(gradients[key]) == 0), key
    assert np.all(np.asarray(gradients["means"])[0, :2] == 0)  # depth moves with the mean
    assert np.all(np.asarray(gradients["colors"]) != 0)


def test_no_gaussians_have_empty_gradients(rng, make_inputs, gradients_of):
    gradients = gradients_of(make_inputs(rng, 0, 2, 20, 20), (20, 20))
    assert gradients["means"].shape == (0, 3)
    assert np.all(np.asarray(gradients["world_from_camera"]) == 0)


def test_masked_gaussians_have_zero_gradient(rng, make_inputs, gradients_of):
    inputs, mask = make_inputs(rng, 20, 1, 24, 24), np.arange(20) >= 5
    inputs["means"][:2] = np.nan
    gradients = gradients_of(inputs, mask=mask)
    for key in ("means", "scales", "quats", "opacities", "colors"):
        assert np.all(np.asarray(gradients[key])[~mask] == 0), key
        assert np.any(np.asarray(gradients[key])[mask] != 0), key


@pytest.mark.parametrize("field", ["means", "scales", "quats", "opacities", "colors"])
def test_non_finite_gaussian_is_left_out_and_counted(rng, make_inputs, draw, gradients_of, field):
    size = (24, 24)
    inputs = make_inputs(rng, 20, 1, *size)
    broken = {key: value.copy() for key, value in inputs.items()}
    broken[field].reshape(20, -1)[7, 0] = np.inf if field == "scales" else np.nan
    rendering = draw(broken, size)
    without = draw(inputs | {"mask": np.arange(20) != 7}, size)
    assert rendering.invalid == 1
    np.testing.assert_array_equal(rendering.rgb, without.rgb)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients_of(broken)))
