"""The released program's file: its weights in our model, its inputs, and how close we must come."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.config import load_config
from geolrm_jax.geometry.cameras import from_opengl
from geolrm_jax.models.deformable_attention import Features, look
from geolrm_jax.models.dinov2 import PATCH, ViTConfig
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.models.proposal import dense_anchors
from geolrm_jax.precision import Precision
from geolrm_jax.scene import Anchors, Cameras, Views
from geolrm_jax.weights.released import convert

NETWORKS = {"ser": "proposal", "gen": "reconstruction"}


def released_config(sizes: dict) -> GeoLRMConfig:
    """`configs/released.py` at the file's sizes, dropout off."""
    base, dino = load_config("released").model, sizes["dino"]
    vit = ViTConfig(
        width=dino["hidden_size"],
        depth=dino["num_hidden_layers"],
        heads=dino["num_attention_heads"],
        mlp_ratio=dino["mlp_ratio"],
        pretrained_grid=dino["image_size"] // PATCH,
    )

    def network(config, key, **rest):
        part = sizes[key]
        transformer = dataclasses.replace(
            config.transformer,
            width=part["transformer_dim"],
            depth=part["transformer_layers"],
            heads=part["transformer_heads"],
            points=part["num_deform_points"],
            rope_grid=part["grid_size"],
            rope_scale=part.get("scale", 0.5),
            dropout=0.0,
        )
        encoder = dataclasses.replace(config.encoder, vit=vit, channels=part["encoder_feat_dim"])
        return dataclasses.replace(config, encoder=encoder, transformer=transformer, **rest)

    decoder = dataclasses.replace(
        base.reconstruction.decoder,
        gaussians_per_anchor=sizes["gen"]["gs_per_token"],
        offset_max=sizes["gen"]["offset_max"],
        scale_max=sizes["gen"]["scale_max"],
    )
    grids = dict(coarse_grid=sizes["ser"]["token_res"], fine_grid=sizes["ser"]["grid_size"])
    return dataclasses.replace(
        base,
        proposal=network(base.proposal, "ser", **grids),
        reconstruction=network(base.reconstruction, "gen", decoder=decoder),
    )


def views_of(images, poses, intrinsics) -> Views:
    """Channel-first images, Blender poses, intrinsics divided by the image's size."""
    rgb = jnp.array(np.moveaxis(images, 2, -1))
    height, width = rgb.shape[2:4]
    scale = np.array([[width], [height], [1]], np.float32)
    cameras = Cameras(jnp.array(from_opengl(poses)), jnp.array(intrinsics * scale), height, width)
    ones = jnp.ones(rgb.shape[:-1])
    return Views(cameras, rgb, ones, 0.0 * ones, jnp.ones(rgb.shape[:2], bool))


class Released:
    """One file; all sizes come from it."""

    def __init__(self, folder: Path):
        self.vectors = np.load(folder / "geolrm_released.npz")
        self.sizes = json.loads((folder / "geolrm_released.json").read_text())["config"]
        self.config = released_config(self.sizes)
        weights = {key.removeprefix("w/"): self.vectors[key] for key in self.vectors.files if key.startswith("w/")}
        shapes = {key: array.shape for key, array in weights.items()}
        self.variables = jax.tree.map(jnp.array, convert(shapes, weights.__getitem__, self.config))
        self.views = self.views_under("in/images", "in/c2ws", "in/Ks")
        self.odd_views = self.views_under("nonsq/image", "nonsq/c2ws", "nonsq/Ks")

    def views_under(self, *keys: str) -> Views:
        return views_of(*(self.vectors[key] for key in keys))

    def model(self, **rules) -> nnx.Module:
        """The model with the file's weights, and perhaps with other rules in both transformers."""

        def network(part):
            return dataclasses.replace(part, transformer=dataclasses.replace(part.transformer, **rules))

        parts = {name: network(getattr(self.config, name)) for name in NETWORKS.values()}
        config = dataclasses.replace(self.config, **parts)
        abstract = nnx.eval_shape(lambda: config.make(nnx.Rngs(0), Precision()))
        return nnx.merge(nnx.split(abstract)[0], self.variables["params"], self.variables["batch_stats"])

    def network(self, name: str, **rules) -> nnx.Module:
        """The proposal ("ser") or the reconstruction ("gen")."""
        return getattr(self.model(**rules), NETWORKS[name])

    def anchors(self, name: str) -> Anchors:
        """The coarse grid, or the anchors that the file gives the reconstruction."""
        if name == "ser":
            part = self.config.proposal
            return dense_anchors(part.coarse_grid, part.fine_grid, self.views.rgb.shape[0])
        positions = jnp.array(self.vectors["gen/anchors"])
        return Anchors(positions, jnp.zeros(positions.shape, jnp.int32), jnp.ones(positions.shape[:2], bool))

    def before_blocks(self, name: str, network: nnx.Module) -> tuple[jax.Array, Anchors, Features]:
        """What a network's first block gets."""
        transformer, anchors = network.transformer, self.anchors(name)
        features = look(network.encoder(self.views), self.views, anchors, "none", "mirrored")
        shared = jnp.broadcast_to(transformer.query[...], (*anchors.mask.shape, transformer.config.width - 3))
        tokens = jnp.concatenate([anchors.positions, shared], axis=-1)
        return tokens, transformer.config.rope_indices(anchors), features

    @staticmethod
    def layer(blocks: nnx.Module, number: int) -> nnx.Module:
        """One block of a stack."""
        return jax.tree.map(lambda x: x[number], blocks)

    @staticmethod
    def hierarchy(maps) -> np.ndarray:
        """The levels one behind the other, as the released program keeps them."""
        return np.concatenate([np.asarray(m).reshape(*m.shape[:2], -1, m.shape[-1]) for m in maps], axis=2)

    @staticmethod
    def close(ours, theirs, tolerance: float = 1e-5) -> None:
        """Asserts a distance relative to the tensor's largest value."""
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.fixture(scope="session")
def released(parity) -> Released:
    """The file of the released program."""
    return Released(parity)
