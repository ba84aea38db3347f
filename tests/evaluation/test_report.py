import base64
import dataclasses
import hashlib
import io
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from geolrm_jax.evaluation import results as results_module
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.evaluation.report import write_report
from geolrm_jax.evaluation.results import EvaluationResults, ImageScores, ObjectResult, Pictures, environment
from geolrm_jax.metrics.geometry import VoxelCounts

SUMMARY = {"psnr", "ssim", "lpips", "chamfer", "fscore", "proposal", "seconds", "peak_memory_bytes"}


def scores(psnr, ssim, lpips=None):
    def array(values):
        return None if values is None else np.array(values, np.float32)

    return ImageScores(array(psnr), array(ssim), array(lpips))


def pictures(rng):
    def some(count, size):
        return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)

    return Pictures(some(3, 6), some(2, 8), some(2, 8), some(2, 8), some(2, 8))


def made_up(rng, lpips=False) -> EvaluationResults:
    first = ObjectResult(
        name="basket <1>",
        input_views=(0, 12, 6),
        target_views=(3, 9),
        prediction=scores([20.0, 22.0], [0.5, 0.75], [0.25, 0.5] if lpips else None),
        white=scores([10.0, 10.0], [0.25, 0.25], [0.5, 0.5] if lpips else None),
        nearest_view=scores([15.0, 17.0], [0.5, 0.5], [0.5, 0.5] if lpips else None),
        chamfer=0.125,
        fscores=(1.0, 0.75, 0.5, 0.25),
        voxels=VoxelCounts(*(np.array(n) for n in (10, 20, 5, 10, 15))),
        hull_voxels=VoxelCounts(*(np.array(n) for n in (40, 20, 10, 20, 10))),
        anchors=1432,
        gaussians=45824,
        reconstruct_seconds=0.5,
        render_seconds=0.25,
        pictures=pictures(rng),
    )
    second = dataclasses.replace(
        first,
        name="boat",
        prediction=scores([30.0, 32.0], [1.0, 1.0], [0.0, 0.25] if lpips else None),
        chamfer=0.375,
        fscores=(0.5, 0.25, 0.0, 0.0),
        voxels=VoxelCounts(*(np.array(n) for n in (30, 20, 15, 30, 20))),
        reconstruct_seconds=0.75,
        pictures=None,
    )
    third = dataclasses.replace(first, name="plant", reconstruct_seconds=9.0, pictures=None)
    return EvaluationResults(
        config_name="quickstart",
        config={"steps": np.int64(900), "betas": (0.9, 0.95), "path": None},
        protocol=Protocol(targets=(3, 9), inputs=3),
        checkpoint_step=900,
        objects=[first, second, third],
        lpips_sha256="ab" * 32 if lpips else None,
        surface="centres of Gaussians",
        peak_memory_bytes=None,
        environment=environment(),
    )


