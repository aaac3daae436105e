"""Compiling ahead: what a step takes, what XLA says when it refuses, kernels by arithmetic. For TPUs: tests/aot."""

import jax
import pytest

from moe_embed import ahead, estimate, hlo, program, sharding, topology
from moe_embed import config as config_lib
from tests import tiny

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.06G) exceeds available "
         "HBM (15.75G).", (22.06 * GIB, 15.75 * GIB)),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.91G of 15.75G hbm. "
         "Exceeded hbm capacity by 2.16G.", (17.91 * GIB, 15.75 * GIB)),
        ("Used 900.5M of 0.5G hbm", (900.5 * 2**20, GIB / 2)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.00M of 128.00M vmem.", None),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)  # fmt: skip
def test_what_xla_says_when_memory_runs_out(message, expected):
    assert ahead.refusal(message) == expected


KERNEL = """HloModule m

ENTRY %main (a: bf16[384,16]) -> bf16[384,32] {{
  %s = s32[9]{{0}} parameter(0)
  %a = bf16[384,16]{{1,0}} parameter(1)
  %b = bf16[{b}]{{2,1,0}} parameter(2)
  %c = bf16[2,3,64,8]{{3,2,1,0}} parameter(3)
  %d = bf16[2,3,128,8]{{3,2,1,0}} parameter(4)
  ROOT %{name}.1 = {result} custom-call({operands}), custom_call_target="tpu_custom_call", metadata={{op_name="x"}}
}}
"""
ATTENTION = 2 * 2 * 3 * 64 * 128 * 8


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        ({"name": "gmm", "operands": "%s, %a, %b"}, 2 * 300 * 16 * 32),
        ({"name": "tgmm", "operands": "%s, %a, %a", "result": "f32[8,16,32]{2,1,0}"}, 2 * 300 * 16 * 32),
        ({"name": "splash_mha_fwd_segmented_residuals", "operands": "%s, %c, %d, %d"}, 2 * ATTENTION),
        ({"name": "splash_mha_dq_segmented", "operands": "%s, %c, %d, %d"}, 3 * ATTENTION),
        ({"name": "splash_mha_dkv_segmented", "operands": "%s, %c, %d, %d"}, 4 * ATTENTION),
        ({"name": "splash_mha_dkv_segmented", "operands": "%s, %c, %d, %d",
          "result": "(bf16[2,4,3,64,8]{4,3,2,1,0}, bf16[2,3,128,8]{3,2,1,0})"}, 5 * ATTENTION),
        ({"name": "something", "operands": "%s, %a, %b"}, None),
    ],
)  # fmt: skip
def test_kernels_by_arithmetic(changes, flops):
    text = KERNEL.format(**{"b": "8,16,32", "result": "bf16[384,32]{1,0}"} | changes)
    main = hlo.read(text).computations["main"]
    kernel = main.instructions[f"{changes['name']}.1"]
    operands = main.operands(kernel)
    found = ahead.grouped_flops(kernel, operands, rows=300) or ahead.attention_flops(kernel, operands)
    assert found == flops


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({}, tiny.batches),
        ({"data": {"num_negatives": 2}, "loss": {"distill": "scores"}}, tiny.batches),
        ({"loss": {"objective": "mlm", "bidirectional": False}}, tiny.mlm_batches),
    ],
)
def test_the_arrays_of_a_step_are_those_of_a_real_batch(changes, make, eight_devices):
    c = tiny.config(**changes)
    real = make(c, num_shards=8).batch_at(0).arrays
    mesh = sharding.make_mesh(config_lib.Mesh(expert=2), devices=eight_devices)
    step = estimate.step_of(c, num_devices=8, tokens_a_pair=32)._replace(num_micro=len(real["tokens_MBL"]))
    found = ahead.abstract_batch(c, step, mesh=mesh)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in real.items()}
    assert found["tokens_MBL"].sharding.shard_shape(found["tokens_MBL"].shape)[1] == c.data.rows


def compile_step(num_micro: int, *, recompute: bool, pairs: int = 4096) -> ahead.Compiled:
    """The train step of `pairs` pairs of 32 tokens on one device, in so many micro-batches; never run."""
    small = {"encoder": {"num_layers": 2}, "moe": {"num_experts": 2}, "run": {"recompute": recompute},
             "loss": {"bidirectional": False}}  # fmt: skip
    c = tiny.config(data={"rows": pairs // num_micro, "batch_size": pairs}, **small)
    prog = program.build(c, sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1]))
    step = estimate.step_of(c, num_devices=1, tokens_a_pair=32)
    assert step.num_micro == num_micro
    found = ahead.compile_step(prog, step, options={"xla_backend_optimization_level": 0})
    assert found.peak > estimate.bytes_on_device(prog.abstract_state)
    model = estimate.model_flops(c, step)
    expected = sum(model.values()) + (sum(model.values()) - model["loss"]) / 3 * recompute
    assert found.count.flops == pytest.approx(expected, rel=0.01)  # beside the model: pooling, half tiles
    return found


def test_flops_do_not_depend_on_how_a_batch_is_cut():
    whole, cut = compile_step(1, recompute=False).count, compile_step(8, recompute=False).count
    assert cut.flops == pytest.approx(whole.flops, rel=0.02)
    assert {loop.source for loop in cut.loops} == {"text", "caller"}
    assert cut.unknown == ()
    assert set(cut.bytes_by_kind().values()) == {0}  # among one
    twice = compile_step(8, recompute=True).count
    assert twice.flops > 1.2 * cut.flops


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(config_lib.UserError, match=r"needs libtpu, .* pip install -e \.\[tpu\]"):
        ahead.devices(topology.find("v5e-8"))
