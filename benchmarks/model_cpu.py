"""The proposal network's transformer in float32 on CPU against the same computation in PyTorch, in one process.

  python benchmarks/model_cpu.py [--threads 2] [--repeats 5] [--tokens 4096] [--json FILE]

6 layers of width 384 (16 heads, 8 points) on 16^3 anchors and the maps of 4 views at 448^2 (112 x 112 and 64 x 64, 384
channels), attention among tokens; and the deformable cross-attention of one layer alone, forward and with the backward
pass of everything it depends on. Both sides get the same parameters and inputs, and their results are compared before
anything is timed. Runs alternate, so that other load on the machine meets both; medians are reported.

The PyTorch side is written from the equations (specification, section 2) with what PyTorch offers for them:
`scaled_dot_product_attention`, `grid_sample`. Needs `pip install 'geolrm-jax[torch]'`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.models.deformable_attention import look
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.proposal import dense_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Views

VIEWS, SIZE, CHANNELS, LEVELS = 4, 448, 384, (112, 64)


class TorchTransformer:
    """The equations in PyTorch, on one scene; parameters (the JAX module's nested dict) as torch tensors."""

    def __init__(self, params: dict, config: TransformerConfig):
        self.params, self.config = params, config

    def __call__(self, positions, voxels, cameras, maps):
        """Tokens (N, D) of anchors at `positions` (N, 3) from maps (V, H, W, C)."""
        config, blocks = self.config, self.params["blocks"]
        points = self.project(positions, *cameras)
        angles = self.angles(voxels)
        x = torch.cat([positions, self.params["query"].expand(len(positions), -1)], dim=-1)
        for layer in range(config.depth):
            p = tree_map(lambda leaf, layer=layer: leaf[layer], blocks)
            x = x + self.self_attention(p["self_attention"], rms_norm(x, p["norm1"]["scale"]), angles)
            x = x + self.cross_attention(p["cross_attention"], rms_norm(x, p["norm2"]["scale"]), points, maps)
            x = x + swiglu(p["mlp"], rms_norm(x, p["norm3"]["scale"]))
        return rms_norm(x, self.params["norm"]["scale"])

    def project(self, positions, world_from_camera, intrinsics):
        """Projections (V, N, 2) as fractions of the image; all anchors lie in front of all cameras."""
        camera_from_world = torch.linalg.inv(world_from_camera)
        local = positions @ camera_from_world[:, :3, :3].mT + camera_from_world[:, None, :3, 3]
        pixels = local @ intrinsics.mT
        return pixels[..., :2] / pixels[..., 2:] / SIZE

    def angles(self, voxels):
        """Angles (N, 3, Q) of the rotary embedding."""
        pairs = self.config.width // self.config.heads // 6
        return voxels[..., None] * 10000.0 ** (-torch.arange(pairs) / pairs)

    def self_attention(self, p, x, angles):
        """Full attention among tokens with rotated queries and keys."""
        heads = self.config.heads
        q, k, v = (F.linear(x, p[name]["kernel"].T).unflatten(-1, (heads, -1)) for name in ("query", "key", "value"))
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)))[0]
        return mixed.transpose(0, 1).flatten(1) @ p["out"]["kernel"]

    def cross_attention(self, p, x, points, maps):
        """Deformable attention (Zhu et al. 2021, Eq. 2) in every view, then a weighted mean over views."""
        heads, samples = self.config.heads, self.config.points
        shape = (len(x), heads, len(maps), samples)
        offsets = linear(p["offsets"], x).view(*shape, 2)
        weights = linear(p["logits"], x).view(*shape[:2], -1).softmax(-1).view(shape)
        sampled = 0
        for level, level_map in enumerate(maps):
            views, height, width = level_map.shape[:3]
            value = linear(p["value"], level_map).view(views, height, width, heads, -1)
            value = value.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (V K, C, H, W)
            locations = points[:, :, None, None] + offsets[:, :, level] / torch.tensor([width, height])
            grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (V K, N, P, 2)
            found = F.grid_sample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            found = found.unflatten(0, (views, heads))  # (V, K, C, N, P)
            sampled = sampled + (found * weights[:, :, level].transpose(0, 1)[None, :, None]).sum(-1)
        sampled = sampled.permute(0, 3, 1, 2).flatten(2)  # (V, N, D)
        of_view = linear(p["view_logit"], sampled).softmax(0)
        return linear(p["out"], (of_view * sampled).sum(0))


