"""Images and gradients against gsplat's PyTorch reference in float64; cases and sizes come from the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.rendering import count_pairs, rasterize
from geolrm_jax.scene import Cameras, Gaussians

TOLERANCE = {"rgb": 2e-5, "alpha": 2e-5, "depth": 5e-5}
FLIPPED = 5e-3  # a threshold decided the other way by rounding moves a pixel by less than this,
FLIPPED_SHARE = 1e-3  # and no more than this share of the pixels
INPUTS = ("means", "scales", "quats", "opacities", "colors", "background", "viewmats", "intrinsics")


@pytest.fixture(scope="module")
def cases(parity):
    """Every case of the file: its arrays, our pictures, and our gradients of sum(outputs * cotangents)."""
    with np.load(parity / "rasterizer.npz") as file:
        names = sorted({key.split("/")[0] for key in file.files})
        arrays = {n: {k.removeprefix(f"{n}/"): file[k] for k in file.files if k.startswith(f"{n}/")} for n in names}
    assert arrays
    return {name: (case, *render(case)) for name, case in arrays.items()}


def scene(inputs, size):
    """The reference's poses are world-to-camera: ours are the inverse, and gradients pass through it."""
    fields = (inputs[key] for key in ("means", "scales", "quats", "opacities", "colors"))
    gaussians = Gaussians(*fields, mask=jnp.ones(inputs["opacities"].shape, bool))
    return gaussians, Cameras(jnp.linalg.inv(inputs["viewmats"]), inputs["intrinsics"], *size)


def render(case):
    inputs = {key: jnp.asarray(case[f"in/{key}"]) for key in INPUTS}
    size = case["out/alpha"].shape[-3:-1]
    options = {"max_alpha": float(case["in/max_alpha"]), "capacity": count_pairs(*scene(inputs, size)) + 100}

    def total(inputs):
        r = rasterize(*scene(inputs, size), background=inputs["background"], **options)
        outputs = {"rgb": r.rgb, "alpha": r.alpha[..., None], "depth": r.depth[..., None]}
        return sum(jnp.sum(outputs[key] * case[f"cotangent/{key}"]) for key in outputs), (outputs, r.overflow)

    gradients, (outputs, overflow) = jax.jit(jax.grad(total, has_aux=True))(inputs)
    assert overflow == 0
    return outputs, gradients


@pytest.mark.parametrize("output", TOLERANCE)
def test_images(cases, output):
    for name, (case, outputs, _) in cases.items():
        error = np.abs(np.asarray(outputs[output], np.float64) - case[f"out/{output}"]).max(axis=-1)
        print(name, output, np.sort(error.ravel())[-5:])
        assert error.max() < FLIPPED, name
        assert np.mean(error > TOLERANCE[output]) <= FLIPPED_SHARE, name


@pytest.mark.parametrize("key", INPUTS)
def test_gradients(cases, key):
    for name, (case, _, gradients) in cases.items():
        ours, expected = np.asarray(gradients[key], np.float64), case[f"grad/{key}"]
        relative = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        cosine = np.vdot(ours, expected) / (np.linalg.norm(ours) * np.linalg.norm(expected))
        print(name, key, relative, 1 - cosine)
        assert relative < 1e-4, name
        assert cosine > 0.99999, name
