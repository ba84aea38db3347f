"""Experiments: one tree of frozen dataclasses, read from a config file, changed by overrides, stored as JSON."""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.evaluation.protocol import Protocol
from geolrm_jax.export.files import written_whole
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.models.image_encoder import check_input_size
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.sharding import MeshConfig
from geolrm_jax.training.loop import StageConfig

FORMAT_VERSION = 2  # 1 had start_from for warm_start


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers."""

    name: str
    data: DataConfig
    model: GeoLRMConfig
    proposal: StageConfig | None
    """How the proposal network is trained; None skips the stage."""
    reconstruction: StageConfig | None
    """How the reconstruction network is trained, on the frozen proposal's anchors; None skips the stage."""
    evaluation: Protocol
    input_size: int = 448
    """Side of the images that the networks see, a multiple of 28."""
    render_size: int = 448
    """Side of the images that supervise."""
    warm_start: str | None = None
    """Another run's work directory, or one of imported weights, whose latest networks take the place of fresh ones."""
    allow_missing: str | None = None
    """Pattern of names of arrays, as `reconstruction.decoder`, that stay fresh where `warm_start` lacks them or has
    them in another shape; None: it must fit."""
    dinov2_weights: str | None = None
    """A DINOv2 file (Hugging Face safetensors, torch .pth) that the image encoders of fresh networks start from."""
    seed: int = 0
    precision: Precision = Precision()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_input_size(self.input_size, self.input_size)
        if self.render_size < 16:
            raise ValueError(f"render_size must be at least 16, got {self.render_size}")
        if self.reconstruction and not (self.proposal or self.warm_start):
            raise ValueError(
                "reconstruction trains on the anchors of a trained proposal: "
                "proposal must not be None, or warm_start must name a work directory that holds one"
            )
        if self.allow_missing is not None:
            if not self.warm_start:
                raise ValueError(f"allow_missing {self.allow_missing!r} is about warm_start, which is not set")
            try:
                re.compile(self.allow_missing)
            except re.error as error:
                raise ValueError(f"allow_missing {self.allow_missing!r} is no regular expression: {error}") from error
        if self.model.proposal.fine_grid != self.data.occupancy_grid:
            raise ValueError(
                f"model.proposal.fine_grid {self.model.proposal.fine_grid} and data.occupancy_grid "
                f"{self.data.occupancy_grid} must be equal"
            )

    def absolute(self) -> "Experiment":
        """The same with absolute paths, so that the work directory alone says where everything is."""
        files = {
            name: os.path.abspath(path) for name in ("warm_start", "dinov2_weights") if (path := getattr(self, name))
        }
        stages = {
            name: dataclasses.replace(stage, pipeline=stage.pipeline.absolute()) for name, stage in self.stages.items()
        }
        reconstruction = stages.get("reconstruction")
        weights = getattr(reconstruction and reconstruction.objective, "lpips_weights", None)
        if weights:
            objective = dataclasses.replace(reconstruction.objective, lpips_weights=os.path.abspath(weights))
            stages["reconstruction"] = dataclasses.replace(reconstruction, objective=objective)
        return dataclasses.replace(self, data=self.data.absolute(), **stages, **files)

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages to train, in order."""
        stages = {"proposal": self.proposal, "reconstruction": self.reconstruction}
        return {name: stage for name, stage in stages.items() if stage}


def config_path(name: str) -> Path:
    """The file that `--config` means: a path, or the bare name of one of the project's configs.

    Raises:
      FileNotFoundError: if there is none; the message lists the project's and names the closest.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(__file__).parent
    checkout = package.parent / "configs" if (package.parent / "pyproject.toml").is_file() else package / "configs"
    folders = [checkout] if checkout.is_dir() else []
    found = {str(f.relative_to(d).with_suffix("")): f for d in folders for f in sorted(d.rglob("*.py"))}
    found = {key: file for key, file in found.items() if not Path(key).name.startswith("_")}
    if name in found:
        return found[name]
    close = difflib.get_close_matches(Path(name).stem, found, n=1)
    hint = f", did you mean {close[0]!r}? Expected" if close else ": expected"
    raise FileNotFoundError(f"no config {name!r}{hint} a file or one of: {', '.join(sorted(found))}")


