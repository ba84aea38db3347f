"""Reading compiled programs: loops multiplied in, groups of devices, bytes of slices; against numbers by hand."""

import jax
import jax.numpy as jnp
import pytest

from geolrm_jax.runtime.hlo import parse

# As XLA writes for a TPU and a CPU, shortened: a loop of five rounds with a gather in its body and a sum after it.
TEXT = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p: bf16[5,16,8], i: s32[]) -> bf16[1,16,8] {
  %p = bf16[5,16,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,16,8]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,16,8}
}

%body (t: (s32[], bf16[5,16,8])) -> (s32[], bf16[5,16,8]) {
  %t = (s32[], bf16[5,16,8]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %w = bf16[5,16,8]{2,1,0} get-tuple-element(%t), index=1
  %part = bf16[1,16,8]{2,1,0:T(8,128)(2,1)} fusion(%w, %n), kind=kLoop, calls=%sliced
  %all-gather.1 = bf16[1,32,8]{2,1,0:S(1)} all-gather(%part), channel_id=1, replica_groups=mesh['x'=1,'y'=2,'z'=4], \
device_ids=([4,2]T(1,0)) {'y'}, dimensions={1}, metadata={op_name="jit(f)/while/body/gather"}
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  ROOT %out = (s32[], bf16[5,16,8]{2,1,0}) tuple(%next, %w)
}

%condition (t: (s32[], bf16[5,16,8])) -> pred[] {
  %t.1 = (s32[], bf16[5,16,8]{2,1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%t.1), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%n.1, %five), direction=LT
}

ENTRY %main (start: s32[], weights: bf16[5,16,8], x: f32[4]) -> f32[4] {
  %start = s32[] parameter(0)
  %weights = bf16[5,16,8]{2,1,0} parameter(1)
  %x = f32[4]{0} parameter(2)
  %both = (s32[], bf16[5,16,8]{2,1,0}) tuple(%start, %weights)
  %loop = (s32[], bf16[5,16,8]{2,1,0}) while(%both), condition=%condition, body=%body
  %all-reduce = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add, \
metadata={op_name="jit(f)/sum"}
  %moved = f32[4]{0} collective-permute(%all-reduce), source_target_pairs={{0,2},{2,0}}
  %swapped = f32[4]{0} all-to-all(%moved), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %result = f32[4]{0} negate(%swapped)
}
"""


def test_collectives_count_by_the_rounds_around_them():
    found = {c.kind: c for c in parse(TEXT).collectives()}
    gathered = found["all-gather"]
    assert (gathered.shape, gathered.size, gathered.times) == ("bf16[1,16,8]", 256, 5)
    assert gathered.sent == 5 * 256  # to the one other device of its group, once a round
    assert gathered.source == "jit(f)/while/body/gather"
    summed = found["all-reduce"]
    assert summed.sent == pytest.approx(2 * 3 / 4 * 16)  # reduce-scatter and all-gather of 16 bytes among four
    assert found["collective-permute"].sent == 16
    assert found["all-to-all"].sent == 8
    assert parse(TEXT).unknown() == []


def test_groups_in_all_their_notations():
    found = {c.kind: c for c in parse(TEXT).collectives()}
    mesh = {"data": 4, "fsdp": 2}
    assert found["all-gather"].group == (0, 1)  # numbers 0 2 4 6 1 3 5 7, as 2 x 4: along the first axis
    assert found["all-gather"].axes(mesh) == ("fsdp",)
    assert found["all-reduce"].group == (0, 2, 4, 6)
    assert found["all-reduce"].axes(mesh) == ("data",)
    assert found["all-to-all"].axes(mesh) == ("fsdp",)
    assert found["collective-permute"].axes(mesh) == ("data",)
    assert found["collective-permute"].axes({"data": 2, "fsdp": 4}) == ("fsdp",)


def test_memory_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip():
    # A round: the slice is read and written, and read by the gather, whose result stays on the chip; the counter.
    a_round = 2 * 256 + 4 + 256 + (4 + 4 + 4)
    assert parse(TEXT).memory_traffic() == 5 * a_round + 4 * 32  # and four times 16 bytes in and out


@pytest.mark.parametrize("bound", ["s32[] get-tuple-element(%t.1), index=0", "pred[] constant(false)"])
def test_a_loop_whose_rounds_depend_on_data_counts_once_and_is_named(bound):
    open_ended = TEXT.replace("%five = s32[] constant(5)", f"%five = {bound}")
    assert open_ended != TEXT
    program = parse(open_ended)
    assert program.unknown() == ["loop"]
    assert {c.kind: c.times for c in program.collectives()}["all-gather"] == 1


def test_a_compiled_scan():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(f).lower(jnp.ones((64, 64)), jnp.ones((7, 64, 64))).compile().as_text()
    program = parse(text)
    assert program.unknown() == [] and program.collectives() == []
    least = 7 * (3 * 64 * 64 * 4)  # a round reads its weights and the state, and writes the state
    assert least <= program.memory_traffic() <= 4 * least


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="found no ENTRY"):
        parse("HloModule empty")
