"""The balance loss by hand and against a loop; normalisation; the objective's metrics."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import objectives
from moe_embed.model.moe import RouterSums


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    even = RouterSums(jnp.full((2, 4), 5.0), jnp.full((2, 4), 2.5))  # 10 tokens, top 2 of 4
    assert float(objectives.balance_loss(even, num_tokens=10.0, top_k=2)) == pytest.approx(1.0)
    one = RouterSums(jnp.array([[10.0, 0, 0, 0]]), jnp.array([[10.0, 0, 0, 0]]))
    assert float(objectives.balance_loss(one, num_tokens=10.0, top_k=1)) == pytest.approx(4.0)


def test_balance_loss_equals_the_loop_of_the_paper():
    """megablocks, as contrastors calls it: E / (layers * T * k) * sum over layers and experts of count * mean probability."""
    rng = np.random.default_rng(0)
    tokens, experts, layers, k = 50, 8, 3, 2
    p = rng.dirichlet(np.ones(experts), (layers, tokens))
    counts = np.zeros((layers, experts))
    for layer, token in np.ndindex(layers, tokens):
        for e in np.argsort(-p[layer, token])[:k]:
            counts[layer, e] += 1
    expected = (
        experts
        / (layers * tokens * k)
        * sum(counts[layer, e] * p[layer, :, e].mean() for layer in range(layers) for e in range(experts))
    )
    sums = RouterSums(jnp.array(counts), jnp.array(p.sum(1)))
    assert float(objectives.balance_loss(sums, num_tokens=tokens, top_k=k)) == pytest.approx(expected, rel=1e-5)
    halves = [RouterSums(jnp.array(counts), jnp.array(p[:, half].sum(1) * 2)) for half in (slice(0, 25), slice(25, 50))]
    assert float(objectives.balance_loss(halves[0], num_tokens=tokens, top_k=k)) != pytest.approx(expected, rel=1e-5)


def test_normalise_by_hand_and_of_zero():
    np.testing.assert_allclose(objectives.normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
