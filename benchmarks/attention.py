"""Time of deformable attention and self-attention, forward and with all gradients, beside PyTorch.

  python benchmarks/attention.py [--json FILE]              # on CPU, float32: a minute
  python benchmarks/attention.py --gpu [--json FILE]        # on an NVIDIA GPU, bfloat16
  python benchmarks/attention.py --growth [--json FILE] [--plot FILE.png]   # deformable, time against N x V

PyTorch is optional (`pip install torch`), the plot needs matplotlib; what is missing is null in the JSON, with the
reason. `--threads` (2) is for each program; they take turns, and figures are medians. On a machine with a GPU the
first and the last line want JAX_PLATFORMS=cpu. The layer with its projections is in model_cpu.py.

Deformable attention: normal features, reference points uniform in [0.05, 0.95]^2, offsets normal times 2 cells, logits
normal, numpy `default_rng(0)`. PyTorch's way is `grid_sample`, all heads and views as one batch, compiled by
`torch.compile` on the GPU. The loss is the mean of the squared output; gradients are for features, reference points,
offsets and logits. Self-attention: normal queries, keys and values, against `scaled_dot_product_attention`, and on the
GPU against cuDNN called directly.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import (
    compiled_memory,
    environment,
    exponent,
    free_memory,
    plot_growth,
    seconds_of,
    take_cores,
    take_turns,
    why_absent,
)

from kernels_pallas.deformable_attention import multiview_deformable_attention
from kernels_pallas.deformable_attention.shapes import WORKLOADS, Workload
from kernels_pallas.self_attention import self_attention
from kernels_pallas.self_attention.shapes import WORKLOADS as SELF_WORKLOADS

STEPS = ("forward", "forward_backward")
GROWTH = [(queries, views) for queries in (4096, 16_384, 65_536) for views in (1, 4, 21)]
LIMIT = 60.0  # seconds: calls of the growth that would take longer are left out


class Program(NamedTuple):
    """A contestant: calls that return when their results are there.

    Attributes:
      forward: () -> output.
      both: () -> (loss, gradients of the arrays).
      memory: () -> peak bytes of `both`, or None where that is not known.
    """

    forward: Callable[[], object]
    both: Callable[[], tuple]
    memory: Callable[[], int | None]


def deformable_inputs(case: Workload) -> tuple:
    """Features, reference points, offsets, logits, float32."""
    rng, c = np.random.default_rng(0), case
    sizes = [(c.scenes, c.views, *size, c.heads, c.channels) for size in c.maps]
    samples = (c.scenes, c.queries, c.heads, len(c.maps), c.points)
    features = tuple(rng.standard_normal(size, np.float32) for size in sizes)
    points = rng.uniform(0.05, 0.95, (c.scenes, c.views, c.queries, 2)).astype(np.float32)
    return (
        features,
        points,
        2 * rng.standard_normal((*samples, 2), np.float32),
        rng.standard_normal(samples, np.float32),
    )


def ours(function: Callable, arrays: tuple) -> Program:
    """A JAX function of arrays, compiled."""
    arrays = jax.device_put(arrays)
    forward = jax.jit(function).lower(*arrays).compile()
    loss = jax.value_and_grad(lambda arrays: jnp.mean(function(*arrays).astype(jnp.float32) ** 2))
    both = jax.jit(loss).lower(arrays).compile()
    return Program(
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(both(arrays)),
        lambda: compiled_memory(both),
    )


def deformable(case: Workload, arrays: tuple, implementation: str) -> Program:
    """Our operation, every view valid."""
    valid = jnp.ones((case.scenes, case.views, case.queries), bool)
    return ours(lambda *a: multiview_deformable_attention(*a, valid, implementation=implementation), arrays)


def theirs(function: Callable, arrays: tuple, device: str, dtype: str) -> Program:
    """A PyTorch function of tensors; `arrays` is a pytree."""
    import torch

    def tensor(array):
        # Coordinates and weights stay float32 on both sides.
        kind = getattr(torch, dtype) if array.dtype.name == dtype else torch.float32
        return torch.tensor(np.asarray(array, np.float32), device=device, dtype=kind, requires_grad=True)

    tensors = jax.tree.map(tensor, arrays)
    leaves = jax.tree.leaves(tensors)

    def finish():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            out = function(*tensors)
        finish()
        return out.float().cpu().numpy() if device == "cpu" else out

    def both():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = function(*tensors).float().square().mean()
        gradients = torch.autograd.grad(loss, leaves)
        finish()
        return loss, jax.tree.unflatten(jax.tree.structure(tensors), gradients)

    return Program(forward, both, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None)


def grid_sample_attention(features, points, offsets, logits):
    """Deformable attention in all views by PyTorch's `grid_sample` (Zhu et al. 2021, Eq. 2)."""
    import torch
    import torch.nn.functional as F

    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    out = 0
    for level, maps in enumerate(features):
        scenes, views, height, width, heads, channels = maps.shape
        table = maps.permute(0, 1, 4, 5, 2, 3).reshape(-1, channels, height, width)
        size = torch.tensor([width, height], device=maps.device)
        places = points[:, :, :, None, None] + offsets[:, None, :, :, level] / size  # (B, V, N, K, P, 2)
        # In bfloat16 coordinates have 8 bits, and a tenth of the result is wrong: float32, as autocast does.
        grid = (2 * places - 1).transpose(2, 3).flatten(0, 2)
        found = F.grid_sample(table.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        found = found.view(scenes, views, heads, channels, *found.shape[-2:])
        share = weights[:, :, :, level].transpose(1, 2)[:, None, :, None]  # (B, 1, K, 1, N, P)
        out = out + (found * share).sum(-1)
    return out.permute(0, 1, 4, 2, 3)


def self_inputs(scenes: int, tokens: int, heads: int, width: int) -> tuple:
    """Queries, keys, values, float32."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((scenes, tokens, heads, width), np.float32) for _ in range(3))


def torch_self_attention(queries, keys, values):
    """PyTorch's fused attention."""
    import torch.nn.functional as F

    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (queries, keys, values)))
    return mixed.transpose(1, 2)