def load_config(name: str) -> Experiment:
    """Runs a config file's `get_config()`; a config builds on another by calling this.

    Raises:
      FileNotFoundError: if there is no such config.
      ValueError: if the file has no `get_config()` that returns an Experiment.
    """
    path = config_path(name)
    if path.suffix != ".py":
        raise ValueError(f"{path}: expected a .py file with a function get_config()")
    try:
        module = _module_of(path)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path}: expected a function get_config() that returns an Experiment")
    experiment = module.get_config()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path}: get_config() must return an Experiment, got {type(experiment).__name__}")
    return experiment


def _module_of(path: Path) -> ModuleType:
    """The file as a module: by its name where it lies in a package that can be imported, else by itself."""
    package = []
    for folder in path.resolve().parents:
        if not (folder / "__init__.py").is_file():
            break
        package.insert(0, folder.name)
    if package and importlib.util.find_spec(package[0]):
        name = ".".join([*package, path.stem])
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve() == path.resolve():
            return importlib.import_module(name)  # its classes are found again by that name
    spec = importlib.util.spec_from_file_location(f"geolrm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply_overrides(experiment: Experiment, arguments: Sequence[str], *, program: str) -> Experiment:
    """Applies `--reconstruction.optimizer.learning-rate 3e-4` and the like; a bad one ends the program with a hint."""
    return tyro.cli(
        Experiment,
        prog=program,
        description=f"Fields of the config {experiment.name!r}, all of which can be overridden.",
        default=experiment,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),
    )


def to_tree(value: Any) -> Any:
    """Plain JSON types; a dataclass becomes its fields and, under `type`, where its class is found."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, tuple):
        return [to_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_tree(tree: Any) -> Any:
    """The inverse of `to_tree`; lists come back as tuples.

    Raises:
      ValueError: if a class cannot be found or its fields are others.
    """
    if isinstance(tree, list):
        return tuple(from_tree(item) for item in tree)
    if not isinstance(tree, dict):
        return tree
    module, _, name = tree["type"].partition(":")
    fields = {key: from_tree(value) for key, value in tree.items() if key != "type"}
    try:
        return getattr(importlib.import_module(module), name)(**fields)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"cannot rebuild {tree['type']} from a stored config: {error}; a class that a config names must be in a "
            "module that can be imported, not in the config file itself"
        ) from error


def check_workdir(experiment: Experiment, workdir: Path) -> None:
    """Raises a ValueError if the folder belongs to another config, naming what differs, or if this one is not to be
    rebuilt from JSON: better before the training than after."""
    from_tree(to_tree(experiment))
    if (workdir / "config.json").exists():
        differences = _differences(to_tree(read_config(workdir)), to_tree(experiment))
        if differences:
            raise ValueError(
                f"{workdir} belongs to another config, {len(differences)} values differ "
                f"({'; '.join(differences[:5])}): choose another --workdir"
            )


def write_config(experiment: Experiment, workdir: Path) -> None:
    """Writes `workdir/config.json`; raises as `check_workdir` does."""
    check_workdir(experiment, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with written_whole(workdir / "config.json") as temporary:
        tree = {"format_version": FORMAT_VERSION, "experiment": to_tree(experiment)}
        temporary.write_text(json.dumps(tree, indent=2) + "\n")


def read_config(workdir: Path) -> Experiment:
    """The experiment that a work directory belongs to.

    Raises:
      FileNotFoundError: if it has no config.json.
      ValueError: if that file is damaged or of an unknown version.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a work directory that training has written")
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {version}")
    try:
        return from_tree(tree["experiment"])
    except KeyError as error:
        raise ValueError(f"{path}: no key {error} where an experiment is expected") from error


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [d for k in keys for d in _differences(there.get(k), here.get(k), f"{path}.{k}" if path else k)]
    return [] if there == here else [f"{path} is {there!r} there, {here!r} here"]
