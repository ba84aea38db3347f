"""LPIPS at its real widths, with random weights in the published layout, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from geolrm_jax.losses.lpips import Lpips
from geolrm_jax.models.vgg import VGG16
from geolrm_jax.precision import Precision
from geolrm_jax.weights.lpips import load_lpips

# torchvision's vgg16().features, written out: a number is a convolution's width, M a pool; ReLU after each number.
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(1)
    tensors, position, inputs = {}, 0, 3
    for layer in LAYERS:
        if layer == "M":
            position += 1
            continue
        kernel = rng.normal(size=(layer, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
        tensors[f"features.{position}.weight"] = kernel.astype(np.float32)
        tensors[f"features.{position}.bias"] = rng.normal(size=layer, scale=0.1).astype(np.float32)
        position, inputs = position + 2, layer
    for k, width in enumerate([64, 128, 256, 512, 512]):
        tensors[f"lin{k}.model.1.weight"] = rng.uniform(0, 0.1, (1, width, 1, 1)).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def saved(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    safetensors.numpy.save_file(weights | {"classifier.0.bias": np.zeros(3, np.float32)}, path)
    return path


@pytest.fixture(scope="module")
def lpips(saved):
    return load_lpips(saved)[0]


def numpy_features(weights, image):
    """Unit vectors of relu1_2, 2_2, 3_3, 4_3, 5_3 for one (H, W, 3) image in [-1, 1], channel-first."""
    x = image.astype(np.float64).transpose(2, 0, 1)
    x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
    features, position = [], 0
    for layer in LAYERS:
        if layer == "M":
            features.append(x / (np.sqrt((x**2).sum(axis=0)) + 1e-10))
            c, h, w = x.shape
            x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
            position += 1
            continue
        kernel, bias = (weights[f"features.{position}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
        x = np.maximum(np.tensordot(kernel, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)
        position += 2
    return features


def numpy_lpips(weights, image, reference):
    pairs = zip(numpy_features(weights, image), numpy_features(weights, reference), strict=True)
    heads = [weights[f"lin{k}.model.1.weight"].astype(np.float64).reshape(-1, 1, 1) for k in range(5)]
    return sum((head * (a - b) ** 2).sum(axis=0).mean() for head, (a, b) in zip(heads, pairs, strict=True))


def images(rng, count, height=32, width=32):
    x = rng.uniform(-1, 1, (count, height, width, 3)).astype(np.float32)
    y = np.clip(x + rng.normal(scale=0.3, size=x.shape), -1, 1).astype(np.float32)
    return x, y


@jax.jit
def distance(lpips, x, y):
    return lpips.distance(x, lpips.target_features(y))


def test_value_against_numpy(lpips, weights, rng):
    x, y = images(rng, 2, 32, 38)
    expected = [numpy_lpips(weights, a, b) for a, b in zip(x, y, strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(distance(lpips, x, y), expected, rtol=1e-4)
    np.testing.assert_allclose(distance(lpips, x[None], y[None])[0], expected, rtol=1e-4)


def test_distance_of_equal_images_is_zero(lpips, rng):
    x, y = images(rng, 2)
    assert (distance(lpips, x, x) == 0).all() and (distance(lpips, x, y) > 0).all()


def test_loss_is_the_mean_over_valid_views_of_images_from_0_to_1(lpips, rng):
    x, y = images(rng, 4)
    each = np.asarray(distance(lpips, x, y))
    x, y = (jnp.asarray((image + 1) / 2).reshape(2, 2, 32, 32, 3) for image in (x, y))
    valid = jnp.array([[True, False], [True, True]])
    np.testing.assert_allclose(jax.jit(lpips.between)(x, y, valid), each[[0, 2, 3]].mean(), rtol=1e-4)


def test_gradient_against_finite_differences(lpips, weights, rng):
    """Along a random direction, in float64 NumPy, where the step can be small."""
    x, y = (image[0] for image in images(rng, 1))
    gradient = jax.jit(jax.grad(lambda x, y: distance(lpips, x, y)))(x, y)
    for direction in (rng.normal(size=x.shape), np.asarray(gradient, np.float64)):
        step = 1e-5 * direction / np.linalg.norm(direction)
        slope = numpy_lpips(weights, x.astype(np.float64) + step, y) - numpy_lpips(weights, x - step, y)
        expected = slope / (2 * np.linalg.norm(step))
        along = np.vdot(gradient, step) / np.linalg.norm(step)
        np.testing.assert_allclose(along, expected, rtol=2e-3, atol=2e-3 * np.linalg.norm(gradient))


def test_targets_get_no_gradient(lpips, rng):
    x, y = images(rng, 1, 16, 16)
    assert (jax.grad(lambda y: distance(lpips, x, y).sum())(y) == 0).all()


def test_pixels_whose_every_activation_is_zero_give_no_nan(weights, tmp_path, rng):
    """Negative kernels over what a ReLU leaves: relu1_2 is zero everywhere."""
    dead = weights | {"features.2.weight": -np.abs(weights["features.2.weight"]), "features.2.bias": np.zeros(64, "f")}
    safetensors.numpy.save_file(dead, tmp_path / "dead.safetensors")
    lpips, _ = load_lpips(tmp_path / "dead.safetensors")
    x, y = images(rng, 1, 16, 16)
    assert (lpips.features(x)[0] == 0).all()
    assert np.isfinite(jax.grad(lambda x: distance(lpips, x, y).sum())(x)).all()


def test_bfloat16_runs_the_convolutions_only(saved, lpips, rng):
    half, _ = load_lpips(saved, Precision("bfloat16"))
    x, y = images(rng, 1)
    exact, rounded = distance(lpips, x, y), distance(half, x, y)
    assert rounded.dtype == jnp.float32 and rounded != exact
    np.testing.assert_allclose(rounded, exact, rtol=0.05)


def test_only_activations_and_targets_are_kept_for_the_gradient(rng):
    """What the backward pass is given, from shapes alone: the blocks and the distances are computed again."""
    lpips = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=Precision()))
    image = jax.ShapeDtypeStruct((1, 2, 32, 48, 3), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, 2), bool)

    def backward(lpips, x, y, valid):
        return jax.vjp(lambda x: lpips.between(x, y, valid), x)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, lpips, image, image, valid))
    per_view = sorted((x.shape[2:], x.dtype.name) for x in kept if x.shape[:2] == (1, 2) and x.ndim > 2)
    taps = [(32, 48, 64), (16, 24, 128), (8, 12, 256), (4, 6, 512), (2, 3, 512)]
    assert per_view == sorted([(tap, "float32") for tap in taps * 2] + [((32, 48, 3), "float32")])


def test_random_initialisation_and_small_images():
    lpips = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0), precision=Precision()))
    shapes = jax.eval_shape(lambda m, x: m.features(x), lpips, jnp.zeros((2, 16, 47, 3)))
    assert [s.shape for s in shapes] == [
        (2, 16, 47, 64),
        (2, 8, 23, 128),
        (2, 4, 11, 256),
        (2, 2, 5, 512),
        (2, 1, 2, 512),
    ]
    vgg = nnx.eval_shape(lambda: VGG16(rngs=nnx.Rngs(0), precision=Precision()))
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 15x32"):
        jax.eval_shape(lambda m, x: m(x), vgg, jnp.zeros((1, 15, 32, 3)))
