"""Intervals and p-values against what is known: normal theory, all sign patterns of a few queries."""

import itertools

import numpy as np
import pytest

from moe_embed import significance


def test_the_interval_is_the_normal_one_for_many_queries():
    values = np.random.default_rng(0).normal(0.4, 0.3, 2_000)
    low, high = significance.interval([values])
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == (pytest.approx(values.mean() - half, abs=5e-4), pytest.approx(values.mean() + half, abs=5e-4))
    assert significance.interval([values]) == (low, high)  # the same draws every time
    assert significance.interval([values], seed=1) != (low, high)


def test_tasks_weigh_the_same_whatever_their_size():
    rng = np.random.default_rng(0)
    small, large = rng.normal(0.0, 0.1, 50), rng.normal(1.0, 0.1, 5_000)
    low, high = significance.interval([small, large])
    assert low < (small.mean() + large.mean()) / 2 < high
    half = 1.96 * np.sqrt(small.var() / 50 + large.var() / 5_000) / 2
    assert high - low == pytest.approx(2 * half, rel=0.05)


def test_the_p_value_is_that_of_all_patterns_of_signs():
    differences = np.array([0.5, 0.3, 0.4, -0.1, 0.2, 0.6, 0.1, 0.3])
    means = [np.mean(differences * signs) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.abs(means) >= differences.mean() - 1e-12)
    assert significance.p_value([differences]) == pytest.approx(exact, abs=0.004)
    assert significance.p_value([-differences]) == pytest.approx(exact, abs=0.004)
    assert significance.p_value([differences - differences.mean()]) == 1.0


def test_many_queries_are_drawn_a_part_at_a_time(monkeypatch):
    values = np.random.default_rng(0).random(300)
    whole = significance.interval([values])
    monkeypatch.setattr(significance, "AT_ONCE", 1_000)
    assert significance.interval([values]) == pytest.approx(whole, abs=2e-3)
