"""DINOv2's files in every layout that is about, made from one set of random numbers: all must give the same tree."""

import hashlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from geolrm_jax.models.dinov2 import ViTConfig, vit
from geolrm_jax.precision import Precision
from geolrm_jax.weights.dinov2 import init_from_dinov2, load_dinov2

CONFIG = ViTConfig(width=6, depth=2, heads=2, pretrained_grid=3, registers=2, position_rule="size_antialiased")


def parameters(config):
    """The model's own tree with a random number in every place."""
    rng = np.random.default_rng(5)
    state = nnx.state(nnx.eval_shape(lambda: config.make(nnx.Rngs(0), Precision())), nnx.Param)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nnx.to_pure_dict(state))


def hugging_face(p, *, new: bool):
    """The layout of transformers, before and from version 5 on, written out."""

    def linear(name, m):
        return {f"{name}.weight": m["kernel"].T, f"{name}.bias": m["bias"]}

    def norm(name, m):
        return {f"{name}.weight": m["scale"], f"{name}.bias": m["bias"]}

    tensors = {
        "embeddings.cls_token": p["class_token"][None, None],
        "embeddings.mask_token": p["mask_token"][None],
        "embeddings.position_embeddings": p["positions"][None],
        "embeddings.register_tokens": p["registers"][None],
        "embeddings.patch_embeddings.projection.weight": p["patches"]["kernel"].transpose(3, 2, 0, 1),
        "embeddings.patch_embeddings.projection.bias": p["patches"]["bias"],
        **norm("layernorm", p["norm"]),
    }
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not new:
        attention = ("attention.query", "attention.key", "attention.value", "output.dense")
    for n in range(p["blocks"]["scale1"].shape[0]):
        block = jax.tree.map(lambda x, n=n: x[n], p["blocks"])
        at = f"encoder.layer.{n}"
        for theirs, ours in zip(attention, ("query", "key", "value", "out"), strict=True):
            tensors |= linear(f"{at}.attention.{theirs}", block[ours])
        for name in ("fc1", "fc2"):
            tensors |= linear(f"{at}.mlp.{name}", block[name])
        for k in (1, 2):
            tensors |= norm(f"{at}.norm{k}", block[f"norm{k}"])
            tensors[f"{at}.layer_scale{k}.lambda1"] = block[f"scale{k}"]
    return tensors


