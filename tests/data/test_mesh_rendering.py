"""Meshes rendered by Mitsuba: depth, normals, alpha and colour are those that follow from the definition."""

import json

import numpy as np
import pytest
from PIL import Image

mitsuba = pytest.importorskip("mitsuba", reason="needs the extra `mesh`")
trimesh = pytest.importorskip("trimesh", reason="needs the extra `mesh`")

from geolrm_jax.data import mesh_rendering  # noqa: E402
from geolrm_jax.data.mesh_files import linear_to_srgb, read_mesh, srgb_to_linear, used_vertices  # noqa: E402
from geolrm_jax.data.mesh_objects import object_rig  # noqa: E402
from geolrm_jax.data.mesh_rendering import MeshScene, choose_variant  # noqa: E402
from geolrm_jax.geometry.cameras import orbit  # noqa: E402

SIZE, FOV = 32, 39.6


@pytest.fixture(params=["scalar_rgb", "llvm_ad_rgb"])
def variant(request):
    if request.param == "llvm_ad_rgb" and choose_variant() != "llvm_ad_rgb":
        pytest.skip("no LLVM 18 to 21")
    return request.param


def scene(parts, variant, **options):
    return MeshScene(parts, **{"size": SIZE, "fov": np.radians(FOV), "samples": 16, "variant": variant, **options})


def camera(azimuth=25.0, elevation=20.0, radius=1.9):
    return orbit(np.array([azimuth]), np.array([elevation]), radius, FOV, SIZE)


def pixel_rays(cameras):
    """Origin and directions of camera z 1 of the pixel centres of one camera, from the definition."""
    pose, k = cameras.world_from_camera[0].astype(np.float64), cameras.intrinsics[0].astype(np.float64)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    local = np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x)], axis=-1)
    return pose[:3, 3], local @ pose[:3, :3].T


def cube_hits(origin, directions, half):
    """Distance along the directions to a box about the origin, inf where it is missed, and the normal there."""
    with np.errstate(divide="ignore", invalid="ignore"):
        near = (-np.sign(directions) * half - origin) / directions
        far = (np.sign(directions) * half - origin) / directions
    enter, axis = near.max(axis=-1), near.argmax(axis=-1)
    normal = -np.sign(directions) * np.eye(3)[axis]
    hit = enter < far.min(axis=-1)
    return np.where(hit, enter, np.inf), np.where(hit[..., None], normal, 0.0)


@pytest.fixture
def box(tmp_path):
    """A box of one colour, twice as long as wide, far from the origin and large: 1 x 0.5 x 0.5 when it is read."""
    mesh = trimesh.creation.box(extents=(8.0, 4.0, 4.0))
    mesh.apply_translation((100.0, 3.0, -7.0))
    mesh.visual.vertex_colors = np.tile(np.uint8([200, 100, 50, 255]), (len(mesh.vertices), 1))
    mesh.export(tmp_path / "box.ply")
    return tmp_path / "box.ply"


def test_depth_normal_and_alpha_of_a_box(box, variant):
    cameras = camera()
    view = scene(read_mesh(box), variant).render(cameras.world_from_camera[0], seed=0)
    depth, normal = cube_hits(*pixel_rays(cameras), np.array([0.5, 0.25, 0.25]))
    solid = np.isfinite(depth)
    # A ray that meets an edge may pass on either side of it; there is none among these.
    np.testing.assert_array_equal(view.depth > 0, solid)
    np.testing.assert_allclose(view.depth[solid], depth[solid], atol=2e-6)
    np.testing.assert_allclose(view.normal, normal, atol=1e-5)
    inner = np.pad(solid, 1)
    around = np.stack([inner[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)])
    alpha = view.rgba[..., 3]
    assert (alpha[around.all(axis=0)] == 255).all() and (alpha[~around.any(axis=0)] == 0).all()
    edge = around.any(axis=0) & ~around.all(axis=0)
    assert ((alpha[edge] > 0) & (alpha[edge] < 255)).mean() > 0.3
    assert abs(alpha.sum() / 255.0 - solid.sum()) < 0.02 * solid.sum()


