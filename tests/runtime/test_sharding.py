"""Sharding: the rules, the mesh, and where a batch lies. The same numbers on more devices: tests/training."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from geolrm_jax.models.splitting import RULES, spec_of, whole
from geolrm_jax.runtime.sharding import AXES, MeshConfig, batch_shardings, padded, row_share
from geolrm_jax.scene import Batch, Cameras, Views

SIZES = {"data": 2, "fsdp": 4, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("mlp/w1/kernel", (6, 384, 1024), P(None, "fsdp", "tensor")),
        ("mlp/w2/kernel", (6, 1024, 384), P(None, "tensor", "fsdp")),
        ("self_attention/query/kernel", (6, 384, 384), P(None, "fsdp", "tensor")),
        ("self_attention/out/kernel", (6, 384, 384), P(None, "tensor", "fsdp")),
        ("cross_attention/value/bias", (6, 384), P(None, "tensor")),
        ("cross_attention/out/bias", (6, 384), P()),  # of a sum over devices
        ("cross_attention/view_logit/kernel", (6, 384, 1), P()),
        ("mlp/w1/kernel", (6, 385, 1024), P(None, None, "tensor")),  # 385 does not divide
        ("norm1/scale", (6, 384), P()),
        ("mlp/w1/kernel", (6,), P()),  # as Adafactor keeps of one
    ],
)
def test_rules(path, shape, expected):
    for place in ("params/proposal/transformer/blocks", "opt_state/1/0/mu/proposal/transformer/blocks"):
        assert spec_of(f"{place}/{path}", shape, SIZES) == expected
    assert spec_of(path, shape, {}) == P()  # one device


def test_every_rule_names_parameters_of_the_model():
    names = [
        f"{module}/{kind}"
        for module in ("query", "out", "fc1", "fc2", "w1", "w2", "w3", "patches", "low", "upsample", "hidden")
        for kind in ("kernel", "bias")
    ] + ["vit/positions", "cross_attention/logits/kernel"]
    for pattern, _ in RULES:
        assert any(spec_of(f"net/{name}", (8, 8), SIZES) != P() for name in names), pattern


def test_a_mesh_must_cover_the_devices():
    with pytest.raises(ValueError, match=r"data 3 x fsdp 5 does not cover the 1 devices"):
        MeshConfig(data=3, fsdp=5).make()
    with pytest.raises(ValueError, match=r"mesh\.context: expected .* at least 1, got 0"):
        MeshConfig(context=0)
    assert MeshConfig().make().shape == dict(zip(AXES, (jax.device_count(), 1, 1, 1), strict=True))
    assert MeshConfig(fsdp=4, context=2).shape(64) == {"data": 8, "fsdp": 4, "context": 2, "tensor": 1}
    assert MeshConfig(fsdp=4, context=2).rows(64) == 32


def make_batch(inputs, targets):
    def views(number, size):
        image = np.ones((2, number, size, size), np.float32)
        cameras = Cameras(np.tile(np.eye(4, dtype=np.float32), (2, number, 1, 1)), np.ones((2, number, 3, 3)), 4, 4)
        return Views(cameras, np.repeat(image[..., None], 3, -1), image, image, np.ones((2, number), bool))

    return Batch(views(inputs, 4), views(targets, 6), np.zeros((2, 8, 8, 8), bool), np.arange(2, dtype=np.int32))


class Device:
    """As much of a device as a mesh asks for."""

    platform, device_kind, client, num_cores = "cpu", "cpu", None, None

    def __init__(self, number, process):
        self.id, self.process_index = number, process


def mesh_of(shape, per_process=1):
    devices = np.array([Device(i, i // per_process) for i in range(int(np.prod(shape)))], object)
    return jax.sharding.Mesh(devices.reshape(shape), AXES)


def test_views_are_padded_by_copies_that_do_not_count():
    mesh = mesh_of((1, 1, 4, 2))
    batch = make_batch(inputs=3, targets=8)
    more = padded(batch, mesh)
    assert more.inputs.valid.tolist() == [[True, True, True, False]] * 2
    assert more.targets is batch.targets
    np.testing.assert_array_equal(more.inputs.rgb[:, 3], batch.inputs.rgb[:, 2])
    assert batch.inputs.valid.all()  # as it was
    specs = jax.tree.map(lambda s: s.spec, batch_shardings(more, mesh))
    assert specs.inputs.rgb == P(("data", "fsdp"), "context")
    assert specs.targets.cameras.intrinsics == P(("data", "fsdp"), ("context", "tensor"))
    assert specs.occupancy == specs.index == P(("data", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "per_process", "expected"),
    [
        ((4, 1, 1, 1), 2, ((0, 1), 4)),
        ((1, 1, 4, 1), 2, ((0,), 1)),
        ((2, 1, 4, 1), 2, ((0,), 2)),
        ((2, 2, 2, 1), 1, ((0,), 4)),
    ],
)
def test_processes_with_the_same_rows_read_the_same_share(shape, per_process, expected):
    assert row_share(mesh_of(shape, per_process)) == expected


def test_a_process_reads_the_rows_of_its_devices_wherever_they_lie():
    """As on a TPU, where the chips of a host are a square of the torus."""
    devices = mesh_of((16, 1, 1, 1)).devices.reshape(4, 4)
    for row, column in np.ndindex(4, 4):
        devices[row, column].process_index = row // 2 * 2 + column // 2
    mesh = jax.sharding.Mesh(devices.reshape(8, 2, 1, 1), AXES)
    assert row_share(mesh) == ((0, 1, 4, 5), 16)


@pytest.mark.parametrize(("platform", "shape"), [("gpu", (2, 2, 2, 1)), ("gpu", (1, 4, 2, 1)), ("tpu", (1, 4, 2, 1))])
def test_hosts_are_apart_along_data_and_only_slices_of_tpus_must_be(platform, shape):
    kind = {"platform": platform, "device_kind": "", "process_index": 0}
    devices = [Mock(jax.Device, id=i, slice_index=i % 2, **kind) for i in range(8)]
    config = MeshConfig(*shape)
    if platform == "tpu":
        with pytest.raises(ValueError, match=r"mesh\.data 1 must be a multiple of the 2 slices"):
            config.make(devices)
        return
    placed = config.make(devices).devices
    assert placed.shape == shape and {device.id for device in placed.flat} == set(range(8))
    if shape[0] == 2:
        assert [{device.slice_index for device in part.flat} for part in placed] == [{0}, {1}]


def test_rows_that_overlap_in_part_are_refused():
    with pytest.raises(ValueError, match="the rows of 2 processes overlap"):
        row_share(mesh_of((3, 1, 2, 1), per_process=3))


def test_parameters_are_gathered_for_their_use_and_their_gradients_scattered():
    mesh = AbstractMesh((2, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    tree = {"w1": {"kernel": jnp.ones((8, 8))}, "blocks": {"w1": {"kernel": jnp.ones((2, 8, 8))}}}

    def loss(tree):
        with jax.sharding.use_abstract_mesh(mesh):
            used = whole(tree, without="blocks")
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(used))

    text = str(jax.make_jaxpr(jax.grad(loss))(tree))
    assert text.count("sharding_constraint") == 2  # the one that is not stacked, and its gradient
    assert whole(tree) is tree  # no mesh
