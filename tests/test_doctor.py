"""The facts of a bug report."""

import types

import jax
import jax.numpy as jnp
import pytest

import moe_embed
from moe_embed import doctor

NAMES = [
    "moe_embed",
    "python",
    "packages",
    "devices",
    "cores",
    "memory",
    "bfloat16",
    "kernels",
    "multiply",
    "disk",
    "cache",
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multiply_rate(dtype):
    rate = doctor.multiply_rate(dtype, size=128, repeats=2)
    assert 0 < rate < 1e7  # GFLOP/s; a wrong unit would be off by a thousand and more


def test_facts(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "multiply_rate", lambda dtype: 1234.4 if dtype is jnp.float32 else 56.0)
    facts = doctor.facts()
    assert list(facts) == NAMES
    assert all(isinstance(value, str) and value and "\n" not in value for value in facts.values())
    assert facts["moe_embed"] == moe_embed.__version__
    assert f"jax {jax.__version__}" in facts["packages"]
    assert facts["devices"].startswith(f"{jax.device_count()} x ")
    assert facts["multiply"].startswith("1,234 GFLOP/s float32, 56 bfloat16")
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


@pytest.mark.parametrize(
    ("platform", "has", "said"),
    [("cpu", {}, "slower than float32 on most CPUs"), ("tpu", {}, "native: use"), ("gpu", {"compute_capability": "9.0"}, "native: use"),
     ("gpu", {"compute_capability": "7.5"}, "not native (X has compute capability 7.5"), ("gpu", {"compute_capability": "gfx90a"}, "native: use")],
)  # fmt: skip
def test_what_is_said_of_bfloat16(platform, has, said):
    assert said in doctor._bfloat16(types.SimpleNamespace(platform=platform, device_kind="X", **has))


def test_an_absent_package_is_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor, "multiply_rate", lambda dtype: 1.0)
    assert doctor.facts()["packages"].endswith("no-such-package absent")