def cpu_programs() -> dict[str, dict[str, Program]]:
    """Ours and PyTorch's by name of the work."""
    absent, case = why_absent("torch"), WORKLOADS["proposal"]
    tokens = SELF_WORKLOADS["proposal"]
    works = {
        "deformable proposal": (
            deformable(case, arrays := deformable_inputs(case), "auto"),
            grid_sample_attention,
            arrays,
        ),
        "self proposal": (
            ours(lambda *a: self_attention(*a, jnp.array([tokens.tokens])), qkv := self_inputs(*tokens)),
            torch_self_attention,
            qkv,
        ),
    }
    return {
        name: {"ours": program} | ({} if absent else {"torch": theirs(function, arrays, "cpu", "float32")})
        for name, (program, function, arrays) in works.items()
    }


def gpu_programs(name: str) -> tuple[dict[str, Callable[[], Program]], int]:
    """Makers of the contestants of one row, and the number of samples or scores."""
    import ml_dtypes

    def narrow(tree):
        return jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), tree)

    kind, _, size = name.partition(" ")
    if kind == "deformable":
        case = WORKLOADS[size]
        features, *rest = deformable_inputs(case)
        arrays = (narrow(features), *rest)
        return {
            "pallas_gpu": lambda: deformable(case, arrays, "pallas_gpu"),
            "xla": lambda: deformable(case, arrays, "xla"),
            "torch": lambda: theirs(_torch_compiled(grid_sample_attention), arrays, "cuda", "bfloat16"),
        }, case.samples
    tokens = SELF_WORKLOADS[size]
    arrays = narrow(self_inputs(*tokens))
    lengths = jnp.array([tokens.tokens])
    return {
        "auto": lambda: ours(lambda *a: self_attention(*a, lengths), arrays),
        "cudnn_directly": lambda: ours(lambda *a: jax.nn.dot_product_attention(*a, implementation="cudnn"), arrays),
        "torch": lambda: theirs(torch_self_attention, arrays, "cuda", "bfloat16"),
    }, tokens.tokens**2 * tokens.heads


def _torch_compiled(function: Callable) -> Callable:
    import torch

    return torch.compile(function)


def compare(program: Program, peer: Program) -> dict:
    """Relative L2 of the difference of outputs and of each gradient."""

    def host(array):
        return np.asarray(array.float().cpu().numpy() if hasattr(array, "cpu") else array, np.float32)

    def relative(a, b):
        return float(np.linalg.norm(host(a) - host(b)) / np.linalg.norm(host(b)))

    gradients = (jax.tree.leaves(p.both()[1]) for p in (program, peer))
    pairs = zip(*gradients, strict=True)
    return {"output": relative(program.forward(), peer.forward()), "gradients": [relative(*pair) for pair in pairs]}


