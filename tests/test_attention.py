"""Attention over packed rows: the three kernels beside a loop over texts, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed.model import attention

B, L, H, K = 2, 128, 2, 64
SEGMENTS = np.zeros((B, L), np.int32)  # rows end in padding
SEGMENTS[0, :100] = np.repeat([1, 2, 3], [60, 1, 39])
SEGMENTS[1, :70] = 1
ON_TPU = functools.partial(attention.on_tpu, interpret=True)
ON_GPU = functools.partial(attention.on_gpu, interpret=True)


def example(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.array(rng.normal(size=(B, L, H, K)), dtype) for _ in range(3))


def loop(q, k, v):
    """Each text by itself, each head by itself."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    mixed = np.zeros(q.shape)
    for b, h, s in np.ndindex(B, H, 3):
        own = SEGMENTS[b] == s + 1
        scores = q[b, own, h] @ k[b, own, h].T / K**0.5
        weights = np.exp(scores - scores.max(initial=-np.inf, axis=-1, keepdims=True))
        mixed[b, own, h] = weights / weights.sum(-1, keepdims=True) @ v[b, own, h]
    return mixed


def graded(f, q, k, v):
    """The output of real tokens, and the gradients of a random function of it."""
    real = jnp.array(SEGMENTS > 0)[:, :, None, None]
    target = jnp.array(np.random.default_rng(9).normal(size=q.shape), jnp.float32)

    def total(q, k, v):
        mixed = f(q, k, v, jnp.array(SEGMENTS)).astype(jnp.float32) * real
        return (mixed * target).sum(), mixed

    with jax.default_matmul_precision("highest"):
        (_, mixed), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return mixed, *gradients


KERNELS = {"plain": attention.in_blocks, "splash": ON_TPU, "triton": ON_GPU}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_values_equal_a_loop_over_texts(kernel):
    q, k, v = example()
    np.testing.assert_allclose(graded(kernel, q, k, v)[0], loop(q, k, v), atol=2e-6)
    assert np.abs(graded(kernel, q, k, v.at[0, 59].add(1))[0] - loop(q, k, v)).max() > 1e-3


@pytest.mark.parametrize("kernel", [ON_TPU, ON_GPU], ids=["splash", "triton"])
def test_gradients_equal_those_of_autodiff(kernel):
    got, expected = graded(kernel, *example()), graded(attention.in_blocks, *example())
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert np.abs(graded(kernel, *example(seed=1))[1] - expected[1]).max() > 1e-3


def test_blocks_of_queries_change_nothing_and_are_recomputed(monkeypatch):
    whole = graded(attention.in_blocks, *example())
    monkeypatch.setattr(attention, "BLOCK", 48)  # 32 is the largest divisor of 128 below
    for a, b in zip(graded(attention.in_blocks, *example()), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    f = lambda q, k, v: attention.in_blocks(q, k, v, jnp.array(SEGMENTS)).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(f))(*example()))
    assert f"{B},{H},32,{L}" in text
    assert f"{B},{H},{L},{L}" not in text


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_bfloat16_stays_bfloat16_and_is_close(kernel):
    low = kernel(*example(dtype=jnp.bfloat16), jnp.array(SEGMENTS))
    assert low.dtype == jnp.bfloat16
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.array(low, np.float32)[real], loop(*example())[real], atol=0.03)


@pytest.mark.parametrize(("length", "head_dim", "calls"), [(256, 64, 2), (64, 64, 0), (256, 32, 0)])
def test_on_tpu_whole_tiles_take_the_kernel_and_other_rows_do_not(length, head_dim, calls):
    x = jax.ShapeDtypeStruct((2, length, 2, head_dim), jnp.bfloat16)
    f = lambda q, k, v: attention.attend(q, k, v, jnp.ones((2, length), jnp.int32)).astype(jnp.float32).sum()  # noqa: E731
    lowered = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == calls
