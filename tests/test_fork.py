"""The package that docs/fork.md shows: every file of it runs, does what it says, and all train together."""

import contextlib
import importlib
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geolrm_jax import cli
from geolrm_jax.config import from_tree, load_config, read_config, to_tree, write_config
from geolrm_jax.data.builders.shards import make_record
from geolrm_jax.geometry.cameras import turntable
from geolrm_jax.inference import abstract_model
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.logging import read_metrics
from geolrm_jax.scene import Anchors, Gaussians, Views
from geolrm_jax.training.objectives import ReconstructionObjective

PARTS = ("attention", "encoder", "decoder", "objective", "data")


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory):
    """The package's files, written as the page has them, and importable."""
    page = (request.config.rootpath / "docs" / "fork.md").read_text()
    folder = tmp_path_factory.mktemp("fork")
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        file = folder / re.match(r"# (\S+)\n", example).group(1)
        file.parent.mkdir(exist_ok=True)
        file.write_text(example)
    assert {file.stem for file in (folder / "lab").iterdir()} == {*PARTS}
    with contextlib.ExitStack() as stack:
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))
        yield {name: importlib.import_module(f"lab.{name}") for name in PARTS}
        for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def base(tiny):
    return load_config(tiny)


def forked(module, base, monkeypatch):
    """The example's config over another one than the page's."""
    monkeypatch.setattr(module, "load_config", lambda name: base)
    return module.get_config()


@pytest.mark.parametrize("part", PARTS)
def test_each_is_a_config_that_a_work_directory_can_hold(lab, base, part, monkeypatch):
    real = lab[part].get_config()
    assert from_tree(to_tree(real)) == real
    experiment = forked(lab[part], base, monkeypatch)
    _, ours = abstract_model(experiment.model, Precision())
    _, theirs = abstract_model(base.model, Precision())
    names = [{jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)} for shapes in (ours, theirs)]
    new = {"encoder": "['deeper']", "decoder": "['before']"}.get(part)
    assert all(new in name for name in names[0] - names[1]) if new else names[0] == names[1]


def anchors(rng, count=5):
    voxels = jnp.array(rng.integers(0, 8, (1, count, 3)), jnp.int32)
    return Anchors(voxels / 8 - 0.5, voxels, jnp.ones((1, count), bool))


def test_attention_does_not_depend_on_the_length_of_queries(lab, base, monkeypatch, rng):
    transformer = forked(lab["attention"], base, monkeypatch).model.reconstruction.transformer
    ours = transformer.make_self_attention(nnx.Rngs(0), Precision())
    theirs = base.model.reconstruction.transformer.make_self_attention(nnx.Rngs(0), Precision())
    x, where = jnp.array(rng.normal(size=(1, 5, 12)), jnp.float32), anchors(rng)
    for attention, same in ((ours, True), (theirs, False)):
        before = attention(x, where)
        attention.query.kernel[...] = 5.0 * attention.query.kernel[...]
        assert np.allclose(attention(x, where), before, atol=1e-4) == same


def test_the_encoder_adds_to_the_low_level(lab, base, monkeypatch, rng):
    config = forked(lab["encoder"], base, monkeypatch).model.reconstruction.encoder
    encoder = replace(config, levels=("low",)).make(nnx.Rngs(0), Precision())
    cameras = jax.tree.map(lambda x: jnp.asarray(x)[None], turntable(2, size=28))
    rgb = jnp.array(rng.random((1, 2, 28, 28, 3)), jnp.float32)
    views = Views(cameras, rgb, jnp.ones((1, 2, 28, 28)), jnp.ones((1, 2, 28, 28)), jnp.ones((1, 2), bool))
    changed = encoder(views)
    encoder.deeper.kernel[...] = 0.0 * encoder.deeper.kernel[...]
    plain = encoder(views)
    theirs = base.model.reconstruction.encoder
    same = replace(theirs, levels=("low",)).make(nnx.Rngs(0), Precision())(views)
    assert not np.allclose(changed[0], plain[0]) and np.array_equal(plain[0], same[0])


