"""The loss against a ten-line numpy loop: hard negatives, duplicates, both directions, and over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import shard_map

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.infonce import infonce

N, D = 16, 8


def example(h=0, seed=0, duplicates=False):
    rng = np.random.default_rng(seed)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    ids = np.arange(N * (1 + h), dtype=np.int32)
    if duplicates:
        ids[(1 + h) * 3] = ids[0]
    if h:
        ids[1 + h + 1] = -1  # the second query lacks its first hard negative
    return unit(rng.normal(size=(N, D))), unit(rng.normal(size=(N * (1 + h), D))), ids


def loop(q, d, ids, *, temperature, h=0, bidirectional=False):
    losses, hits = [], 0
    for i in range(N):
        label = i * (1 + h)
        allowed = [j for j in range(len(d)) if ids[j] >= 0 and (j == label or ids[j] != ids[label])]
        scores = {j: float(q[i] @ d[j]) / temperature for j in allowed}
        loss = np.log(sum(np.exp(s) for s in scores.values())) - scores[label]
        if bidirectional:
            back = [k for k in range(N) if k == i or ids[k * (1 + h)] != ids[label]]
            loss = (loss + np.log(sum(np.exp(q[k] @ d[label] / temperature) for k in back)) - scores[label]) / 2
        losses.append(loss)
        hits += max(scores, key=scores.get) == label
    return np.mean(losses), hits / N


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_the_loop(h, bidirectional, duplicates):
    q, d, ids = example(h, duplicates=duplicates)
    loss, metrics = infonce(q, d, ids, temperature=0.1, bidirectional=bidirectional)
    expected, accuracy = loop(q, d, ids, temperature=0.1, h=h, bidirectional=bidirectional)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(accuracy)


def test_a_swapped_document_is_noticed():
    q, d, ids = example()
    expected, _ = loop(q, d, ids, temperature=0.1)
    loss, _ = infonce(q, d[::-1], ids, temperature=0.1)
    assert abs(float(loss) - expected) > 1e-2


def test_an_unmasked_duplicate_is_noticed():
    q, d, ids = example(duplicates=True)
    d[3] = d[0]
    masked, _ = infonce(q, d, ids, temperature=0.1)
    unmasked, _ = infonce(q, d, ids, temperature=0.1, mask_duplicates=False)
    assert float(unmasked) - float(masked) > 1e-3


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("h", [0, 2])
def test_loss_and_gradients_are_the_same_on_every_mesh(data, expert, h, eight_devices):
    q, d, ids = example(h, duplicates=True)
    f = lambda q, d, ids: infonce(q, d, ids, temperature=0.05, bidirectional=True)[0]  # noqa: E731
    expected, (dq, dd) = jax.value_and_grad(f, argnums=(0, 1))(q, d, ids)
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert), devices=eight_devices[: data * expert])
    rows = sharding.spec("x_ND", column="activation"), sharding.spec("x_N", column="activation")
    sharded = jax.jit(
        shard_map(
            jax.value_and_grad(f, argnums=(0, 1)),
            mesh=mesh,
            in_specs=(rows[0], rows[0], rows[1]),
            out_specs=(sharding.EVERYWHERE, (rows[0], rows[0])),
        )
    )
    loss, (got_dq, got_dd) = sharded(jnp.array(q), jnp.array(d), jnp.array(ids))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(got_dq, dq, atol=1e-6)
    np.testing.assert_allclose(got_dd, dd, atol=1e-6)


def test_large_scores_stay_finite():
    q, _, ids = example()
    assert np.isfinite(float(infonce(q, q, ids, temperature=1e-4)[0]))
    assert np.isfinite(float(infonce(q, -q, ids, temperature=1e-4)[0]))
