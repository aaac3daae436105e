"""The few counts of micro-batches: against all choices there are."""

import itertools

import numpy as np
import pytest

from moe_embed.data import sizes
from moe_embed.data.packing import pack


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


def texts(count: int, *, of: int, batches: int, devices: int = 1, seed=0):
    """Lengths of `count` texts a device, up to `of` tokens each."""
    rng = np.random.default_rng(seed)
    return [[rng.integers(4, of + 1, count).tolist() for _ in range(devices)] for _ in range(batches)]


def fitted(batches, **fixed):
    longest = max(n for b in batches for of in b for n in of)
    return sizes.fit(batches, **{"longest": longest, "row_length": 0, "rows": 0, "texts_per_row": 64} | fixed)


@pytest.mark.parametrize(
    ("count", "of", "devices"), [(16, 40, 1), (16, 200, 1), (512, 100, 1), (512, 100, 4), (64, 250, 2)]
)
def test_rows_hold_what_they_must_with_little_padding(count, of, devices):
    batches = texts(count, of=of, batches=30, devices=devices)
    length, rows, needed = fitted(batches)
    assert max(n for b in batches for device in b for n in device) <= length
    assert rows * length <= sizes.TOKENS
    for b, micro in zip(batches, needed, strict=True):
        packed = max(pack(device, row_length=length, texts_per_row=64).num_rows for device in b)
        assert (micro - 1) * rows < packed <= micro * rows
    few = sizes.choose(needed, np.ones(30), worst=max(needed), most=sizes.FEW + 1)
    assert len(few) <= sizes.FEW
    run = sum(next(m for m in few if m >= n) for n in needed) * rows * length * devices
    assert sum(sum(map(sum, b)) for b in batches) / run > 0.8
    fixed = sum(-(-max(pack(device, row_length=512, texts_per_row=64).num_rows for device in b) // 8) for b in batches)
    assert run <= fixed * 8 * 512 * devices  # what configs/finetune_pairs.py had whatever the texts


def test_what_is_set_stays():
    batches = texts(64, of=100, batches=10)
    assert fitted(batches, row_length=320)[0] == 320
    assert fitted(batches, rows=3)[1] == 3
    assert fitted(batches, rows=3, row_length=320)[:2] == (3, 320)[::-1]
    assert fitted(batches)[:2] != (320, 3)


def test_a_long_text_gets_a_long_row():
    assert fitted([[[1_000, 5, 5]]])[0] == 1_024
    assert fitted([[[5, 5, 5]]])[0] < 1_024
