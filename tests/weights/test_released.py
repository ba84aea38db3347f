"""The released checkpoint: all of its keys, in and out. The numbers it gives are in tests/parity."""

import json

import numpy as np
import pytest

from geolrm_jax.config import load_config
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.weights.dinov2_names import OLD_BY_NEW
from geolrm_jax.weights.files import open_tensors
from geolrm_jax.weights.released import convert, export, plan, released_leaves


@pytest.fixture(scope="module")
def released(parity):
    tree = json.loads((parity / "released_state_dict.json").read_text())
    return {key: tuple(shape) for key, shape in tree["shapes"].items()}, tree["param_counts"]


@pytest.fixture(scope="module")
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py")).model


@pytest.fixture(scope="module")
def checkpoint(tiny):
    """Random numbers under the released names of a tiny model."""
    rng = np.random.default_rng(0)
    return {
        key: np.array(41, np.int64) if leaf.dtype.kind == "i" else rng.standard_normal(leaf.there_shape, np.float32)
        for leaf in released_leaves(tiny)
        for key in leaf.keys
    }


def shapes_of(arrays):
    return {key: array.shape for key, array in arrays.items()}


def test_every_released_key_is_consumed_once(released):
    shapes, counts = released
    planned = plan(shapes, GeoLRMConfig())
    consumed = [key for leaf in planned.leaves for key in leaf.keys]
    assert sorted(consumed) == sorted(shapes)
    assert planned.consumed == len(shapes)
    parts = planned.parts()
    assert sum(parts.values()) == counts["ALL"]
    for theirs, ours in {"serializer": "proposal", "lrm_generator": "reconstruction"}.items():
        assert sum(n for part, n in parts.items() if part.startswith(ours)) == counts[f"{theirs}.TOTAL"]
        encoder = [counts[f"{theirs}.encoder.{part}"] for part in ("model", "deconv", "low_level_encoder")]
        assert parts[f"{ours}.encoder"] == sum(encoder)
        transformer = [counts[f"{theirs}.transformer.{part}"] for part in ("query_token", "layers", "norm")]
        assert parts[f"{ours}.transformer"] == sum(transformer)


def test_the_losses_weights_are_ignored_by_name(released):
    shapes, _ = released
    planned = plan(shapes | {"lpips.net.slice1.0.weight": (64, 3, 3, 3), "lpips.lin0.weight": (1, 64)}, GeoLRMConfig())
    assert planned.ignored == ("lpips.net.slice1.0.weight", "lpips.lin0.weight")
    assert planned.consumed == len(shapes)


def test_all_problems_are_in_one_message(released):
    shapes = dict(released[0])
    del shapes["serializer.transformer.query_token"]
    del shapes["lrm_generator.transformer.layers.11.ffn_norm.weight"]
    shapes["lrm_generator.encoder.deconv.0.weight"] = (384, 768, 4, 4)
    shapes["lrm_generator.encoder.model.embeddings.register_tokens"] = (1, 4, 768)
    with pytest.raises(ValueError) as error:
        plan(shapes, GeoLRMConfig(), where="geolrm.ckpt")
    assert str(error.value).splitlines() == [
        "geolrm.ckpt does not fit the model:",
        "  2 missing:",
        "    serializer.transformer.query_token",
        "    lrm_generator.transformer.layers.11.ffn_norm.weight",
        "  1 unexpected:",
        "    lrm_generator.encoder.model.embeddings.register_tokens [1, 4, 768]",
        "  1 of another shape:",
        "    lrm_generator.encoder.deconv.0.weight [384, 768, 4, 4], expected [768, 384, 4, 4]",
    ]


def test_a_model_of_the_proposal_alone_has_no_place_for_the_rest(released):
    with pytest.raises(ValueError, match=r"unexpected:\n    lrm_generator\.encoder\.model\.embeddings\.cls_token"):
        plan(released[0], GeoLRMConfig(reconstruction=None))


def test_arrays_land_where_they_belong(checkpoint, tiny):
    variables = convert(shapes_of(checkpoint), checkpoint.__getitem__, tiny)
    params, stats = variables["params"], variables["batch_stats"]
    for theirs, ours in {"serializer": "proposal", "lrm_generator": "reconstruction"}.items():
        block, net = params[ours]["transformer"]["blocks"], params[ours]
        for there, here in {
            f"{theirs}.transformer.query_token": net["transformer"]["query"][None, None],
            f"{theirs}.transformer.layers.0.feed_forward.w3.weight": block["mlp"]["w3"]["kernel"][0].T,
            f"{theirs}.transformer.layers.0.ffn_norm.weight": block["norm3"]["scale"][0],
            f"{theirs}.transformer.layers.0.cross_attention.cross_view_weight.bias": block["cross_attention"][
                "view_logit"
            ]["bias"][0],
            f"{theirs}.encoder.low_level_encoder.0.weight": net["encoder"]["low"]["kernel"].transpose(3, 2, 0, 1),
            f"{theirs}.encoder.model.embeddings.mask_token": net["encoder"]["vit"]["mask_token"][None],
            f"{theirs}.encoder.model.encoder.layer.0.attention.output.dense.weight": net["encoder"]["vit"]["blocks"][
                "out"
            ]["kernel"][0].T,
            f"{theirs}.encoder.deconv.1.running_var": stats[ours]["encoder"]["high_norm"]["var"],
            f"{theirs}.encoder.low_level_encoder.1.num_batches_tracked": stats[ours]["encoder"]["low_norm"]["count"],
        }.items():
            np.testing.assert_array_equal(here, checkpoint[there], err_msg=there)
    decoder = params["reconstruction"]["decoder"]
    np.testing.assert_array_equal(
        decoder["hidden"]["kernel"].T, checkpoint["lrm_generator.renderer.latent_decoder.0.weight"]
    )
    np.testing.assert_array_equal(decoder["out"]["bias"], checkpoint["lrm_generator.renderer.latent_decoder.2.bias"])
    assert stats["proposal"]["encoder"]["low_norm"]["count"].dtype == np.int32


def test_newer_names_of_hugging_face_give_the_same(checkpoint, tiny):
    newer = {}
    for key, array in checkpoint.items():
        for new, old in OLD_BY_NEW.items():
            key = key.replace(old, new)
        newer[key] = array
    assert "serializer.encoder.model.encoder.layer.0.attention.q_proj.weight" in newer
    assert "serializer.encoder.model.encoder.layer.0.attention.o_proj.bias" in newer
    before = convert(shapes_of(checkpoint), checkpoint.__getitem__, tiny)
    after = convert(shapes_of(newer), newer.__getitem__, tiny)
    np.testing.assert_equal(after, before)
    both = newer | checkpoint
    with pytest.raises(ValueError, match=r"16 unexpected:\n    serializer\S*attention\.q_proj\.weight"):
        plan(shapes_of(both), tiny)


def test_the_way_back_is_bit_for_bit(checkpoint, tiny, tmp_path):
    variables = convert(shapes_of(checkpoint), checkpoint.__getitem__, tiny)

    def read(collection, path):
        found = variables[collection]
        for key in path.split("."):
            found = found[key]
        return found

    assert export(tmp_path / "back.safetensors", tiny, read) == len(checkpoint)
    back = open_tensors(tmp_path / "back.safetensors")
    assert set(back.shapes) == set(checkpoint)
    for key, array in checkpoint.items():
        assert back.dtypes[key] == array.dtype
        np.testing.assert_array_equal(back.read(key), array, err_msg=key)
