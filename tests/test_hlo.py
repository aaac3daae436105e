"""HLO text, written by hand: what is read of it, and how often loops run."""

import jax
import jax.numpy as jnp
import pytest

from moe_embed import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}, num_partitions=8

%fused (p.0: f32[4,8], p.1: (s32[], bf16[2])) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p.1 = (s32[], /*index=1*/bf16[2]{0}) parameter(1)
  ROOT %add = f32[4,8]{1,0:T(8,128)S(1)} add(%p.0, %p.0), metadata={op_name="jit(f)/(a)/add"}
}

ENTRY %main.1 (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %k.1 = (f32[4,8]{1,0}, pred[3]{0}) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, metadata={op_name="jit(f)/kernel"}
  %y = f32[4,8]{1,0} get-tuple-element(%k.1), index=0
  ROOT %out = f32[4,8]{1,0} fusion(%y, %k.1), kind=kLoop, calls=%fused
}
"""


def test_computations_instructions_and_shapes():
    module = hlo.read(TEXT)
    assert (module.entry, module.num_devices) == ("main.1", 8)
    assert list(module.computations) == ["fused", "main.1"]
    fused, main = module.computations["fused"], module.computations["main.1"]
    assert (fused.root, main.root) == ("add", "out")
    assert fused.instructions["p.1"].arrays == (hlo.Array("s32", ()), hlo.Array("bf16", (2,)))
    add = fused.instructions["add"]
    assert (add.opcode, add.operands, add.op_name) == ("add", ("p.0", "p.0"), "jit(f)/(a)/add")
    assert main.operands(main.instructions["out"]) == [
        hlo.Array("f32", (4, 8)),
        hlo.Array("f32", (4, 8)),
        hlo.Array("pred", (3,)),
    ]


def test_an_instruction_may_take_several_lines():
    kernel = hlo.read(TEXT).computations["main.1"].instructions["k.1"]
    assert (kernel.opcode, kernel.op_name) == ("custom-call", "jit(f)/kernel")


@pytest.mark.parametrize(
    ("array", "size"),
    [(("f32", (4, 8)), 128), (("bf16", (3,)), 6), (("pred", (5,)), 5), (("s4", (4,)), 2), (("f8e4m3fn", (4,)), 4),
     (("u64", ()), 8), (("token", ()), 0)],
)  # fmt: skip
def test_bytes(array, size):
    assert hlo.Array(*array).bytes == size


LOOP = """HloModule jit_f

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.0 = pred[] compare(%a, %b), direction={direction}
}}

%condition (s: (s32[], f32[2], s32[])) -> pred[] {{
  %s = (s32[], f32[2], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = {limit}
  ROOT %lt = {compare}
}}

%body (t: (s32[], f32[2], s32[])) -> (s32[], f32[2], s32[]) {{
  %t = (s32[], f32[2], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %c = s32[] constant({step})
  %next = s32[] add(%j, %c)
  %v = f32[2]{{0}} get-tuple-element(%t), index=1
  %e = s32[] get-tuple-element(%t), index=2
  %e.1 = {after}
  ROOT %r = (s32[], f32[2], s32[]) tuple(%next, %v, %e.1)
}}

ENTRY %main (x: f32[2], n: s32[]) -> f32[2] {{
  %x = f32[2]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant({first})
  %zero.1 = s32[] copy(%zero)
  %ten = s32[] constant(10)
  %in = (s32[], f32[2], s32[]) tuple(%zero.1, %x, {last})
  %w = (s32[], f32[2], s32[]) while(%in), condition=%condition, body=%body{known}
  ROOT %o = f32[2]{{0}} get-tuple-element(%w), index=1
}}
"""
PLAIN = dict(
    direction="LT", limit="s32[] constant(7)", compare="pred[] compare(%i, %limit), direction=LT", step=1, first=0,
    last="%ten", after="s32[] copy(%e)", known="",
)  # fmt: skip
IN_STATE = "s32[] get-tuple-element(%s), index=2"


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 7),
        ({"first": 2}, 5),
        ({"step": 2}, 4),
        ({"compare": "pred[] compare(%i, %limit), direction=LE"}, 8),
        ({"compare": "pred[] compare(%limit, %i), direction=GT"}, 7),
        ({"compare": "pred[] fusion(%i, %limit), kind=kLoop, calls=%compared"}, 7),
        ({"compare": "pred[] fusion(%i, %limit), kind=kLoop, calls=%compared", "direction": "LE"}, 8),
        ({"limit": IN_STATE}, 10),
        ({"limit": IN_STATE, "last": "%n"}, None),  # an argument: depends on the data
        ({"limit": IN_STATE, "after": "s32[] add(%e, %c)"}, None),  # the limit moves
        ({"step": 0}, None),
        ({"first": 9}, 0),
        ({"limit": IN_STATE, "last": "%n", "known": ', backend_config={"known_trip_count":{"n":"12"}}'}, 12),
    ],
)
def test_trip_counts(changes, trips):
    module = hlo.read(LOOP.format(**PLAIN | changes))
    main = module.computations["main"]
    assert hlo.trip_count(module, main, main.instructions["w"]) == trips


def test_real_loops_have_their_lengths():
    def f(x, n):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x), None), x, None, length=5)[0]
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x) * i, x)

    module = hlo.read(jax.jit(f).lower(jnp.ones(300), 3).compile().as_text())
    places = [(c, i) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"]
    assert sorted(str(hlo.trip_count(module, inside, loop)) for inside, loop in places) == ["5", "None"]
