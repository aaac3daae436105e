"""Norm, rotary positions, attention over packed rows and pooling, each against a few lines of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from moe_embed import config as config_lib
from moe_embed.model import layers

D, H, K, L = 16, 2, 8, 12
ENCODER = config_lib.Encoder(vocab_size=64, num_layers=2, dim=D, num_heads=H, ffn_dim=24, max_seq_length=32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(module, x_LD, positions):
    """One text, no packing: the textbook."""
    w, b = np.array(module.w_qkv_DGHK[...]), np.array(module.b_qkv_GHK[...])
    qkv = np.einsum("ld,dghk->glhk", x_LD, w) + b[:, None]
    angle = positions[:, None] * 10_000.0 ** (-np.arange(0, K, 2) / K)
    complex_turn = np.exp(1j * angle)[:, None]
    q, k = (((t[..., : K // 2] + 1j * t[..., K // 2 :]) * complex_turn) for t in qkv[:2])
    scores = np.einsum("lhk,jhk->hlj", q, k.conj()).real / np.sqrt(K)
    mixed = np.einsum("hlj,jhk->lhk", softmax(scores), qkv[2])
    return np.einsum("lhk,hkd->ld", mixed, np.array(module.w_out_HKD[...])) + np.array(module.b_out_D[...])


def attention():
    module = layers.Attention(ENCODER, rngs=nnx.Rngs(0))
    module.b_qkv_GHK[...] = jax.random.normal(jax.random.key(1), (3, H, K))
    module.b_out_D[...] = jax.random.normal(jax.random.key(2), (D,))
    return module


def packed():
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
    x = jax.random.normal(jax.random.key(3), (1, L, D))
    return x, segments, positions


def run(module, x, segments, positions):
    return module(x, segments, layers.rotary_angles(positions, head_dim=K, base=10_000.0))


def test_attention_in_a_packed_row_is_that_of_each_text_alone():
    module, (x, segments, positions) = attention(), packed()
    y = np.array(run(module, x, segments, positions)[0])
    np.testing.assert_allclose(y[:5], attend(module, np.array(x[0, :5]), np.arange(5)), atol=1e-5)
    np.testing.assert_allclose(y[5:9], attend(module, np.array(x[0, 5:9]), np.arange(4)), atol=1e-5)


def test_one_segment_over_both_texts_is_noticed():
    module, (x, segments, positions) = attention(), packed()
    y = np.array(run(module, x, jnp.minimum(segments, 1), positions)[0])
    assert np.abs(y[:5] - attend(module, np.array(x[0, :5]), np.arange(5))).max() > 1e-2


def test_positions_that_do_not_restart_only_matter_by_their_differences():
    module, (x, segments, positions) = attention(), packed()
    shifted = run(module, x, segments, positions + 7)
    np.testing.assert_allclose(shifted[0, :9], run(module, x, segments, positions)[0, :9], atol=1e-5)
    stretched = run(module, x, segments, positions * 2)
    assert np.abs(np.array(stretched - shifted)[0, :9]).max() > 1e-3


def test_norm_by_hand():
    module = layers.Norm(2, epsilon=0.0)
    module.scale_D[...], module.bias_D[...] = jnp.array([2.0, 3.0]), jnp.array([1.0, -1.0])
    np.testing.assert_allclose(module(jnp.array([[1.0, 5.0]])), [[-1.0, 2.0]], rtol=1e-6)


def test_mlp_uses_the_exact_gelu():
    module = layers.Mlp(ENCODER, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 7, D)).astype(np.float32)
    h = x @ np.array(module.w_up_DF[...])
    h = h * (1 + erf(h / np.sqrt(2))) / 2
    np.testing.assert_allclose(module(jnp.array(x)), h @ np.array(module.w_down_FD[...]), atol=1e-5)


def test_gelu_and_its_derivatives_are_jaxs():
    x = jnp.linspace(-6, 6, 101)
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_allclose(layers.gelu(x), exact(x), atol=1e-6)
    for ours, theirs in (
        (jax.grad(layers.gelu), jax.grad(exact)),
        (jax.grad(jax.grad(layers.gelu)), jax.grad(jax.grad(exact))),
    ):
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), atol=1e-6)
    assert np.abs(layers.gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4


def test_mean_pool_by_hand():
    hidden = jnp.array([[[1.0, 0.0], [3.0, 0.0], [5.0, 4.0], [9.0, 9.0]]])
    pooled = layers.mean_pool(hidden, jnp.array([[1, 1, 2, 0]]), num_segments=3)
    np.testing.assert_array_equal(pooled, [[[2.0, 0.0], [5.0, 4.0], [0.0, 0.0]]])
