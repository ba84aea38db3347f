"""Time of the rasterizer, forward and forward + backward of all inputs, beside its peers.

  python benchmarks/rasterizer.py [--json FILE]                  # on CPU, beside gsplat's PyTorch reference: minutes
  python benchmarks/rasterizer.py --gpu [--json FILE]            # on an NVIDIA GPU, beside gsplat's CUDA and splax
  python benchmarks/rasterizer.py --growth [--json FILE] [--plot FILE.png]   # time against the number of pairs
  python benchmarks/rasterizer.py --cases quickstart,training    # other sizes, ours alone where scenes are several

The peers are optional: `pip install torch jaxtyping rich ninja && pip install --no-deps gsplat`, `pip install splax`;
the plot needs matplotlib. What is missing is null in the JSON, with the reason. On a machine with a GPU the first and
the last line want JAX_PLATFORMS=cpu. `--threads` (2) is for each program; they take turns, and figures are medians.

The scene: numpy `default_rng(0)`, means uniform in the cube, quats normal, scales sigmoid(normal) * 0.02, opacities
sigmoid(normal), colours uniform, cameras at distance 1.75 with a field of view of 50 degrees, white background. All
programs yield rgb, alpha and depth; the loss is mean(rgb^2) + mean(alpha) + mean(depth). gsplat's CUDA has no gradient
for the intrinsics, splax none for intrinsics and background, and its depth is divided by alpha.
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

from geolrm_jax.geometry.cameras import orbit
from geolrm_jax.rendering import count_pairs, rasterize
from geolrm_jax.scene import Cameras, Gaussians
from kernels_pallas.rasterization.shapes import WORKLOADS, Workload

TABLE = {
    f"object_{gaussians}_{size}": Workload(scenes=1, views=1, gaussians=gaussians, size=size)
    for gaussians in (2_000, 10_000, 50_000)
    for size in (128, 256)
}
CASES = TABLE | WORKLOADS
GROWTH = [(gaussians, size) for gaussians in (32_768, 131_072, 524_288, 2_097_152) for size in (128, 256, 512, 1024)]
LIMIT = 60.0  # seconds: calls of the growth that would take longer are left out
FLIPS = 1e-3  # share of pixels in which rounding may decide a threshold the other way
FIELDS = ("means", "scales", "quats", "opacities", "colors")


class Program(NamedTuple):
    """A contestant: calls that return when their results are there.

    Attributes:
      forward: () -> (rgb (..., V, H, W, 3), alpha (..., V, H, W), depth (..., V, H, W)).
      both: () -> (loss, gradients by the names of the inputs).
      memory: () -> peak bytes of the last call of `both` on the device, or None where that is not known.
    """

    forward: Callable[[], tuple]
    both: Callable[[], tuple]
    memory: Callable[[], int | None]


def make_inputs(case: Workload) -> dict[str, np.ndarray]:
    """The benchmark's scene: Gaussians (B, G, ...), cameras (B, V, ...), background (3,)."""
    rng, shape = np.random.default_rng(0), (case.scenes, case.gaussians)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    means, quats = rng.uniform(-0.5, 0.5, (*shape, 3)), rng.normal(size=(*shape, 4))
    scales, opacities = sigmoid(rng.normal(size=(*shape, 3))) * 0.02, sigmoid(rng.normal(size=shape))
    colors = rng.uniform(size=(*shape, 3))
    rig = orbit(np.arange(case.views) * 360.0 / case.views, 20.0, 1.75, 50.0, case.size)
    cameras = [np.tile(a, (case.scenes, 1, 1, 1)) for a in (rig.world_from_camera, rig.intrinsics)]
    names = (*FIELDS, "world_from_camera", "intrinsics", "background")
    arrays = (means, scales, quats, opacities, colors, *cameras, np.ones(3))
    return {name: np.asarray(a, np.float32) for name, a in zip(names, arrays, strict=True)}


