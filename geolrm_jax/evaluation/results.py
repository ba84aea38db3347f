"""What an evaluation found: per object, in summary, and on which machine and code."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

import geolrm_jax
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.metrics.geometry import VoxelCounts, voxel_rates
from geolrm_jax.scene import AnyArray, pytree

PACKAGES = ("geolrm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@pytree
class ImageScores:
    """Image metrics of one object, one number per target view.

    Attributes:
      lpips: None where there are no LPIPS weights.
    """

    psnr: Float[AnyArray, "t"]
    ssim: Float[AnyArray, "t"]
    lpips: Float[AnyArray, "t"] | None

    def means(self) -> dict[str, float | None]:
        """Averages over the views, under the report's keys."""
        lpips = None if self.lpips is None else float(np.mean(self.lpips))
        return {"psnr": float(np.mean(self.psnr)), "ssim": float(np.mean(self.ssim)), "lpips": lpips}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What the page shows of one object; `inputs` at any size, the others at one size."""

    inputs: UInt8[np.ndarray, "v hi wi 3"]
    targets: UInt8[np.ndarray, "t h w 3"]
    predictions: UInt8[np.ndarray, "t h w 3"]
    errors: UInt8[np.ndarray, "t h w 3"]
    depths: UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class ObjectResult:
    """Everything measured on one object."""

    name: str
    input_views: tuple[int, ...]
    target_views: tuple[int, ...]
    prediction: ImageScores
    white: ImageScores
    """Scores of the white picture."""
    nearest_view: ImageScores
    """Scores of the nearest input view."""
    chamfer: float | None
    """Chamfer distance at the protocol's scale; None where geometry was not measured."""
    fscores: tuple[float, ...] | None
    """One F-score per threshold of the protocol."""
    voxels: VoxelCounts | None
    """Proposal against ground-truth occupancy; None where no occupancy is known."""
    hull_voxels: VoxelCounts | None
    """The visual hull's surface against ground-truth occupancy: what needs no network."""
    anchors: int
    gaussians: int
    reconstruct_seconds: float
    """From images in memory to Gaussians, without compilation."""
    render_seconds: float
    """All target views."""
    pictures: Pictures | None = None
    """None leaves the object out of the page's gallery."""


@dataclasses.dataclass(frozen=True)
class EvaluationResults:
    """An evaluation, complete."""

    config_name: str
    config: Mapping[str, Any]
    """The resolved config as plain nested values."""
    protocol: Protocol
    checkpoint_step: int
    objects: Sequence[ObjectResult]
    lpips_sha256: str | None
    """Hash of the LPIPS weights; None: off."""
    surface: str
    """Where predicted surface points come from, for the reader."""
    peak_memory_bytes: int | None
    """Peak device memory; None where the device does not tell."""
    environment: "Environment"


@dataclasses.dataclass(frozen=True)
class Environment:
    """Code and machine of a run."""

    git: Mapping[str, Any] | None
    """`commit` and `dirty` of the checkout; None for an installed package."""
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]


def environment() -> Environment:
    """Describes this process: the checkout's commit, the devices, the packages' versions."""
    device = jax.devices()[0]
    hardware = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return Environment(_git(), hardware, {"python": platform.python_version(), **versions})


def _git() -> dict[str, Any] | None:
    root = Path(geolrm_jax.__file__).parents[1]
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words):
        # A full path and inherited descriptors let Python spawn instead of fork, which JAX's threads do not survive.
        command = [git, "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, close_fds=False).stdout.strip()

    top = ask("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():  # installed, perhaps inside somebody else's checkout
        return None
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}


def image_means(results: EvaluationResults, source: str) -> dict[str, float | None]:
    """PSNR, SSIM and LPIPS of `source` (prediction, white or nearest_view), averaged over views, then objects."""
    per_object = [getattr(result, source).means() for result in results.objects]
    return {name: _mean([means[name] for means in per_object]) for name in ("psnr", "ssim", "lpips")}


def geometry_means(results: EvaluationResults) -> dict[str, Any]:
    """Chamfer distance, F-scores by threshold and proposal rates; None where nothing was measured."""
    scored = [result.fscores for result in results.objects if result.fscores is not None]
    fscore = (
        dict(zip(threshold_names(results.protocol), np.mean(scored, axis=0).tolist(), strict=True)) if scored else None
    )
    return {
        "chamfer": _mean([result.chamfer for result in results.objects if result.chamfer is not None]),
        "fscore": fscore,
        "proposal": occupancy_rates(results, "voxels"),
    }


def occupancy_rates(results: EvaluationResults, source: str) -> dict[str, dict[str, float]] | None:
    """Rates of `source` (voxels or hull_voxels) over the voxels of all objects; None where nothing was counted."""
    counts = [getattr(result, source) for result in results.objects if getattr(result, source) is not None]
    return voxel_rates(jax.tree.map(lambda *n: np.stack([np.asarray(x) for x in n]), *counts)) if counts else None


def median_seconds(results: EvaluationResults) -> dict[str, float]:
    """Median over objects of the seconds to reconstruct and to render."""
    return {
        "reconstruct": statistics.median(result.reconstruct_seconds for result in results.objects),
        "render": statistics.median(result.render_seconds for result in results.objects),
    }


def threshold_names(protocol: Protocol) -> list[str]:
    """The F-score thresholds as the report's keys: "0.2", "0.05", ..."""
    return [f"{threshold:g}" for threshold in protocol.fscore_thresholds]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else float(np.mean(values))
