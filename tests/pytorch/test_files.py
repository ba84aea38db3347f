"""Torch's own files, written by torch: read one tensor at a time, and refused where they could do more."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from geolrm_jax.weights.files import open_tensors

torch = pytest.importorskip("torch")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


@pytest.fixture
def state():
    torch.manual_seed(0)
    base = torch.randn(10)
    return collections.OrderedDict(
        matrix=torch.randn(3, 4),
        transposed=torch.randn(4, 5).T,
        part=base[3:8],
        shared=base[4:],
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        bfloat=torch.randn(5).bfloat16(),
        half=torch.randn(6, 7).half(),
        double=torch.randn(2).double(),
        number=torch.tensor(7),
        mask=torch.tensor([True, False]),
        empty=torch.zeros(0, 3),
    )


def save(tree, path, zipped):
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_holds(tensors, state):
    assert list(tensors.shapes) == list(state)
    for name, tensor in state.items():
        wide = tensor.detach().float() if name in ("bfloat", "half") else tensor.detach()
        read = tensors.read(name)
        assert read.shape == tensors.shapes[name] and read.dtype == tensors.dtypes[name]
        np.testing.assert_array_equal(read, wide.numpy(), err_msg=name)
    assert tensors.widened == ("bfloat", "half")


@FORMATS
def test_a_flat_dict(state, tmp_path, zipped):
    assert_holds(open_tensors(save(state, tmp_path / "x.pth", zipped)), state)


@FORMATS
def test_a_training_checkpoint(state, tmp_path, zipped):
    """Lightning's: the tensors under state_dict; optimizer, numbers and names beside it are left out."""
    tree = {
        "epoch": 3,
        "hyper_parameters": {"name": "x", "sizes": [1, 2], "scale": None},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "state_dict": state,
    }
    assert_holds(open_tensors(save(tree, tmp_path / "x.ckpt", zipped)), state)


def test_entries_that_are_no_tensors_are_left_out(state, tmp_path):
    torch.save({**state, "version": 3, "notes": {"a": [1]}}, tmp_path / "x.pth")
    assert_holds(open_tensors(tmp_path / "x.pth"), state)


@FORMATS
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = save({"a": torch.zeros(2), "hyper_parameters": Evil()}, tmp_path / "evil.ckpt", zipped)
    with pytest.raises(ValueError, match=r"evil\.ckpt: refused, .*posix\.mkdir") as error:
        open_tensors(path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@FORMATS
def test_a_pickled_module_is_refused(tmp_path, zipped):
    path = save(torch.nn.Linear(2, 2), tmp_path / "module.pt", zipped)
    with pytest.raises(ValueError, match=r"module\.pt: refused, .*torch\.nn\.modules\.linear\.Linear"):
        open_tensors(path)


@FORMATS
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_named(tmp_path, zipped, share):
    path = save({"a": torch.randn(400), "b": torch.randn(40, 40)}, tmp_path / "cut.ckpt", zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.ckpt: .*(truncated|damaged)") as error:
        open_tensors(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("tree", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"state_dict": {"epoch": 3}}])
def test_a_file_without_named_tensors_is_named(tmp_path, tree):
    torch.save(tree, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: no dict of tensors"):
        open_tensors(tmp_path / "none.pt")


def test_a_tensor_that_is_not_plain_is_named(tmp_path):
    torch.save({"a": torch.zeros(2), "odd": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: odd is of type torch\.complex64"):
        open_tensors(tmp_path / "odd.pt")


READING = """
import resource, sys
from geolrm_jax.weights.files import open_tensors
import torch
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
tensors = open_tensors(sys.argv[1])
before = peak()
for name in tensors.shapes:
    tensors.read(name)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_reading_one_after_the_other_needs_the_memory_of_one(tmp_path):
    """Also where a tensor lies transposed in the file, which torch's mapping has to turn."""
    state = {f"x{n}": torch.ones(1 << 20) for n in range(24)}  # 4 MB each
    state["turned"] = torch.ones(1 << 10, 1 << 10).T
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    run = subprocess.run([sys.executable, "-c", READING, str(tmp_path / "x.ckpt")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 24, "MB, of a file of 100"
