"""What a run tells: scalars on disk, a progress bar, notices above it, and the last screen.

Only one process of a multi-host run writes. Values arrive as Python or NumPy numbers: fetching them from the device,
and when, is the caller's business.
"""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from tensorboardX import SummaryWriter

from geolrm_jax.export.files import written_whole

Scalars = Mapping[str, Any]

console = Console(highlight=False)


def is_writer() -> bool:
    """True on the one process that writes files and speaks.

    Asking for the process index starts the backends, which must not happen before `jax.distributed.initialize`;
    until that was called there is one process.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


class RunLogger:
    """Scalars of one stage as TensorBoard events and as lines of `metrics.jsonl`.

    A line is `{"step": 10, "stage": "proposal", "wall_time": <seconds since 1970>, "<name>": <number>, ...}`; a value
    that is not finite is null there, because JSON has no other word for it. The stages of a run share the file and
    have an event folder each.

    Args:
      directory: holds `metrics.jsonl` and `tensorboard/<stage>`.
      stage: name of the stage whose steps are counted.
      resumed_at: step of the checkpoint that the run goes on from: what the stage had logged later is dropped, so
        that every step stands once. None starts the stage anew.

    Raises:
      ValueError: if an existing `metrics.jsonl` has a line that is no such object.
    """

    def __init__(self, directory: Path | str, stage: str, resumed_at: int | None = None):
        self.path = Path(directory) / "metrics.jsonl"
        self.stage = stage
        self._file = self._events = None
        if is_writer():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _drop_later_steps(self.path, stage, resumed_at)
            self._file = self.path.open("a")
            first = 0 if resumed_at is None else resumed_at + 1
            self._events = SummaryWriter(str(self.path.parent / "tensorboard" / stage), purge_step=first)

    def log(self, step: int, scalars: Scalars, hosts: Mapping[str, Any] | None = None) -> None:
        """Writes the scalars of one step; to be called before the step's checkpoint is saved, or a kill loses them.

        `hosts`, of a run of several processes, stands in the line under its name.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        now = time.time()
        for name, value in values.items():
            self._events.add_scalar(name, value, step, walltime=now)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": int(step), "stage": self.stage, "wall_time": round(now, 3), **finite}
        line |= {"hosts": hosts} if hosts else {}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises:
      ValueError: if any other line is no JSON object with `step` and `stage`.
    """
    lines = Path(path).read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path | str, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
    if not isinstance(record, dict) or not {"step", "stage"} <= record.keys():
        raise ValueError(f"{path}, line {number}: expected an object with `step` and `stage`")
    return record


def _drop_later_steps(path: Path, stage: str, resumed_at: int | None) -> None:
    last = -1 if resumed_at is None else resumed_at
    kept = [record for record in read_metrics(path) if record["stage"] != stage or record["step"] <= last]
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


@dataclasses.dataclass
class Progress:
    """A running count with its rate over the last `window` seconds; made by `progress`."""

    description: str
    total: int
    completed: int
    unit: str
    window: float = 60.0
    scalars: Scalars = dataclasses.field(default_factory=dict)
    _times: collections.deque = dataclasses.field(default_factory=collections.deque)

    def __post_init__(self):
        self._times.append((time.monotonic(), self.completed))

    def update(self, completed: int, scalars: Scalars | None = None) -> None:
        """Sets the count and, if given, the scalars shown beside it (numbers, already fetched)."""
        self.completed = completed
        if scalars is not None:
            self.scalars = scalars
        now = time.monotonic()
        self._times.append((now, completed))
        while len(self._times) > 2 and self._times[0][0] < now - self.window:
            self._times.popleft()

    @property
    def rate(self) -> float:
        """Units per second, 0 before the first."""
        (start, before), (end, after) = self._times[0], self._times[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def pace(self) -> str:
        """Rate and time left."""
        rate = self.rate
        left = duration((self.total - self.completed) / rate) if rate > 0 else "-:--"
        speed = f"{rate:.3g} {self.unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{self.unit}"
        return f"{speed}  ETA {left}"

    def values(self) -> str:
        """The scalars as one line."""
        return "  ".join(f"{name} {float(value):.4g}" for name, value in self.scalars.items())


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _Lines(Progress):
    """On a pipe or a file: one plain line every few seconds."""

    interval = 5.0

    def __post_init__(self):
        super().__post_init__()
        self._spoken = time.monotonic()

    def update(self, completed: int, scalars: Scalars | None = None) -> None:
        super().update(completed, scalars)
        if completed >= self.total or time.monotonic() - self._spoken >= self.interval:
            self._spoken = time.monotonic()
            share = f"{100 * completed // self.total}%" if self.total else "-"
            _say(f"{self.description}  {completed}/{self.total}  {share}  {self.pace()}  {self.values()}".rstrip())


class _Display(rich.progress.Progress):
    """A bar with a second line, which is cut at the terminal's width so that the bar keeps its own."""

    below = ""

    def get_renderables(self):
        yield from super().get_renderables()
        if self.below:
            yield Text("  " + self.below, style="dim", no_wrap=True, overflow="ellipsis")


