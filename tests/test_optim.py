"""Schedules by hand, decay by name, and one AdamW step against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import optim


def values(name, steps=(0, 5, 10, 55, 100)):
    c = config_lib.Optim(learning_rate=2.0, schedule=name, warmup_steps=10)
    return [float(optim.schedule(c, steps=100)(step)) for step in steps]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0, 1, 2, 1, 0]),
        ("linear", [0, 1, 2, 1, 0]),
        ("constant", [0, 1, 2, 2, 2]),
        ("inverse_sqrt", [0, 1, 2, 2 * (10 / 55) ** 0.5, 2 * (10 / 100) ** 0.5]),
    ],
)
def test_schedules_by_hand(name, expected):
    np.testing.assert_allclose(values(name), expected, atol=1e-6)


def test_without_warm_up_it_begins_at_the_peak():
    assert float(optim.schedule(config_lib.Optim(learning_rate=2.0), steps=10)(0)) == 2.0


def test_matrices_decay_and_biases_and_norms_do_not():
    names = {
        "w_up_REDF": 1,
        "word_VD": 1,
        "w_router_RED": 1,
        "position_PD": 1,
        "w_DU": 1,
        "b_U": 0,
        "scale_U": 0,
        "bias_U": 0,
        "b_V": 0,
        "b_qkv_RGHK": 0,
        "b_out_RD": 0,
        "scale_RD": 0,
        "bias_D": 0,
        "type_YD": 0,
    }
    mask = optim.decays({name: jnp.zeros(()) for name in names})
    assert mask == {name: bool(decays) for name, decays in names.items()}


def test_one_step_is_adamw_after_clipping():
    c = config_lib.Optim(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=1.0, epsilon=1e-8)
    optimizer = optim.make(c, steps=10)
    params = {"w_up_DF": jnp.array([[3.0]]), "b_up_F": jnp.array([4.0])}
    gradients = {"w_up_DF": jnp.array([[30.0]]), "b_up_F": jnp.array([40.0])}
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    # Adam's first step is the gradient's sign; only the matrix decays.
    np.testing.assert_allclose(updates["w_up_DF"], [[-0.1 * (1 + 0.5 * 3)]], rtol=1e-5)
    np.testing.assert_allclose(updates["b_up_F"], [-0.1], rtol=1e-5)
    np.testing.assert_allclose(state[1][0].mu["b_up_F"], [0.1 * 40 / 50], rtol=1e-5)  # clipped to norm 1


def test_a_frozen_piece_table_has_no_moments_and_no_gradient():
    params = {
        "embedding": {"word_VD": jnp.array([[3.0]]), "type_YD": jnp.array([[1.0]])},
        "w_up_DF": jnp.array([[2.0]]),
    }

    def names(**changes):
        c = config_lib.Optim(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=1.0, **changes)
        optimizer = optim.make(c, steps=10)
        frozen = optim.freeze if c.freeze_embedding else lambda params: params
        loss = lambda params: sum(30 * x.sum() for x in jax.tree.leaves(frozen(params)))  # noqa: E731
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return [path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim], updates

    found, updates = names(freeze_embedding=True)
    assert sorted(found) == ["type_YD", "type_YD", "w_up_DF", "w_up_DF"]  # first and second moments
    assert updates["embedding"]["word_VD"] == 0  # exactly: it does not even decay
    np.testing.assert_allclose(updates["w_up_DF"], [[-0.1 * (1 + 0.5 * 2)]], rtol=1e-5)
    found, updates = names()
    assert found.count("word_VD") == 2
    np.testing.assert_allclose(updates["embedding"]["word_VD"], [[-0.1 * (1 + 0.5 * 3)]], rtol=1e-5)


def test_an_update_that_is_not_good_is_left_out_and_the_count_goes_on():
    new, old = {"count": jnp.int32(3), "mu": jnp.array([1.0, jnp.nan])}, {"count": jnp.int32(2), "mu": jnp.zeros(2)}
    left, taken = (optim.keep_if(jnp.bool_(good), new, old) for good in (False, True))
    assert (int(left["count"]), left["mu"].tolist()) == (3, [0.0, 0.0])
    assert float(taken["mu"][0]) == 1.0
    assert jnp.isnan(taken["mu"][1])
