"""Benchmarks run, and what they write hangs together; their numbers are not looked at here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_train_step_and_its_parts(tiny, tmp_path):
    """The parts, traced and counted apart, add up to the operations of the whole step: none is missing or twice."""
    file = tmp_path / "step.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--config", tiny, "--inputs", "2"]
    command += ["--batch", "2", "--compute", "float32", "--repeats", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(file.read_text())["steps"]

    assert (row["objects"], row["inputs"], row["targets"]) == (2, 2, 3)
    assert row["last_step"]["overflow"] == row["last_step"]["skipped"] == 0
    assert row["samples_per_second"] * row["seconds"]["median"] == pytest.approx(2)
    summed = [part for part in row["parts"] if not part["of"]]
    assert sum(part["flops"] for part in summed) == pytest.approx(2 * row["flops_per_sample"], rel=0.02)
    seconds = sum((part["with_backward"] or part["forward"])["median"] for part in summed)
    assert row["unexplained"] == pytest.approx(row["seconds"]["median"] - seconds)
    for part in summed:
        assert f"{part['part']} " in done.stdout
