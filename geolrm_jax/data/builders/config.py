"""What a data set is built from, and what is stored of that beside it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from geolrm_jax.data.builders.layout import CONFIG_FILE
from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.data.record import FORMAT_VERSION, Encoding
from geolrm_jax.data.source import Source
from geolrm_jax.geometry.voxels import Rounding

_SOURCE_PATHS = ("root", "index", "captions")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set: where its objects come from and how they are stored."""

    source: Source = ProceduralSource()
    """Where objects come from."""
    occupancy_grid: int = 64
    """Voxels a side of the ground-truth occupancy; the proposal network's fine grid."""
    occupancy_rounding: Rounding = "voxel"
    """Rule by which surface points become voxels: "voxel", the nearest, or "released", the paper's code."""
    image_encoding: Encoding = "raw"
    """"raw" bytes are fast to read, "png" is smaller."""
    size: int | None = None
    """Height of the stored views, widths in proportion; None: as the source has them."""
    root: str | None = None
    """Folder of the built set, which several runs may share; None: `data` inside the work directory."""
    built: bool = False
    """True: `root` holds a finished set, made by `geolrm data build`, and is taken whatever its source and encoding."""

    on_demand: bool = False
    """True: nothing is built; procedural objects are rendered when they are drawn, on the training accelerator."""

    def __post_init__(self):
        if self.on_demand and not isinstance(self.source, ProceduralSource):
            raise ValueError(f"data.on_demand renders a ProceduralSource, got {type(self.source).__name__}")
        if self.on_demand and (self.root or self.built):
            raise ValueError("data.on_demand builds no set: expected neither data.root nor data.built")
        if self.built and self.root is None:
            raise ValueError("data.built says that data.root holds a finished set: name it")
        if self.size is not None and (self.size < 16 or isinstance(self.source, ProceduralSource)):
            raise ValueError(
                f"data.size must be at least 16, and procedural objects have data.source.size, got {self.size}"
            )
        if self.occupancy_grid < 2:
            raise ValueError(f"data.occupancy_grid must be at least 2, got {self.occupancy_grid}")

    def absolute(self) -> "DataConfig":
        """The same with absolute paths: of the set, and of the folder and lists of its source."""

        def with_paths(config: Any, *names: str) -> Any:
            paths = {name: os.path.abspath(path) for name in names if (path := getattr(config, name, None))}
            return dataclasses.replace(config, **paths)

        return with_paths(dataclasses.replace(self, source=with_paths(self.source, *_SOURCE_PATHS)), "root")


def stored_config(config: DataConfig) -> dict[str, Any]:
    """What decides a set's content, as the JSON that stands beside it."""
    content = dataclasses.asdict(config)
    for name in ("root", "built", "on_demand"):
        del content[name]
    content["source"] = {"kind": type(config.source).__name__, **content["source"]}
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **content}))


def read_config(directory: Path | str) -> dict[str, Any]:
    """The config of a finished set.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: if it is damaged or of another format version.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is no built data set: {CONFIG_FILE} expected in it")
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: JSON with format_version expected ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {version}, this program reads {FORMAT_VERSION}: build the set anew"
            + (" (version 1 kept all views of an object in one record)" if version == 1 else "")
        )
    return content


def check_same(found: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    """Raises a ValueError that names what differs unless the set in `directory` is the one wanted."""
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        raise ValueError(
            f"{directory} holds a data set of another config: "
            + "; ".join(f"{key} is {found.get(key)} there, {wanted.get(key)} here" for key in changed)
        )