def only_scene(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs without the axis of scenes, which the peers do not have."""
    return {name: a if name == "background" else a[0] for name, a in inputs.items()}


def scene_of(inputs: dict, size: int) -> tuple[Gaussians, Cameras]:
    """The arguments of `rasterize`."""
    mask = jnp.ones(inputs["opacities"].shape, bool)
    cameras = Cameras(inputs["world_from_camera"], inputs["intrinsics"], size, size)
    return Gaussians(*(inputs[key] for key in FIELDS), mask=mask), cameras


def loss_of(rgb, alpha, depth):
    """A scalar that depends on all of the picture, of JAX's or PyTorch's arrays."""
    return (rgb**2).mean() + alpha.mean() + depth.mean()


def ours(inputs: dict[str, np.ndarray], size: int, pairs: int, implementation: str) -> Program:
    """`rasterize`, compiled for so many pairs."""

    def picture(inputs):
        gaussians, cameras = scene_of(inputs, size)
        background = inputs["background"]
        r = rasterize(gaussians, cameras, background=background, capacity=pairs, implementation=implementation)
        return r.rgb, r.alpha, r.depth

    return _compiled(picture, inputs)


def splax(inputs: dict[str, np.ndarray], size: int) -> Program:
    """splax, mapped over the views; its activations, which it applies itself, are undone first."""
    from splax import io, render

    fx, fy, cx, cy = (float(inputs["intrinsics"][0][i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))

    def picture(inputs):
        log_scales, logits = io.invert_activations(inputs["scales"], inputs["opacities"])
        harmonics = io.rgb_to_sh(inputs["colors"])[:, None]

        def view(world_from_camera):
            gaussians = (inputs["means"], log_scales, inputs["quats"], harmonics, logits)
            lens = {
                "viewmat": jnp.linalg.inv(world_from_camera),
                "img_shape": (size, size),
                "f": (fx, fy),
                "c": (cx, cy),
            }
            pixels, alpha = render(*gaussians, **lens, background=inputs["background"], render_depth=True)
            return pixels[..., :3], alpha, pixels[..., 3]

        return jax.vmap(view)(inputs["world_from_camera"])

    return _compiled(picture, inputs)


def _compiled(picture: Callable[[dict], tuple], inputs: dict[str, np.ndarray]) -> Program:
    """A JAX function as a contestant."""
    inputs = jax.device_put(inputs)
    forward = jax.jit(picture).lower(inputs).compile()
    both = jax.jit(jax.value_and_grad(lambda inputs: loss_of(*picture(inputs)))).lower(inputs).compile()

    return Program(
        lambda: jax.block_until_ready(forward(inputs)),
        lambda: jax.block_until_ready(both(inputs)),
        lambda: compiled_memory(both),
    )


def gsplat(inputs: dict[str, np.ndarray], size: int, threads: int | None) -> Program:
    """gsplat: its PyTorch functions with so many threads, or its CUDA for None."""
    import gsplat_peer

    return Program(*gsplat_peer.program(inputs, size, loss_of, threads))


def race(programs: dict[str, Program], repeats: int) -> dict:
    """Seconds by step and program."""
    return {
        step: take_turns({name: getattr(program, field) for name, program in programs.items()}, repeats)
        for step, field in (("forward", "forward"), ("forward_backward", "both"))
    }


def compare(program: Program, peer: Program) -> dict:
    """How far two programs' results are apart: largest differences, pixels beyond 1e-4, relative L2 of gradients."""

    def host(array):
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array)

    result, beyond = {}, False
    for name, a, b in zip(("rgb", "alpha", "depth"), program.forward(), peer.forward(), strict=True):
        difference = np.abs(host(a) - host(b))
        result[name] = float(difference.max())
        beyond |= (difference.max(-1) if name == "rgb" else difference) > 1e-4
    mine, theirs = ({name: host(g) for name, g in p.both()[1].items()} for p in (program, peer))
    gradients = {k: float(np.linalg.norm(mine[k] - g) / np.linalg.norm(g)) for k, g in theirs.items() if g.any()}
    return result | {"share_beyond_1e-4": float(np.mean(beyond)), "gradients": gradients}


def table_row(name: str, repeats: int, threads: int) -> dict:
    """One line of the CPU table."""
    case = CASES[name]
    inputs = make_inputs(case)
    pairs = count_pairs(*scene_of(inputs, case.size))
    programs, row = {"ours": ours(inputs, case.size, pairs, "auto")}, {"case": name, **case._asdict(), "pairs": pairs}
    absent = why_absent("gsplat", "torch") or (None if case.scenes == 1 else "gsplat has no axis of scenes")
    if absent:
        row |= {"gsplat": None, "reason": absent}
    else:
        programs["gsplat"] = gsplat(only_scene(inputs), case.size, threads)
        row["difference"] = difference = compare(programs["ours"], programs["gsplat"])
        if difference["share_beyond_1e-4"] > FLIPS or difference["rgb"] > 5e-3:
            raise ValueError(f"ours and gsplat do not draw the same picture of {name}: {difference}")
    row |= race(programs, repeats) | ({} if absent else {"ratio": {}})
    for step in ("forward", "forward_backward"):
        times = row[step]
        line = f"{name:18s} {pairs:9d} pairs  {step:16s}"
        line += "".join(f"  {who} {t['median']:8.4f} s" for who, t in times.items())
        if not absent:
            row["ratio"][step] = {k: times["ours"][k] / times["gsplat"][k] for k in ("median", "least")}
            line += f"  ratio {row['ratio'][step]['median']:.3f} (of the least times {row['ratio'][step]['least']:.3f})"
        print(line, flush=True)
    return row


