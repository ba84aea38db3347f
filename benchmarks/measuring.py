"""What the measurements share: turns, medians, what they were measured on, and how time grows."""

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# A program that waits must leave the machine to the other: PyTorch's threads sleep between tasks, instead of holding
# the cores in a loop, and JAX does not take the GPU's whole memory at once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np


def take_cores(count: int) -> None:
    """Leaves this process so many cores; before the first JAX array, as JAX makes as many threads as it has cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def take_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least seconds by name; the calls take turns, after one of each that is not counted."""
    turns = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(repeats + 1)][1:]
    times = {name: [turn[name] for turn in turns] for name in calls}
    return {name: {"median": statistics.median(t), "least": min(t)} for name, t in times.items()}


def why_absent(*packages: str) -> str | None:
    """Why a peer cannot take part, or None."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def free_memory() -> int:
    """Bytes that can be had, on Linux; elsewhere what is installed is not known and never short."""
    line = next((line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), f"x: {2**40}")
    return int(line.split()[1]) * 1024


def compiled_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments, results and temporaries; results that take the place of donated arguments count once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def environment(threads: int, *packages: str) -> dict:
    """What the numbers were measured on; versions of JAX, NumPy and those of `packages` that are installed."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    names = [name for name in ("jax", "jaxlib", "numpy", *packages) if not why_absent(name)]
    return {
        "hardware": {"devices": [d.device_kind for d in jax.devices()], "cpu": cpu, "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "threads": threads,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of log time over log size, by least squares: 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plot_growth(panels: dict[str, dict[str, list[tuple[float, float]]]], sizes: str, title: str, path: Path) -> None:
    """Seconds over sizes, both logarithmic, a line for each name in a panel, with a line of slope one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 4), sharey=True, squeeze=False, layout="constrained")
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for label, line in lines.items():
            axis.loglog(*zip(*line, strict=True), "o-", label=label)
        points = sorted(point for line in lines.values() for point in line)
        ends = np.array([points[0][0], points[-1][0]])
        axis.loglog(ends, points[-1][1] / points[-1][0] * ends, "k:", label="linear")
        axis.set(xlabel=sizes, title=f"{name}: exponent {exponent(*zip(*points, strict=True)):.2f}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds")
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
