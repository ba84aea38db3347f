import json
import re
import struct

import pytest
from rich.console import Console

from geolrm_jax.runtime import logging


def steps(path, stage):
    return [line["step"] for line in map(json.loads, path.read_text().splitlines()) if line["stage"] == stage]


def test_lines_and_events_hold_the_scalars(tmp_path):
    with logging.RunLogger(tmp_path, "proposal") as logger:
        logger.log(1, {"loss": 2.5, "losses/bce": 0.25})
        logger.log(2, {"loss": float("nan")})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    wall_time = first.pop("wall_time")
    assert first == {"step": 1, "stage": "proposal", "loss": 2.5, "losses/bce": 0.25}
    assert second["loss"] is None and second["wall_time"] >= wall_time > 1.7e9
    (events,) = (tmp_path / "tensorboard" / "proposal").glob("events*")
    scalars = read_events(events)
    assert scalars["loss"][0] == (1, 2.5) and scalars["losses/bce"] == [(1, 0.25)]


def read_events(path):
    """Scalars of an event file: length, checksum, protobuf, checksum; a reader of its own for what we wrote."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, data = {}, path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return scalars


def test_resuming_leaves_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with logging.RunLogger(tmp_path, "proposal") as logger:
        for step in range(1, 4):
            logger.log(step, {"loss": 1.0})
    with logging.RunLogger(tmp_path, "reconstruction") as logger:
        for step in range(1, 6):
            logger.log(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 6, "stage": "recons')  # a kill in the middle of a line
    with logging.RunLogger(tmp_path, "reconstruction", resumed_at=3) as logger:
        for step in range(4, 8):
            logger.log(step, {"loss": 0.5})
    assert steps(path, "reconstruction") == [1, 2, 3, 4, 5, 6, 7]
    assert steps(path, "proposal") == [1, 2, 3]
    assert [line["loss"] for line in logging.read_metrics(path)][-5:] == [1.0, 0.5, 0.5, 0.5, 0.5]
    logging.RunLogger(tmp_path, "reconstruction").close()
    assert steps(path, "reconstruction") == [] and steps(path, "proposal") == [1, 2, 3]


@pytest.mark.parametrize("line", ["hello", "[1]", '{"step": 1}'])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "proposal"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        logging.RunLogger(tmp_path, "proposal", resumed_at=1)
    assert line in path.read_text()


def test_plain_lines_on_a_pipe(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    with logging.progress("proposal [a]", 20) as bar:
        for step in range(1, 21):
            now[0] = 2.0 * step
            bar.update(step, {"loss": 1 / step})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7  # every third step, six seconds apart, and the last
    assert lines[0] == "proposal [a]  3/20  15%  2 s/step  ETA 0:34  loss 0.3333"
    assert lines[-1] == "proposal [a]  20/20  100%  2 s/step  ETA 0:00  loss 0.05"


def test_the_rate_forgets_the_compilation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    bar = logging.Progress("x", total=1000, completed=0, unit="step")
    for step in range(1, 200):
        now[0] = 100.0 + step
        bar.update(step)
    assert bar.rate == pytest.approx(1.0)
    assert bar.pace() == "1 step/s  ETA 13:21"


def test_bar_on_a_terminal_keeps_notices_above_and_nests(monkeypatch, capsys):
    monkeypatch.setattr(logging, "console", Console(force_terminal=True, width=140, highlight=False))
    with logging.progress("outer", 10) as outer:
        outer.update(4, {"loss": 0.125})
        logging.notice("LPIPS: off [no weights file]")
        with logging.progress("inner", 5, unit="object") as inner:
            inner.update(5)
        logging.warn("2 records skipped")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "4/10" in text and "loss 0.125" in text and "5/5" in text
    assert "LPIPS: off [no weights file]" in text and "warning: 2 records skipped" in text


def test_many_losses_leave_the_bar_its_place(monkeypatch, capsys):
    monkeypatch.setattr(logging, "console", Console(force_terminal=True, width=80, highlight=False))
    with logging.progress("reconstruction", 9000) as bar:
        bar.update(4000, {f"a_rather_long_loss_name_{k}": 0.125 for k in range(9)})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"reconstruction ━+.*4000/9000 .* ETA \d+:\d\d", text)
    assert "a_rather_long_loss_name_0 0.125" in text and max(map(len, re.split(r"[\r\n]", text))) <= 80


def test_last_screen_never_wraps_a_command(capsys):
    command = "python eval.py --workdir " + "long/" * 40
    logging.summary("Done.", [("report", "W/report.html"), ("Gaussians", "W/a.ply")], [("Evaluate", command)])
    lines = capsys.readouterr().out.splitlines()
    assert "Done." in lines and "  report     W/report.html" in lines and f"    {command}" in lines


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "is_writer", lambda: False)
    with logging.RunLogger(tmp_path / "w", "proposal") as logger, logging.progress("x", 2) as bar:
        logger.log(1, {"loss": 1.0})
        bar.update(2)
    logging.notice("a")
    logging.summary("a", [], [])
    assert not (tmp_path / "w").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert logging.duration(float(seconds)) == text