def test_uniform_light_shows_the_colour_itself_up_to_the_edge(box, variant):
    """Nothing shades a convex surface under radiance 1: straight colour is the albedo, at whatever alpha."""
    view = scene(read_mesh(box), variant, light="uniform", samples=256).render(camera().world_from_camera[0], seed=0)
    alpha = view.rgba[..., 3]
    for pixels in (alpha == 255, (alpha > 25) & (alpha < 230)):
        assert pixels.sum() > 20
        colors = srgb_to_linear(view.rgba[pixels][:, :3] / 255.0).mean(axis=0)
        np.testing.assert_allclose(colors, srgb_to_linear(np.array([200, 100, 50]) / 255.0), rtol=0.02)
    assert (view.rgba[alpha == 0] == 0).all()


def test_studio_light_is_the_documented_one(box, variant):
    """Mean radiance over each face of the box against albedo (mean + 2/3 slope n . key)."""
    view = scene(read_mesh(box), variant, samples=256).render(camera().world_from_camera[0], seed=0)
    albedo, whole = srgb_to_linear(np.array([200, 100, 50]) / 255.0), view.rgba[..., 3] == 255
    for normal in np.eye(3):
        face = whole & (view.normal @ normal > 0.99)
        assert face.sum() > 10
        toward_key = np.array(mesh_rendering.STUDIO_KEY) @ normal
        light = mesh_rendering.STUDIO_MEAN + 2 / 3 * mesh_rendering.STUDIO_SLOPE * toward_key
        seen = srgb_to_linear(view.rgba[face][:, :3] / 255.0).mean(axis=0)
        np.testing.assert_allclose(seen, albedo * light, rtol=0.02)


def test_stored_normals_are_kept_and_face_the_camera(tmp_path, variant):
    """A coarse sphere whose vertices carry normals: those of the round one, on either side of its wall."""
    mesh = trimesh.creation.icosphere(subdivisions=3)
    mesh.invert()  # the triangles look inward, as files from elsewhere may
    stored = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.vertices, process=False)
    stored.export(tmp_path / "ball.ply", vertex_normal=True)
    cameras = camera()
    view = scene(read_mesh(tmp_path / "ball.ply"), variant).render(cameras.world_from_camera[0], seed=0)
    solid = view.depth > 0
    origin, directions = pixel_rays(cameras)
    points = origin + directions * view.depth[..., None]
    facing = (view.normal * directions)[solid].sum(axis=-1)
    assert facing.max() < 1e-5
    center = solid & ((points * directions).sum(-1) < -0.1)
    np.testing.assert_allclose(
        view.normal[center], (points / np.linalg.norm(points, axis=-1, keepdims=True))[center], atol=5e-3
    )


QUAD = np.array([[-0.5, 0.0, -0.5], [0.5, 0.0, -0.5], [0.5, 0.0, 0.5], [-0.5, 0.0, 0.5]])
QUAD_UV = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
QUAD_FACES = np.array([[0, 1, 2], [0, 2, 3]])
PICTURE = np.uint8([[[230, 20, 20], [20, 230, 20]], [[20, 20, 230], [200, 200, 20]]])


def write_obj(folder, texture_folder):
    """A square in the x-z plane, upright in a z-up world, with PICTURE on it, 8 x 8 pixels a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    texture_folder.mkdir(parents=True, exist_ok=True)
    lines = ["mtllib model.mtl", "usemtl one"]
    lines += [f"v {x} {y} {z}" for x, y, z in QUAD] + [f"vt {u} {v}" for u, v in QUAD_UV]
    lines += [f"f {' '.join(f'{i + 1}/{i + 1}' for i in face)}" for face in QUAD_FACES]
    (folder / "model.obj").write_text("\n".join(lines) + "\n")
    (folder / "model.mtl").write_text("newmtl one\nKd 0.5 0.5 0.5\nmap_Kd texture.png\n")
    Image.fromarray(PICTURE.repeat(8, 0).repeat(8, 1)).save(texture_folder / "texture.png")
    return folder / "model.obj"


def textured_quad(alpha=None, offset=0.0, **material):
    """The square, in a glTF file's y-up frame."""
    picture = PICTURE.repeat(8, 0).repeat(8, 1)
    if alpha is not None:
        picture = np.concatenate([picture, alpha.repeat(8, 0).repeat(8, 1)[..., None]], axis=-1)
    vertices = np.stack([QUAD[:, 0], QUAD[:, 2], np.full(4, offset)], axis=-1)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(picture), metallicFactor=0.0, roughnessFactor=1.0, **material
    )
    visual = trimesh.visual.TextureVisuals(uv=QUAD_UV, material=material)
    return trimesh.Trimesh(vertices, QUAD_FACES, visual=visual, process=False)


