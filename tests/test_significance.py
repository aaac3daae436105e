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


def test_weighted_tasks_are_weighted_in_the_mean_the_interval_and_the_p_value():
    rng = np.random.default_rng(0)
    some = [rng.normal(at, 0.1, 400) for at in (0.0, 0.5, 1.0)]
    weights = [0.5, 0.25, 0.25]
    whole = sum(w * of.mean() for w, of in zip(weights, some, strict=True))
    assert significance.mean(some, weights=weights) == pytest.approx(whole)
    assert abs(significance.mean(some) - whole) > 0.1
    half = 1.96 * np.sqrt(sum(w**2 * of.var() / 400 for w, of in zip(weights, some, strict=True)))
    assert significance.interval(some, weights=weights) == pytest.approx((whole - half, whole + half), abs=1e-3)
    two = [np.full(6, 1.0), np.full(6, -1.0)]  # of weight 0.9 and 0.1: a mean of 0.8
    patterns = [np.mean(p) for p in itertools.product((-1, 1), repeat=6)]
    exact = np.mean([abs(0.9 * a + 0.1 * b) >= 0.8 - 1e-12 for a, b in itertools.product(patterns, repeat=2)])
    assert significance.p_value(two, weights=[0.9, 0.1]) == pytest.approx(exact, abs=0.004)
    assert significance.p_value(two) == 1.0  # the same weight each: no difference


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
