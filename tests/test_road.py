"""The whole road at the smallest size: train, stop, go on, evaluate, infer, and every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geolrm_jax import cli
from geolrm_jax.export.ply import read_ply
from geolrm_jax.runtime.logging import read_metrics


def fails(arguments, *patterns, capsys):
    """The command ends with code 1 and one line that holds all the patterns."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for pattern in patterns:
        assert pattern in error, error


def test_training_leaves_everything_that_was_promised(trained):
    for name in ("config.json", "metrics.jsonl", "eval/4/report.json", "eval/4/report.html"):
        assert (trained / name).stat().st_size > 0
    assert list((trained / "tensorboard" / "proposal").glob("events*"))
    [folder] = [p for p in (trained / "eval" / "4").iterdir() if p.is_dir()]
    assert (folder / "turntable.mp4").stat().st_size > 0
    assert np.isfinite(np.asarray(read_ply(folder / "gaussians.ply").means)).all()
    for stage in ("proposal", "reconstruction"):
        assert sorted(int(p.name) for p in (trained / stage / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]


def test_the_log_has_every_step_once_and_all_losses(trained):
    lines = read_metrics(trained / "metrics.jsonl")
    steps = [(line["stage"], line["step"]) for line in lines]
    assert steps == [(stage, step) for stage in ("proposal", "reconstruction") for step in (1, 2, 3, 4)]
    assert {"cross_entropy", "affinity", "iou", "gradient_norm", "learning_rate", "skipped"} <= set(lines[0])
    assert {"image", "alpha", "depth", "total_variation", "psnr", "anchors", "overflow"} <= set(lines[-1])


def test_the_report_has_the_protocols_keys(trained):
    report = json.loads((trained / "eval" / "4" / "report.json").read_text())
    assert {"summary", "baselines", "objects", "config", "checkpoint_step", "git", "hardware", "versions"} <= set(
        report
    )
    summary = report["summary"]
    assert {"psnr", "ssim", "lpips", "chamfer", "fscore", "proposal", "seconds", "peak_memory_bytes"} <= set(summary)
    assert set(summary["fscore"]) == {"0.2", "0.05", "0.02", "0.01"} and summary["lpips"] is None
    assert {"white", "nearest_view"} <= set(report["baselines"])
    assert len(report["objects"]) == 2 and report["checkpoint_step"] == 4


def test_evaluation_alone_gives_the_same_numbers(trained, tmp_path):
    assert cli.main(["eval", "--workdir", str(trained), "--out", str(tmp_path)]) == 0
    again, before = (json.loads((p / "report.json").read_text()) for p in (tmp_path, trained / "eval" / "4"))
    for name in ("psnr", "ssim", "chamfer", "fscore", "proposal"):
        assert again["summary"][name] == before["summary"][name]
    assert cli.main(["eval", "--workdir", str(trained), "--step", "2", "--objects", "1"]) == 0
    assert json.loads((trained / "eval" / "2" / "report.json").read_text())["checkpoint_step"] == 2


def test_running_again_does_nothing_twice(trained, tiny):
    before = (trained / "metrics.jsonl").read_text()
    assert cli.main(["train", "--config", tiny, "--workdir", str(trained)]) == 0
    assert (trained / "metrics.jsonl").read_text() == before


def write_transforms(folder: Path, views: int = 3, size: int = 40) -> Path:
    """A NeRF-style folder: grey squares seen from a turntable."""
    from PIL import Image

    from geolrm_jax.geometry.cameras import from_opengl, turntable

    folder.mkdir()
    frames = []
    for view in range(views):
        picture = np.zeros((size, size, 4), np.uint8)
        picture[10:30, 10:30] = (120, 130, 140, 255)
        Image.fromarray(picture).save(folder / f"{view}.png")
        pose = from_opengl(turntable(views, size=size).world_from_camera[view].astype(float))  # its own inverse
        frames.append({"file_path": f"./{view}.png", "transform_matrix": pose.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": np.radians(39.6), "frames": frames}))
    return folder


def test_inference_from_a_folder_and_from_python(trained, tmp_path):
    folder = write_transforms(tmp_path / "pictures")
    out = tmp_path / "out"
    assert (
        cli.main(["infer", "--workdir", str(trained), "--views", str(folder), "--out", str(out), "--size", "32"]) == 0
    )
    assert (out / "turntable.mp4").stat().st_size > 0

    import geolrm_jax
    from geolrm_jax.data.transforms import read_views
    from geolrm_jax.recipe import to_views

    model = geolrm_jax.load_model(trained)
    gaussians = geolrm_jax.reconstruct(model, to_views(read_views(folder)))
    kept = np.asarray(gaussians.mask)
    written = read_ply(out / "gaussians.ply")
    np.testing.assert_allclose(written.means, np.asarray(gaussians.means)[kept], atol=1e-6)
    np.testing.assert_allclose(written.opacities, np.asarray(gaussians.opacities)[kept], atol=1e-5)


def test_bad_work_directories(trained, tiny, tmp_path, capsys):
    fails(["eval", "--workdir", tmp_path / "none"], "none/config.json does not exist", capsys=capsys)
    fails(["eval", "--workdir", trained, "--step", "77"], "no checkpoint '77'", "2, 4", capsys=capsys)
    fails(
        ["train", "--config", tiny, "--workdir", trained, "--seed", "5"],
        "belongs to another config",
        "seed is 0 there, 5 here",
        capsys=capsys,
    )
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "reconstruction" / "checkpoints" / "4" / "model")
    fails(["eval", "--workdir", copy, "--step", "4"], "reconstruction/checkpoints/4", "is missing", capsys=capsys)


def test_bad_configs_and_data(tiny, tmp_path, capsys):
    train = ["train", "--workdir", tmp_path / "w", "--config"]
    fails([*train, "missing.py"], "no config 'missing.py'", capsys=capsys)
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in (*train, tiny, "--input-size", "30")])
    assert "multiple of 28" in capsys.readouterr().err
    fails([*train, "real_objects", "--data.source.root", tmp_path / "nowhere"], "nowhere", capsys=capsys)
    (tmp_path / "empty").mkdir()
    fails(
        ["train", "--workdir", tmp_path / "v", "--config", "real_objects", "--data.source.root", tmp_path / "empty"],
        "an empty data set",
        capsys=capsys,
    )
    # Nothing half-made is left: the corrected command finds a fresh work directory.
    assert not (tmp_path / "v").exists() or {file.name for file in (tmp_path / "v").iterdir()} <= {".lock"}


