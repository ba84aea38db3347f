"""The two published files of LPIPS, made up in their layouts, combined into the one that is read."""

import hashlib
import re

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from geolrm_jax.weights.lpips import combine, load_lpips

# torchvision's vgg16().features, written out: position in the list, inputs, outputs.
CONVOLUTIONS = [
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
]


def numbers(*shape, start):
    """Distinct everywhere, so that no permutation goes unnoticed."""
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """vgg16 and heads as safetensors files, and their tensors."""
    folder, vgg = tmp_path_factory.mktemp("sources"), {}
    for n, (position, inputs, outputs) in enumerate(CONVOLUTIONS):
        vgg[f"features.{position}.weight"] = numbers(outputs, inputs, 3, 3, start=1000 * n)
        vgg[f"features.{position}.bias"] = numbers(outputs, start=1000 * n + 500)
    heads = {f"lin{k}.model.1.weight": numbers(1, c, 1, 1, start=k) for k, c in enumerate((64, 128, 256, 512, 512))}
    classifier = {f"classifier.{n}.weight": np.zeros((2, 2), np.float32) for n in (0, 3, 6)}
    safetensors.numpy.save_file(vgg | classifier, folder / "vgg16.safetensors")
    safetensors.numpy.save_file(heads, folder / "heads.safetensors")
    return folder / "vgg16.safetensors", folder / "heads.safetensors", vgg, heads


@pytest.fixture(scope="module")
def combined(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("combined") / "lpips.safetensors"
    return out, combine(*sources[:2], out)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_combined_file_has_both_and_no_classifier(sources, combined):
    out, _ = combined
    expected = sources[2] | sources[3]
    tensors = safetensors.numpy.load_file(out)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)


def test_digests_are_returned_and_stand_in_the_file(sources, combined):
    out, digests = combined
    assert digests == {"vgg16": sha256(sources[0]), "heads": sha256(sources[1]), "combined": sha256(out)}
    with safetensors.safe_open(out, "numpy") as file:
        assert file.metadata() == {"vgg16_sha256": digests["vgg16"], "heads_sha256": digests["heads"]}


def test_every_number_has_its_place_in_the_metric(sources, combined, capsys):
    lpips, digest = load_lpips(combined[0])
    assert digest == combined[1]["combined"] and digest in capsys.readouterr().out
    convolutions = [c for block in lpips.vgg.blocks for c in block]
    for convolution, (position, _, _) in zip(convolutions, CONVOLUTIONS, strict=True):
        theirs = sources[2][f"features.{position}.weight"]  # (out, in, y, x)
        np.testing.assert_array_equal(convolution.kernel[...], theirs.transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(convolution.bias[...], sources[2][f"features.{position}.bias"])
    for k, head in enumerate(lpips.heads):
        np.testing.assert_array_equal(head[...], sources[3][f"lin{k}.model.1.weight"].reshape(-1))


def test_sources_that_are_something_else_are_named(sources, tmp_path):
    vgg, heads, _, _ = sources
    with pytest.raises(ValueError, match=r"(?s)heads\.safetensors does not fit.*features"):
        combine(heads, heads, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"(?s)vgg16\.safetensors does not fit.*lin0\.model\.1\.weight"):
        combine(vgg, vgg, tmp_path / "out.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        combine(vgg, tmp_path / "none.pth", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_named_with_every_wrong_key(combined, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_lpips(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no such file")
    with pytest.raises(ValueError, match=r"text\.safetensors: neither a \.safetensors file"):
        load_lpips(tmp_path / "text.safetensors")
    tensors = safetensors.numpy.load_file(combined[0])
    del tensors["features.5.bias"], tensors["lin3.model.1.weight"]
    tensors["features.0.weight"] = np.ascontiguousarray(tensors["features.0.weight"].transpose(2, 3, 1, 0))
    tensors["features.1.weight"] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as caught:
        load_lpips(tmp_path / "a.safetensors")
    message = re.sub(r"\s+", " ", str(caught.value))
    assert "2 missing: lin3.model.1.weight features.5.bias" in message
    assert "1 unexpected: features.1.weight [7]" in message
    assert "features.0.weight [3, 3, 3, 64], expected [64, 3, 3, 3]" in message
