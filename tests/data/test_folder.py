"""The GObjaverse layout: real renders agree with themselves, and every broken file is named."""

import json
import shutil
import struct
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import OpenEXR
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from geolrm_jax.data import folder
from geolrm_jax.data.builders import records
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.folder import (
    FolderSource,
    check_name,
    find_objects,
    read_camera,
    read_captions,
    read_channels,
    read_image,
    read_names,
    read_views,
)
from geolrm_jax.data.occupancy import drop_edges, unproject_pixels
from geolrm_jax.data.record import select_views
from geolrm_jax.geometry.cameras import project, unproject


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


MANY_SIDES = [0, 4, 8, 12, 16, 20, 25, 26]


@pytest.fixture(scope="module", params=["basket", "moka_pot"])
def seen_and_mesh(request, real_renders):
    """Eight views of an object, its normals in the world, and its mesh turned from y up to z up."""
    trimesh = pytest.importorskip("trimesh", reason="needs the extra `mesh`")
    file = real_renders.parent / "objects" / f"{request.param}.glb"
    if not file.is_file():
        pytest.skip(f"no mesh {file}")
    folder = real_renders / request.param
    views = read_views(folder, MANY_SIDES)
    paths = [folder / f"{view:05d}" / f"{view:05d}_nd.exr" for view in MANY_SIDES]
    red, green, blue = np.moveaxis(
        np.stack([read_channels(path, ("R", "G", "B"), *views.depth.shape[1:]) for path in paths]), -1, 0
    )
    normals = np.stack([-red, -blue, green], axis=-1)  # R, G, B = (-nx, nz, -ny)
    mesh = trimesh.load(file, force="mesh")
    mesh.vertices = np.stack([mesh.vertices[:, 0], -mesh.vertices[:, 2], mesh.vertices[:, 1]], axis=-1)
    return views, normals, mesh


def test_unprojected_depth_lies_on_the_mesh(seen_and_mesh):
    """Distance to the nearest of the triangles around the nearest surface samples, which is never too small."""
    trimesh = pytest.importorskip("trimesh")
    views, _, mesh = seen_and_mesh
    points = unproject_pixels(drop_edges(views.depth, views.cameras), views.cameras)
    points = points[np.random.default_rng(0).choice(len(points), 4000, replace=False)].astype(float)
    samples, faces = trimesh.sample.sample_surface(mesh, 200_000, seed=0)
    _, near = cKDTree(samples).query(points, k=6)
    triangles = mesh.triangles[faces[near]].reshape(-1, 3, 3)
    closest = trimesh.triangles.closest_point(triangles, np.repeat(points, 6, axis=0))
    distance = np.linalg.norm(closest.reshape(-1, 6, 3) - points[:, None], axis=-1).min(axis=1)
    assert distance.mean() < 1e-3 and np.quantile(distance, 0.99) < 3e-3


def test_normals_face_the_camera_and_are_those_of_the_depth(seen_and_mesh):
    views, normals, _ = seen_and_mesh
    depth = drop_edges(views.depth, views.cameras)
    points = np.asarray(unproject(views.cameras, jnp.asarray(views.depth)))
    toward = (views.cameras.world_from_camera[:, None, None, :3, 3] - points)[depth > 0]
    facing = (normals[depth > 0] * toward).sum(-1) / np.linalg.norm(toward, axis=-1)
    assert (facing > -0.02).mean() > 0.99
    # The cross product of differences between neighbours' points, where the surface is smooth.
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    measured = np.cross(down, across)
    measured /= np.maximum(np.linalg.norm(measured, axis=-1, keepdims=True), 1e-12)
    cosine = (measured * normals[:, 1:-1, 1:-1]).sum(-1)[depth[:, 1:-1, 1:-1] > 0]
    assert np.median(cosine) > 0.97


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
    assert FolderSource(str(tree), test=None).listing() == ({"train": [], "test": ["a", "dict/b"]}, {})