def write_gobjaverse(root: Path, objects=("chair", "lamp"), views=(0, 3, 6, 9, 12), size=28) -> Path:
    """Procedural objects in the GObjaverse layout, as real files."""
    import OpenEXR
    from PIL import Image

    from geolrm_jax.data.procedural import ProceduralSource

    source = ProceduralSource(len(objects), 0, seed=5, size=size, view_ids=views)
    for name, id in zip(objects, source.ids("train"), strict=True):
        images = source.read("train", id)
        for row, view in enumerate(views):
            folder = root / name / f"{view:05d}"
            folder.mkdir(parents=True)
            Image.fromarray(images.rgba[row]).save(folder / f"{view:05d}.png")
            pose = images.cameras.world_from_camera[row].astype(float)
            fov = float(np.radians(source.fov))
            axes = {name: pose[:3, k].tolist() for k, name in enumerate(("x", "y", "z", "origin"))}
            (folder / f"{view:05d}.json").write_text(json.dumps({**axes, "x_fov": fov, "y_fov": fov}))
            zeros = np.zeros((size, size), np.float32)
            channels = {"R": zeros, "G": zeros, "B": zeros, "A": images.depth[row].astype(np.float32)}
            header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
            OpenEXR.File(header, channels).write(str(folder / f"{view:05d}_nd.exr"))
    return root


def test_evaluation_on_a_folder(trained, tmp_path):
    folder = write_gobjaverse(tmp_path / "mine")
    assert cli.main(["eval", "--workdir", str(trained), "--data", str(folder)]) == 0
    report = json.loads((trained / "eval" / "4-mine" / "report.json").read_text())
    assert [o["id"] for o in report["objects"]] == ["chair", "lamp"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "00003_nd.exr").unlink(), "00003_nd.exr"),
        (lambda f: (f / "00003_nd.exr").write_bytes((f / "00003_nd.exr").read_bytes()[:200]), "00003_nd.exr"),
        (lambda f: (f / "00003.json").unlink(), "00003.json"),
        (lambda f: (f / "00003.png").write_bytes(b""), "00003.png"),
    ],
)
def test_bad_files_of_a_data_set(tiny, tmp_path, damage, named, capsys):
    folder = write_gobjaverse(tmp_path / "mine", objects=("chair",))
    damage(folder / "chair" / "00003")
    config = ["train", "--config", "real_objects", "--workdir", tmp_path / "w", "--data.source.root", folder]
    fails([*config, "--data.source.test", "chair"], named, capsys=capsys)
    assert {file.name for file in (tmp_path / "w").iterdir()} <= {".lock"}


def test_a_stage_alone(request, tmp_path, capsys):
    config = request.config.rootpath / "tests" / "configs" / "tiny_proposal.py"
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path)]) == 0
    assert (tmp_path / "proposal" / "checkpoints" / "4").is_dir() and not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "1.png").unlink(), "1.png"),
        (lambda f: (f / "1.png").write_bytes((f / "1.png").read_bytes()[:60]), "1.png"),
        (lambda f: (f / "transforms.json").write_text("{"), "transforms.json"),
        (lambda f: scale_pose(f / "transforms.json"), "no rotation"),
    ],
)
def test_bad_views(trained, tmp_path, damage, named, capsys):
    folder = write_transforms(tmp_path / "pictures")
    damage(folder)
    fails(["infer", "--workdir", trained, "--views", folder, "--out", tmp_path / "out"], named, capsys=capsys)
    assert not (tmp_path / "out").exists()


def scale_pose(file: Path) -> None:
    tree = json.loads(file.read_text())
    tree["frames"][1]["transform_matrix"][0][0] = 3.0
    file.write_text(json.dumps(tree))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tiny, trained, tmp_path):
    """SIGKILL after the first checkpoint of the reconstruction; the data set is shared to save time."""
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "geolrm_jax.cli", "train", "--config", tiny, "--workdir", str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoint = workdir / "reconstruction" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / "eval").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def losses(directory):
        measured = ("wall_time", "seconds_", "samples_per_second", "host_memory")
        lines = read_metrics(directory / "metrics.jsonl")
        return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]

    assert losses(workdir) == losses(trained)
