"""The mixture against a loop over tokens; routing rules; padding; independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from moe_embed import config as config_lib
from moe_embed.model import moe as moe_lib

D, F, E, A = 16, 24, 4, 2
ENCODER = config_lib.Encoder(vocab_size=64, num_layers=2, dim=D, num_heads=2, ffn_dim=F, max_seq_length=32)


def layer(seed=0):
    module = moe_lib.Moe(ENCODER, config_lib.Moe(num_experts=E, top_k=A), rngs=nnx.Rngs(seed))
    module.b_out_D[...] = jax.random.normal(jax.random.key(5), (D,))
    return module


def example(b=3, length=40, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(b, length, D)).astype(np.float32)
    segments = np.ones((b, length), np.int32)
    segments[:, length - 5 :] = 0
    return jnp.array(x), jnp.array(segments)


def loop(module, x_BLD, segments_BL):
    """Softmax over all experts, the top two by probability, their MLPs weighted, one shared bias."""
    router, up, down = (np.array(w[...]) for w in (module.w_router_ED, module.w_up_EDF, module.w_down_EFD))
    y = np.zeros(x_BLD.shape, np.float32)
    for b, i in np.ndindex(x_BLD.shape[:2]):
        x = np.array(x_BLD[b, i])
        if segments_BL[b, i]:
            logits = router @ x
            p = np.exp(logits - logits.max())
            p /= p.sum()
            for e in np.argsort(-p, kind="stable")[:A]:
                h = x @ up[e]
                h = h * (1 + erf(h / np.sqrt(2))) / 2
                y[b, i] += p[e] * (h @ down[e])
        y[b, i] += np.array(module.b_out_D[...])
    return y


def test_values_equal_a_loop_over_tokens():
    module, (x, segments) = layer(), example()
    y, sums = module(x, segments)
    np.testing.assert_allclose(y, loop(module, x, segments), atol=2e-5)
    assert sums.choices_E.sum() == A * int((segments > 0).sum())
    np.testing.assert_allclose(sums.probability_E.sum(), int((segments > 0).sum()), rtol=1e-6)


def test_a_perturbed_expert_is_noticed():
    module, (x, segments) = layer(), example()
    expected = loop(module, x, segments)
    module.w_down_EFD[...] = module.w_down_EFD[...].at[2].mul(1.5)
    assert np.abs(np.array(module(x, segments)[0]) - expected).max() > 1e-2


def test_gradients_equal_those_of_all_experts_computed():
    """The oracle runs every expert on every token and masks: no sort, no rows, no custom gradient."""
    module, (x, segments) = layer(), example()
    graph, state = nnx.split(module)
    target = jax.random.normal(jax.random.key(2), x.shape)

    def fast(state, x):
        return (nnx.merge(graph, state)(x, segments)[0] * target).sum()

    def oracle(state, x):
        m = nnx.merge(graph, state)
        p = jax.nn.softmax(x @ m.w_router_ED[...].T)
        weight, chosen = jax.lax.top_k(p, A)
        gate = (jax.nn.one_hot(chosen, E) * weight[..., None]).sum(-2) * (segments > 0)[..., None]
        h = jax.nn.gelu(jnp.einsum("bld,edf->blef", x, m.w_up_EDF[...]), approximate=False)
        y = jnp.einsum("blef,efd,ble->bld", h, m.w_down_EFD[...], gate) + m.b_out_D[...]
        return (y * target).sum()

    got, expected = jax.grad(fast, argnums=(0, 1))(state, x), jax.grad(oracle, argnums=(0, 1))(state, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_lowest_index():
    expert, weight, _ = moe_lib.route(jnp.ones((3, D)), jnp.ones(3, bool), jnp.zeros((E, D)), top_k=A)
    np.testing.assert_array_equal(expert, [[0, 1]] * 3)
    np.testing.assert_allclose(weight, 1 / E)


def test_padding_is_routed_nowhere_and_changes_nothing():
    module, (x, segments) = layer(), example()
    y, sums = module(x, segments)
    noisy = jnp.where((segments > 0)[..., None], x, 100 * x + 3)
    y_noisy, sums_noisy = module(noisy, segments)
    np.testing.assert_array_equal(y[:, :35], y_noisy[:, :35])
    np.testing.assert_array_equal(sums.choices_E, sums_noisy.choices_E)
    np.testing.assert_array_equal(y[:, 35:], jnp.broadcast_to(module.b_out_D[...], (3, 5, D)))


def test_a_token_does_not_depend_on_its_neighbours():
    module, (x, segments) = layer(), example()
    other = jnp.array(np.random.default_rng(9).normal(size=x.shape).astype(np.float32)).at[0].set(x[0])
    np.testing.assert_allclose(module(x, segments)[0][0], module(other, segments)[0][0], atol=1e-6)


def test_every_token_on_one_expert_is_still_computed():
    """Dropless: the worst imbalance there is loses nothing."""
    module, (x, segments) = layer(), example()
    x = jnp.abs(x)
    module.w_router_ED[...] = jnp.zeros((E, D)).at[3].set(1.0).at[1].set(0.5)
    y, sums = module(x, segments)
    np.testing.assert_array_equal(sums.choices_E, [0, 105, 0, 105])
    np.testing.assert_allclose(y, loop(module, x, segments), atol=2e-5)


def test_dispatch_places_each_choice_once():
    rng = np.random.default_rng(0)
    expert_TA = jnp.array(rng.integers(0, E + 1, (700, A)))
    d = moe_lib.plan_dispatch(expert_TA, num_experts=E)
    flat = np.array(expert_TA).reshape(-1)
    rows, choices = np.array(d.row_TA).reshape(-1), np.array(d.choice_X)
    placed = rows < len(choices)
    np.testing.assert_array_equal(placed, flat < E)
    np.testing.assert_array_equal(choices[rows[placed]], np.flatnonzero(placed))
    assert (choices < flat.size).sum() == placed.sum()
    tile = choices.reshape(len(d.tile_expert), -1)
    for t in range(int(d.num_tiles)):
        used = tile[t][tile[t] < flat.size]
        assert set(flat[used]) == {int(d.tile_expert[t])}
        assert (np.diff(used) > 0).all()  # stable: a fixed order of summation in the gradients
