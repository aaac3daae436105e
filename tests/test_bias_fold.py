"""The direction on paper, from a norm and from a fit; and that each condition of it is needed."""

import numpy as np
import pytest

from moe_embed import bias_fold
from moe_embed.config import UserError


def test_the_direction_on_paper():
    """gamma (1, 2), beta (3, 2): sum 3 + 1, v = (1/4, 1/8), and x = (3 + a, 2 - 2a) has x . v = 1 for every a."""
    v_D = bias_fold.exact_direction(np.array([1, 2]), np.array([3, 2]))
    np.testing.assert_array_equal(v_D, [1 / 4, 1 / 8])
    a = np.linspace(-2, 2, 5)
    np.testing.assert_allclose(np.stack([3 + a, 2 - 2 * a], 1) @ v_D, 1, rtol=1e-15)
    assert np.abs(np.stack([3 + a, 2 + 2 * a], 1) @ v_D - 1).max() > 0.5  # not a norm's output: its n does not sum to 0


def test_a_direction_is_fitted_where_the_norm_gives_none():
    """beta 0 leaves no exact direction; a first number that hardly varies is one, and is found."""
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(2000, 8))
    x_TD[:, 0] = 3 + 0.03 * x_TD[:, 0]
    gamma_D, beta_D = np.ones(8), np.zeros(8)
    fold = bias_fold.direction(gamma_D, beta_D, x_TD, layer=3)
    assert fold.how == "fitted"
    np.testing.assert_allclose(fold.v_D, [1 / 3] + [0] * 7, atol=1e-3)
    assert fold.error == pytest.approx(0.01, rel=0.1)
    n_TD = rng.normal(size=(2000, 8))
    n_TD -= n_TD.mean(1, keepdims=True)
    exact = bias_fold.direction(gamma_D, beta_D + 1, n_TD + 1, layer=3)
    assert (exact.how, exact.error < 1e-6, 1e-4 < exact.error_bfloat16 < 1e-2) == ("exact", True, True)
    alone = bias_fold.direction(
        gamma_D, beta_D + 3e-4, n_TD + 3e-4, layer=3
    )  # v is 417 eight times, and no fit is near it
    assert (alone.how, alone.error < 1e-3, alone.error_bfloat16 > 0.2) == ("exact, for float32 alone", True, True)
    with pytest.raises(UserError, match=r"layer 3's first MLP bias .* is 0, and a fit on text is off by"):
        bias_fold.direction(gamma_D, beta_D, rng.normal(size=(2000, 8)), layer=3)


def test_a_ridge_keeps_a_fitted_direction_small():
    """Two dims that are nearly one: without a ridge their difference would be blown up to catch what noise they have."""
    rng = np.random.default_rng(0)
    x_TD = np.ones((500, 2)) + rng.normal(size=(500, 1)) * [0.0, 1e-6]
    np.testing.assert_allclose(bias_fold.fitted_direction(x_TD), [0.5, 0.5], rtol=1e-3)
