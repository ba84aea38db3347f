"""Damaged sources: whatever was done to a file, the build ends, and the object is listed or is what it was before."""

import io
import json
import struct
import zlib

import numpy as np
import OpenEXR
import pytest
from PIL import Image

from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.builders.records import build
from geolrm_jax.data.checking import check
from geolrm_jax.data.folder import FolderSource, read_views
from geolrm_jax.data.reader import open_split

OBJECT, VIEWS, DAMAGED = "basket", (0, 4, 8, 13), 8
PNG, EXR, JSON = ".png", "_nd.exr", ".json"


def truncated(data, rng):
    return data[: int(rng.integers(len(data)))]


def scribbled(data, rng):
    """A few bytes overwritten, half of the times near the beginning, where headers are."""
    data, reach = bytearray(data), rng.choice([len(data), 400])
    for place in rng.integers(min(reach, len(data)), size=int(rng.integers(1, 5))):
        data[place] = int(rng.integers(256))
    return bytes(data)


def shortened(data, rng):
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 60)) :]


def resized(data, rng):
    buffer = io.BytesIO()
    size = [(255, 256), (8, 8), (256, 512), (1, 1)][int(rng.integers(4))]
    Image.open(io.BytesIO(data)).resize(size).save(buffer, format="PNG")
    return buffer.getvalue()


def turned(data, rng):
    """The picture's axes swapped, which no checksum notices."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).transpose(Image.Transpose.TRANSPOSE).save(buffer, format="PNG")
    return buffer.getvalue()


def claiming_much(data, rng):
    """A PNG whose header asks for gigabytes, or whose pixels are many more than its header says."""
    side = int(rng.choice([5000, 30_000, 2**31 - 1]))
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    chunk = b"IHDR" + header
    return data[:8] + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def exr(data, change):
    """The EXR with its channels changed by a function of (name, pixels)."""
    file = OpenEXR.File(io.BytesIO(data), separate_channels=True)
    planes = {name: np.ascontiguousarray(change(name, c.pixels.copy())) for name, c in file.channels().items()}
    buffer = io.BytesIO()
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, planes).write(buffer)
    return buffer.getvalue()


def unlikely_depth(data, rng):
    value = [np.nan, -1.0, -np.inf][int(rng.integers(3))]

    def change(name, plane):
        plane[tuple(rng.integers(256, size=2))] = value if name == "A" else 0
        return plane

    return exr(data, change)


def other_window(data, rng):
    return exr(data, lambda name, plane: plane[:, :200])


def turned_depth(data, rng):
    return exr(data, lambda name, plane: plane.T)


def emptied_depth(data, rng):
    return exr(data, lambda name, plane: np.zeros_like(plane))


def huge_window(data, rng):
    place = data.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    side = int(rng.choice([16_383, 2**30, 2**31 - 1]))
    return data[:place] + struct.pack("<4i", 0, 0, side, side) + data[place + 16 :]


def camera(change):
    def damage(data, rng):
        values = json.loads(data)
        change(values, rng)
        return json.dumps(values).encode()

    return damage


def swap_axes(values, rng):
    """Two columns swapped, all three turned round, or the components of all of them."""
    x, y, z = values["x"], values["y"], values["z"]
    kind = int(rng.integers(3))
    if kind == 0:
        values["x"], values["y"] = y, x
    elif kind == 1:
        values["x"], values["y"], values["z"] = y, z, x
    else:
        for key in ("x", "y", "z", "origin"):
            values[key] = values[key][1:] + values[key][:1]


def odd_number(values, rng):
    odd = [float("nan"), float("inf"), "left", None, [], {}, [[1.0]], 10**400, -1.0, 0.0, True]
    values[str(rng.choice(["x", "z", "origin", "x_fov", "y_fov"]))] = odd[int(rng.integers(len(odd)))]


def drop_key(values, rng):
    del values[str(rng.choice(["x", "y", "z", "origin", "x_fov", "y_fov"]))]


def zoomed(values, rng):
    values["x_fov"] = values["y_fov"] = float(rng.choice([0.2, 1.5, 3.0]))


def deep(data, rng):
    return b"[" * 100_000 if rng.random() < 0.5 else b"\xff\xfe" + data


DAMAGES = [
    *((suffix, damage) for suffix in (PNG, EXR) for damage in (truncated, scribbled, shortened)),
    (JSON, truncated),
    (PNG, resized),
    (PNG, turned),
    (PNG, claiming_much),
    (EXR, unlikely_depth),
    (EXR, other_window),
    (EXR, turned_depth),
    (EXR, emptied_depth),
    (EXR, huge_window),
    *((JSON, camera(change)) for change in (swap_axes, odd_number, drop_key, zoomed)),
    (JSON, deep),
    (JSON, lambda data, rng: b""),
    *((suffix, None) for suffix in (PNG, EXR, JSON)),  # no file
]
NAMES = [
    "/etc",
    "/",
    "../sound",
    "a/../../sound",
    "",
    ".",
    "..",
    5,
    None,
    ["sound"],
    "a\0b",
    "x" * 5000,
    "C:\\a",
    "nowhere",
]


def damaged_objects(renders, root, count, rng):
    """Links to a sound object's files, in each copy one of them damaged; returns which by name."""
    what = {}
    for number in range(count):
        suffix, damage = DAMAGES[number % len(DAMAGES)]
        for view in VIEWS:
            folder = root / f"{number:04d}" / f"{view:05d}"
            folder.mkdir(parents=True)
            for other in (PNG, EXR, JSON):
                source = renders / OBJECT / folder.name / f"{folder.name}{other}"
                target = folder / source.name
                if (view, other) != (DAMAGED, suffix):
                    target.symlink_to(source)
                elif damage is not None:
                    target.write_bytes(damage(source.read_bytes(), rng))
        what[f"{number:04d}"] = f"{suffix} {getattr(damage, '__name__', 'missing')}"
    return what