def linear(p, x):
    """An affine layer whose kernel is (in, out)."""
    return F.linear(x, p["kernel"].T, p["bias"])


def rms_norm(x, scale):
    """RMSNorm, eps 1e-5."""
    return F.rms_norm(x, (x.shape[-1],), scale, 1e-5)


def swiglu(p, x):
    """w2(silu(w1 x) * w3 x)."""
    return (F.silu(x @ p["w1"]["kernel"]) * (x @ p["w3"]["kernel"])) @ p["w2"]["kernel"]


def rotate(x, angles):
    """Pairs (i, i + Q) of each third of a head (N, K, 6 Q) turned by angles (N, 3, Q)."""
    parts = x.unflatten(-1, (3, 2, -1))
    u, v = parts.unbind(-2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([u * cos - v * sin, v * cos + u * sin], dim=-2).flatten(-3)


def tree_map(function, tree):
    """`function` of every leaf of nested dicts."""
    return {k: tree_map(function, v) for k, v in tree.items()} if isinstance(tree, dict) else function(tree)


def to_torch(tree, grad: bool = False):
    """A pytree of dicts with torch copies of its arrays."""
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x)).requires_grad_(grad), tree)


def make_problem(config: TransformerConfig, tokens: int):
    """The JAX module's graph and parameters, anchors, views and maps.

    Samples are spread over a few cells. The maps are smooth, as features are: the gradient by a location jumps where a
    sample crosses a cell's border, and rounding takes some across on one side and not on the other. In float64 neither
    side is nearer to the truth than the other; the error that this leaves is 2e-3, on white noise 2e-2.
    """
    rng = np.random.default_rng(0)
    coarse = round(tokens ** (1 / 3))
    if coarse**3 != tokens:
        raise ValueError(f"--tokens must be a cube number, got {tokens}")
    module = config.make(CHANNELS, len(LEVELS), nnx.Rngs(0), Precision())
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    cross = params["blocks"]["cross_attention"]
    for name in ("offsets", "logits"):
        cross[name]["kernel"] = jnp.asarray(0.05 * rng.normal(size=cross[name]["kernel"].shape), jnp.float32)
    cameras = jax.tree.map(lambda x: jnp.asarray(x)[None], turntable(VIEWS, size=SIZE))
    blank = jnp.zeros((1, VIEWS, SIZE, SIZE))
    views = Views(cameras, jnp.zeros((*blank.shape, 3)), blank, blank, jnp.ones((1, VIEWS), bool))
    coarse_maps = jnp.asarray(rng.normal(size=(1, VIEWS, 8, 8, CHANNELS)), jnp.float32)
    maps = tuple(jax.image.resize(coarse_maps, (1, VIEWS, n, n, CHANNELS), "cubic") for n in LEVELS)
    return graphdef, params, dense_anchors(coarse, 128, 1), views, maps


