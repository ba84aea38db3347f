"""A picture of the procedural objects, for the documentation.

    python benchmarks/objects_picture.py [--out docs/pictures/procedural.png]

Seven rows of eight objects of the training split, and one of the split with the unseen family, on white.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from geolrm_jax.data.procedural import ProceduralSource
from geolrm_jax.export.pages import contact_sheet, to_uint8

COLUMNS, ROWS = 8, {"train": 7, "unseen_family": 1}


def picture(source: ProceduralSource, split: str, index: int) -> np.ndarray:
    """One object on white, seen from another side each time."""
    view = dataclasses.replace(source, view_ids=(source.view_ids[index % len(source.view_ids)],))
    rgba = view.read(split, view.ids(split)[index]).rgba[0] / 255.0
    return to_uint8(rgba[..., :3] * rgba[..., 3:] + 1.0 - rgba[..., 3:])


def main() -> None:
    """Renders and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=136, help="of one picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/procedural.png"))
    arguments = parser.parse_args()
    counts = {split: COLUMNS * rows for split, rows in ROWS.items()}
    source = ProceduralSource(
        train_objects=counts["train"],
        test_objects=0,
        unseen_family_objects=counts["unseen_family"],
        size=arguments.size,
        seed=arguments.seed,
        fov=33.0,
    )
    pictures = [picture(source, split, index) for split, count in counts.items() for index in range(count)]
    sheet = contact_sheet([pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