def quarters(rgba):
    """Middle colours of the four quarters of what a view shows."""
    rows, columns = (np.flatnonzero((rgba[..., 3] == 255).any(axis=axis)) for axis in (1, 0))
    at = [[v[len(v) // 4], v[3 * len(v) // 4]] for v in (rows, columns)]
    return rgba[np.ix_(*at)][..., :3].astype(int)


@pytest.mark.parametrize("kind", ["obj", "scanned objects", "glb"])
@pytest.mark.parametrize("behind", [False, True])
def test_textures_stand_upright_on_both_sides(tmp_path, variant, kind, behind):
    if kind == "glb":
        path = tmp_path / "model.glb"
        textured_quad().export(path)
    else:
        scanned = kind == "scanned objects"  # Google's folders
        path = write_obj(tmp_path / "meshes", tmp_path / ("materials/textures" if scanned else "meshes"))
    cameras = camera(azimuth=90.0 if behind else -90.0, elevation=0.0)
    view = scene(read_mesh(path), variant, light="uniform").render(cameras.world_from_camera[0], seed=0)
    expected = PICTURE[:, ::-1] if behind else PICTURE
    # The glossy coat of glTF's materials adds a few percent of white.
    difference = quarters(view.rgba) - expected.astype(int)
    assert np.abs(difference).max() <= (45 if kind == "glb" else 8)
    np.testing.assert_allclose(view.depth[view.depth > 0], 1.9, atol=1e-5)


def test_vertex_colours_of_gltf_are_linear(tmp_path, variant):
    mesh = trimesh.creation.box()
    mesh.visual.vertex_colors = np.tile(np.uint8([128, 64, 32, 255]), (len(mesh.vertices), 1))
    mesh.export(tmp_path / "box.glb")
    view = scene(read_mesh(tmp_path / "box.glb"), variant, light="uniform").render(camera().world_from_camera[0], 0)
    expected = 255.0 * linear_to_srgb(np.array([128, 64, 32]) / 255.0)
    colors = view.rgba[view.rgba[..., 3] == 255][:, :3].mean(axis=0)
    np.testing.assert_allclose(colors, expected, atol=2.0)


def test_holes_of_a_texture_are_seen_through(tmp_path):
    """A square whose upper half is a hole, half a side before another: depth and alpha are what lies behind."""
    alpha = np.uint8([[0, 0], [255, 255]])
    front, back = textured_quad(alpha, alphaMode="MASK"), textured_quad(offset=-0.5)
    trimesh.Scene([front, back]).export(tmp_path / "two.glb")
    parts = read_mesh(tmp_path / "two.glb")
    with pytest.raises(ValueError, match=r"holes.*LLVM 18 to 21"):
        scene(parts, "scalar_rgb")
    if choose_variant() != "llvm_ad_rgb":
        pytest.skip("no LLVM 18 to 21")
    pose = camera(azimuth=-90.0, elevation=0.0).world_from_camera[0]
    view = scene(parts, "llvm_ad_rgb", light="uniform").render(pose, seed=0)
    middle = SIZE // 2
    np.testing.assert_allclose(view.depth[middle - 6, middle], 1.9 + 0.25, atol=1e-5)
    np.testing.assert_allclose(view.depth[middle + 6, middle], 1.9 - 0.25, atol=1e-5)
    assert view.rgba[middle - 6, middle, 3] == 255
    lone = tmp_path / "one.glb"
    front.export(lone)
    view = scene(read_mesh(lone), "llvm_ad_rgb").render(pose, seed=0)
    assert view.rgba[middle - 6, middle, 3] == 0 and view.depth[middle - 6, middle] == 0.0
    assert view.rgba[middle + 6, middle, 3] == 255 and view.depth[middle + 6, middle] > 0.0


@pytest.mark.parametrize("extents", [(1, 1, 1), (10, 1, 1), (1, 1, 10), (3, 3, 0.1)])
def test_nothing_leaves_the_frame_and_no_space_is_wasted(extents, rng):
    points = rng.uniform(-0.5, 0.5, (500, 3)) * extents / np.max(extents)
    points = np.concatenate([points, trimesh.creation.box(extents=np.array(extents) / np.max(extents)).vertices])
    rig = object_rig(points, size=64, fov=FOV)
    assert len({round(float(np.linalg.norm(pose[:3, 3])), 4) for pose in rig.world_from_camera}) == 1
    reach = []
    for pose, k in zip(rig.world_from_camera.astype(np.float64), rig.intrinsics.astype(np.float64), strict=True):
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        assert local[:, 2].min() > 0.3
        pixels = local @ k.T
        reach.append(np.abs(pixels[:, :2] / pixels[:, 2:] - 32.0).max() / 32.0)
    assert max(reach) <= 0.95 + 1e-4
    assert max(reach) > 0.949 or np.isclose(np.linalg.norm(rig.world_from_camera[0, :3, 3]), 1.4)


def test_an_object_fills_the_unit_cube_with_z_up(tmp_path):
    mesh = trimesh.creation.box(extents=(1.0, 4.0, 2.0))
    loose = trimesh.Trimesh([*mesh.vertices, [90.0, 90.0, 90.0]], mesh.faces, process=False)  # a vertex of no triangle
    loose.export(tmp_path / "box.glb")
    loose.export(tmp_path / "box.ply")
    reach = {
        (suffix, up): np.abs(used_vertices(read_mesh(tmp_path / f"box{suffix}", up))).max(axis=0)
        for suffix in (".glb", ".ply")
        for up in ("file", "y", "z")
    }
    along_z, along_y = [0.125, 0.25, 0.5], [0.125, 0.5, 0.25]
    for key, value in reach.items():
        y_up = key[1] == "y" or key == (".glb", "file")
        np.testing.assert_allclose(value, along_z if y_up else along_y, atol=1e-6, err_msg=str(key))


def test_a_node_of_a_scene_is_where_its_file_puts_it(tmp_path):
    """Scaled unevenly, mirrored and turned: vertices and stored normals go along."""
    ball = trimesh.creation.icosphere(subdivisions=4)
    ball.vertex_normals  # noqa: B018 (stored from now on)
    pose = np.diag([1.0, -2.0, 4.0, 1.0]) @ trimesh.transformations.rotation_matrix(0.3, [1, 2, 3])
    placed = trimesh.Scene()
    placed.add_geometry(ball, transform=pose)
    placed.export(tmp_path / "ball.glb")
    (part,) = read_mesh(tmp_path / "ball.glb", up="z")
    corners = part.vertices[part.faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    agreement = np.abs((part.normals[part.faces].mean(axis=1) * flat).sum(axis=-1))
    assert agreement.min() > 0.95
    outward = (part.normals * part.vertices).sum(axis=-1)
    assert (outward > 0).all()


def nan_vertex(folder):
    (folder / "m.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")


def far_face(folder):
    mesh = trimesh.creation.box()
    data = mesh.export(file_type="ply", encoding="ascii").decode().splitlines()
    data[-1] = "3 0 1 99"
    (folder / "m.ply").write_text("\n".join(data) + "\n")


def cut_short(folder):
    data = trimesh.creation.icosphere().export(file_type="glb")
    (folder / "m.glb").write_bytes(data[: len(data) // 2])


def lost_texture(folder):
    write_obj(folder, folder)
    (folder / "texture.png").unlink()


def damaged_texture(folder):
    write_obj(folder, folder)
    (folder / "texture.png").write_bytes((folder / "texture.png").read_bytes()[:60])


def damaged_texture_in_glb(folder):
    data = textured_quad().export(file_type="glb")
    (folder / "m.glb").write_bytes(data.replace(b"\x89PNG", b"\x89PMG"))


def unknown_extension(folder):
    write_gltf(folder, lambda header: header.update(extensionsRequired=["EXT_meshopt_compression"]))


def moved_texture(folder):
    transform = {"extensions": {"KHR_texture_transform": {"scale": [2.0, 2.0]}}}
    write_gltf(
        folder, lambda header: header["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"].update(transform)
    )


def write_gltf(folder, edit):
    """The textured square as .gltf and its buffers, after an edit of its JSON part."""
    files = trimesh.exchange.gltf.export_gltf(trimesh.Scene(textured_quad()))
    for name, data in files.items():
        if name.endswith(".gltf"):
            header = json.loads(data)
            edit(header)
            data = json.dumps(header).encode()
        (folder / name).write_bytes(data)


def cloud(folder):
    trimesh.PointCloud(np.random.default_rng(0).normal(size=(9, 3))).export(folder / "m.ply")


DAMAGES = {
    "a number that is none": (nan_vertex, "not finite|NaN|nan"),
    "a triangle of a vertex that is not there": (far_face, "no readable mesh|vertex 99"),
    "half a file": (cut_short, "no readable mesh"),
    "a lost texture": (lost_texture, "'texture.png' is not there"),
    "a damaged texture": (damaged_texture, "'texture.png' is no readable image"),
    "a damaged texture inside": (damaged_texture_in_glb, "only 0 of 1 base colour textures"),
    "an extension that is not read": (unknown_extension, "needs glTF extensions.*EXT_meshopt_compression"),
    "a texture that is moved": (moved_texture, "coordinates or a transform"),
    "no mtl": (lambda f: write_obj(f, f).with_suffix(".mtl").unlink(), "'model.mtl' is not there"),
    "points only": (cloud, "holds no triangle"),
    "an empty file": (lambda f: (f / "m.obj").touch(), "no readable mesh|holds no triangle"),
    "no extent": (lambda f: (f / "m.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n"), "no extent"),
    "text": (lambda f: (f / "m.glb").write_text("hello"), "no readable mesh"),
}


def test_a_gltf_file_with_its_buffers_beside_it_is_read(tmp_path):
    write_gltf(tmp_path, lambda header: None)
    (part,) = read_mesh(tmp_path / "model.gltf")
    assert len(part.faces) == 2 and part.material.texture.shape == (16, 16, 3)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_mesh_is_named_with_its_reason(tmp_path, name):
    damage, reason = DAMAGES[name]
    damage(tmp_path)
    (path,) = (p for p in tmp_path.iterdir() if p.suffix in (".glb", ".gltf", ".obj", ".ply"))
    with pytest.raises(ValueError, match=reason) as caught:
        read_mesh(path)
    assert str(path) in str(caught.value)


def test_an_old_llvm_is_not_used(monkeypatch, tmp_path):
    """A library that is no LLVM, or none: the scalar variant, and the variable stays."""
    (tmp_path / "libLLVM.so").write_text(json.dumps("no library"))
    monkeypatch.setenv("DRJIT_LIBLLVM_PATH", str(tmp_path / "libLLVM.so"))
    assert choose_variant() == "scalar_rgb"


def test_a_real_object_looks_as_another_program_drew_it(real_renders):
    """Same cameras, other lights: depth within half floats, the same outline, textures where they belong."""
    from geolrm_jax.data.folder import read_views

    there = read_views(real_renders / "white_yellow_mug", [6, 26])
    parts = read_mesh(real_renders.parent / "objects" / "white_yellow_mug.glb")
    fov = 2.0 * np.arctan(0.5 * 256 / there.cameras.intrinsics[0, 0, 0])
    drawn = MeshScene(parts, size=256, fov=float(fov), samples=16, variant=choose_variant())
    for i in range(2):
        view = drawn.render(there.cameras.world_from_camera[i], seed=i)
        assert ((view.depth > 0) != (there.depth[i] > 0)).sum() <= 4
        both = (view.depth > 0) & (there.depth[i] > 0)
        assert np.abs(view.depth - there.depth[i])[both].max() < 1.1e-3  # a step of half floats at 2 is 2e-3
        alpha = [x[..., 3].astype(float) for x in (view.rgba, there.rgba[i])]
        assert np.abs(alpha[0] - alpha[1]).mean() < 0.3
        over = [
            x[..., :3] / 255.0 * (a[..., None] / 255.0) for x, a in zip((view.rgba, there.rgba[i]), alpha, strict=True)
        ]
        assert -10.0 * np.log10(np.square(over[0] - over[1]).mean()) > 24.0
