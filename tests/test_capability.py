"""A GPU that Triton does not know gets programs without its kernels, and is named."""

import types

import jax
import jax.numpy as jnp
import pytest

from moe_embed import config as config_lib
from moe_embed import doctor, train
from moe_embed.model import attention, capability, grouped_matmul
from tests import cuda


def gpu(capability: str, kind: str = "Tesla T4"):
    """As jax shows a GPU."""
    return types.SimpleNamespace(
        platform="gpu",
        device_kind=kind,
        compute_capability=capability,
        memory_stats=lambda: {"bytes_limit": 16 * 2**30},
    )


@pytest.mark.parametrize(
    ("found", "old"),
    [("7.5", True), ("6.0", True), ("8.0", False), ("8.9", False), ("9.0", False), ("10.0", False), ("12.0", False), ("gfx90a", False)],
)  # fmt: skip
def test_ampere_is_the_oldest(found, old):
    expected = f"Tesla T4 has compute capability {found}, and Triton's kernels need 8.0" if old else ""
    assert capability.too_old([gpu("9.0"), gpu(found)]) == expected
    assert capability.too_old(jax.devices()) == ""  # a CPU has none


@pytest.mark.parametrize(("found", "calls"), [("7.5", (0, 0)), ("8.0", (3, 2))])
def test_an_old_gpu_gets_no_kernel_of_triton(found, calls, monkeypatch):
    """Attention and the grouped matmul, with their gradients, lowered for CUDA; in the second case the kernels are there."""
    monkeypatch.setattr(jax, "devices", lambda: [gpu(found)])
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.float32)
    attend = lambda q, k, v: attention.attend(q, k, v, jnp.ones((2, 256), jnp.int32)).sum()  # noqa: E731
    text = cuda.lowered(jax.grad(attend, argnums=(0, 1, 2)), x, x, x)
    rows, w = jax.ShapeDtypeStruct((512, 128), jnp.float32), jax.ShapeDtypeStruct((2, 128, 256), jnp.float32)
    tiles = jnp.zeros(4, jnp.int32), jnp.int32(4)
    times = lambda rows, w: grouped_matmul.grouped_matmul(rows, w, *tiles).sum()  # noqa: E731
    of_times = cuda.lowered(jax.grad(times, argnums=(0, 1)), rows, w)
    assert (text.count("xla.gpu.triton"), of_times.count("xla.gpu.triton")) == calls


@pytest.mark.parametrize(("found", "said"), [("7.5", True), ("8.0", False)])
def test_a_run_and_doctor_say_so(found, said, monkeypatch, capsys, tmp_path):
    config = config_lib.load("configs/demo.py:tiny", ["--config.run.steps=1", "--config.data.batch_size=8"])
    monkeypatch.setattr(train, "jax", types.SimpleNamespace(devices=lambda: [gpu(found)], profiler=jax.profiler))
    train.train(config, workdir=tmp_path)
    sentence = f"kernels     XLA's own, slower: {capability.too_old([gpu(found)])}\n"
    assert (sentence in capsys.readouterr().out) == said
    monkeypatch.setattr(doctor, "multiply_rate", lambda dtype: 1.0)
    monkeypatch.setattr(doctor.jax, "devices", lambda: [gpu(found)])
    assert doctor.facts()["kernels"] == (capability.too_old([gpu(found)]) if said else "Pallas for Triton")
