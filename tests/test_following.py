"""Evaluation beside training: what appears is evaluated once, what is lost is passed over, the end is noticed."""

import json
import shutil
import threading
import time

import pytest

from geolrm_jax import cli, following, recipe
from geolrm_jax.following import FollowConfig, follow

QUICK = FollowConfig(poll=0.05, idle_timeout=120.0)


@pytest.fixture
def workdir(trained, tmp_path):
    """A trained work directory without reports."""
    copy = tmp_path / "work"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("eval"))
    return copy


@pytest.fixture
def evaluated(monkeypatch):
    """The steps that were evaluated, as they are."""
    steps, evaluate = [], following.evaluate
    monkeypatch.setattr(following, "evaluate", lambda *a, **k: (steps.append(k["step"]), evaluate(*a, **k)))
    return steps


def psnr(workdir, step):
    return json.loads((workdir / "eval" / str(step) / "report.json").read_text())["summary"]["psnr"]


def test_checkpoints_that_appear_one_after_another(workdir, evaluated):
    later, checkpoints = workdir.parent / "later", workdir / "reconstruction" / "checkpoints"
    shutil.move(checkpoints, later)

    def train():
        time.sleep(0.2)  # before there is a folder of checkpoints
        checkpoints.mkdir()
        for step in (2, 4):
            (later / str(step)).rename(checkpoints / str(step))
            while not (workdir / "eval" / str(step) / "report.json").is_file():
                time.sleep(0.05)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    best = json.loads(follow(workdir, QUICK).read_text())
    training.join()
    assert evaluated == [2, 4]
    values = {step: psnr(workdir, step) for step in (2, 4)}
    assert best["steps"] == {str(step): value for step, value in values.items()}
    assert best["step"] == max(values, key=values.get) and best["value"] == max(values.values())


def test_it_goes_on_where_it_was_stopped(workdir, evaluated):
    follow(workdir, QUICK)
    (workdir / "eval" / "best.json").unlink()
    (workdir / "eval" / "2" / "report.json").write_text("{")  # not whole
    shutil.rmtree(workdir / "reconstruction" / "checkpoints" / "2")
    reports = workdir / "eval" / "4" / "report.json"
    written = reports.stat().st_mtime_ns
    best = json.loads(follow(workdir, QUICK).read_text())
    assert evaluated == [2, 4] and reports.stat().st_mtime_ns == written
    assert best == {"metric": "psnr", "step": 4, "value": psnr(workdir, 4), "steps": {"4": psnr(workdir, 4)}}
    # A report of fewer objects is another evaluation.
    follow(workdir, FollowConfig(poll=0.05, objects=1, metric="chamfer"))
    assert evaluated == [2, 4, 4]


def test_what_training_has_evaluated_is_taken(trained, tmp_path, evaluated):
    workdir = shutil.copytree(trained, tmp_path / "work")
    shutil.rmtree(workdir / "eval")
    recipe.evaluate(workdir)
    report = workdir / "eval" / "4" / "report.json"
    written = report.stat().st_mtime_ns
    best = json.loads(follow(workdir, QUICK).read_text())
    assert evaluated == [2] and report.stat().st_mtime_ns == written and best["steps"]["4"] == psnr(workdir, 4)


def test_a_step_that_was_saved_anew_is_evaluated_anew(workdir, evaluated):
    """As after a rollback; also where deletion and new save fall between two looks, here between two calls."""
    follow(workdir, QUICK)
    table = workdir / "reconstruction" / "checkpoints" / "2" / "checksums.json"
    about = table.parent / "run" / "run.json"
    about.write_text(about.read_text() + " ")
    table.write_text(table.read_text() + " ")  # other bytes, the same model
    report = workdir / "eval" / "2" / "report.json"
    stale = json.loads(report.read_text())
    stale["summary"]["psnr"] = 99.0
    report.write_text(json.dumps(stale))
    best = json.loads(follow(workdir, QUICK).read_text())
    assert evaluated == [2, 4, 2] and best["value"] < 99.0 and best["steps"]["2"] == psnr(workdir, 2)


def test_damaged_and_deleted_checkpoints_are_passed_over(workdir, monkeypatch, capsys):
    checkpoints, evaluate = workdir / "reconstruction" / "checkpoints", following.evaluate
    shutil.copytree(checkpoints / "2", checkpoints / "3")
    largest = max((checkpoints / "2" / "model").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])

    def keeping_two(*arguments, step, **options):
        if step == 3:
            shutil.rmtree(checkpoints / "3")
        return evaluate(*arguments, step=step, **options)

    monkeypatch.setattr(following, "evaluate", keeping_two)
    follow(workdir, QUICK)
    captured = capsys.readouterr()
    told = "".join((captured.out + captured.err).split())  # long lines are wrapped
    assert told.count("isdamagedandpassedover") == 1 and largest.name in told
    assert told.count("wasdeletedbeforeitcouldbeevaluated") == 1
    assert {path.name for path in (workdir / "eval").iterdir()} == {"4", "best.json"}


def test_a_fault_of_ours_is_not_passed_over(workdir, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no such view")

    monkeypatch.setattr(following, "evaluate", broken)
    with pytest.raises(ValueError, match="no such view"):
        follow(workdir, QUICK)


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--idle-timeout", "0.3"], 1, "no new checkpoint of stage reconstruction for 0.3 seconds"),
        (["--idle-timeout", "0"], 1, "positive seconds"),
        (["--step", "2"], 2, "neither --step nor --out"),
    ],
)
def test_wrong_and_vain_commands(tmp_path, options, code, told, capsys):
    try:
        ended = cli.main(["eval", "--follow", "--workdir", str(tmp_path / "none"), *options])
    except SystemExit as error:
        ended = error.code
    assert ended == code and told in capsys.readouterr().err


def test_a_metric_without_weights(workdir, capsys):
    assert cli.main(["eval", "--follow", "--metric", "lpips", "--workdir", str(workdir)]) == 1
    assert "--lpips" in capsys.readouterr().err
