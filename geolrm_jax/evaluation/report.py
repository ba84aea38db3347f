"""Writes an evaluation as `report.json` for programs and `report.html`, one file, for people."""

import dataclasses
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geolrm_jax.evaluation.protocol import object_list_hash
from geolrm_jax.evaluation.results import (
    EvaluationResults,
    ImageScores,
    ObjectResult,
    geometry_means,
    image_means,
    median_seconds,
    occupancy_rates,
    threshold_names,
)
from geolrm_jax.export.files import written_whole
from geolrm_jax.export.pages import figure, table, write_page

BASELINES = ("white", "nearest_view")
LPIPS_OFF = "LPIPS: off, no weights file"


def write_report(directory: Path | str, results: EvaluationResults) -> tuple[Path, Path]:
    """Writes both files, each whole or not at all, and returns their paths (JSON, HTML).

    Raises:
      ValueError: if there is no object to report.
    """
    if not results.objects:
        raise ValueError(f"{directory}: no objects were evaluated, nothing to report")
    directory = Path(directory)
    as_json, as_page = directory / "report.json", directory / "report.html"
    report = report_tree(results)
    with written_whole(as_json) as temporary:
        temporary.write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_page(as_page, f"GeoLRM evaluation: {results.config_name}", _body(results, report), STYLE)
    return as_json, as_page


def report_tree(results: EvaluationResults) -> dict[str, Any]:
    """The content of `report.json`: numbers, texts and None, in nested dicts and lists."""
    cost = {"seconds": median_seconds(results), "peak_memory_bytes": results.peak_memory_bytes}
    summary = {**image_means(results, "prediction"), **geometry_means(results), **cost}
    nothing = dict.fromkeys(summary)
    baselines = {name: {**nothing, **image_means(results, name)} for name in BASELINES}
    if hull := occupancy_rates(results, "hull_voxels"):
        baselines["visual_hull"] = {**nothing, "proposal": hull}
    return {
        "summary": summary,
        "baselines": baselines,
        "objects": [_object_tree(result, results) for result in results.objects],
        "config": {
            "name": results.config_name,
            "protocol": dataclasses.asdict(results.protocol),
            "object_list_sha256": object_list_hash(result.name for result in results.objects),
            "lpips_sha256": results.lpips_sha256,
            "surface": results.surface,
            "experiment": results.config,
        },
        "checkpoint_step": results.checkpoint_step,
        "git": results.environment.git,
        "hardware": results.environment.hardware,
        "versions": results.environment.versions,
    }


def _object_tree(result: ObjectResult, results: EvaluationResults) -> dict[str, Any]:
    alone = geometry_means(dataclasses.replace(results, objects=[result]))
    return {
        "id": result.name,
        **result.prediction.means(),
        **alone,
        "seconds": {"reconstruct": result.reconstruct_seconds, "render": result.render_seconds},
        "anchors": result.anchors,
        "gaussians": result.gaussians,
        "input_views": result.input_views,
        "target_views": result.target_views,
        "views": _scores_tree(result.prediction),
        "baselines": {name: getattr(result, name).means() for name in BASELINES},
    }


def _scores_tree(scores: ImageScores) -> dict[str, Any]:
    return {"psnr": scores.psnr, "ssim": scores.ssim, "lpips": scores.lpips}