def build_damaged(renders, tmp_path, count, rng, processes):
    (tmp_path / "source").mkdir()
    what = damaged_objects(renders, tmp_path / "source", count, rng)
    (tmp_path / "source" / "sound").symlink_to(renders / OBJECT)
    (tmp_path / "index.json").write_text(json.dumps([*what, *NAMES, "sound", "sound"]))
    source = FolderSource(str(tmp_path / "source"), train_views=VIEWS, index=str(tmp_path / "index.json"))
    directory = build(DataConfig(source, occupancy_grid=32), tmp_path / "set", processes=processes, max_rejected=1.0)
    listed = [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]
    records = open_split(directory, "train")
    return what, listed, {record.id: record for record in map(records.__getitem__, range(len(records)))}, directory


def assert_listed_or_harmless(renders, what, listed, stored):
    """Every object is in the set or in the list; those in the set are, pixel for pixel, what they were."""
    reasons = {entry["id"]: entry["reason"] for entry in listed if entry["kind"] == "rejected"}
    assert len(reasons) == len({*what, *map(str, NAMES)} - {*stored}) and all(reasons.values())
    assert {*what} <= {*reasons, *stored} and not {*reasons} & {*stored}
    expected = stored["sound"].views()
    np.testing.assert_array_equal(expected.rgba, read_views(renders / OBJECT, VIEWS).rgba)
    for id in {*stored} - {"sound"}:
        views = stored[id].views()
        assert what[id].split()[1] in ("truncated", "scribbled", "shortened"), what[id]
        for name in ("rgba", "depth", "view_ids"):
            np.testing.assert_array_equal(getattr(views, name), getattr(expected, name), err_msg=what[id])
        for name in ("world_from_camera", "intrinsics"):
            np.testing.assert_array_equal(getattr(views.cameras, name), getattr(expected.cameras, name), what[id])
    assert len(stored) < 1 + 0.1 * len(what)


def test_damaged_objects_are_listed_and_do_not_get_in(real_renders, tmp_path, rng):
    what, listed, stored, directory = build_damaged(real_renders, tmp_path, 150, rng, processes=1)
    assert_listed_or_harmless(real_renders, what, listed, stored)
    assert [(e["id"], e["reason"]) for e in listed if e["kind"] == "left out"] == [
        ("sound", "listed 2 times, stored once")
    ]
    assert check(directory, processes=1, pictured=1).findings == []


@pytest.mark.slow
def test_two_thousand_damaged_objects(real_renders, tmp_path):
    rng = np.random.default_rng(1)
    what, listed, stored, _ = build_damaged(real_renders, tmp_path, 2000, rng, processes=2)
    assert_listed_or_harmless(real_renders, what, listed, stored)
