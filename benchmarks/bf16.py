"""The second stage in float32, in bfloat16, and in bfloat16 with rounded projections: same seed, same data.

    python benchmarks/bf16.py [--steps 2000] [--size 56] [--out FOLDER] [--json FILE]

The quickstart's networks at a smaller size, on procedural objects. One proposal network is trained in float32; then a
reconstruction network on its anchors for each variant, from the same fresh parameters and the same batches:

- `float32`;
- `bfloat16`: the policy of precision.py, as in configs/geolrm_bf16.py;
- `bfloat16, projections too`: what the paper's second stage failed with;
- `float32, other seed`: other parameters and batches on the same data, to know what a difference means.

The loss is the mean over the last tenth of the steps; `psnr` is that of the unseen objects.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from measuring import environment

from geolrm_jax import recipe
from geolrm_jax.config import Experiment, load_config
from geolrm_jax.precision import Precision
from geolrm_jax.runtime import logging, programs
from geolrm_jax.runtime.logging import read_metrics

REFERENCE = "float32"


def small(steps: int, size: int, anchors: int) -> Experiment:
    """The quickstart at another size."""
    base = load_config("quickstart")
    data = replace(base.data, source=replace(base.data.source, train_objects=120, size=size))
    stage = replace(
        base.reconstruction,
        objective=replace(base.reconstruction.objective, max_anchors=anchors),
        steps=steps,
        optimizer=replace(base.reconstruction.optimizer, learning_rate=1e-3),
        checkpoint=replace(base.reconstruction.checkpoint, every=max(steps // 4, 10)),
    )
    evaluation = replace(base.evaluation, input_size=size, render_size=size, max_anchors=anchors)
    return replace(
        base, name="bf16", data=data, reconstruction=stage, evaluation=evaluation, input_size=size, render_size=size
    )


def variants(experiment: Experiment) -> dict[str, Experiment]:
    """What is compared."""
    halved = replace(experiment, precision=Precision("bfloat16"))
    network = experiment.model.reconstruction
    rounded = replace(network, transformer=replace(network.transformer, coordinates="bfloat16"))
    return {
        REFERENCE: experiment,
        "bfloat16": halved,
        "bfloat16, projections too": replace(halved, model=replace(halved.model, reconstruction=rounded)),
        "float32, other seed": replace(experiment, seed=experiment.seed + 1),
    }


def measured(workdir: Path, steps: int) -> dict[str, float]:
    """What a finished run says of itself."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["stage"] == "reconstruction"]
    late = [line for line in lines if line["step"] > 0.9 * steps]
    report = json.loads((workdir / "eval" / str(steps) / "report.json").read_text())
    return {
        "loss": fmean(line["loss"] for line in late),
        "train_psnr": fmean(line["psnr"] for line in late),
        "psnr": report["summary"]["psnr"],
        "skipped": sum(line["skipped"] for line in lines),
        "largest_gradient_norm": max(line["gradient_norm"] for line in lines),
        "seconds_per_step": fmean(line["seconds_per_step"] for line in late),
    }


def main() -> None:
    """Parses, trains, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--size", type=int, default=56, help="of images and renders, a multiple of 28")
    parser.add_argument("--anchors", type=int, default=448)
    parser.add_argument("--out", type=Path, help="work directories, which a second call goes on with")
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    programs.keep_between_runs()
    experiment, results = small(known.steps, known.size, known.anchors), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (known.out or Path(temporary)).absolute()
        recipe.run(replace(experiment, reconstruction=None), folder / "proposal")
        trained = replace(
            experiment,
            proposal=None,
            warm_start=str(folder / "proposal"),
            data=replace(experiment.data, root=str(folder / "proposal" / "data")),
        )
        for name, variant in variants(trained).items():
            workdir = folder / name.replace(", ", "-").replace(" ", "-")
            recipe.run(variant, workdir)
            results[name] = measured(workdir, known.steps)
            results[name]["loss_over_float32"] = results[name]["loss"] / results[REFERENCE]["loss"] - 1
    rows = [
        (
            name,
            f"loss {row['loss']:.5f} ({row['loss_over_float32']:+.2%}), {row['psnr']:.2f} dB, {row['skipped']} skipped",
        )
        for name, row in results.items()
    ]
    logging.summary(f"{known.steps} steps, {known.size}² pixels, {known.anchors} anchors", rows, [])
    if known.json:
        about = {"steps": known.steps, "size": known.size, "anchors": known.anchors}
        about |= {"batch": experiment.reconstruction.batch, "variants": results}
        known.json.write_text(json.dumps({**environment(os.cpu_count(), "flax"), **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
