"""The transformers, block by block, and the networks' results against the released program's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax.geometry.voxels import released_indices, voxel_positions
from geolrm_jax.losses.occupancy import affinity, cross_entropy
from geolrm_jax.models.deformable_attention import look
from geolrm_jax.models.proposal import select_anchors
from geolrm_jax.models.rope3d import rope3d
from geolrm_jax.weights.released import released_leaves

EACH, END = 1e-5, 1e-4  # of the largest value: each part, the end of a network


@pytest.mark.parametrize("name", ["ser", "gen"])
def test_anchors_projections_and_indices(released, name):
    vectors, anchors = released.vectors, released.anchors(name)
    if name == "ser":
        np.testing.assert_array_equal(anchors.positions[0], vectors["ser/token_xyzs"])
        axis = jnp.arange(len(vectors["ser/xyz_grid_axis"]), dtype=jnp.int32)
        ours = voxel_positions(jnp.stack([axis] * 3, -1), len(axis))
        np.testing.assert_array_equal(ours[:, 0], vectors["ser/xyz_grid_axis"])
    config = released.network(name).transformer.config
    np.testing.assert_array_equal(config.rope_indices(anchors).voxels, vectors[f"{name}/rope_idx"])
    points = look((), released.views, anchors, "none", "mirrored").reference_points
    np.testing.assert_allclose(points, vectors[f"{name}/uvs"], atol=EACH)


def test_released_indices_in_float32(released):
    theirs = released.vectors["note/rope_idx_axis128_long"]
    positions = voxel_positions(jnp.arange(len(theirs), dtype=jnp.int32)[:, None].repeat(3, 1), len(theirs))
    np.testing.assert_array_equal(released_indices(positions, len(theirs), 0.5)[:, 0], theirs)


@pytest.mark.parametrize("name", ["ser", "gen"])
def test_every_block(released, name):
    """Each block on our own input to it; every tensor of a block that the file has."""
    vectors, model = released.vectors, released.network(name)
    network = model.transformer
    x, anchors, features = released.before_blocks(name, model)
    for number in range(network.config.depth):
        compared = {}
        block, key = released.layer(network.blocks, number), f"{name}/blk{number}"
        compared["sa_norm"] = y = block.norm1(x)
        compared["q_pre_rope"], compared["k_pre_rope"] = block.self_attention.query(y), block.self_attention.key(y)
        compared["self_attn"] = block.self_attention(y, anchors)
        x = x + compared["self_attn"]
        compared["ca_norm"] = y = block.norm2(x)
        sampled = np.asarray(block.cross_attention.sampled(y, features))
        compared["msda"] = sampled.reshape(-1, *sampled.shape[2:])
        compared["cross_view_logits"] = block.cross_attention.view_logit(sampled)
        compared["cross_attn_residual_out"] = x = y + block.cross_attention(y, anchors, features)
        compared["ffn"] = block.mlp(block.norm3(x))
        compared["out"] = x = x + compared["ffn"]
        seen = [k.removeprefix(f"{key}/") for k in vectors.files if k.startswith(f"{key}/")]
        assert set(seen) <= set(compared) and (number or len(seen) == len(compared))
        for tensor in seen:
            released.close(compared[tensor], vectors[f"{key}/{tensor}"])
        if number == 0:
            for letter in "qk":
                heads = jnp.reshape(compared[f"{letter}_pre_rope"], (*x.shape[:2], network.config.heads, -1))
                if f"{name}/{letter}_post_rope" in vectors.files:
                    released.close(rope3d(heads, anchors.voxels), vectors[f"{name}/{letter}_post_rope"])
    released.close(network.norm(x), vectors[f"{name}/final_norm"], END)


def test_proposal(released):
    vectors = released.vectors
    logits = released.model().proposal(released.views)
    released.close(logits, vectors["ser/occ_logits"], END)
    tokens = released.model(self_attention="tokens").proposal
    released.close(tokens(released.views), vectors["ser_flash/occ_logits"], END)

    # Logits this close to zero may have either sign.
    near = np.abs(logits) < END * np.abs(vectors["ser/occ_logits"]).max()
    occupied = np.asarray(logits) > 0
    assert (np.abs(occupied.sum((1, 2, 3)) - vectors["ser/n_occupied"]) <= near.sum((1, 2, 3))).all()
    count = vectors["ser/points"].shape[1]
    anchors = select_anchors(logits, count, jax.random.key(0), "origin")
    ours, theirs = np.asarray(anchors.positions), vectors["ser/points"]
    for scene, mask in enumerate(vectors["ser/points_mask"]):
        there = set(map(tuple, theirs[scene][mask]))
        here = set(map(tuple, ours[scene])) - (set() if mask.all() else {(0.0, 0.0, 0.0)})
        if occupied[scene].sum() <= count:
            assert len(here ^ there) <= near[scene].sum()
        else:  # random subsets of the same voxels
            every = np.asarray(voxel_positions(jnp.argwhere(jnp.asarray(occupied[scene])), occupied.shape[-1]))
            assert len(here) == count and here | there <= set(map(tuple, every))
    assert np.asarray(anchors.mask).all()


def test_every_block_of_token_attention(released):
    vectors = released.vectors
    model = released.network("ser", self_attention="tokens")
    network = model.transformer
    x, anchors, features = released.before_blocks("ser", model)
    for number in range(network.config.depth):
        block, key = released.layer(network.blocks, number), f"ser_flash/blk{number}"
        attended = block.self_attention(block.norm1(x), anchors)
        released.close(attended, vectors[f"{key}/self_attn"])
        y = block.norm2(x + attended)
        released.close(y + block.cross_attention(y, anchors, features), vectors[f"{key}/cross_attn_residual_out"])
        x = block(x, anchors, features)
        released.close(x, vectors[f"{key}/out"])
    released.close(network.norm(x), vectors["ser_flash/final_norm"], END)


def latents(released, **rules):
    model = released.model(**rules).reconstruction
    anchors = released.anchors("gen")
    return model.transformer(anchors, released.views, model.encoder(released.views))


@pytest.mark.parametrize("suffix, scale", [("", 0.5), ("_scale1", 1.0)])
def test_reconstruction_latents(released, suffix, scale):
    vectors = released.vectors
    released.close(latents(released, rope_scale=scale), vectors[f"gen/latents{suffix}"], END)
    flash = latents(released, rope_scale=scale, self_attention="tokens")
    released.close(flash, vectors[f"gen/latents_flash{suffix}"], END)
    positions = jnp.array(vectors["gen/anchors"])
    indices = released_indices(positions, released.config.reconstruction.transformer.rope_grid, scale)
    np.testing.assert_array_equal(indices, vectors[f"gen/rope_idx{suffix}"])
    block = released.layer(released.model().reconstruction.transformer.blocks, 0)
    q = block.self_attention.query(jnp.array(vectors["gen/blk0/sa_norm"]))
    q = q.reshape(*q.shape[:2], released.config.reconstruction.transformer.heads, -1)
    released.close(rope3d(q, indices), vectors[f"gen/q_post_rope{suffix}"])


def test_released_attention_depends_on_the_order_of_anchors(released):
    vectors, order = released.vectors, released.vectors["gen/perm"]
    model, anchors = released.model().reconstruction, released.anchors("gen")
    permuted = jax.tree.map(lambda x: x[:, order], anchors)
    out = np.asarray(model.transformer(permuted, released.views, model.encoder(released.views)))
    unpermuted = np.empty_like(out)
    unpermuted[:, order] = out
    released.close(unpermuted, vectors["gen/latents_of_permuted_anchors_unpermuted"], END)


@pytest.mark.parametrize("suffix, attention", [("", "released_heads"), ("_flash", "tokens")])
def test_gaussians(released, suffix, attention):
    vectors = released.vectors
    model = released.model(self_attention=attention).reconstruction
    gaussians = model(released.anchors("gen"), released.views)
    parts = (gaussians.means, gaussians.opacities[..., None], gaussians.scales, gaussians.quats, gaussians.colors)
    released.close(np.concatenate(parts, axis=-1), vectors[f"gen/gaussians{suffix}"], END)
    if not suffix:
        decoder = model.decoder
        raw = decoder.out(jax.nn.silu(decoder.hidden(jnp.array(vectors["gen/latents"]))))
        released.close(raw, vectors["gen/decoder_raw"], END)


def test_proposal_gradients(released):
    vectors = released.vectors
    target = jnp.array(vectors["grad/target"]) > 0.5
    graphdef = nnx.split(released.model())[0]

    def loss(params):
        logits = nnx.merge(graphdef, params, released.variables["batch_stats"]).proposal(released.views)
        return cross_entropy(logits, target) + affinity(logits, target, "batch")

    value, gradient = jax.value_and_grad(loss)(released.variables["params"])
    np.testing.assert_allclose(value, vectors["grad/loss"], rtol=1e-5)
    theirs = {key.removeprefix("grad/"): key for key in vectors.files if key.startswith("grad/")}
    del theirs["target"], theirs["loss"]
    # The bias of the view weights moves all views alike: its gradient is zero but for rounding.
    smallest = 1e-6 * max(np.abs(vectors[key]).max() for key in theirs.values())
    compared = set()
    for leaf in released_leaves(released.config):
        ours = gradient
        if leaf.collection != "params" or not leaf.path.startswith("proposal."):
            continue
        for name in leaf.path.split("."):
            ours = ours[name]
        for key in leaf.keys:
            short = key.removeprefix("serializer.")
            if short in theirs:
                expected = vectors[theirs[short]]
                error = np.linalg.norm(leaf.store(np.asarray(ours), key) - expected)
                assert error < 1e-4 * np.linalg.norm(expected) + smallest, short
                compared.add(short)
    assert compared == set(theirs)
