"""The head of masked language modelling against a loop in numpy; rows of the table that are no pieces score nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed import config as config_lib
from moe_embed import optim
from moe_embed.model import mlm_head

T, D, V = 5, 8, 12
ENCODER = config_lib.Encoder(vocab_size=V, num_layers=2, dim=D, num_heads=2, ffn_dim=16, max_seq_length=32)


def example(scale=1.0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    head = {"w_DU": scale * draw(D, D), "b_U": scale * draw(D), "scale_U": draw(D), "bias_U": draw(D), "b_V": draw(V)}
    return head, draw(V, D), draw(T, D)


def loop(head, word_VD, hidden_TD, *, epsilon):
    score_TV = np.zeros((T, V))
    for t in range(T):
        x_U = [sum(hidden_TD[t, d] * head["w_DU"][d, u] for d in range(D)) + head["b_U"][u] for u in range(D)]
        x_U = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in x_U])
        x_U = (x_U - x_U.mean()) / np.sqrt(x_U.var() + epsilon) * head["scale_U"] + head["bias_U"]
        for v in range(V):
            score_TV[t, v] = sum(x_U * word_VD[v]) + head["b_V"][v]
    return score_TV


def test_scores_equal_the_loop_and_every_parameter_counts():
    head, word_VD, hidden_TD = example()
    score_TV = mlm_head.scores(head, word_VD, hidden_TD, num_ids=V, epsilon=1e-5)
    expected = loop(head, word_VD, hidden_TD, epsilon=1e-5)
    np.testing.assert_allclose(score_TV, expected, rtol=1e-4, atol=1e-4)
    for name in head:
        other = mlm_head.scores(head | {name: head[name] * 1.1}, word_VD, hidden_TD, num_ids=V, epsilon=1e-5)
        assert np.abs(other - expected).max() > 1e-2, name


def test_rows_beyond_the_last_piece_have_no_part_in_the_softmax():
    head, word_VD, hidden_TD = example()
    whole = loop(head, word_VD, hidden_TD, epsilon=1e-5)
    score_TV = mlm_head.scores(head, word_VD, hidden_TD, num_ids=9, epsilon=1e-5)
    np.testing.assert_allclose(score_TV[:, :9], whole[:, :9], rtol=1e-4, atol=1e-4)
    assert (np.asarray(score_TV[:, 9:]) == np.float32(mlm_head.MASKED)).all()
    found = np.asarray(jax.nn.logsumexp(score_TV, axis=1))
    np.testing.assert_allclose(found, np.log(np.exp(whole[:, :9]).sum(1)), rtol=1e-4)
    assert (np.log(np.exp(whole).sum(1)) - found > 1e-3).all()

    def loss(word_VD, b_V):
        score_TV = mlm_head.scores(head | {"b_V": b_V}, word_VD, hidden_TD, num_ids=9, epsilon=1e-5)
        return jax.nn.logsumexp(score_TV, axis=1).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(word_VD, head["b_V"]):
        assert not gradient[9:].any()
        assert gradient[:9].any()


def test_the_norm_has_the_encoders_epsilon():
    head, word_VD, hidden_TD = example(scale=0.1)  # little variance: epsilon is felt
    for epsilon in (1e-12, 1e-2):
        score_TV = mlm_head.scores(head, word_VD, hidden_TD, num_ids=V, epsilon=epsilon)
        np.testing.assert_allclose(score_TV, loop(head, word_VD, hidden_TD, epsilon=epsilon), rtol=1e-4, atol=1e-4)
    assert np.abs(score_TV - loop(head, word_VD, hidden_TD, epsilon=1e-12)).max() > 0.1


def test_in_bfloat16_products_are_low_and_scores_are_float32():
    head, word_VD, hidden_TD = example()
    exact = mlm_head.scores(head, word_VD, hidden_TD, num_ids=V, epsilon=1e-5)
    low = mlm_head.scores(head, word_VD, jnp.asarray(hidden_TD, jnp.bfloat16), num_ids=V, epsilon=1e-5)
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - exact).max() < 0.03 * np.abs(exact).max()


def test_fresh_parameters():
    head = mlm_head.init(ENCODER, key=jax.random.key(0))
    assert {name: array.shape for name, array in head.items()} == {
        "w_DU": (D, D), "b_U": (D,), "scale_U": (D,), "bias_U": (D,), "b_V": (V,)}  # fmt: skip
    assert {array.dtype for array in head.values()} == {jnp.float32.dtype}
    assert {name for name, decays in optim.decays(head).items() if decays} == {"w_DU"}
    wide = mlm_head.init(config_lib.Encoder(vocab_size=V, num_layers=2, dim=256, num_heads=2, ffn_dim=16,
                                            max_seq_length=32), key=jax.random.key(0))  # fmt: skip
    assert abs(float(wide["w_DU"].std()) * 16 - 1) < 0.02  # unit variance in, unit variance out
    assert (head["scale_U"] == 1).all()
    assert not any(head[name].any() for name in ("b_U", "bias_U", "b_V"))
