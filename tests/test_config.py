"""Experiments: stored and read back, overridden, refused."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from geolrm_jax.config import (
    apply_overrides,
    config_path,
    from_tree,
    load_config,
    read_config,
    to_tree,
    write_config,
)
from geolrm_jax.inference import abstract_model
from geolrm_jax.precision import Precision


@pytest.fixture
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_and_survives_json(name):
    experiment = load_config(name)
    assert experiment.name == name.replace("/", "_")
    assert from_tree(json.loads(json.dumps(to_tree(experiment)))) == experiment


def parameters(model):
    return sum(x.size for x in jax.tree.leaves(abstract_model(model, Precision())[1]["params"]))


def test_ablations_change_what_they_say():
    """Parameters that each row adds to or takes from the full model, by hand."""
    full = load_config("ablations/full").model
    depth, width, heads, channels = 12, 768, 16, 384
    sampling = depth * (width + 1) * heads * 2 * 3  # per point: two offsets and a logit, for each of two levels
    vit, upsample = 86_580_480, 16 * width * channels + 2 * channels
    differences = {
        "no_plucker": -6 * 16 * channels,
        "no_low_level": -9 * 16 * channels - 2 * channels - sampling * 8 // 2,
        "no_high_level": -vit - upsample - sampling * 8 // 2,
        "no_rope": 0,
        "fixed_inputs": 0,
        "points_0": -8 * sampling,
        "points_4": -4 * sampling,
        "points_8": 0,
        "points_16": 8 * sampling,
    }
    assert {f"ablations/{name}" for name in (*differences, "full", "proposal")} == {
        name for name in NAMES if name.startswith("ablations/")
    }
    for name, difference in differences.items():
        assert parameters(load_config(f"ablations/{name}").model) - parameters(full) == difference, name


def test_the_papers_table():
    """Specification, section 5."""
    for name, stage, batch, dtype in (
        ("proposal", "proposal", 64, "bfloat16"),
        ("reconstruction",) * 2 + (32, "float32"),
    ):
        experiment = load_config(name)
        trained = experiment.stages[stage]
        assert list(experiment.stages) == [stage] and experiment.precision.compute == dtype
        assert (trained.batch, trained.accumulation) == (batch * 8, 8)
        assert trained.steps * trained.batch <= 12 * 280_000 < (trained.steps + 1) * trained.batch
        optimizer = trained.optimizer
        rates = (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip)
        assert rates == (1e-4, 0.9, 0.95, 0.05, 4.0) and optimizer.warmup == 1500
        assert (trained.views, trained.inputs, experiment.input_size, experiment.render_size) == (
            8,
            (1, 2, 3, 4, 5, 6, 7),
            448,
            448,
        )
    assert load_config("reconstruction").reconstruction.objective.max_anchors == 4096


def test_overrides_change_one_field(tiny):
    changed = apply_overrides(tiny, ["--reconstruction.optimizer.learning-rate", "3e-4"], program="test")
    assert changed.reconstruction.optimizer.learning_rate == 3e-4
    original = dataclasses.replace(changed.reconstruction.optimizer, learning_rate=1e-3)
    assert (
        dataclasses.replace(changed, reconstruction=dataclasses.replace(changed.reconstruction, optimizer=original))
        == tiny
    )


def test_fields_of_an_objective_can_be_overridden(tiny):
    changed = apply_overrides(tiny, ["--reconstruction.objective.max-anchors", "7"], program="test")
    assert changed.reconstruction.objective == dataclasses.replace(tiny.reconstruction.objective, max_anchors=7)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = apply_overrides(load_config("real_objects"), ["--data.source.root", "renders"], program="test")
    assert experiment.absolute().data.source.root == str(tmp_path / "renders")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--reconstruction.optimizer.learning-rat", "1"], "--reconstruction.optimizer.learning-rate"),
        (["--proposal.steps", "many"], "many"),
        (["--proposal.steps", "0"], "steps must be at least 1"),
    ],
)
def test_a_wrong_override_ends_with_a_hint(tiny, arguments, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        apply_overrides(tiny, arguments, program="test")
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err.replace("\n", "")


def test_an_unknown_config_is_named_with_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"'quickstrat', did you mean 'quickstart'"):
        config_path("quickstrat")


def test_a_file_without_get_config_is_refused(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty.py: expected a function get_config"):
        load_config(str(file))
    file.write_text("def get_config(:\n")
    with pytest.raises(ValueError, match=r"empty.py, line 1"):
        load_config(str(file))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml: expected a .py file"):
        load_config(str(tmp_path / "config.yaml"))


def test_a_work_directory_belongs_to_one_config(tiny, tmp_path):
    write_config(tiny, tmp_path)
    write_config(tiny, tmp_path)
    assert read_config(tmp_path) == tiny
    with pytest.raises(ValueError, match=r"belongs to another config.*seed is 0 there, 1 here"):
        write_config(dataclasses.replace(tiny, seed=1), tmp_path)
    assert read_config(tmp_path) == tiny


def test_a_damaged_or_foreign_config_json_is_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="format_version 2, got None"):
        read_config(tmp_path)
    file.write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 2, got 99"):
        read_config(tmp_path)


def test_input_size_must_be_a_multiple_of_28(tiny):
    with pytest.raises(ValueError, match="multiple of 28"):
        dataclasses.replace(tiny, input_size=100)
