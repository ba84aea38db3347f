"""The GObjaverse layout: real renders agree with themselves, and every broken file is named."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from geolrm_jax.data.folder import FolderSource, find_objects, read_views
from geolrm_jax.data.occupancy import drop_edges, unproject_pixels
from geolrm_jax.data.record import select_views
from geolrm_jax.geometry.cameras import project


def test_depths_and_colours_of_two_views_agree(real_renders):
    """Points seen by one view, projected into its neighbour, lie at that one's depth wherever both see them."""
    views = read_views(real_renders / "basket", [3, 4])
    first, second = (select_views(views, [view], "basket") for view in (3, 4))
    depth = drop_edges(first.depth, first.cameras)
    points = unproject_pixels(depth, first.cameras).astype(np.float32)
    assert np.abs(points).max() < 0.51 and len(points) > 5000
    pixels, z = (np.asarray(x)[0] for x in project(second.cameras, jnp.asarray(points)))
    column, row = np.floor(pixels).astype(int).T
    measured = drop_edges(second.depth, second.cameras)[0][row, column]
    seen = (measured > 0) & (z < measured + 0.02)
    assert seen.mean() > 0.5
    # Half floats at depth 2 have steps of 1e-3, and the nearest pixel is up to half a pixel away.
    assert np.median(np.abs(z - measured)[seen]) < 2e-3
    colors = first.rgba[0, ..., :3][depth[0] > 0].astype(float)
    difference = np.abs(colors - second.rgba[0, ..., :3][row, column])[seen]
    assert np.median(difference) < 6


def test_views_are_the_38_distinct_ones(real_renders):
    assert read_views(real_renders / "plate").view_ids.tolist() == [v for v in range(40) if v not in (24, 39)]
    assert "basket" in find_objects(real_renders)


@pytest.fixture
def tree(real_renders, tmp_path):
    """Two objects of three views, one a level deeper and with the official folder in between."""
    for name in ("a", "dict/b/campos_512_v4"):
        for view in ("00000", "00006", "00024"):
            shutil.copytree(real_renders / "plate" / view, tmp_path / "set" / name / view)
    return tmp_path / "set"


def test_layouts_are_found_and_read_alike(tree):
    assert find_objects(tree) == ["a", "dict/b"]
    flat, deep = read_views(tree / "a"), read_views(tree / "dict/b")
    assert flat.view_ids.tolist() == deep.view_ids.tolist() == [0, 6]
    np.testing.assert_array_equal(flat.rgba, deep.rgba)
    source = FolderSource(root=str(tree), test=("a",))
    assert (source.ids("train"), source.ids("test")) == (["dict/b"], ["a"])
    with pytest.raises(ValueError, match="no objects c"):
        FolderSource(root=str(tree), test=("c",)).ids("test")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_depth(path, value):
    import OpenEXR

    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = {name: np.array(channel.pixels) for name, channel in file.channels().items()}
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    channels["A"][5, 5] = value
    OpenEXR.File(header, channels).write(str(path))


def drop_key(path):
    camera = json.loads(path.read_text())
    del camera["x_fov"]
    path.write_text(json.dumps(camera))


BREAKS = {
    "missing png": (".png", lambda p: p.unlink(), "no file .*00006.png: expected an image"),
    "truncated png": (".png", truncate, "00006.png is no readable image"),
    "not a png": (".png", lambda p: p.write_bytes(b"hello"), "00006.png is no readable image"),
    "another size": (".png", lambda p: Image.new("RGBA", (8, 8)).save(p), "00006.png is .*8, 8"),
    "missing json": (".json", lambda p: p.unlink(), "no file .*00006.json: expected a camera"),
    "truncated json": (".json", truncate, "00006.json is no camera"),
    "json without a key": (".json", drop_key, "00006.json is no camera.*x_fov"),
    "no rotation": (".json", lambda p: edit_json(p, x=[0.0, 2.0, 0.0]), "00006.json: the camera matrix is no rotation"),
    "camera of NaN": (".json", lambda p: edit_json(p, origin=[float("nan")] * 3), "00006.json: .*not finite"),
    "missing exr": ("_nd.exr", lambda p: p.unlink(), "no file .*00006_nd.exr: expected an OpenEXR"),
    "truncated exr": ("_nd.exr", truncate, "00006_nd.exr is no OpenEXR"),
    "NaN in depth": ("_nd.exr", lambda p: write_depth(p, np.nan), "00006_nd.exr: depth must be a number"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_named(tree, name):
    suffix, damage, message = BREAKS[name]
    damage(tree / "a" / "00006" / f"00006{suffix}")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_views(tree / "a")
    assert "\n" not in str(caught.value)


def test_empty_and_missing_folders_are_named(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="an empty data set"):
        find_objects(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_objects(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no views"):
        read_views(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no views \[7\]: expected 00007/00007.json"):
        read_views(tree / "a", [0, 7])
