"""Scenes, and a dense renderer to compare with: written from the equations, every Gaussian in every pixel."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from geolrm_jax.geometry.cameras import orbit
from geolrm_jax.rendering import rasterize
from geolrm_jax.scene import Cameras, Gaussians


@pytest.fixture(scope="session")
def make_inputs():
    """Random Gaussians in the cube and cameras around it, slightly rolled and off-centre, as a dictionary."""

    def make(rng, gaussians, views, height, width, *, scenes=(), scale=0.08, channels=3, dtype=np.float32):
        shape = (*scenes, gaussians)
        cameras = orbit(np.linspace(0, 250, views), 25.0, 1.75, 50.0, max(height, width))
        intrinsics = np.array(cameras.intrinsics, np.float64)
        intrinsics[..., :2, 2] = np.array([width, height]) / 2 + rng.uniform(-3, 3, (views, 2))
        inputs = {
            "means": rng.uniform(-0.5, 0.5, (*shape, 3)),
            "scales": scale * rng.uniform(0.1, 1.0, (*shape, 3)),
            "quats": rng.normal(size=(*shape, 4)),
            "opacities": rng.uniform(0.05, 0.95, shape),
            "colors": rng.uniform(size=(*shape, channels)),
            "background": rng.uniform(size=channels),
            "world_from_camera": np.broadcast_to(cameras.world_from_camera, (*scenes, views, 4, 4)),
            "intrinsics": np.broadcast_to(intrinsics, (*scenes, views, 3, 3)),
        }
        return {key: np.array(value, dtype) for key, value in inputs.items()}

    return make


@pytest.fixture(scope="session")
def on_axis():
    """Isotropic Gaussians on the optical axis of a camera at the origin."""

    def make(distances, opacities, sigma=0.1, focal=50.0, size=24):
        count = len(distances)
        return {
            "means": np.stack([np.zeros(count), np.zeros(count), distances], axis=-1).astype(np.float32),
            "scales": np.full((count, 3), sigma, np.float32),
            "quats": np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
            "opacities": np.float32(opacities),
            "colors": np.eye(3, dtype=np.float32)[:count],
            "background": np.zeros(3, np.float32),
            "world_from_camera": np.eye(4, dtype=np.float32)[None],
            "intrinsics": np.float32([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])[None],
        }

    return make


@pytest.fixture(scope="session")
def objects_of():
    """`Gaussians` and `Cameras` of a dictionary of inputs."""

    def make(inputs, size):
        fields = (inputs[key] for key in ("means", "scales", "quats", "opacities", "colors"))
        mask = inputs.get("mask", np.ones(inputs["opacities"].shape, bool))
        return Gaussians(*fields, mask=mask), Cameras(inputs["world_from_camera"], inputs["intrinsics"], *size)

    return make


@pytest.fixture(scope="session")
def draw(objects_of):
    """`rasterize` of a dictionary of inputs."""

    def call(inputs, size, **options):
        return rasterize(*objects_of(inputs, size), background=inputs["background"], **options)

    return call


@pytest.fixture(scope="session")
def dense():
    """The pictures of one view in float64, by their names in `Rendering`."""
    return render_densely


def render_densely(inputs, view, size, *, near=0.01, far=1e10, max_alpha=0.999, eps2d=0.3, antialias=False):
    g = {key: np.asarray(value, np.float64) for key, value in inputs.items()}
    world_from_camera, k = g["world_from_camera"][view], g["intrinsics"][view]
    pose = np.linalg.inv(world_from_camera)
    camera = g["means"] @ pose[:3, :3].T + pose[:3, 3]
    sums, transmittance = np.zeros((*size, g["colors"].shape[-1] + 4)), np.ones(size)
    finished = np.zeros(size, bool)
    for i in np.argsort(camera[:, 2], kind="stable"):
        if not near < camera[i, 2] < far:
            continue
        rotation = Rotation.from_quat(g["quats"][i], scalar_first=True).as_matrix()
        covariance = project_covariance(camera[i], k, pose[:3, :3] @ rotation * g["scales"][i], size)
        dilated = covariance + eps2d * np.eye(2)
        opacity = g["opacities"][i]
        if antialias:
            opacity *= np.sqrt(max(0.0, np.linalg.det(covariance) / np.linalg.det(dilated)))
        distance = mahalanobis(camera[i], k, dilated, size)
        alpha = np.minimum(max_alpha, opacity * np.exp(-0.5 * distance))
        alpha = np.where((alpha >= 1 / 255) & ~finished, alpha, 0)
        finished |= transmittance * (1 - alpha) <= 1e-4
        weight = np.where(finished, 0, alpha) * transmittance
        normal = rotation[:, np.argmin(g["scales"][i])]
        normal = normal if normal @ (world_from_camera[:3, 3] - g["means"][i]) >= 0 else -normal
        sums += weight[..., None] * np.concatenate([g["colors"][i], camera[i, 2:], normal])
        transmittance = transmittance - weight
    rgb = sums[..., :-4] + transmittance[..., None] * g["background"]
    return {"rgb": rgb, "alpha": 1 - transmittance, "depth": sums[..., -4], "normal": sums[..., -3:]}


def project_covariance(centre, k, axes, size):
    """J A A^T J^T of a Gaussian whose axes in the camera's frame are the columns of A."""
    (x, y, z), (fx, fy), (height, width) = centre, (k[0, 0], k[1, 1]), size
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    u = np.clip(x / z, -k[0, 2] / fx - margin_x, (width - k[0, 2]) / fx + margin_x)
    v = np.clip(y / z, -k[1, 2] / fy - margin_y, (height - k[1, 2]) / fy + margin_y)
    half = np.array([[fx, 0, -fx * u], [0, fy, -fy * v]]) / z @ axes
    return half @ half.T


def mahalanobis(centre, k, covariance, size):
    """Squared distance of every pixel's centre from the projected centre, in units of the covariance."""
    y, x = np.indices(size) + 0.5
    offset = np.stack(
        [x - (k[0, 0] * centre[0] / centre[2] + k[0, 2]), y - (k[1, 1] * centre[1] / centre[2] + k[1, 2])]
    )
    return np.einsum("ihw,ij,jhw->hw", offset, np.linalg.inv(covariance), offset)