def _plain(value: Any) -> Any:
    """JSON's own types: arrays and tuples as lists, NumPy numbers as Python's, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# The page ------------------------------------------------------------------------------------------------------------

STYLE = """
.object { display: grid; grid-template-columns: 1.15fr repeat(4, 1fr); gap: .7rem .8rem; min-width: 48rem; }
.object > .head { font-weight: 600; font-size: .875rem; color: var(--soft); }
.inputs { display: grid; grid-template-columns: repeat(2, 1fr); gap: .5rem; align-content: start; }
.images { font-size: 1.15rem; }
.images tbody tr:first-child { font-weight: 600; }
.facts td:first-child, .numbers td:first-child { color: var(--soft); }
.facts td:first-child { white-space: nowrap; }
"""


def _body(results: EvaluationResults, report: Mapping[str, Any]) -> str:
    protocol, count = results.protocol, len(results.objects)
    intro = (
        f"<p>Each of {count} object{'s' if count > 1 else ''} was turned into 3D Gaussians from {protocol.inputs} "
        f"pictures (“inputs”) in one pass of the network, and drawn from {len(protocol.targets)} other directions "
        f"(“targets”). The table compares those drawings with the true pictures, over a white background, "
        f"and puts two answers beside them that need no network.</p>"
    )
    shown = [result for result in results.objects if result.pictures is not None]
    gallery = "".join(_gallery(result) for result in shown)
    return "\n".join(
        [
            intro,
            _image_table(report),
            _details_table(results, report),
            "<h2>What was evaluated</h2>",
            _facts(results, report),
            f"<h2>Pictures</h2>{GALLERY_LEGEND}{gallery}" if shown else "",
            "<h2>All objects</h2>",
            _objects_table(results),
        ]
    )


def _image_table(report: Mapping[str, Any]) -> str:
    names = ("prediction", "nearest input view", "white picture")
    sources = (report["summary"], report["baselines"]["nearest_view"], report["baselines"]["white"])
    rows = [
        [name, _number(s["psnr"], 2), _number(s["ssim"], 3), _number(s["lpips"], 3)]
        for name, s in zip(names, sources, strict=True)
    ]
    note = "PSNR and SSIM: higher is better. LPIPS: lower is better. Means over views, then over objects."
    if report["config"]["lpips_sha256"] is None:
        note += f" {LPIPS_OFF}."
    header = ["", "PSNR (dB)", "SSIM", "LPIPS"]
    return f'<h2>Result</h2>{table(header, rows, kind="images")}<p class="soft">{note}</p>'


def _details_table(results: EvaluationResults, report: Mapping[str, Any]) -> str:
    summary = report["summary"]
    memory = summary["peak_memory_bytes"]
    rows = [
        ["seconds per object, images to Gaussians (median)", _number(summary["seconds"]["reconstruct"], 3)],
        ["seconds per object, rendering all targets (median)", _number(summary["seconds"]["render"], 3)],
        ["peak device memory", "–" if memory is None else f"{memory / 2**30:.2f} GiB"],
        ["anchors per object (mean)", f"{np.mean([r.anchors for r in results.objects]):,.0f}"],
        ["Gaussians per object (mean)", f"{np.mean([r.gaussians for r in results.objects]):,.0f}"],
        [f"Chamfer distance ({results.surface}; cube [-1, 1]³)", _number(summary["chamfer"], 4)],
    ]
    scores = summary["fscore"] or dict.fromkeys(threshold_names(results.protocol))
    rows += [[f"F-score at {name}", _number(score, 3)] for name, score in scores.items()]
    rows += _occupancy_rows("proposal", summary["proposal"])
    rows += _occupancy_rows("visual hull of the inputs", report["baselines"].get("visual_hull", {}).get("proposal"))
    return f"<h3>Geometry and cost</h3>{table([], rows, kind='numbers')}"


def _occupancy_rows(source: str, rates: Mapping[str, Mapping[str, float]] | None) -> list[list[str]]:
    labels = {"precision": "precision", "recall": "recall", "iou": "IoU"}
    return [
        [f"{source}: {labels[name]} of voxels, exact / within one", " / ".join(f"{v:.3f}" for v in rate.values())]
        for name, rate in (rates or {}).items()
    ]


def _facts(results: EvaluationResults, report: Mapping[str, Any]) -> str:
    protocol, git = results.protocol, results.environment.git
    views = {(result.input_views, result.target_views) for result in results.objects}
    chosen = [f"inputs {_list(inputs)}; targets {_list(targets)}" for inputs, targets in sorted(views)[:3]]
    rows = [
        ["config", results.config_name],
        ["checkpoint", f"step {results.checkpoint_step:,}"],
        ["objects", f"{len(results.objects)}; SHA-256 of the list {report['config']['object_list_sha256']}"],
        ["views", " | ".join(chosen) + (" | …" if len(views) > 3 else "")],
        ["split of the set", protocol.split],
        ["sizes", f"inputs {protocol.input_size}², compared at {protocol.render_size}² pixels"],
        ["LPIPS weights", f"SHA-256 {results.lpips_sha256}" if results.lpips_sha256 else LPIPS_OFF],
        ["code", "installed package" if git is None else git["commit"] + (", with local changes" * git["dirty"])],
        ["hardware", HARDWARE.format(**results.environment.hardware)],
        ["versions", ", ".join(f"{key} {value}" for key, value in report["versions"].items())],
    ]
    return table([], rows, text_columns=2, kind="facts")


HARDWARE = "{devices} × {device} ({platform}), CPU cores: {cpu_cores}, processes: {processes}"

GALLERY_LEGEND = (
    '<p class="soft">Error: mean absolute difference of the colours, black for none over red and yellow to white for '
    "half the range or more. Depth: near is dark, far is light, white where nothing is drawn.</p>"
)


def _gallery(result: ObjectResult) -> str:
    pictures, scores = result.pictures, result.prediction
    names = ("Inputs", "Target", "Prediction", "Error", "Depth")
    inputs = zip(pictures.inputs, result.input_views, strict=True)
    thumbnails = "".join(figure(picture, f"view {view}") for picture, view in inputs)
    cells = [f'<div class="head">{name}</div>' for name in names]
    cells.append(f'<div class="inputs" style="grid-row: 2 / span {len(result.target_views)}">{thumbnails}</div>')
    for k, view in enumerate(result.target_views):
        score = f"{float(scores.psnr[k]):.2f} dB, SSIM {float(scores.ssim[k]):.3f}"
        cells.append(figure(pictures.targets[k], f"view {view}"))
        cells.append(figure(pictures.predictions[k], score))
        cells.append(figure(pictures.errors[k], f"error, view {view}"))
        cells.append(figure(pictures.depths[k], f"depth, view {view}"))
    means, nearest = scores.means(), result.nearest_view.means()
    line = (
        f"PSNR {means['psnr']:.2f} dB (nearest input view {nearest['psnr']:.2f}), SSIM {means['ssim']:.3f} "
        f"({nearest['ssim']:.3f}), {result.anchors:,} anchors, {result.gaussians:,} Gaussians"
    )
    head = f'<h3>{html.escape(result.name)}</h3><p class="soft">{line}</p>'
    return f'{head}<div class="scroll"><div class="object">{"".join(cells)}</div></div>'


def _objects_table(results: EvaluationResults) -> str:
    header = ["object", "PSNR (dB)", "SSIM", "LPIPS", "nearest view", "white", "Chamfer", "anchors", "seconds"]
    rows = []
    for result in results.objects:
        means = result.prediction.means()
        row = [_number(means["psnr"], 2), _number(means["ssim"], 3), _number(means["lpips"], 3)]
        row += [_number(getattr(result, name).means()["psnr"], 2) for name in ("nearest_view", "white")]
        row += [_number(result.chamfer, 4), f"{result.anchors:,}", f"{result.reconstruct_seconds:.3f}"]
        rows.append([result.name, *row])
    return table(header, rows)


def _number(value: float | None, digits: int) -> str:
    """Fixed digits; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def _list(views: tuple[int, ...]) -> str:
    return ", ".join(map(str, views))