def programs(config: TransformerConfig, tokens: int) -> dict[str, tuple[Callable, Callable]]:
    """By name, two functions without arguments that return NumPy arrays: ours and PyTorch's."""
    graphdef, params, anchors, views, maps = make_problem(config, tokens)
    features = look(maps, views, anchors)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, config.width)), jnp.float32)
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["cross_attention"])
    cross_graph = nnx.split(config.make_cross_attention(CHANNELS, len(LEVELS), nnx.Rngs(0), Precision()))[0]

    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))

    def cross(params, x, maps):
        seen = type(features)(maps, features.reference_points, features.view_valid)
        return nnx.merge(cross_graph, params)(x, anchors, seen)

    cross_forward = jax.jit(cross)
    cross_both = jax.jit(jax.value_and_grad(lambda *inputs: jnp.mean(cross(*inputs) ** 2), (0, 1, 2)))

    reference = TorchTransformer(to_torch(params), config)
    places, voxels = (torch.tensor(np.asarray(a[0])) for a in (anchors.positions, anchors.voxels))
    cameras = [torch.tensor(np.asarray(a[0])) for a in (views.cameras.world_from_camera, views.cameras.intrinsics)]
    torch_maps = [torch.tensor(np.asarray(m[0])) for m in maps]
    points, torch_x, torch_layer = reference.project(places, *cameras), torch.tensor(np.asarray(x[0])), to_torch(layer)

    def torch_forward():
        with torch.no_grad():
            return reference(places, voxels, cameras, torch_maps)[None].numpy()

    def torch_cross_forward():
        with torch.no_grad():
            return reference.cross_attention(torch_layer, torch_x, points, torch_maps)[None].numpy()

    def torch_cross_both():
        inputs = jax.tree.map(lambda t: t.detach().requires_grad_(), (torch_layer, torch_x, torch_maps))
        loss = reference.cross_attention(*inputs[:2], points, inputs[2]).square().mean()
        loss.backward()
        grads = jax.tree.map(lambda t: t.grad, inputs)
        return loss.detach().numpy(), (grads[0], grads[1][None], tuple(m[None] for m in grads[2]))

    return {
        "transformer_forward": (lambda: forward(params, anchors, views, maps), torch_forward),
        "cross_attention_forward": (lambda: cross_forward(layer, x, maps), torch_cross_forward),
        "cross_attention_forward_backward": (lambda: cross_both(layer, x, maps), torch_cross_both),
    }


def largest_error(ours, theirs) -> float:
    """Largest difference of any array of two pytrees, as a share of that array's largest value.

    An array whose values are all below a millionth of the others' is zero but for rounding (the gradient by a bias that
    the softmax over views does not see) and is left out.
    """
    pairs = [
        (np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]
    largest = max(np.abs(b).max() for _, b in pairs)
    counted = [(a, b) for a, b in pairs if np.abs(b).max() > 1e-6 * largest]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in counted)


def compare(name: str, ours: Callable, theirs: Callable, repeats: int) -> dict:
    """One row: the error, and seconds of both sides, run in turns."""
    error = largest_error(jax.block_until_ready(ours()), theirs())
    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    for _ in range(repeats):
        for side, run in (("jax", lambda: jax.block_until_ready(ours())), ("torch", theirs)):
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    row = {"program": name, "largest_relative_error": error}
    for side, times in seconds.items():
        row[side] = {"median": statistics.median(times), "least": min(times), "all": times}
    row["ratio"] = row["jax"]["median"] / row["torch"]["median"]
    print(
        f"{name:34s} JAX {row['jax']['median']:7.3f} s   PyTorch {row['torch']['median']:7.3f} s   "
        f"ratio {row['ratio']:.2f}   error {error:.1e}",
        flush=True,
    )
    return row


def environment(threads: int) -> dict:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__}
    return {
        "hardware": {"cpu": cpu, "threads": threads},
        "versions": versions | {"numpy": np.__version__},
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Compares all programs and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores that both sides get (2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each program (5)")
    parser.add_argument("--tokens", type=int, default=4096, help="a cube number (4096)")
    parser.add_argument("--depth", type=int, default=6, help="layers (6)")
    parser.add_argument("--json", type=Path, help="result file (benchmarks/results/model_cpu_DATE.json)")
    known = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: known.threads])  # before JAX counts the cores
    torch.set_num_threads(known.threads)
    config = TransformerConfig(depth=known.depth)
    where = environment(known.threads)
    rows = [compare(n, *sides, known.repeats) for n, sides in programs(config, known.tokens).items()]
    shapes = {"tokens": known.tokens, "views": VIEWS, "maps": LEVELS, "channels": CHANNELS, "depth": known.depth}
    path = known.json or Path(__file__).parent / "results" / f"model_cpu_{where['date']}.json"
    path.write_text(json.dumps(where | shapes | {"rows": rows}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
