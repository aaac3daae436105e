"""Alignment, uniformity and effective rank, against loops and by hand."""

import math

import numpy as np
import pytest

from moe_embed import geometry


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_alignment_by_hand():
    x = np.eye(3)
    assert geometry.alignment(x, x) == 0
    assert geometry.alignment(x, np.roll(x, 1, axis=0)) == pytest.approx(2)
    assert geometry.alignment(x, -x) == pytest.approx(4)


def test_uniformity_against_a_loop():
    x = unit(np.random.default_rng(0), 12, 5)
    pairs = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True))) for i in range(12) for j in range(i)
    ]
    assert geometry.uniformity(x.astype(np.float32)) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert geometry.uniformity(np.ones((4, 1))) == pytest.approx(0)
    assert geometry.uniformity(unit(np.random.default_rng(1), 12, 5)) != pytest.approx(geometry.uniformity(x), rel=1e-5)
    with pytest.raises(ValueError, match="two vectors"):
        geometry.uniformity(x[:1])


def test_effective_rank_by_hand():
    assert geometry.effective_rank(np.eye(7)) == pytest.approx(7)
    assert geometry.effective_rank(np.repeat(np.eye(7)[:1], 5, axis=0)) == pytest.approx(1)
    x = np.diag([3.0, 1.0])
    assert geometry.effective_rank(x) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert geometry.spectrum(x) == pytest.approx([0.75, 0.25])