def test_a_build_searches_its_source_once(tree, tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr(folder, "find_objects", lambda root: searched.append(root) or find_objects(root))
    (tmp_path / "captions.json").write_text(json.dumps({"a": "a cube"}))
    source = FolderSource(str(tree), test=("dict/b",), captions=str(tmp_path / "captions.json"))
    records._plan(DataConfig(source), {}, tmp_path, None)
    assert searched == [str(tree)]


def test_links_that_lead_back_are_followed_once(tree):
    for name, target in (("again", "."), ("dict/up", ".."), ("self", "self"), ("nowhere", "missing")):
        (tree / name).symlink_to(target)
    (tree / "copy").symlink_to("a")
    assert find_objects(tree) == ["a", "copy", "dict/b"]


def test_lists_in_other_encodings_are_read_or_named(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa\n端/b\n".encode())
    assert read_names(tmp_path / "list.txt") == ["a", "端/b"]
    (tmp_path / "list.json").write_bytes('\ufeff["a"]'.encode())
    assert read_names(tmp_path / "list.json") == ["a"]
    for name in ("list.txt", "list.json"):
        (tmp_path / name).write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=rf"{name} is no text in UTF-8"):
            read_names(tmp_path / name)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_depth(path, value):
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


def test_objects_with_five_digits_are_no_views(real_renders, tmp_path):
    for name in ("0/10005", "0/10006/campos_512_v4"):
        shutil.copytree(real_renders / "plate" / "00000", tmp_path / name / "00000")
    assert find_objects(tmp_path) == ["0/10005", "0/10006"]


def test_an_index_takes_the_place_of_searching(tree, tmp_path):
    for content in (["a", "dict/b"], {"a": "x.glb", "dict/b": "y.glb"}):
        (tmp_path / "index.json").write_text(json.dumps(content))
        source = FolderSource(str(tree), test=("a",), index=str(tmp_path / "index.json"))
        assert (source.ids("train"), source.ids("test")) == (["dict/b"], ["a"])
    (tmp_path / "list.txt").write_text("a\n\ndict/b\n")
    assert read_names(tmp_path / "list.txt") == ["a", "dict/b"]
    (tmp_path / "captions.json").write_text(json.dumps({"a": "A Cube", "dict/b": "a plate"}))
    source = FolderSource(str(tree), index=str(tmp_path / "index.json"), captions=str(tmp_path / "captions.json"))
    assert source.listing() == ({"train": ["dict/b"], "test": []}, {"a": "its caption has 'cube' in it"})
    (tmp_path / "captions.json").write_text(json.dumps({"b": "a plate"}))
    with pytest.raises(ValueError, match=r"captions.json: none of its 1 keys is the name of an object"):
        source.ids("train")
    for text, read in (("[1", read_names), ("3", read_names), ("[" * 100_000, read_names), ('{"a": 1}', read_captions)):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken.json"):
            read(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "name", ["/etc", "../a", "a/../../b", "", "a\x00b", "a\nb", "..", "a\\b", "no name: 5", "./a", "a/", "dict//b"]
)
def test_names_that_lead_elsewhere_are_refused(tree, name):
    with pytest.raises((ValueError, FileNotFoundError), match=r"is no name of an object|no folder"):
        FolderSource(str(tree)).read("train", name)
    check_name("dict/b")


def test_objects_with_too_few_views_are_refused(tree):
    with pytest.raises(ValueError, match="a has 2 views, at least 38"):
        FolderSource(str(tree), min_views=38).read("train", "a")


def png_of(width, height):
    """A well-formed PNG header that claims a size, with no pixels to speak of."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(5000, 5000), (12_000, 12_000), (60_000, 60_000)])
def test_pictures_that_claim_too_much_are_refused_before_they_are_decoded(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb.png is no readable image: .*(pixels|limit)"):
        read_image(tmp_path / "bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_an_exr_with_a_huge_or_shifted_window_is_refused_from_its_header(real_renders, tmp_path):
    data = (real_renders / "plate" / "00000" / "00000_nd.exr").read_bytes()
    place = data.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    for window in ((0, 0, 99_999, 99_999), (1, 0, 256, 255), (0, 0, -1, -1), (0, 0, 255, 127)):
        (tmp_path / "a.exr").write_bytes(data[:place] + struct.pack("<4i", *window) + data[place + 16 :])
        with pytest.raises(ValueError, match=r"a.exr is no OpenEXR file with channels A"):
            read_channels(tmp_path / "a.exr", ("A",), 256, 256)


def test_an_exr_with_many_channels_or_parts_is_refused_from_its_header(tmp_path):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    planes = {"A": np.ones((6, 9), np.float32), **{f"c{i}": np.ones((6, 9), np.float32) for i in range(16)}}
    OpenEXR.File(header, planes).write(str(tmp_path / "many.exr"))
    parts = [OpenEXR.Part({**header, "name": name}, {"A": np.ones((6, 9), np.float32)}) for name in "ab"]
    OpenEXR.File(parts).write(str(tmp_path / "parts.exr"))
    for name, message in (("many.exr", "17 channels, at most 16"), ("parts.exr", "2 parts")):
        with pytest.raises(ValueError, match=rf"{name} is no OpenEXR file .*{message}"):
            read_channels(tmp_path / name, ("A",), 6, 9)


def test_an_object_with_too_many_pixels_is_refused_at_its_first_view(tree, monkeypatch):
    monkeypatch.setattr(folder, "MAX_OBJECT_PIXELS", 2 * 256**2)
    assert len(read_views(tree / "a", [0, 6]).rgba) == 2
    (tree / "a" / "00006" / "00006.png").unlink()
    with pytest.raises(ValueError, match="3 views of 256 x 256, at most 131072 pixels"):
        read_views(tree / "a", [0, 6, 24])


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png is no readable image: its pixels are of Pillow's mode I"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_half_and_float_channels_are_found_by_name(tmp_path, rng, kind):
    planes = {name: rng.uniform(0, 3, (6, 9)).astype(kind) for name in ("Z", "B", "A", "R")}
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, dict(planes)).write(str(tmp_path / "a.exr"))
    read = read_channels(tmp_path / "a.exr", ("A", "Z"), 6, 9)
    np.testing.assert_array_equal(read, np.stack([planes["A"], planes["Z"]], -1).astype(np.float32))
    with pytest.raises(ValueError, match=r"a.exr is no OpenEXR file with channels G"):
        read_channels(tmp_path / "a.exr", ("G",), 6, 9)
    whole = {"A": np.ones((6, 9), np.uint32)}
    OpenEXR.File(header, whole).write(str(tmp_path / "b.exr"))
    with pytest.raises(ValueError, match=r"b.exr: channels are uint32"):
        read_channels(tmp_path / "b.exr", ("A",), 6, 9)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"x": 10**400}, "is no camera"),
        ({"x": "left"}, "is no camera"),
        ({"x_fov": 0.0}, "between 0 and pi"),
        ({"y_fov": 4.0}, "between 0 and pi"),
        ({"x_fov": float("nan")}, "between 0 and pi"),
        ({"origin": [1e400, 0, 0]}, "not finite"),
    ],
)
def test_cameras_of_odd_numbers_are_refused(tree, values, message):
    path = tree / "a" / "00006" / "00006.json"
    edit_json(path, **values)
    with pytest.raises(ValueError, match=message):
        read_camera(path, 256, 256)
