"""Which published files a work directory's numbers come from: `weights.json`, one entry for each role."""

import json
from pathlib import Path
from typing import Literal

from geolrm_jax.export.files import written_whole
from geolrm_jax.weights.files import sha256_of

Role = Literal["released", "dinov2", "lpips"]
NAME = "weights.json"


def record(workdir: Path, role: Role, file: Path | str, sha256: str | None = None) -> dict[str, str | int]:
    """Adds a file's name, size and SHA-256 to `workdir/weights.json` and returns them.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the role had another file before.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of {role} weights")
    entry = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256 or sha256_of(file)}
    recorded = read(workdir)
    if recorded.get(role, entry)["sha256"] != entry["sha256"]:
        raise ValueError(
            f"{workdir} was begun with other {role} weights (SHA-256 {recorded[role]['sha256']}) than {file} "
            f"({entry['sha256']}): choose another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with written_whole(workdir / NAME) as temporary:
        temporary.write_text(json.dumps({**recorded, role: entry}, indent=2) + "\n")
    return entry


def read(workdir: Path) -> dict[str, dict[str, str | int]]:
    """What is recorded, by role."""
    path = workdir / NAME
    return json.loads(path.read_text()) if path.is_file() else {}
