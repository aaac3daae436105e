"""Which experts read what, by hand."""

import types

import numpy as np
import pytest

from moe_embed import expert_maps


def test_shares_by_hand():
    chosen = {"de": np.array([[3.0, 1.0]]), "ja": np.array([[2.0, 6.0]])}
    model = types.SimpleNamespace(
        prompt=lambda name: None, encode_with_sums=lambda texts, task: (None, chosen[texts[0]])
    )
    share_NRE = expert_maps.shares(model, {"de": ["de"], "ja": ["ja"]})
    np.testing.assert_allclose(share_NRE, [[[0.75, 0.25]], [[0.25, 0.75]]])


def test_against_mean_by_hand():
    ratio_NE, information = expert_maps.against_mean(np.array([[0.75, 0.25], [0.25, 0.75]]))
    np.testing.assert_allclose(ratio_NE, [[np.log2(1.5), -1], [-1, np.log2(1.5)]])
    assert information == pytest.approx(0.75 * np.log2(1.5) - 0.25)
    assert expert_maps.against_mean(np.eye(3))[1] == pytest.approx(1, abs=1e-4)  # each group has its own
    two_each = np.array(
        [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    )  # the expert says the group, the group not quite the expert
    assert expert_maps.against_mean(two_each)[1] == pytest.approx(0.5, abs=1e-4)
    assert expert_maps.against_mean(np.full((2, 4), 0.25))[1] == 0
    assert expert_maps.against_mean(np.array([[1.0, 0.0], [1.0, 0.0]]))[1] == pytest.approx(0)  # one expert does it all
