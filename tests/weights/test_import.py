"""`geolrm weights import` and `export`, from file to work directory and back."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from geolrm_jax import cli, load_model
from geolrm_jax.config import load_config, read_config
from geolrm_jax.export.ply import read_ply
from geolrm_jax.weights import provenance
from geolrm_jax.weights.files import TensorFile
from geolrm_jax.weights.released import convert, released_leaves


@pytest.fixture(scope="module")
def tiny(request) -> str:
    return str(request.config.rootpath / "tests" / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def arrays(tiny):
    """Random numbers under the released names; logits high enough for voxels to be found."""
    rng = np.random.default_rng(0)
    arrays = {
        key: np.array(41, np.int64) if leaf.dtype.kind == "i" else 0.1 * rng.standard_normal(leaf.there_shape, "f4")
        for leaf in released_leaves(load_config(tiny).model)
        for key in leaf.keys
    }
    arrays["serializer.upsample.bias"] += 0.1
    return arrays


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "released.safetensors"
    save_file(arrays | {"lpips.lin0.weight": np.zeros((1, 2), np.float32)}, path)
    return path


@pytest.fixture(scope="module")
def workdir(tiny, file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("import") / "work"
    assert cli.main(["weights", "import", "--from", str(file), "--to", str(workdir), "--config", tiny]) == 0
    return workdir


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main(["weights", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_a_work_directory_is_complete(workdir, file, tiny):
    assert read_config(workdir) == load_config(tiny).absolute()
    source = json.loads((workdir / "weights.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source == {"released": {"file": "released.safetensors", "bytes": file.stat().st_size, "sha256": digest}}
    checkpoints = workdir / "reconstruction" / "checkpoints"
    assert {folder.name for folder in (checkpoints / "0").iterdir() if folder.is_dir()} == {"model", "run"}
    assert digest in (checkpoints / "0" / "run" / "run.json").read_text()


def test_the_model_holds_the_files_numbers(workdir, arrays, tiny):
    expected = convert({key: x.shape for key, x in arrays.items()}, arrays.__getitem__, load_config(tiny).model)
    np.testing.assert_equal(jax_to_numpy(load_model(workdir).variables), expected)


def jax_to_numpy(tree):
    return {k: jax_to_numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


def test_the_summary_says_what_was_taken(tiny, file, arrays, tmp_path, capsys):
    assert cli.main(["weights", "import", "--from", str(file), "--to", str(tmp_path / "w"), "--config", tiny]) == 0
    said = capsys.readouterr().out
    assert f"{len(arrays)} consumed, 1 ignored (lpips.*)" in said
    assert hashlib.sha256(file.read_bytes()).hexdigest() in said
    trained = sum(x.size for key, x in arrays.items() if "running" not in key and "num_batches" not in key)
    assert f"{trained:,} parameters" in said


def test_export_gives_the_files_tensors_bit_for_bit(workdir, arrays, tmp_path, tiny):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert cli.main(["weights", "export", "--workdir", str(workdir), "--to", str(first)]) == 0
    read = load_file(first)
    assert set(read) == set(arrays)
    for key, array in arrays.items():
        assert read[key].dtype == array.dtype
        np.testing.assert_array_equal(read[key], array, err_msg=key)
    assert cli.main(["weights", "import", "--from", str(first), "--to", str(tmp_path / "w"), "--config", tiny]) == 0
    assert cli.main(["weights", "export", "--workdir", str(tmp_path / "w"), "--to", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_with_a_checkpoint_is_left_alone(workdir, file, tiny, capsys):
    error = fails(capsys, "import", "--from", file, "--to", workdir, "--config", tiny)
    assert "has a checkpoint already" in error and "choose another folder" in error
    capsys.readouterr()
    assert cli.main(["train", "--config", tiny, "--workdir", str(workdir)]) == 1
    assert "holds imported weights" in capsys.readouterr().err


def test_what_does_not_fit_leaves_nothing(arrays, tiny, tmp_path, capsys):
    wrong = dict(arrays)
    del wrong["serializer.upsample.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    error = fails(capsys, "import", "--from", tmp_path / "wrong.safetensors", "--to", tmp_path / "w", "--config", tiny)
    assert "wrong.safetensors does not fit the model" in error and "serializer.upsample.bias" in error
    assert "none.ckpt does not exist" in fails(
        capsys, "import", "--from", tmp_path / "none.ckpt", "--to", tmp_path / "w", "--config", tiny
    )
    assert not (tmp_path / "w").exists()


def test_an_interrupted_import_never_looks_finished(file, tiny, tmp_path, capsys, monkeypatch):
    workdir, read, left = tmp_path / "w", TensorFile.read, iter(range(30))

    def failing(self, name):
        if next(left, None) is None:
            raise OSError("the disk is gone")
        return read(self, name)

    monkeypatch.setattr(TensorFile, "read", failing)
    arguments = ("import", "--from", file, "--to", workdir, "--config", tiny)
    assert "the disk is gone" in fails(capsys, *arguments)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no checkpoint 'latest'"):
        load_model(workdir)
    assert cli.main(["weights", *map(str, arguments)]) == 0
    load_model(workdir)


def test_an_interrupted_export_leaves_no_file(workdir, tmp_path, capsys, monkeypatch):
    def failing(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("geolrm_jax.runtime.checkpoint.Checkpoints.open_arrays", lambda self, step: failing)
    assert "the disk is full" in fails(capsys, "export", "--workdir", workdir, "--to", tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_bad_arguments_are_named(workdir, tmp_path, capsys):
    assert "ends in .safetensors" in fails(capsys, "export", "--workdir", workdir, "--to", tmp_path / "x.ckpt")
    assert "config.json does not exist" in fails(capsys, "export", "--workdir", tmp_path, "--to", "x.safetensors")
    assert "expected one of dinov2-small" in fails(capsys, "fetch", "nonsense", "--to", tmp_path)
    lpips = ("lpips", "--vgg", tmp_path / "vgg.pth", "--heads", tmp_path / "h.pth", "--to", tmp_path / "x.safetensors")
    assert "vgg.pth does not exist" in fails(capsys, *lpips)
    assert "no checkpoint '7'" in fails(capsys, "export", "--workdir", workdir, "--step", "7", "--to", "x.safetensors")


@pytest.mark.slow
def test_inference_and_evaluation_run_on_an_imported_model(workdir, real_renders, tmp_path):
    views = sorted(real_renders.iterdir())[0]
    arguments = ["infer", "--workdir", str(workdir), "--views", str(views), "--inputs", "0,6", "--size", "32"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert np.isfinite(np.asarray(read_ply(tmp_path / "out" / "gaussians.ply").means)).all()
    arguments = ["eval", "--workdir", str(workdir), "--data", str(real_renders), "--objects", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "eval")]) == 0
    assert json.loads((tmp_path / "eval" / "report.json").read_text())["checkpoint_step"] == 0


def test_types_are_checked_and_what_loses_bits_is_said(arrays, tiny, tmp_path, capsys):
    file, key = tmp_path / "typed.safetensors", "serializer.upsample.bias"
    arguments = ("weights", "import", "--from", str(file), "--config", tiny, "--to")
    save_file({**arrays, key: arrays[key].astype(np.int32)}, file)
    assert f"{key} is int32" in fails(capsys, *arguments[1:], tmp_path / "int")
    save_file({**arrays, key: arrays[key].astype(np.float64) * np.nan}, file)
    assert cli.main([*arguments, str(tmp_path / "wide")]) == 0
    out = capsys.readouterr()
    assert "1 tensors of 64 bits, to float32" in out.out
    assert f"NaN or infinity in {key}" in out.out + out.err


def test_evaluation_of_an_import_asks_for_data(workdir, capsys):
    capsys.readouterr()
    assert cli.main(["eval", "--workdir", str(workdir)]) == 1
    assert "holds imported weights and no data: name some with --data" in capsys.readouterr().err


def test_other_weights_than_a_run_began_with_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    entry = provenance.record(tmp_path / "w", "lpips", tmp_path / "a")
    assert entry["sha256"] == hashlib.sha256(b"a").hexdigest()
    provenance.record(tmp_path / "w", "dinov2", tmp_path / "b")
    provenance.record(tmp_path / "w", "lpips", tmp_path / "a")
    assert list(provenance.read(tmp_path / "w")) == ["lpips", "dinov2"]
    with pytest.raises(ValueError, match="begun with other lpips weights"):
        provenance.record(tmp_path / "w", "lpips", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no such file of lpips weights"):
        provenance.record(tmp_path / "w", "lpips", tmp_path / "none")
