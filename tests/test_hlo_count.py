"""FLOPs, collectives and kernels of HLO written by hand, and of small programs that are compiled here."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_embed import hlo, hlo_count, sharding
from moe_embed.config import Mesh, UserError

F = "f32[{}]{{0}}"


def program(*lines: str, before: str = "") -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.read(f"HloModule m, num_partitions=8\n\n{before}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n")


def flops(*lines: str, **keywords) -> float:
    return hlo_count.count(program(*lines), **keywords).flops


def test_a_dot_is_two_m_n_k():
    lines = ("%a = f32[3,5]{1,0} parameter(0)", "%b = f32[5,7]{1,0} parameter(1)")
    dot = "ROOT %d = f32[3,7]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert flops(*lines, dot) == 2 * 3 * 5 * 7
    lines = ("%a = f32[4,3,5]{2,1,0} parameter(0)", "%b = f32[4,5,7]{2,1,0} parameter(1)")
    dot = (
        "ROOT %d = f32[4,3,7]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1}"
    )
    assert flops(*lines, dot) == 2 * 4 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        # a product [512, 768] x [768, 3072], as a TPU writes it
        ("8,512,768", "768,3072,1", "8,512,3072", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 8 * 512 * 768 * 3072),
        # a batch of 8 x 12 products [512, 64] x [64, 512], the batch in a window of which one place is no hole
        ("8,512,12,64", "8,12,512,64", "8,12,512,512", "window={size=8x12 stride=7x11 lhs_dilate=8x12}, "
         "dim_labels=0b1f_01oi->01bf", 2 * 8 * 12 * 512 * 512 * 64),
        # three outputs of a window of 3 over 5 places
        ("1,5,2", "3,2,4", "1,3,4", "window={size=3}, dim_labels=b0f_0io->b0f", 2 * 3 * 3 * 2 * 4),
        # five outputs: the two at the ends have a place of padding
        ("1,5,2", "3,2,4", "1,5,4", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 13 * 2 * 4),
        ("1,5,4", "3,2,4", "1,3,4", "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=2", 2 * 3 * 3 * 2 * 4),
    ],
)  # fmt: skip
def test_a_convolution_counts_places_that_exist(lhs, rhs, out, attributes, expected):
    lines = (f"%a = bf16[{lhs}] parameter(0)", f"%b = bf16[{rhs}] parameter(1)")
    assert flops(*lines, f"ROOT %c = bf16[{out}] convolution(%a, %b), {attributes}") == expected


DOT = """%work (p: f32[3,5]) -> f32[3,3] {
  %p = f32[3,5]{1,0} parameter(0)
  ROOT %d = f32[3,3]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%condition (s: (s32[], f32[3,5])) -> pred[] {
  %s = (s32[], f32[3,5]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[3,5])) -> (s32[], f32[3,5]) {
  %t = (s32[], f32[3,5]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %x = f32[3,5]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %f = f32[3,3]{1,0} fusion(%x), kind=kOutput, calls=%work
  ROOT %r = (s32[], f32[3,5]) tuple(%next, %x)
}
"""
START = ("%x.1 = f32[3,5]{1,0} parameter(0)", "%zero = s32[] constant(0)",
         "%in = (s32[], f32[3,5]) tuple(%zero, %x.1)")  # fmt: skip
ONCE = 2 * 3 * 3 * 5


@pytest.mark.parametrize(
    ("line", "times"),
    [
        ("%f = f32[3,3]{1,0} fusion(%x.1), kind=kOutput, calls=%work", 1),
        ("%f = f32[3,3]{1,0} call(%x.1), to_apply=%work", 1),
        ("%w = (s32[], f32[3,5]) while(%in), condition=%condition, body=%body", 4),
        ('%w = (s32[], f32[3,5]) while(%in), condition=%condition, body=%body, '
         'backend_config={"known_trip_count":{"n":"9"}}', 9),
        ("%c = f32[3,3]{1,0} conditional(%zero, %x.1, %x.1), branch_computations={%work, %condition}", 1),
        ("%s = ((f32[3,5]), f32[3,3]) async-start(%x.1), calls=%work", 1),
    ],
)  # fmt: skip
def test_what_is_called_counts_as_often_as_it_runs(line, times):
    assert hlo_count.count(program(*START, line, before=DOT)).flops == times * ONCE


ENDLESS = DOT.replace("s32[] constant(4)", "s32[] get-tuple-element(%s), index=0")
WHILE = '%w = (s32[], f32[3,5]) while(%in), condition=%condition, body=%body, metadata={op_name="f/tiles/while"}'


def test_a_loop_of_unknown_length_is_an_error_that_names_it_unless_the_caller_knows():
    module = program(*START, WHILE, before=ENDLESS)
    with pytest.raises(UserError, match=r"the loop w \(f/tiles/while\)"):
        hlo_count.count(module)
    with pytest.raises(UserError, match="the loop w"):
        hlo_count.count(module, trips=lambda op_name: 3.0 if "others" in op_name else None)
    counted = hlo_count.count(module, trips=lambda op_name: 2.5 if "tiles" in op_name else None)
    assert counted.flops == 2.5 * ONCE
    assert counted.loops == (hlo_count.Loop("w", "f/tiles/while", 2.5, "caller"),)


def test_a_loop_of_unknown_length_with_nothing_in_it_does_not_matter():
    idle = ENDLESS.replace("calls=%work", "calls=%condition")
    assert hlo_count.count(program(*START, WHILE, before=idle)).loops == ()


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", "all-reduce", 400 * 2 * 3 / 4),
        ("all-reduce(%x), replica_groups={}", "all-reduce", 400 * 2 * 7 / 8),
        ("all-gather(%x), replica_groups=[2,4]<=[8]", "all-gather", 400 * 3),
        ("reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0)", "reduce-scatter", 400 / 2),
        ("all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}", "all-to-all", 400 * 3 / 4),
        ("all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", "all-to-all", 400 * 3 / 4),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 400),
        ("all-gather-start(%x), replica_groups=[1,8]<=[8]", "all-gather", 400 * 7),
        ("all-reduce(%x, %y), replica_groups=[1,8]<=[8]", "all-reduce", 600 * 2 * 7 / 8),
    ],
)
def test_bytes_over_the_wires(line, kind, sent):
    arrays = ("%x = f32[100]{0} parameter(0)", "%y = bf16[100]{0} parameter(1)")
    module = program(*arrays, f"%c = (f32[100], f32[800]) {line}, channel_id=1")
    assert hlo_count.count(module).bytes_by_kind() == {kind: sent}


def test_a_start_and_its_done_are_one_and_equal_channels_are_not():
    gather = "%s = (f32[4], f32[32]) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8]"
    lines = ("%x = f32[4]{0} parameter(0)", gather, "%d = f32[32] all-gather-done(%s)")
    assert hlo_count.count(program(*lines)).bytes_by_kind() == {"all-gather": 7 * 16}
    again = gather.replace("%s", "%s.1")  # a TPU's text has channel 1 for all that came from shard_map
    assert hlo_count.count(program(*lines, again)).bytes_by_kind() == {"all-gather": 2 * 7 * 16}


CHAINED = """%{name} (p: f32[4]) -> f32[32] {{
  %p.{name} = f32[4]{{0}} parameter(0)
  %g.{name} = f32[32]{{0}} all-gather(%p.{name}), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={{chain_id="0"}}
  ROOT %c.{name} = f32[32]{{0}} custom-call(%g.{name}), custom_call_target="AsyncCollective{name}"
}}
"""


def test_a_chain_of_fusions_around_one_collective_is_one():
    calls = [f"%f.{name} = f32[32] fusion(%x), kind=kCustom, calls=%{name}" for name in ("Start", "Done")]
    before = "\n".join(CHAINED.format(name=name) for name in ("Start", "Done"))
    assert hlo_count.count(program("%x = f32[4]{0} parameter(0)", *calls, before=before)).bytes_by_kind() == {
        "all-gather": 7 * 16
    }
    other = before.replace('chain_id="0"', 'chain_id="1"', 1)
    assert hlo_count.count(program("%x = f32[4]{0} parameter(0)", *calls, before=other)).bytes_by_kind() == {
        "all-gather": 2 * 7 * 16
    }


SCATTER = """%all-reduce-scatter.1 (p: f32[800]) -> f32[100] {
  %p = f32[800]{0} parameter(0)
  %r = f32[800]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %id = u32[] partition-id()
  ROOT %d = f32[100]{0} dynamic-slice(%r, %id), dynamic_slice_sizes={100}
}
"""


def test_a_fusion_of_all_reduce_and_own_part_is_a_reduce_scatter():
    lines = ("%x = f32[800]{0} parameter(0)", "%f = f32[100] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1")
    assert hlo_count.count(program(*lines, before=SCATTER)).bytes_by_kind() == {"reduce-scatter": 3200 * 7 / 8}


def test_kernels_are_counted_by_the_caller_and_named_if_nobody_can():
    lines = (
        "%x = f32[4,8]{1,0} parameter(0)",
        '%gmm.2 = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/gmm"}',
        '%b = f32[4,8]{1,0} custom-call(%gmm.2), custom_call_target="AllocateBuffer"',
    )
    known = hlo_count.count(program(*lines), kernel_flops=lambda kernel, operands: operands[0].dims[1])
    assert [(work.what, work.flops, work.times) for work in known.kernels] == [("gmm", 8, 1)]
    assert (known.flops, known.unknown) == (8, ())
    nobody = hlo_count.count(program(*lines))
    assert [work.what for work in nobody.unknown] == ["gmm"]
    assert nobody.flops == 0


def test_a_product_in_a_scan_of_five_counts_five_times():
    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    compiled = jax.jit(f).lower(jnp.ones((32, 64)), jnp.ones((64, 64))).compile()
    assert hlo_count.count(hlo.read(compiled.as_text())).flops == 5 * 2 * 32 * 64 * 64
    assert compiled.cost_analysis()["flops"] < 1.1 * 2 * 32 * 64 * 64  # the reason for all this


@pytest.mark.parametrize(
    ("letter_call", "expected"),
    [
        ("gather", {"all-gather": 7 * 256}),
        ("scatter", {"reduce-scatter": 7 / 8 * 256}),
        ("reduce", {"all-reduce": 2 * 7 / 8 * 256}),
        ("pass_on", {"collective-permute": 256}),
    ],
)
def test_collectives_of_compiled_programs(eight_devices, letter_call, expected):
    mesh = sharding.make_mesh(Mesh(), devices=eight_devices)
    local = functools.partial(lambda x: jax.tree.map(jnp.sin, getattr(sharding, letter_call)(jnp.cos(x), "B")))
    specs = sharding.spec("x_BL", column="activation")
    f = sharding.on_each_device(local, mesh=mesh, in_specs=(specs,), out_specs=specs)
    x = jax.device_put(
        jnp.ones((64, 8)), sharding.shardings({"x_BL": jnp.ones((64, 8))}, column="activation", mesh=mesh)["x_BL"]
    )
    text = jax.jit(f).lower(x).compile().as_text()
    assert hlo_count.count(hlo.read(text)).bytes_by_kind() == expected
