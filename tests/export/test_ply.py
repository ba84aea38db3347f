import dataclasses

import numpy as np
import plyfile
import pytest

from geolrm_jax.export.ply import read_ply, write_ply
from geolrm_jax.scene import Gaussians

COLORS = ["f_dc_0", "f_dc_1", "f_dc_2"]
SHAPES = ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def some_gaussians(rng, count=50):
    return Gaussians(
        means=rng.uniform(-0.5, 0.5, (count, 3)).astype(np.float32),
        scales=rng.uniform(1e-4, 0.02, (count, 3)).astype(np.float32),
        quats=rng.normal(size=(count, 4)).astype(np.float32),
        opacities=np.concatenate([[0.0, 1.0, 1e-4, 0.9999], rng.uniform(size=count - 4)]).astype(np.float32),
        colors=rng.uniform(size=(count, 3)).astype(np.float32),
        mask=np.ones(count, bool),
    )


def test_round_trip_to_float32_rounding(tmp_path, rng):
    written = some_gaussians(rng)
    assert write_ply(tmp_path / "new" / "a.ply", written) == 50
    read = read_ply(tmp_path / "new" / "a.ply")
    for name in ("means", "quats", "mask"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    np.testing.assert_allclose(read.scales, written.scales, rtol=1e-6)
    np.testing.assert_allclose(read.opacities, written.opacities, atol=2e-7)
    np.testing.assert_allclose(read.colors, written.colors, atol=1e-7)


def test_the_file_is_the_standard_layout(tmp_path):
    """Checked from the bytes, without plyfile: header text, then 17 little-endian floats."""
    one = Gaussians(
        means=np.array([[0.1, -0.2, 0.3]], np.float32),
        scales=np.array([[0.01, 0.02, 0.0]], np.float32),
        quats=np.array([[1.0, 0.0, 0.0, 0.0]], np.float32),
        opacities=np.array([0.75], np.float32),
        colors=np.array([[1.0, 0.5, 0.0]], np.float32),
        mask=np.array([True]),
    )
    write_ply(tmp_path / "a.ply", one)
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 1"]
    assert lines[3:] == [f"property float {name}" for name in ["x", "y", "z", "nx", "ny", "nz", *COLORS, *SHAPES]]
    expected = [0.1, -0.2, 0.3, 0, 0, 0, 1.7724538, 0, -1.7724538, np.log(3), np.log(0.01), np.log(0.02)]
    expected += [np.log(1e-10), 1, 0, 0, 0]
    np.testing.assert_allclose(np.frombuffer(body, "<f4"), expected, rtol=1e-6)


def test_padding_is_not_written_and_nothing_is_infinite(tmp_path, rng):
    gaussians = some_gaussians(rng)
    mask = rng.uniform(size=50) < 0.5
    gaussians.means[~mask] = np.nan  # what stands in the padding does not matter
    gaussians = dataclasses.replace(gaussians, mask=mask)
    assert write_ply(tmp_path / "a.ply", gaussians) == mask.sum()
    vertices = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"].data
    assert all(np.isfinite(vertices[name]).all() for name in vertices.dtype.names)
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply").means, gaussians.means[mask])


def test_a_bad_value_leaves_the_old_file(tmp_path, rng):
    gaussians = some_gaussians(rng)
    write_ply(tmp_path / "a.ply", gaussians)
    before = (tmp_path / "a.ply").read_bytes()
    gaussians.scales[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 values of scales are not finite"):
        write_ply(tmp_path / "a.ply", gaussians)
    assert (tmp_path / "a.ply").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_one_scene_at_a_time(tmp_path, rng):
    batched = Gaussians(*(np.asarray(leaf)[None] for leaf in dataclasses.astuple(some_gaussians(rng))))
    with pytest.raises(ValueError, match=r"one scene.*\(1, 50, 3\)"):
        write_ply(tmp_path / "a.ply", batched)


def store(path, columns):
    vertices = np.zeros(2, dtype=[(name, "<f4") for name in columns])
    for name, value in columns.items():
        vertices[name] = value
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(path)


def test_files_of_other_programs(tmp_path):
    store(tmp_path / "a.ply", dict.fromkeys([*"xyz", *COLORS, *SHAPES], 0.5) | {"f_rest_0": 0.0})
    assert read_ply(tmp_path / "a.ply").means.shape == (2, 3)
    store(tmp_path / "b.ply", dict.fromkeys([*"xyz", *COLORS, *SHAPES], 0.5) | {"f_rest_0": 0.1})
    with pytest.raises(ValueError, match=r"b\.ply: has view-dependent colours"):
        read_ply(tmp_path / "b.ply")


def test_errors_name_the_file_and_the_property(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ply"):
        read_ply(tmp_path / "none.ply")
    (tmp_path / "text.ply").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ply: not a readable PLY"):
        read_ply(tmp_path / "text.ply")
    (tmp_path / "binary.ply").write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(ValueError, match=r"binary\.ply: not a readable PLY"):
        read_ply(tmp_path / "binary.ply")
    store(tmp_path / "mesh.ply", {"x": 0.0, "y": 0.0, "z": 0.0, "opacity": 0.0})
    with pytest.raises(ValueError, match=r"mesh\.ply: .* lack f_dc_0, f_dc_1, f_dc_2, scale_0, .*, rot_3"):
        read_ply(tmp_path / "mesh.ply")


def test_a_truncated_file_is_refused(tmp_path, rng):
    write_ply(tmp_path / "a.ply", some_gaussians(rng))
    data = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"cut\.ply: not a readable PLY"):
        read_ply(tmp_path / "cut.ply")
