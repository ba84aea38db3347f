"""Gaussians as the `.ply` of 3D Gaussian Splatting (Kerbl et al. 2023), which viewers open.

One vertex a Gaussian, little-endian float32: `x y z`, `nx ny nz` (zero), `f_dc_0..2` (degree-0 spherical harmonics,
(rgb - 0.5) / 0.282...), `opacity` (logit), `scale_0..2` (natural logarithm), `rot_0..3` (wxyz). The released GeoLRM's
files have the same names but no normals, and hold activated values: RGB, opacity, scale.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import plyfile

from geolrm_jax.export.files import written_whole
from geolrm_jax.scene import Gaussians

SH_DEGREE_0 = 0.28209479177387814  # 1 / (2 sqrt(pi)), the constant spherical harmonic
OPACITY_MARGIN = 1e-7  # logits stay within about 16
SMALLEST_SCALE = 1e-10
RELEASED_OPACITY = 0.005
Flavour = Literal["3dgs", "released"]
FIELDS = {
    "means": ("x", "y", "z"),
    "normals": ("nx", "ny", "nz"),
    "colors": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacities": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
}


def write_ply(path: Path | str, gaussians: Gaussians, flavour: Flavour = "3dgs") -> int:
    """Writes the Gaussians of one scene whose mask is True, and returns how many.

    "3dgs" is what viewers open: opacities are held in [1e-7, 1 - 1e-7] and scales above 1e-10, so that every number in
    the file is finite. "released" is the flavour of the paper's code, which leaves out opacities below 0.005.

    Args:
      path: of the file.
      gaussians: leaves without leading axes, RGB colours.
      flavour: of the values.

    Raises:
      ValueError: if there are leading axes, the colours are not RGB, or a value is not finite.
    """
    if gaussians.means.ndim != 2 or gaussians.colors.shape != gaussians.means.shape:
        raise ValueError(
            f"write_ply takes one scene: expected means and colors of shape (G, 3), "
            f"got {tuple(gaussians.means.shape)} and {tuple(gaussians.colors.shape)}"
        )
    kept = np.asarray(gaussians.mask)
    if flavour == "released":
        kept = kept & (np.asarray(gaussians.opacities) >= RELEASED_OPACITY)
    values = {
        name: np.asarray(getattr(gaussians, name), dtype=np.float64)[kept]
        for name in ("means", "colors", "opacities", "scales", "quats")
    }
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {np.sum(~np.isfinite(value))} values of {name} are not finite; nothing written")
    stored = values | {"opacities": values["opacities"][:, None], "normals": np.zeros_like(values["means"])}
    if flavour == "3dgs":
        stored |= _deactivated(stored)
    fields = {name: FIELDS[name] for name in FIELDS if (flavour, name) != ("released", "normals")}
    vertices = np.empty(int(kept.sum()), dtype=[(name, "<f4") for names in fields.values() for name in names])
    for field, names in fields.items():
        for column, name in enumerate(names):
            vertices[name] = stored[field][:, column]
    element = plyfile.PlyElement.describe(vertices, "vertex")
    with written_whole(path) as temporary:
        plyfile.PlyData([element], byte_order="<").write(str(temporary))
    return len(vertices)


def _deactivated(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Harmonics, logits and logarithms of activated values."""
    opacities = np.clip(values["opacities"], OPACITY_MARGIN, 1 - OPACITY_MARGIN)
    return {
        "colors": (values["colors"] - 0.5) / SH_DEGREE_0,
        "opacities": np.log(opacities) - np.log1p(-opacities),
        "scales": np.log(np.maximum(values["scales"], SMALLEST_SCALE)),
    }


def read_ply(path: Path | str, flavour: Flavour = "3dgs") -> Gaussians:
    """The Gaussians of a file, activated, float32, all valid.

    Args:
      path: of the file.
      flavour: as in `write_ply`; both have the same names of properties, so that a file does not tell.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no PLY, lacks a property, or has view-dependent colours, which Gaussians here have not.
    """
    vertices = _read_vertices(Path(path))
    needed = [name for field, names in FIELDS.items() if field != "normals" for name in names]
    missing = [name for name in needed if name not in vertices.dtype.names]
    if missing:
        raise ValueError(f"{path}: not a 3DGS file, the vertices lack {', '.join(missing)}")
    if any(vertices[name].any() for name in vertices.dtype.names if name.startswith("f_rest_")):
        raise ValueError(f"{path}: has view-dependent colours (f_rest_*), expected degree-0 spherical harmonics only")
    columns = {
        field: np.stack([vertices[name].astype(np.float64) for name in names], axis=-1)
        for field, names in FIELDS.items()
        if field != "normals"
    }
    if flavour == "3dgs":
        columns["opacities"] = 1 / (1 + np.exp(-columns["opacities"]))
        columns["scales"] = np.exp(columns["scales"])
        columns["colors"] = columns["colors"] * SH_DEGREE_0 + 0.5
    columns["opacities"] = columns["opacities"][:, 0]
    values = {field: column.astype(np.float32) for field, column in columns.items()}
    return Gaussians(**values, mask=np.ones(len(vertices), dtype=bool))


def _read_vertices(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such PLY file")
    try:
        data = plyfile.PlyData.read(str(path))
    except (plyfile.PlyParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable PLY file ({error})") from None
    if "vertex" not in data:
        raise ValueError(f"{path}: not a 3DGS file, it has no vertices")
    return data["vertex"].data
