"""`geolrm plan`: what it reports of a small step on simulated devices, by itself and through the command line."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from geolrm_jax import plan
from geolrm_jax.config import load_config
from geolrm_jax.info import describe
from geolrm_jax.plan_cli import show, summary
from geolrm_jax.runtime.sharding import MeshConfig


@pytest.fixture(scope="module")
def tiny(request):
    return str(request.config.rootpath / "tests" / "configs" / "tiny.py")


def command(config, file, *arguments):
    program = [sys.executable, "-m", "geolrm_jax.cli", "plan", "--config", config, "--json", str(file), *arguments]
    return subprocess.run(program, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory):
    """The proposal's step of 16 objects on eight simulated devices."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    devices = ("--topology", "cpu:8", "--mesh", "fsdp=4", "--stage", "proposal", "--inputs", "3")
    done = command(tiny, file, *devices, "--proposal.batch", "16", "--proposal.accumulation", "2")
    assert done.returncode == 0, done.stderr
    assert "Memory" in done.stdout and "Communication" in done.stdout
    return json.loads(file.read_text())


def test_memory_by_category(planned, tiny):
    hbm = planned["hbm"]
    assert hbm["total"] == sum(size for name, size in hbm.items() if name != "total") == planned["hbm_bytes_per_chip"]
    assert planned["fits"] is True
    assert hbm["batch"] == 2 * (3 + 3) * (28 * 28 * 5 + 16 + 9) * 4 + 2 * (3 + 3) + 2 * 8**3 + 2 * 4  # two rows a chip
    shards = sum(row["bytes_per_chip"] for row in planned["parameters"])
    assert shards <= hbm["parameters"] <= 1.05 * shards  # and the batch statistics
    assert 2 * shards <= hbm["optimizer"] <= 2.1 * shards
    assert hbm["constants"] == 0
    assert hbm["temporaries"] > 0
    assert hbm["output"] < 4096  # metrics: the state is donated


def test_parameters_are_listed_with_their_shares(planned, tiny):
    total = describe(load_config(tiny), views=[1], anchors=[1])["parameters"]["proposal"]["total"]
    assert sum(math.prod(row["shape"]) for row in planned["parameters"]) == total
    rows = {row["name"]: row for row in planned["parameters"]}
    kernel = rows["proposal/transformer/blocks/mlp/w1/kernel"]
    assert kernel["spec"] == [None, "fsdp", None]
    assert kernel["bytes_per_chip"] * 4 == math.prod(kernel["shape"]) * 4
    assert rows["proposal/transformer/norm/scale"]["spec"] == []


def test_operations_are_those_of_all_objects(planned, tiny):
    (row,) = (r for r in describe(load_config(tiny), views=[3], anchors=[1])["training"] if r["stage"] == "proposal")
    products = sum(row["as_configured"][kind] for kind in ("matmul", "convolution"))
    assert planned["flops"]["matmul"] + planned["flops"]["convolution"] == pytest.approx(2 * products, rel=1e-6)
    assert planned["flops_per_chip"] == pytest.approx(sum(planned["flops"].values()))


def test_pictures_are_known_by_their_sides(tiny):
    moved = plan.picture_test(load_config(tiny), [{"shape": [3, 28, 28]}, {"shape": [5, 28]}])
    assert moved("f32[2,3,28,28]") and moved("bf16[7] f32[1,28,28,3]")
    assert not moved("f32[3,28,28]") and not moved("bf16[1,28,28]")  # parameters
    assert not moved("f32[28,27]") and not moved("f32[]")


def test_communication(planned):
    rows = {(row["kind"], row["axes"]): row for row in planned["collectives"]}
    assert ("all-gather", "fsdp") in rows  # parameters, for their use
    assert any(kind == "all-reduce" and "data" in axes for kind, axes in rows)  # gradients
    assert planned["pictures_moved"] == []
    assert all(row["bytes_sent"] > 0 for row in rows.values())


def test_tables_of_one_that_does_not_fit(planned, capsys):
    failed = {k: v for k, v in planned.items() if k not in ("hbm", "hbm_bytes_per_chip")}
    failed |= {"fits": False, "does_not_fit": "Used 17.00G of 15.75G hbm."}
    show(failed)
    assert "Used 17.00G" in capsys.readouterr().out
    assert summary(failed).endswith("does not fit")


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v9:2x2", "expected one of v5e, v5p, v6e"), ("v5e:", "with its shape"), ("cpu:9999", "before the first use")],
)
def test_unknown_topologies(topology, message):
    with pytest.raises(ValueError, match=message):
        plan.described(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'geolrm-jax\[tpu\]'"):
        plan.described("v5e:2x2")


def test_what_does_not_divide_is_refused(tiny):
    experiment = load_config(tiny)
    with pytest.raises(ValueError, match="does not cover the 1 devices"):
        plan.plan(experiment, "proposal", "cpu:1", MeshConfig(data=2), inputs=2)
    with pytest.raises(ValueError, match="expected one of proposal, reconstruction"):
        plan.plan(experiment, "joint", "cpu:1", MeshConfig(), inputs=2)
    with pytest.raises(ValueError, match="a sweep needs a memory to fill"):
        next(plan.sweep(experiment, "proposal", "cpu:1", [MeshConfig()], inputs=2, refused=print))


def test_a_sweep_goes_on_past_a_mesh_that_is_refused(tiny, monkeypatch):
    def fake(experiment, stage, topology, mesh, *, inputs):
        if mesh.context > 1:
            raise ValueError("context must divide the heads")
        return {"objects": experiment.stages[stage].batch, "fits": experiment.stages[stage].batch < 8}

    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "described", lambda topology: [None] * 4)
    refused, experiment = [], load_config(tiny)
    meshes = [MeshConfig(context=4), MeshConfig(fsdp=2)]
    found = list(plan.sweep(experiment, "proposal", "v5e:2x2", meshes, inputs=2, refused=refused.append))
    assert [row["objects"] for row in found] == [4, 8]
    assert refused == ["data 1, fsdp 1, context 4, tensor 1: context must divide the heads"]


def test_a_bad_mesh_ends_in_one_line(tiny, tmp_path):
    done = command(tiny, tmp_path / "plan.json", "--topology", "cpu:2", "--mesh", "rows=2")
    assert done.returncode == 2 and "expected data=N,fsdp=N" in done.stderr
    done = command(tiny, tmp_path / "plan.json", "--topology", "cpu:2", "--proposal.batch", "3", "--stage", "proposal")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("devices along mesh axes data and fsdp")
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_real_topology(tiny, tmp_path):
    file = tmp_path / "plan.json"
    devices = ("--topology", "v5e:2x2", "--mesh", "fsdp=2", "--stage", "proposal", "--precision.compute", "bfloat16")
    done = command(tiny, file, *devices, "--proposal.batch", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["fits"] and found["chips"] == 4 and found["pictures_moved"] == []
    model = found["model"]
    assert model["step_seconds"] == max(model[f"{part}_seconds"] for part in ("compute", "memory", "exchange"))
    assert 0 < model["efficiency_apart"] < model["efficiency_overlapped"] <= 1
