"""LPIPS against the `lpips` package with the same weights: its own heads over a VGG16 of random numbers."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.weights.lpips import combine, load_lpips

torch = pytest.importorskip("torch")
lpips = pytest.importorskip("lpips")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # lpips asks for weights in an older way


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The package's metric, and ours from files: its VGG16 in torchvision's layout, and the heads that it ships."""
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    with torch.no_grad():
        for parameter in theirs.net.parameters():  # torchvision starts biases at zero
            if parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    state = theirs.net.state_dict()  # "slice3.10.weight": slices keep the positions in torchvision's list
    vgg = {"features." + key.split(".", 1)[1]: tensor for key, tensor in state.items()}
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg | {"classifier.0.bias": torch.zeros(4096)}, folder / "vgg16.pth")
    heads = Path(inspect.getfile(lpips)).parent / "weights" / "v0.1" / "vgg.pth"
    combine(folder / "vgg16.pth", heads, folder / "lpips.safetensors")
    return theirs, load_lpips(folder / "lpips.safetensors")[0]


def expected(theirs, x, y):
    """Value of every image, and the gradient of their sum with respect to `x`."""
    x, y = (torch.tensor(image).permute(0, 3, 1, 2) for image in (x, y))
    x.requires_grad_()
    values = theirs(x, y)
    values.sum().backward()
    return values.detach().numpy().reshape(-1), x.grad.permute(0, 2, 3, 1).numpy()


@jax.jit
def found(ours, x, y):
    def total(x):
        values = ours.distance(x, ours.target_features(y))
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(x)
    return values, gradient


def close(actual, expected):
    """Within 1e-5 of the largest number."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (16, 16)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_value_and_gradient(pair, rng, size):
    theirs, ours = pair
    x = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    y = np.clip(x + rng.normal(scale=0.3, size=x.shape), -1, 1).astype(np.float32)
    values, gradient = expected(theirs, x, y)
    assert values.min() > 0.01 and np.abs(gradient).max() > 0
    our_values, our_gradient = found(ours, x, y)
    np.testing.assert_allclose(our_values, values, rtol=1e-5)
    close(our_gradient, gradient)
    assert np.linalg.norm(our_gradient - gradient) < 1e-5 * np.linalg.norm(gradient)


def test_identical_images(pair, rng):
    """Zero and a gradient of zeros in the package; ours computes the two sides apart, which differ by rounding."""
    theirs, ours = pair
    x = rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    values, gradient = expected(theirs, x, x)
    assert (values == 0).all() and (gradient == 0).all()
    values, gradient = found(ours, x, x)
    assert np.abs(values).max() < 1e-12 and np.abs(gradient).max() < 1e-7


def test_the_loss_of_a_batch(pair, rng):
    """`between` takes [0, 1], as the package does with `normalize`, and means over views."""
    theirs, ours = pair
    x, y = (rng.uniform(size=(1, 2, 32, 32, 3)).astype(np.float32) for _ in range(2))
    with torch.no_grad():
        values = theirs(*(torch.tensor(v[0]).permute(0, 3, 1, 2) for v in (x, y)), normalize=True)
    loss = jax.jit(ours.between)(jnp.asarray(x), jnp.asarray(y), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(loss, values.mean().item(), rtol=1e-5)
