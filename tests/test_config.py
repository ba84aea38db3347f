"""Experiments: stored and read back, overridden, refused."""

import dataclasses
import json

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


@pytest.fixture
def tiny(request):
    return load_config(str(request.config.rootpath / "tests" / "configs" / "tiny.py"))


@pytest.mark.parametrize("name", ["quickstart", "real_objects", "one_object", "geolrm"])
def test_every_config_loads_and_survives_json(name):
    experiment = load_config(name)
    assert from_tree(json.loads(json.dumps(to_tree(experiment)))) == experiment


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
    with pytest.raises(ValueError, match="format_version 1, got None"):
        read_config(tmp_path)
    file.write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 1, got 99"):
        read_config(tmp_path)


def test_input_size_must_be_a_multiple_of_28(tiny):
    with pytest.raises(ValueError, match="multiple of 28"):
        dataclasses.replace(tiny, input_size=100)
