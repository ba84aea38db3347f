"""`geolrm info`: exact counts of the full model, FLOPs that follow views and anchors, the command."""

import json

import pytest

from geolrm_jax import info
from geolrm_jax.cli import main
from geolrm_jax.config import apply_overrides, load_config
from geolrm_jax.inference import abstract_model


@pytest.fixture(scope="module")
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


def parameters(experiment):
    return info.parameters_by_part(abstract_model(experiment.model, experiment.precision)[1]["params"])


@pytest.fixture(scope="module")
def described(tiny):
    return info.describe(tiny, views=[1, 2], anchors=[16, 32])


def test_the_full_model_has_the_released_numbers_of_parameters(parity):
    released = json.loads((parity / "released_state_dict.json").read_text())["param_counts"]
    described = parameters(load_config("geolrm"))
    for network, prefix in (("proposal", "serializer"), ("reconstruction", "lrm_generator")):
        parts, of = described[network], {k.removeprefix(f"{prefix}."): n for k, n in released.items()}
        assert parts["image encoder, ViT"] == of["encoder.model"]
        assert parts["image encoder, convolutions"] == of["encoder.deconv"] + of["encoder.low_level_encoder"]
        assert parts["transformer blocks"] == of["transformer.layers"]
        assert parts["total"] == released[f"{prefix}.TOTAL"]
    assert described["reconstruction"]["decoder"] == released["lrm_generator.renderer"]
    assert described["total"] == released["ALL"]


def test_parts_add_up(described):
    networks = [described["parameters"][name] for name in ("proposal", "reconstruction")]
    for parts in networks:
        assert sum(n for part, n in parts.items() if part != "total") == parts["total"]
    assert described["parameters"]["total"] == sum(parts["total"] for parts in networks)
    assert described["parameter_bytes"] == 4 * described["parameters"]["total"]
    for row in described["forward"]:
        for kind in ("matmul", "convolution", "other", "total"):
            assert row["total"][kind] == row["proposal"][kind] + row["reconstruction"][kind]
        assert row["total"]["total"] == sum(row["total"][kind] for kind in ("matmul", "convolution", "other"))


def test_images_cost_the_same_each_and_the_proposal_knows_no_anchors(described):
    rows = {(row["views"], row["anchors"]): row for row in described["forward"]}
    assert rows[2, 16]["total"]["convolution"] == 2 * rows[1, 16]["total"]["convolution"]
    assert rows[1, 16]["proposal"] == rows[1, 32]["proposal"]
    # Attention among anchors: twice the anchors are more than twice the products that do not depend on the views.
    more = [rows[1, n]["reconstruction"]["matmul"] for n in (16, 32)]
    per_view = rows[2, 16]["reconstruction"]["matmul"] - more[0]
    assert more[1] > 2 * more[0] - 2 * per_view


def test_training_costs_about_three_forwards_and_remat_one_more(described):
    forward = {row["views"]: row["proposal"] for row in described["forward"]}
    for row in described["training"]:
        assert row["as_configured"]["matmul"] > row["without_remat"]["matmul"]
        if row["stage"] == "proposal":
            assert 2.5 < row["without_remat"]["matmul"] / forward[row["views"]]["matmul"] < 3.5
    assert {(row["stage"], row["views"]) for row in described["training"]} == {
        (stage, views) for stage in ("proposal", "reconstruction") for views in (1, 2)
    }


def test_a_config_of_the_proposal_alone(request):
    experiment = load_config(str(request.config.rootpath / "tests" / "configs" / "tiny_proposal.py"))
    stages = {row["stage"] for row in info.describe(experiment, views=[1], anchors=[8])["training"]}
    assert stages == {"proposal"}


def test_the_command_with_an_override(request, tmp_path, capsys):
    config = str(request.config.rootpath / "tests" / "configs" / "tiny.py")
    arguments = ["info", "--config", config, "--views", "1", "--anchors", "16", "--json", str(tmp_path / "info.json")]
    override = ["--model.reconstruction.transformer.depth", "3"]
    assert main([*arguments, *override]) == 0
    described = json.loads((tmp_path / "info.json").read_text())
    experiment = load_config(config)
    assert described["parameters"] == parameters(apply_overrides(experiment, override, program="test"))
    blocks = [d["reconstruction"]["transformer blocks"] for d in (parameters(experiment), described["parameters"])]
    assert blocks[1] == 3 * blocks[0]
    assert [(row["views"], row["anchors"]) for row in described["forward"]] == [(1, 16)]
    assert f"{described['parameters']['total']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value", "words"), [("--views", "0", "at least 1"), ("--anchors", "a", "commas")])
def test_bad_numbers_are_named(request, capsys, option, value, words):
    config = str(request.config.rootpath / "tests" / "configs" / "tiny.py")
    try:
        code = main(["info", "--config", config, option, value])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code
    assert words in capsys.readouterr().err