def test_the_decoder_gives_round_gaussians(lab, base, monkeypatch, rng):
    decoder = forked(lab["decoder"], base, monkeypatch).model.reconstruction.decoder.make(12, nnx.Rngs(0), Precision())
    gaussians = decoder(jnp.array(rng.normal(size=(1, 5, 12)), jnp.float32), anchors(rng))
    assert np.ptp(gaussians.scales, axis=-1).max() == 0 and np.ptp(gaussians.scales[0, :, 0]) > 0


def test_the_objective_adds_its_term(lab, base, monkeypatch):
    objective = forked(lab["objective"], base, monkeypatch).reconstruction.objective
    monkeypatch.setattr(ReconstructionObjective, "terms", lambda self, *_: {"image": jnp.float32(2.0)})
    gaussians = Gaussians(
        jnp.zeros((1, 3, 3)),
        jnp.ones((1, 3, 3)),
        jnp.ones((1, 3, 4)),
        jnp.array([[0.5, 1.0, 0.5]]),
        jnp.zeros((1, 3, 3)),
        jnp.array([[True, True, False]]),
    )
    losses = objective.terms(gaussians, None, None, None, None)
    assert losses["image"] == 2.0
    np.testing.assert_allclose(losses["crispness"], 0.01 * 0.125, rtol=1e-6)


def test_the_balls_are_balls(lab, base, monkeypatch):
    """Occupied voxels lie on a sphere around the origin."""
    data = forked(lab["data"], base, monkeypatch).data
    source = replace(data.source, size=64)
    record = make_record(replace(data, source=source, occupancy_grid=32), "train", source.ids("train")[0])
    voxels = np.argwhere(record.occupancy)
    radii = np.linalg.norm((voxels + 0.5) / 32 - 0.5, axis=-1)
    assert len(voxels) > 50 and 0.2 < radii.mean() < 0.4 and np.ptp(radii) < 3 / 32


def test_a_class_in_the_config_file_itself_is_refused(tiny, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom geolrm_jax.config import load_config\n"
        "from geolrm_jax.training.objectives import ProposalObjective\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(ProposalObjective):\n    pass\n"
        "def get_config():\n"
        f"    base = load_config({tiny!r})\n"
        "    return dataclasses.replace(base, proposal=dataclasses.replace(base.proposal, objective=Mine()))\n"
    )
    assert cli.main(["train", "--config", str(file), "--workdir", str(tmp_path / "w")]) == 1
    assert "module that can be imported" in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.slow
def test_all_of_them_train_together_from_a_run_without_them(lab, base, trained, monkeypatch, tmp_path):
    experiment = base
    for module in lab.values():
        experiment = forked(module, experiment, monkeypatch)
    monkeypatch.setattr("geolrm_jax.config.load_config", lambda name: experiment)
    new = r"reconstruction\.(decoder\.before|encoder\.deeper)"
    command = ["train", "--config", "all", "--workdir", str(tmp_path / "w")]
    assert cli.main([*command, "--warm-start", str(trained), "--allow-missing", new]) == 0
    last = read_metrics(tmp_path / "w" / "metrics.jsonl")[-1]
    assert last["step"] == 4 and np.isfinite(last["loss"]) and last["crispness"] > 0
    assert (tmp_path / "w" / "eval" / "4" / "report.json").is_file()


def test_a_file_of_a_package_is_a_config_whose_classes_are_found_again(tmp_path, monkeypatch, tiny):
    """By the command line's way, which is given a file and not a module."""
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "run.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from geolrm_jax.config import load_config\n"
        "from geolrm_jax.training.objectives import ProposalObjective\n"
        "@dataclass(frozen=True)\n"
        "class Own(ProposalObjective):\n"
        "    pass\n"
        "def get_config():\n"
        f"    base = load_config({str(tiny)!r})\n"
        "    return replace(base, proposal=replace(base.proposal, objective=Own()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    experiment = load_config(str(package / "run.py"))
    assert type(experiment.proposal.objective).__module__ == "own_package.run"
    write_config(experiment, tmp_path / "work")
    assert read_config(tmp_path / "work") == experiment