def meta(p):
    """The layout of Meta's own files, from the older one of transformers."""
    out = {}
    names = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "position_embeddings": "pos_embed"}
    names |= {
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "layernorm": "norm",
        "attention.output.dense": "attn.proj",
    }
    names |= {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    tensors = hugging_face(p, new=False)
    for key, value in tensors.items():
        if ".attention.attention." not in key:
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = value
    for n in range(p["blocks"]["scale1"].shape[0]):
        for tensor in ("weight", "bias"):
            parts = [tensors[f"encoder.layer.{n}.attention.attention.{x}.{tensor}"] for x in ("query", "key", "value")]
            out[f"blocks.{n}.attn.qkv.{tensor}"] = np.concatenate(parts)
    return out


def save(path, tensors):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return path


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


LAYOUTS = {
    "transformers 5": lambda p: hugging_face(p, new=True),
    "transformers 4": lambda p: hugging_face(p, new=False),
    "meta": meta,
}


@pytest.fixture(scope="module")
def tree():
    return parameters(CONFIG)


@pytest.mark.parametrize("prefix", ["", "dinov2.", "model.backbone."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tree(tree, tmp_path, layout, prefix):
    tensors = {prefix + key: value for key, value in LAYOUTS[layout](tree).items()}
    path = save(tmp_path / "model.safetensors", tensors)
    loaded, digest = load_dinov2(path, CONFIG)
    equal(loaded, tree)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_tree_is_that_of_the_module(tree, tmp_path):
    """Merged into a module it runs, and every number takes part but the mask token, which only pretraining uses."""
    loaded, _ = load_dinov2(save(tmp_path / "a.safetensors", meta(tree)), CONFIG)
    graphdef = nnx.split(nnx.eval_shape(lambda: CONFIG.make(nnx.Rngs(0), Precision())))[0]
    images = jax.random.normal(jax.random.key(0), (1, 28, 42, 3))
    gradient = jax.grad(lambda p: (nnx.merge(graphdef, p)(images) ** 3).sum())(loaded)
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
    assert unused == ["['mask_token']"]


def test_heads_are_ignored_by_name(tree, tmp_path, capsys):
    heads = {"classifier.weight": np.zeros((3, 12), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    backbone = {f"dinov2.{key}": value for key, value in hugging_face(tree, new=True).items()}
    loaded, _ = load_dinov2(save(tmp_path / "a.safetensors", backbone | heads), CONFIG)
    equal(loaded, tree)
    assert re.search(r"2 tensors of heads are ignored: classifier\.\w+, classifier\.\w+", capsys.readouterr().out)


def test_everything_that_does_not_fit_is_listed(tree, tmp_path):
    tensors = hugging_face(tree, new=True)
    del tensors["encoder.layer.1.mlp.fc1.bias"]
    tensors["embeddings.position_embeddings"] = np.zeros((1, 5, 6), np.float32)
    tensors["encoder.layer.2.norm1.weight"] = np.zeros(6, np.float32)
    with pytest.raises(ValueError) as caught:
        load_dinov2(save(tmp_path / "bad.safetensors", tensors), CONFIG)
    message = str(caught.value)
    assert "bad.safetensors" in message and len(message.splitlines()) == 7
    assert "1 missing:\n    encoder.layer.1.mlp.fc1.bias" in message
    assert "1 unexpected:\n    encoder.layer.2.norm1.weight [6]" in message
    assert "embeddings.position_embeddings [1, 5, 6], expected [1, 10, 6]" in message


def test_a_model_without_registers_refuses_those_of_a_file(tree, tmp_path):
    path = save(tmp_path / "a.safetensors", meta(tree))
    with pytest.raises(ValueError, match=r"1 unexpected:\s+register_tokens \[1, 2, 6\]"):
        load_dinov2(path, ViTConfig(width=6, depth=2, heads=2, pretrained_grid=3))


def test_a_qkv_of_another_width_is_listed(tree, tmp_path):
    tensors = meta(tree) | {"blocks.0.attn.qkv.bias": np.zeros(17, np.float32)}
    with pytest.raises(ValueError, match=r"(?s)blocks\.0\.attn\.qkv\.query\.bias.*blocks\.0\.attn\.qkv\.bias \[17\]"):
        load_dinov2(save(tmp_path / "a.safetensors", tensors), CONFIG)


def test_other_files_are_refused(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_dinov2(tmp_path / "none.pth", CONFIG)
    with pytest.raises(ValueError, match=r"no weights of DINOv2.*it has features\.0\.weight"):
        load_dinov2(save(tmp_path / "a.safetensors", {"features.0.weight": np.zeros(2)}), CONFIG)
    two = {f"{name}.{key}": value for name in ("a", "b") for key, value in meta(tree).items()}
    with pytest.raises(ValueError, match=r"several vision transformers, with a\.cls_token, b\.cls_token"):
        load_dinov2(save(tmp_path / "b.safetensors", two), CONFIG)


def test_both_encoders_get_the_weights_and_nothing_else_changes(tree, tmp_path):
    path = save(tmp_path / "a.safetensors", meta(tree))
    params = {
        name: {"encoder": {"vit": {"old": np.zeros(1)}, "low": {"kernel": np.full(2, k)}}, "other": np.full(3, k)}
        for k, name in enumerate(("proposal", "reconstruction"))
    }
    before = jax.tree.map(np.copy, params)
    filled, _ = init_from_dinov2(params, path, CONFIG)
    for name in params:
        equal(filled[name]["encoder"]["vit"], tree)
        equal(filled[name]["encoder"]["low"], before[name]["encoder"]["low"])
        equal(filled[name]["other"], before[name]["other"])
    equal(params, before)


# The counts of the published models: 22.1, 86.6 and 304.4 million (their model card says 21, 86 and 300 M).
@pytest.mark.parametrize(("size", "count"), [("small", 22_056_576), ("base", 86_580_480), ("large", 304_368_640)])
def test_published_sizes(size, count):
    for registers in (0, 4):
        config = vit(size, registers=registers)
        state = nnx.state(nnx.eval_shape(lambda config=config: config.make(nnx.Rngs(0), Precision())), nnx.Param)
        assert sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(state))) == count + registers * config.width
    assert vit(size).position_rule == "scale_factor"
    assert vit(size, registers=4).position_rule == "size_antialiased"
