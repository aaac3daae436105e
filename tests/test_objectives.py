"""The balance loss by hand and against a loop; masked language modelling against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from moe_embed import objectives
from moe_embed.model import encoder
from moe_embed.model.moe import RouterSums
from tests import tiny


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


def test_the_loss_is_tiled_where_its_scores_would_be_too_many():
    """8 bytes a score: 2,048 pairs a device against 16,384 documents are 256 MiB, the most that is held."""

    def form(num_devices=8, **of_loss):
        c = tiny.config(data={"batch_size": 16_384, "teacher": "t" if "distill" in of_loss else ""}, loss=of_loss)
        return objectives.with_form(c, num_devices=num_devices).loss.form

    assert form() == "gathered"
    assert form(num_devices=4) == form(dims=(8,)) == "ring"
    assert form(num_devices=4, form="gathered") == "gathered"
    assert form(form="ring") == "ring"
    assert form(num_devices=4, distill="embeddings") == "gathered"  # the ring has none
    assert form(num_devices=1, objective="mlm") == "gathered"


def mlm_by_hand(params, batch, *, c, num_ids):
    """The scores of every piece in every place first; then those of the masked places, one after the other.

    Returns the mean loss, the mean of hits and how many places counted; RouterSums, None for a dense encoder.
    """
    rows = [batch[name] for name in objectives.ROWS]
    f = jax.jit(lambda params, *rows: encoder.apply(params, *rows, c=c.encoder, moe=c.moe))
    with jax.default_matmul_precision("highest"):
        apply = tiny.compiled(f, params, *(array[0] for array in rows))
    head, losses, hits, all_sums = params["head"], [], [], []
    for m in range(len(rows[0])):
        hidden_BLD, sums = apply(params, *(array[m] for array in rows))
        x_BLU = np.float64(hidden_BLD) @ head["w_DU"] + head["b_U"]
        x_BLU = x_BLU * (1 + erf(x_BLU / np.sqrt(2))) / 2
        x_BLU = (x_BLU - x_BLU.mean(-1, keepdims=True)) / np.sqrt(x_BLU.var(-1, keepdims=True) + c.encoder.norm_epsilon)
        x_BLU = x_BLU * head["scale_U"] + head["bias_U"]
        score_BLV = (x_BLU @ params["embedding"]["word_VD"].T + head["b_V"])[..., :num_ids]
        for b, z in np.ndindex(batch["target_MBZ"][m].shape):
            target, score_V = batch["target_MBZ"][m, b, z], score_BLV[b, batch["place_MBZ"][m, b, z]]
            if target >= 0:
                losses.append(np.log(np.exp(score_V).sum()) - score_V[target])
                hits.append(score_V.argmax() == target)
        all_sums.append(sums)
    sums = jax.tree.map(lambda *parts: sum(parts), *all_sums) if all_sums[0] is not None else None
    return np.mean(losses), np.mean(hits), len(losses), sums


@pytest.mark.parametrize(("num_experts", "num_ids"), [(8, 60), (0, None)], ids=["mixture", "dense, all rows"])
def test_mlm_equals_all_scores_of_all_places(num_experts, num_ids):
    c = tiny.config(loss={"objective": "mlm"}, moe={"num_experts": num_experts}, data={"rows": 8})
    params, batch = tiny.params(c), tiny.mlm_batches(c).batch_at(0).arrays
    counted_BZ = batch["target_MBZ"] >= 0
    assert not counted_BZ.all(axis=-1).any()  # every row has fewer than Z, and not all as many
    assert len(set(counted_BZ.sum(-1).reshape(-1))) > 1

    f = jax.jit(lambda params, batch: objectives.mlm(params, batch, config=c, num_ids=num_ids))
    with jax.default_matmul_precision("highest"):
        measure = tiny.compiled(f, params, batch)
    loss, metrics = measure(params, batch)
    expected, accuracy, count, sums = mlm_by_hand(params, batch, c=c, num_ids=num_ids or 64)
    np.testing.assert_allclose(metrics["mlm_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["masked"] == count == counted_BZ.sum()
    real = (batch["segments_MBL"] > 0).sum()
    assert metrics["tokens"] == real
    if sums is None:
        assert loss == metrics["mlm_loss"]
        assert "balance_loss" not in metrics
    else:
        balance = objectives.balance_loss(sums, num_tokens=real, top_k=2)
        np.testing.assert_allclose(metrics["balance_loss"], balance, rtol=1e-5)
        np.testing.assert_allclose(loss, expected + 0.5 * balance, rtol=1e-5)  # config.loss.balance_coefficient
        assert balance > 0.5
        np.testing.assert_allclose(metrics["router_load_RE"], sums.choices_E * 8 / (real * 2), rtol=1e-5)

    other, *_ = mlm_by_hand(
        params, batch, c=c, num_ids=64 if num_ids else 60
    )  # the padding of the table in the softmax
    assert abs(other - expected) > 1e-3
    places = batch | {"place_MBZ": np.where(counted_BZ, batch["place_MBZ"], 5)}  # where no piece is asked for
    np.testing.assert_array_equal(measure(params, places)[0], loss)
    places = batch | {"place_MBZ": np.where(counted_BZ, 5, batch["place_MBZ"])}
    assert abs(float(measure(params, places)[0]) - float(loss)) > 1e-3
    fewer = batch | {"target_MBZ": np.where(np.arange(counted_BZ.shape[-1]) == 0, -1, batch["target_MBZ"])}
    assert measure(params, fewer)[1]["masked"] == count - counted_BZ[..., 0].sum()


def test_mlm_finds_a_piece_that_the_head_was_told():
    """With a bias that says "ka" whatever stands there, and nothing but "ka" masked, the loss is almost none."""
    c = tiny.config(loss={"objective": "mlm", "balance_coefficient": 0.0}, moe={"num_experts": 0}, data={"rows": 16})
    params, batch = tiny.params(c), dict(tiny.mlm_batches(c).batch_at(0).arrays)
    batch["target_MBZ"] = np.where(batch["target_MBZ"] >= 0, 4, -1)
    measure = tiny.compiled(jax.jit(lambda params: objectives.mlm(params, batch, config=c, num_ids=60)), params)
    losses = []
    for piece in (4, 5, 61):  # "ka"; "lo"; a row of the table that is no piece
        head = params["head"] | {"b_V": np.where(np.arange(64) == piece, 30.0, 0.0).astype(np.float32)}
        loss, metrics = measure(params | {"head": head})
        losses.append((float(loss), float(metrics["accuracy"])))
    assert losses[0][0] < 1e-6
    assert losses[0][1] == 1.0
    assert losses[1][0] > 20
    assert losses[1][1] == 0.0
    assert 1 < losses[2][0] < 20
