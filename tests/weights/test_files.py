"""Files of tensors, against the safetensors package."""

import hashlib
import json
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from geolrm_jax.weights.files import open_tensors, write_tensors


@pytest.fixture
def arrays(rng):
    return {
        "a": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "number": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "double": rng.standard_normal((2, 2)),
    }


@pytest.fixture
def file(arrays, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    return path


def test_what_safetensors_writes_is_read(arrays, file):
    tensors = open_tensors(file)
    assert set(tensors.shapes) == set(arrays)
    for name, array in arrays.items():
        read = tensors.read(name)
        assert read.shape == tensors.shapes[name] == array.shape
        assert read.dtype == tensors.dtypes[name]
        np.testing.assert_array_equal(read, array)
    assert tensors.dtypes["half"] == np.float32 and tensors.widened == ("half",)
    assert tensors.dtypes["double"] == np.float64 and tensors.dtypes["number"] == np.int64
    assert tensors.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_bfloat16_is_widened(rng, tmp_path):
    array = rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16)
    save_file({"x": array}, tmp_path / "x.safetensors")
    read = open_tensors(tmp_path / "x.safetensors").read("x")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, array.astype(np.float32))


def test_what_is_written_safetensors_reads(arrays, tmp_path):
    arrays["a"] = arrays["a"].T  # not in C order
    path = tmp_path / "out" / "x.safetensors"
    shapes, dtypes = ({k: getattr(a, what) for k, a in arrays.items()} for what in ("shape", "dtype"))
    write_tensors(path, shapes, dtypes, arrays.__getitem__)
    read = load_file(path)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("what was there before")
    shapes, dtypes = {"a": (2,), "b": (2,)}, {"a": np.dtype("f4"), "b": np.dtype("f4")}
    with pytest.raises(ValueError, match=r"x\.safetensors: b has shape \(3,\), expected \(2,\)"):
        write_tensors(path, shapes, dtypes, lambda name: np.zeros(2 if name == "a" else 3))
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [-1, -40, 40, 9])
def test_a_truncated_file_is_named(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors: truncated"):
        open_tensors(file)


def test_a_file_cut_after_it_was_opened_is_named(file):
    tensors = open_tensors(file)
    file.write_bytes(file.read_bytes()[:-60])
    last = max((name for name in tensors.shapes if name != "empty"), key=lambda name: tensors._entries[name].place)
    with pytest.raises(ValueError, match=rf"weights\.safetensors: truncated, {last} ends after"):
        tensors.read(last)


@pytest.mark.parametrize("content", [b"", b"PK", b"what is this?", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin: neither a \.safetensors file nor a torch checkpoint"):
        open_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        open_tensors(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    "header, message",
    [
        ("{not json", "header is not JSON"),
        (json.dumps({"x": {"dtype": "F32", "shape": [2]}}), "x has no dtype, shape and data_offsets"),
        (json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}), "x is of type F4"),
        (json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), r"x has 8 bytes, .* \(3,\) of F32"),
        (json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "truncated, x ends at byte"),
        (json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "x has shape"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        open_tensors(path)


def test_without_torch_its_files_are_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + b"\0" * 20)
    with pytest.raises(ValueError, match=r"x\.pth is a torch checkpoint.*pip install 'geolrm-jax\[torch\]'"):
        open_tensors(tmp_path / "x.pth")
