"""DINOv2 against transformers, through the files that transformers writes, with random weights in every place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.models.dinov2 import ViTConfig, interpolate_positions
from geolrm_jax.precision import Precision
from geolrm_jax.weights.dinov2 import load_dinov2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"width": 48, "depth": 3, "heads": 4}
# Of the published models: 37 x 37 patches; 518 leaves the positions as they are, the others have them interpolated.
SIZES = [(224, 224), (448, 448), (518, 518), (224, 448), (42, 28)]


def reference(config, cls=None):
    """transformers' backbone of a config, with random numbers for what starts as ones or zeros too."""
    registers = {"num_register_tokens": config.registers} if config.registers else {}
    family = "Dinov2WithRegisters" if config.registers else "Dinov2"
    hf_config = getattr(transformers, f"{family}Config")(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        image_size=14 * config.pretrained_grid,
        patch_size=14,
        **registers,
    )
    torch.manual_seed(0)
    model = (cls or getattr(transformers, f"{family}Backbone"))(hf_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "lambda1" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def ours(config, path):
    """Our feature map as a function of images, with the parameters in the file."""
    graphdef = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0), Precision())))[0]
    params = jax.tree.map(jnp.asarray, load_dinov2(path, config)[0])
    return jax.jit(lambda images: nnx.merge(graphdef, params)(images))


def images(rng, height, width, count=1):
    return rng.normal(size=(count, height, width, 3)).astype(np.float32)


def feature_map(model, x):
    """The last stage of the backbone, which transformers reshapes and normalises itself, channels last."""
    with torch.no_grad():
        return model(torch.tensor(x).permute(0, 3, 1, 2)).feature_maps[-1].permute(0, 2, 3, 1).numpy()


def close(actual, expected):
    """Within 2e-5 of numbers of size one; the check itself would notice features that are all alike."""
    assert expected.std() > 0.3 and expected.std(axis=(1, 2)).mean() > 0.02
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "registers"])
def pair(request, tmp_path_factory):
    """transformers' small backbone and ours, from the file that the former has written."""
    rule = "size_antialiased" if request.param else "size"
    config = ViTConfig(**SMALL, registers=request.param, position_rule=rule)
    model = reference(config)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, ours(config, folder / "model.safetensors")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_feature_maps(pair, rng, size):
    model, apply = pair
    x = images(rng, *size)
    close(apply(x), feature_map(model, x))


def test_a_batch(pair, rng):
    model, apply = pair
    x = images(rng, 42, 28, count=3)
    close(apply(x), feature_map(model, x))


def test_real_width(rng, tmp_path):
    """ViT-B's width and heads, two layers."""
    config = ViTConfig(depth=2, position_rule="size")
    model = reference(config)
    model.save_pretrained(tmp_path)
    x = images(rng, 224, 224)
    close(ours(config, tmp_path / "model.safetensors")(x), feature_map(model, x))


def test_a_classifier_in_a_torch_file(rng, tmp_path):
    """A `.bin` of a whole classifier: behind a prefix, with a head; the backbone in it gives the same features."""
    config = ViTConfig(**SMALL, position_rule="size")
    classifier = reference(config, transformers.Dinov2ForImageClassification)
    torch.save(classifier.state_dict(), tmp_path / "pytorch_model.bin")
    x = images(rng, 56, 70)
    with torch.no_grad():
        tokens = classifier.dinov2(torch.tensor(x).permute(0, 3, 1, 2)).last_hidden_state[:, 1:]
    close(ours(config, tmp_path / "pytorch_model.bin")(x), tokens.reshape(1, 4, 5, -1).numpy())


RULES = {
    "scale_factor": lambda r, c, n: {"scale_factor": ((r + 0.1) / n, (c + 0.1) / n)},
    "size": lambda r, c, _: {"size": (r, c)},
    "size_antialiased": lambda r, c, _: {"size": (r, c), "antialias": True},
}


@pytest.mark.parametrize("rule", RULES)
def test_position_rules(rule, rng):
    """Against torch's own interpolation; it computes coordinates in float32, which is 1e-5 of a random table."""
    table = rng.normal(size=(1 + 37 * 37, 3)).astype(np.float32)
    grid = torch.tensor(table[1:].reshape(37, 37, 3)).permute(2, 0, 1)[None]
    found = {}
    for rows, columns in [(16, 16), (32, 32), (16, 32), (5, 74), (45, 37)]:
        options = RULES[rule](rows, columns, 37)
        expected = torch.nn.functional.interpolate(grid, mode="bicubic", **options)[0].permute(1, 2, 0).numpy()
        found[rows, columns] = np.asarray(interpolate_positions(jnp.asarray(table), rows, columns, rule))
        np.testing.assert_array_equal(found[rows, columns][0], table[0])
        np.testing.assert_allclose(found[rows, columns][1:].reshape(expected.shape), expected, rtol=0, atol=4e-5)
    for other in RULES.keys() - {rule}:
        assert np.abs(interpolate_positions(jnp.asarray(table), 16, 16, other) - found[16, 16]).max() > 0.05
