"""The few counts of micro-batches: against all choices there are."""

import itertools

import numpy as np
import pytest

from moe_embed.data import sizes


def waste(chosen, needed, weight) -> float:
    run = sum(w * min(c for c in chosen if c >= n) for n, w in zip(needed, weight, strict=True))
    return run / sum(n * w for n, w in zip(needed, weight, strict=True)) - 1


def by_trying(needed, weight) -> tuple[int, float]:
    """The fewest counts that waste little enough, and the least such a choice can waste."""
    different = sorted(set(needed))
    for count in range(1, len(different) + 1):
        best = min(
            waste((*some, max(different)), needed, weight) for some in itertools.combinations(different, count - 1)
        )
        if best <= sizes.WASTE:
            return count, best
    raise AssertionError


@pytest.mark.parametrize("seed", range(8))
def test_against_every_choice(seed):
    rng = np.random.default_rng(seed)
    needed = [*rng.integers(3, 8, 20), *rng.integers(20, 24, 10), *rng.integers(60, 63, 10)]
    weight = rng.random(40)
    count, least = by_trying(needed, weight)
    chosen = sizes.choose(needed, weight, worst=200)
    assert chosen[-1] == 200
    assert len(chosen) - 1 == min(count, sizes.MOST - 1)
    if count < sizes.MOST:
        assert waste(chosen, needed, weight) == pytest.approx(least, abs=1e-12)
    assert waste((62, 200), needed, weight) > 0.1  # one would not do


def test_what_is_always_the_same_is_one_shape():
    assert sizes.choose([4] * 10, [1] * 10, worst=4) == (4,)
    assert sizes.choose([4] * 10, [1] * 10, worst=9) == (4, 9)
    assert sizes.choose([500] * 50 + [501], [1] * 51, worst=999) == (
        501,
        999,
    )  # half a percent is not worth a compilation
    assert sizes.choose([4, 9], [1, 0], worst=9) == (4, 9)
    assert sizes.choose([12], [1], worst=9) == (12,)


def test_never_more_than_most():
    assert len(sizes.choose(range(1, 200), [1] * 199, worst=500)) == sizes.MOST