class _Bar(Progress):
    """On a terminal: a bar that stays at the bottom."""

    def __post_init__(self):
        super().__post_init__()
        self.display = _Display(
            rich.progress.TextColumn("[bold]{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[pace]}"),
            console=console,
            refresh_per_second=4,  # each refresh takes the interpreter's lock from the training loop
        )
        self._task = self.display.add_task(
            escape(self.description), total=self.total, completed=self.completed, pace=""
        )

    def update(self, completed: int, scalars: Scalars | None = None) -> None:
        super().update(completed, scalars)
        self.display.below = self.values()
        self.display.update(self._task, completed=completed, pace=escape(self.pace()))


@contextlib.contextmanager
def progress(description: str, total: int, *, start: int = 0, unit: str = "step") -> Iterator[Progress]:
    """Shows how far a loop is: `with progress("proposal", 900) as bar: ...; bar.update(step, {"loss": 0.3})`.

    A bar on a terminal, plain lines every few seconds elsewhere, silence on all processes but one. Bars may be nested.
    """
    if not is_writer():
        yield Progress(description, total, start, unit)
    elif console.is_terminal:
        bar = _Bar(description, total, start, unit)
        with bar.display:
            yield bar
    else:
        yield _Lines(description, total, start, unit)


@contextlib.contextmanager
def bars(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function (kind, done, in all) that shows a bar for each kind, from its first call on: "train objects"."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Progress] = {}

        def advance(kind: str, done: int, total: int) -> None:
            if kind not in shown:
                shown[kind] = stack.enter_context(progress(f"{kind} {unit}s", total, start=done, unit=unit))
            shown[kind].update(done)

        yield advance


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)


def notice(text: str) -> None:
    """One line about something the user should know, above a running bar."""
    if is_writer():
        _say(text)


def warn(text: str) -> None:
    """Like `notice`, for what may be wrong."""
    if is_writer():
        _say(f"warning: {text}", style="yellow")


def summary(title: str, rows: Sequence[tuple[str, str]], next_steps: Sequence[tuple[str, str]]) -> None:
    """The last screen of a command: what was written where, and what to run next.

    Args:
      title: what is done, in one line.
      rows: (what, where or how much) pairs.
      next_steps: (purpose, command) pairs; commands are never wrapped, so that they can be copied.
    """
    if not is_writer():
        return
    width = max((len(what) for what, _ in rows), default=0)
    _say(f"\n{title}", style="bold green")
    for what, where in rows:
        _say(f"  {what:<{width}}  {where}")
    if next_steps:
        _say("\nNext", style="bold")
    for purpose, command in next_steps:
        _say(f"  {purpose}:")
        _say(f"    {command}", style="cyan")