def test_json_has_the_keys_and_the_numbers(tmp_path, rng):
    path, _ = write_report(tmp_path, made_up(rng, lpips=True))
    report = json.loads(path.read_text())
    assert set(report) == {
        *("summary", "baselines", "objects", "config"),
        *("checkpoint_step", "git", "hardware", "versions"),
    }
    summary = report["summary"]
    assert set(summary) == SUMMARY
    assert summary["psnr"] == pytest.approx((21 + 31 + 21) / 3)
    assert summary["ssim"] == pytest.approx((0.625 + 1 + 0.625) / 3)
    assert summary["lpips"] == pytest.approx((0.375 + 0.125 + 0.375) / 3)
    assert summary["chamfer"] == pytest.approx((0.125 + 0.375 + 0.125) / 3)
    assert summary["fscore"] == pytest.approx({"0.2": 2.5 / 3, "0.05": 1.75 / 3, "0.02": 1 / 3, "0.01": 0.5 / 3})
    assert summary["seconds"] == {"reconstruct": 0.75, "render": 0.25}
    precision, recall = (5 + 15 + 5) / 50, (5 + 15 + 5) / 60
    proposal = summary["proposal"]
    assert proposal["precision"] == pytest.approx({"exact": precision, "within_one_voxel": 1.0})
    assert proposal["recall"] == pytest.approx({"exact": recall, "within_one_voxel": 50 / 60})
    assert proposal["iou"]["exact"] == pytest.approx(25 / (50 + 60 - 25))
    for name, psnr in (("white", 10.0), ("nearest_view", 16.0)):
        baseline = report["baselines"][name]
        assert set(baseline) == SUMMARY and baseline["psnr"] == psnr and baseline["lpips"] == 0.5
        assert {baseline[key] for key in ("chamfer", "fscore", "proposal", "seconds", "peak_memory_bytes")} == {None}
    hull = report["baselines"]["visual_hull"]
    assert set(hull) == SUMMARY and hull["psnr"] is None
    assert hull["proposal"]["precision"] == {"exact": 0.25, "within_one_voxel": 0.5}
    assert [entry["id"] for entry in report["objects"]] == ["basket <1>", "boat", "plant"]
    assert report["objects"][1]["proposal"]["precision"]["exact"] == 0.5
    assert report["config"]["experiment"] == {"steps": 900, "betas": [0.9, 0.95], "path": None}
    assert report["config"]["protocol"]["targets"] == [3, 9] and report["checkpoint_step"] == 900
    assert report["config"]["object_list_sha256"] == hashlib.sha256(b"basket <1>\nboat\nplant\n").hexdigest()
    assert re.fullmatch(r"\d+\.\d+.*", report["versions"]["jax"]) and report["hardware"]["devices"] >= 1


def test_what_was_not_measured_is_null(tmp_path, rng):
    results = made_up(rng)
    objects = [
        dataclasses.replace(o, chamfer=None, fscores=None, voxels=None, hull_voxels=None) for o in results.objects
    ]
    path, page = write_report(tmp_path, dataclasses.replace(results, objects=objects))
    report = json.loads(path.read_text())
    summary = report["summary"]
    assert set(report["baselines"]) == {"white", "nearest_view"}
    assert {summary[key] for key in ("lpips", "chamfer", "fscore", "proposal", "peak_memory_bytes")} == {None}
    assert "LPIPS: off, no weights file" in page.read_text()


def test_an_infinite_distance_keeps_the_json_valid(tmp_path, rng):
    results = made_up(rng)
    objects = [dataclasses.replace(results.objects[0], chamfer=float("inf"))]
    path, page = write_report(tmp_path, dataclasses.replace(results, objects=objects))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["summary"]["chamfer"] is None
    assert "∞" in page.read_text()


def test_page_shows_every_picture_and_number(tmp_path, rng):
    results = made_up(rng, lpips=True)
    _, page = write_report(tmp_path, results)
    text = page.read_text()
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]
    p = results.objects[0].pictures
    expected = [*p.inputs]
    for k in range(2):
        expected += [p.targets[k], p.predictions[k], p.errors[k], p.depths[k]]
    assert len(shown) == len(expected) == 11
    for a, b in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    captions = ("24.33", "16.00", "10.00", "20.00 dB, SSIM 0.500", "basket &lt;1&gt;", "view 12", "1,432", "ab" * 32)
    for words in captions:
        assert words in text, words
    assert "basket <1>" not in text and "LPIPS: off" not in text and not re.search(r'(src|href)="(?!data:)', text)


def test_nothing_to_report(tmp_path, rng):
    with pytest.raises(ValueError, match="no objects were evaluated"):
        write_report(tmp_path, dataclasses.replace(made_up(rng), objects=[]))
    assert list(tmp_path.iterdir()) == []


def test_git_of_the_package_only(tmp_path, monkeypatch):
    """A package installed inside somebody else's checkout has no commit of its own."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    (tmp_path / "site" / "geolrm_jax").mkdir(parents=True)
    (tmp_path / "geolrm_jax").mkdir()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(results_module.geolrm_jax, "__file__", str(tmp_path / "site" / "geolrm_jax" / "__init__.py"))
    assert environment().git is None
    monkeypatch.setattr(results_module.geolrm_jax, "__file__", str(tmp_path / "geolrm_jax" / "__init__.py"))
    found = environment().git
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["dirty"] is False
    (tmp_path / "new.txt").write_text("x")
    assert environment().git["dirty"] is True
