"""Images and gradients against gsplat's PyTorch reference in float64 (sizes and cases come from the file)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.rendering import rasterize
from geolrm_jax.scene import Cameras, Gaussians

CASES = ["geolrm", "hard"]
FLIPPED = 5e-3  # a threshold decided the other way by rounding moves a pixel by less than this,
FLIPPED_SHARE = 1e-3  # and no more than this share of the pixels


@pytest.fixture(scope="module", params=CASES)
def case(request, parity):
    with np.load(parity / "rasterizer.npz") as file:
        prefix = f"{request.param}/"
        return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


def render(inputs, size, max_alpha, capacity):
    """The reference's inputs are world-to-camera: ours are the inverse, and gradients pass through it."""
    gaussians = Gaussians(
        *(inputs[key] for key in ("means", "scales", "quats", "opacities", "colors")),
        mask=jnp.ones(inputs["opacities"].shape, bool),
    )
    cameras = Cameras(jnp.linalg.inv(inputs["viewmats"]), inputs["intrinsics"], int(size[0]), int(size[1]))
    return rasterize(gaussians, cameras, background=inputs["background"], max_alpha=float(max_alpha), capacity=capacity)


@pytest.fixture(scope="module")
def ours(case):
    """Rendering and gradients of sum(outputs * cotangents)."""
    inputs = {key.removeprefix("in/"): jnp.asarray(value) for key, value in case.items() if key.startswith("in/")}
    size, max_alpha = (int(case["in/size"][0]), int(case["in/size"][1])), float(case["in/max_alpha"])
    inputs = {key: value for key, value in inputs.items() if key not in ("size", "max_alpha")}

    def total(inputs):
        r = render(inputs, size, max_alpha, capacity=len(inputs["viewmats"]) * 50_000)
        outputs = {"rgb": r.rgb, "alpha": r.alpha[..., None], "depth": r.depth[..., None]}
        return sum(jnp.sum(outputs[key] * case[f"cotangent/{key}"]) for key in outputs), (outputs, r.overflow)

    gradients, (outputs, overflow) = jax.jit(jax.grad(total, has_aux=True))(inputs)
    assert overflow == 0
    return outputs, gradients


@pytest.mark.parametrize(("output", "tolerance"), [("rgb", 2e-5), ("alpha", 2e-5), ("depth", 5e-5)])
def test_images(case, ours, output, tolerance):
    error = np.abs(np.asarray(ours[0][output], np.float64) - case[f"out/{output}"]).max(axis=-1)
    print(output, np.sort(error.ravel())[-5:])
    assert error.max() < FLIPPED
    assert np.mean(error > tolerance) <= FLIPPED_SHARE


@pytest.mark.parametrize(
    "name", ["means", "scales", "quats", "opacities", "colors", "background", "viewmats", "intrinsics"]
)
def test_gradients(case, ours, name):
    got, expected = np.asarray(ours[1][name], np.float64), case[f"grad/{name}"]
    relative = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    cosine = np.vdot(got, expected) / (np.linalg.norm(got) * np.linalg.norm(expected))
    print(name, relative, 1 - cosine)
    assert relative < 1e-4
    assert cosine > 0.99999