def measure(name: str, programs: dict[str, Program], repeats: int) -> dict:
    """One row, of which the first program is ours."""
    (first, program), *others = programs.items()
    row = {"work": name, "difference": {other: compare(program, peer) for other, peer in others}}
    for other, difference in row["difference"].items():
        if not difference["output"] < 1e-2:
            raise ValueError(f"{name}: {first} and {other} do not compute the same: {difference}")
    for step, field in zip(STEPS, ("forward", "both"), strict=True):
        row[step] = take_turns({who: getattr(p, field) for who, p in programs.items()}, repeats)
        line = "".join(f"  {who} {t['median']:8.4f} s" for who, t in row[step].items())
        ratios = {other: row[step][first]["median"] / row[step][other]["median"] for other, _ in others}
        row.setdefault("ratio", {})[step] = ratios
        print(f"{name:24s} {step:16s}{line}" + "".join(f"  / {o} {r:.2f}" for o, r in ratios.items()), flush=True)
    row["memory"] = {}
    for who, p in programs.items():
        p.both()
        row["memory"][who] = p.memory()
    return row


def gpu_row(name: str, repeats: int) -> dict:
    """Time and peak memory of ours and the peers, or the reason why there is none."""
    if jax.devices()[0].platform != "gpu":
        reason = f"no NVIDIA GPU: JAX runs on {jax.devices()[0].device_kind}"
        return {"work": name} | dict.fromkeys((*STEPS, "memory")) | {"reason": reason}
    makers, units = gpu_programs(name)
    programs, absent = {}, {}
    for who, make in makers.items():
        try:
            program = make()
            program.both()
            programs[who] = program
        except Exception as error:  # not installed, no compiler for it, out of memory: a peer must not end the run
            absent[who] = f"{type(error).__name__}: {error}"[:500]
    try:
        row = measure(name, programs, repeats)
    except ValueError as error:  # they do not compute the same: said, and the other rows are measured
        row = {"work": name, "reason": str(error)}
    return row | {"units": units, "absent": absent}


def growth(repeats: int) -> dict:
    """Time of deformable attention against queries x views, with the proposal's heads, points and maps."""
    rows, per_unit = [], 0.0
    for units, queries, views in sorted((n * v, n, v) for n, v in GROWTH):
        row = {"queries": queries, "views": views, "units": units, "forward": None, "forward_backward": None}
        if per_unit * units > LIMIT:
            row["reason"] = f"a call would take {per_unit * units:.0f} s, by the one before"
        else:
            case = WORKLOADS["proposal"]._replace(queries=queries, views=views)
            program = deformable(case, deformable_inputs(case), "auto")
            row["memory"] = program.memory()
            if row["memory"] > (free := free_memory()):
                row["reason"] = f"needs {row['memory'] / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            else:
                for step, call in zip(STEPS, (program.forward, program.both), strict=True):
                    turns = max(1, min(repeats, int(20 / seconds_of(call))))
                    row[step] = take_turns({"ours": call}, turns)["ours"]["median"]
                per_unit = row["forward_backward"] / units
        rows.append(row)
        print(json.dumps(row), flush=True)
    timed = [r for r in rows if r["forward_backward"]]
    fits = {step: exponent([r["units"] for r in timed], [r[step] for r in timed]) for step in STEPS}
    print(json.dumps(fits), flush=True)
    return {"growth": rows, "exponents": fits}


def plot(result: dict, path: Path) -> None:
    """Time over queries x views."""
    panels = {}
    for step in STEPS:
        rows = [r for r in result["growth"] if r[step]]
        panels[step.replace("_", " + ")] = {
            f"{views} views": [(r["units"], r[step]) for r in rows if r["views"] == views]
            for views in sorted({r["views"] for r in rows})
        }
    title = f"Deformable attention, 16 heads of 24, 2 x 8 samples, {result['hardware']['cores']} CPU cores"
    plot_growth(panels, "queries x views", title, path)


def main() -> None:
    """Runs what is asked for, prints a line for each case, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the rows of the NVIDIA GPU instead")
    parser.add_argument("--growth", action="store_true", help="the growth instead")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of each program on CPU")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw the growth")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.growth:
        parser.error("--plot draws what --growth measures: give both")
    if arguments.plot and (absent := why_absent("matplotlib")):
        parser.error(f"--plot: {absent}")
    if not arguments.gpu:
        take_cores(arguments.threads)
        if not why_absent("torch"):
            import torch

            torch.set_num_threads(arguments.threads)
    result = environment(arguments.threads, "torch")
    if arguments.growth:
        result |= growth(arguments.repeats)
    else:
        works = {} if arguments.gpu else cpu_programs()
        result["cpu"] = [measure(name, programs, arguments.repeats) for name, programs in works.items()]
        names = ("deformable training", "deformable evaluation", "self evaluation", "self largest")
        result["gpu"] = [gpu_row(name, arguments.repeats) for name in names]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