def gpu_row(repeats: int) -> dict:
    """512k Gaussians, 8 views of 512^2: time and peak memory of ours and the peers, or the reason why there is none."""
    case = CASES["evaluation"]
    row, size = {"case": "evaluation", **case._asdict()}, case.size
    if jax.devices()[0].platform != "gpu":
        reason = f"no NVIDIA GPU: JAX runs on {jax.devices()[0].device_kind}"
        return row | {"forward": None, "forward_backward": None, "memory": None, "reason": reason}
    inputs = make_inputs(case)
    row["pairs"] = pairs = count_pairs(*scene_of(inputs, size))
    makers = {
        "xla": lambda: ours(inputs, size, pairs, "xla"),
        "pallas_gpu": lambda: ours(inputs, size, pairs, "pallas_gpu"),
        "gsplat": lambda: gsplat(only_scene(inputs), size, None),
        "splax": lambda: splax(only_scene(inputs), size),
    }
    programs, row["absent"] = {}, {}
    for name, make in makers.items():
        try:
            program = make()
            program.both()
            programs[name] = program
        except Exception as error:  # not installed, no compiler for it, out of memory: a peer must not end the run
            row["absent"][name] = f"{type(error).__name__}: {error}"[:500]
    row["difference"] = {n: compare(programs["xla"], p) for n, p in programs.items() if n != "xla"}
    row |= race(programs, repeats) | {"memory": {name: program.memory() for name, program in programs.items()}}
    print(json.dumps(row, indent=2), flush=True)
    return row


def growth(repeats: int) -> dict:
    """Time of one view against the number of pairs, and the exponents of time = c pairs^exponent by least squares."""
    cases = [Workload(scenes=1, views=1, gaussians=gaussians, size=size) for gaussians, size in GROWTH]
    counted = [(count_pairs(*scene_of(make_inputs(case), case.size)), case) for case in cases]
    rows, per_pair = [], 0.0
    for pairs, case in sorted(counted):
        row = {**case._asdict(), "pairs": pairs, "forward": None, "forward_backward": None}
        if per_pair * pairs > LIMIT:
            row["reason"] = f"a call would take {per_pair * pairs:.0f} s, by the one before"
        else:
            row |= growth_point(case, pairs, repeats)
        if row["forward_backward"]:
            per_pair = row["forward_backward"] / pairs
        rows.append(row)
        print(json.dumps(row), flush=True)
    fits = {step: exponents([r for r in rows if r[step]], step) for step in ("forward", "forward_backward")}
    print(json.dumps(fits), flush=True)
    return {"growth": rows, "exponents": fits}


def growth_point(case: Workload, pairs: int, repeats: int) -> dict:
    """Median seconds of both steps, or the reason why there are none; fewer repeats where a call takes long."""
    program = ours(make_inputs(case), case.size, pairs, "auto")
    row = {"memory": program.memory()}
    if row["memory"] > (free := free_memory()):
        return row | {"reason": f"needs {row['memory'] / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"}
    for step, call in (("forward", program.forward), ("forward_backward", program.both)):
        first = seconds_of(call)
        row[step] = take_turns({"ours": call}, max(1, min(repeats, int(20 / first))))["ours"]["median"]
    return row


def exponents(rows: list[dict], step: str) -> dict[str, float]:
    """Of time over pairs: of all points, and of those with more than a million pairs."""
    points = [(row["pairs"], row[step]) for row in rows]
    large = [point for point in points if point[0] > 1e6]
    result = {"all": exponent(*zip(*points, strict=True))}
    return result | ({"above_1e6_pairs": exponent(*zip(*large, strict=True))} if len(large) > 1 else {})


def plot(result: dict, path: Path) -> None:
    """Time over pairs."""
    panels = {}
    for step in ("forward", "forward_backward"):
        rows = [r for r in result["growth"] if r[step]]
        panels[step.replace("_", " + ")] = {
            f"{size}² pixels": [(r["pairs"], r[step]) for r in rows if r["size"] == size]
            for size in sorted({r["size"] for r in rows})
        }
    title = f"One view, 32k to 2M Gaussians, {result['hardware']['cores']} CPU cores"
    plot_growth(panels, "(Gaussian, tile) pairs", title, path)


def main() -> None:
    """Runs what is asked for, prints a line for each case, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(TABLE), help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--gpu", action="store_true", help="the row of the NVIDIA GPU instead")
    parser.add_argument("--growth", action="store_true", help="the growth instead, about ten minutes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of each program on CPU")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw the growth")
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; known: {', '.join(CASES)}")
    if arguments.plot and not arguments.growth:
        parser.error("--plot draws what --growth measures: give both")
    if arguments.plot and (absent := why_absent("matplotlib")):
        parser.error(f"--plot: {absent}")
    if not arguments.gpu:
        take_cores(arguments.threads)
    result = environment(arguments.threads, "torch", "gsplat", "splax")
    if arguments.growth:
        result |= growth(arguments.repeats)
    else:
        rows = [] if arguments.gpu else [table_row(name, arguments.repeats, arguments.threads) for name in names]
        result |= {"cpu": rows, "gpu": [gpu_row(arguments.repeats)]}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
