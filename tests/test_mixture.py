"""Who is in step s, against a ten-line loop."""

import dataclasses

import numpy as np
import pytest

from moe_embed.data import mixture as mixture_lib
from moe_embed.data.mixture import Mixture, shares, shuffled

SIZES, WEIGHTS, BATCH, STEPS = (10, 7, 23), (0.5, 0.3, 0.2), 4, 60


def make(sizes=SIZES, weights=WEIGHTS, batch_size=BATCH, steps=STEPS, seed=0) -> Mixture:
    return Mixture(sizes, share=weights or sizes, batch_size=batch_size, steps=steps, seed=seed)


def by_loop(sizes, weights, batch_size, steps, seed):
    weights = weights or sizes
    share = [weight / sum(weights) for weight in weights]
    count, epoch, waiting = [0] * len(sizes), [0] * len(sizes), [[] for _ in sizes]
    for step in range(steps):
        behind = [share[s] * (step + 1) - count[s] for s in range(len(sizes))]
        s = behind.index(max(behind))
        count[s] += 1
        while len(waiting[s]) < batch_size:
            waiting[s] += shuffled(np.arange(sizes[s]), sizes[s], key=(seed, s, epoch[s])).tolist()
            epoch[s] += 1
        yield s, waiting[s][:batch_size]
        del waiting[s][:batch_size]


def sequence(mixture: Mixture, steps: int = STEPS) -> list:
    return [(source, pairs.tolist()) for source, pairs in map(mixture.batch_at, range(steps))]


@pytest.mark.parametrize("sizes", [SIZES, (3, 50), (1, 1, 1, 1)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_against_a_loop(sizes, weighted, batch_size):
    weights = tuple(range(1, len(sizes) + 1)) if weighted else ()
    settings = dict(sizes=sizes, weights=weights, batch_size=batch_size, steps=STEPS, seed=3)
    assert sequence(make(**settings)) == list(by_loop(**settings))
    assert sequence(make(**settings | {"seed": 4})) != list(by_loop(**settings)) or max(sizes) == 1


def test_each_pair_once_an_epoch_over_batch_borders():
    mixture = make(sizes=(10,), weights=(), batch_size=4, steps=25)  # 100 draws: ten epochs, borders inside batches
    drawn = np.concatenate([mixture.batch_at(step)[1] for step in range(25)]).reshape(10, 10)
    assert np.array_equal(np.sort(drawn, axis=1), np.tile(np.arange(10), (10, 1)))
    assert len({tuple(epoch) for epoch in drawn.tolist()}) == 10  # a fresh order each time


def test_each_pair_once_an_epoch_for_each_of_several_sources():
    drawn = {source: [] for source in range(3)}
    for source, pairs in sequence(make()):
        drawn[source] += pairs
    for source, size in enumerate(SIZES):
        assert len(drawn[source]) > size
        for start in range(0, len(drawn[source]) - size + 1, size):
            assert sorted(drawn[source][start : start + size]) == list(range(size))


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0), (0.9, 0.1, 0.0), ()])
def test_shares_hold_at_every_prefix(weights):
    share = np.array(weights or SIZES, float) / sum(weights or SIZES)
    chosen = np.array([source for source, _ in sequence(make(weights=weights, steps=500), 500)])
    count = np.cumsum(chosen[:, None] == np.arange(3), axis=0)
    wanted = np.arange(1, 501)[:, None] * share
    assert np.abs(count - wanted).max() < 1
    assert not np.any(count[:, share == 0])
    at_random = np.random.default_rng(0).choice(3, 500, p=share)
    assert np.abs(np.cumsum(at_random[:, None] == np.arange(3), axis=0) - wanted).max() > 1  # the bound says something


def test_random_access_is_the_sequence():
    straight, mixture = sequence(make()), make()
    for step in np.random.default_rng(1).integers(0, STEPS, 200):
        source, pairs = mixture.batch_at(int(step))
        assert (source, pairs.tolist()) == straight[step]
        pairs[:] = -1  # a caller's own array


def test_more_steps_do_not_change_the_first_ones():
    assert sequence(make(steps=1000)) == sequence(make(steps=STEPS))


def test_another_seed_another_order():
    a, b = sequence(make(seed=0)), sequence(make(seed=1))
    assert [source for source, _ in a] == [source for source, _ in b]
    assert all(x != y for (_, x), (_, y) in zip(a, b, strict=True))
    two = make(sizes=(50, 50), weights=())
    assert two.batch_at(0)[1].tolist() != two.batch_at(1)[1].tolist()  # sources do not share an order


def test_one_source_a_batch():
    for source, pairs in map(make().batch_at, range(STEPS)):
        assert isinstance(source, int)
        assert pairs.shape == (BATCH,)
        assert pairs.dtype == np.int64
        assert 0 <= pairs.min() <= pairs.max() < SIZES[source]


def test_a_step_beyond_the_last_is_refused():
    with pytest.raises(IndexError):
        make().batch_at(STEPS)


LANGS = (["de", "en", "de", "ja", "de", "en"], ["", ""])


def make_groups(langs, *, each_language: bool, batch_size: int) -> list:
    """The groups of sources by their items' languages, each group's places written out."""
    sources = [mixture_lib.by_language(of_items) for of_items in langs]
    groups = mixture_lib.make_groups(sources, each_language=each_language, batch_size=batch_size)
    return [dataclasses.replace(g, members=g.members[np.arange(len(g.members))]) for g in groups]


def test_groups_are_sources_or_languages_and_lose_nobody():
    whole = make_groups(LANGS, each_language=False, batch_size=2)
    assert [(g.source, g.lang, g.members.tolist()) for g in whole] == [(0, "", [0, 1, 2, 3, 4, 5]), (1, "", [0, 1])]
    apart = make_groups(LANGS, each_language=True, batch_size=1)
    assert [(g.source, g.lang, g.members.tolist()) for g in apart] == [
        (0, "de", [0, 2, 4]), (0, "en", [1, 5]), (0, "ja", [3]), (1, "", [0, 1])]  # fmt: skip
    together = make_groups(LANGS, each_language=True, batch_size=3)
    assert [(g.lang, g.members.tolist()) for g in together] == [("de", [0, 2, 4]), ("en+ja", [1, 3, 5]), ("", [0, 1])]
    joined = make_groups(
        LANGS, each_language=True, batch_size=2
    )  # "ja" cannot fill a batch by itself: with the smallest
    assert [(g.lang, len(g.members)) for g in joined] == [("de", 3), ("en+ja", 3), ("", 2)]
    small = make_groups(LANGS, each_language=True, batch_size=9)  # nor can a whole source
    assert [(g.lang, len(g.members)) for g in small] == [("de+en+ja", 6), ("", 2)]
    for groups in (whole, apart, together, joined, small):
        assert sum(len(g.members) for g in groups) == 8


def test_shares_by_hand():
    groups = make_groups([["a"] * 16 + ["b"] * 81, ["c"] * 1], each_language=True, batch_size=1)
    np.testing.assert_allclose(shares(groups, weights=(), smoothing=1.0), np.array([16, 81, 1]) / 98)
    np.testing.assert_allclose(shares(groups, weights=(), smoothing=0.25), np.array([2, 3, 1]) / 6)  # p ** 0.25
    np.testing.assert_allclose(shares(groups, weights=(0.5, 0.5), smoothing=0.25), [0.2, 0.3, 0.5])
    assert not np.allclose(shares(groups, weights=(0.4, 0.6), smoothing=0.25), [0.2, 0.3, 0.5])


def test_a_language_has_its_share_however_it_is_spread_over_files():
    one_file = make_groups([["en"] * 800, ["sw"] * 50], each_language=True, batch_size=1)
    eight = make_groups([["en"] * 100] * 8 + [["sw"] * 50], each_language=True, batch_size=1)
    expected = shares(one_file, weights=(), smoothing=0.3)
    found = shares(eight, weights=(), smoothing=0.3)
    np.testing.assert_allclose([found[:8].sum(), found[8]], expected)
    np.testing.assert_allclose(found[:8], expected[0] / 8)
    files = make_groups(
        [["en"] * 100] * 8 + [["sw"] * 50], each_language=False, batch_size=1
    )  # nobody asked for languages
    np.testing.assert_allclose(shares(files, weights=(), smoothing=0.5)[8], 50**0.5 / (8 * 10 + 50**0.5))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_an_order_has_everybody_once_and_depends_on_its_key(size):
    places = np.arange(size)
    order = shuffled(places, size, key=(0, 1, 2))
    assert np.array_equal(np.sort(order), places)
    assert np.array_equal(shuffled(places[::-1], size, key=(0, 1, 2)), order[::-1])  # a place at a time, in any order
    if size > 4:
        for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
            assert not np.array_equal(shuffled(places, size, key=key), order)


def test_orders_are_like_drawn_ones():
    """Chi-squared of where each of 10 items goes over 4,000 keys: 99.9 % of true draws of 10 x 10 cells are below 137."""
    count = np.zeros((10, 10))
    for seed in range(4000):
        count[np.arange(10), shuffled(np.arange(10), 10, key=(seed, 0, 0))] += 1
    assert ((count - 400) ** 2 / 400).sum() < 137
    neighbours = np.abs(np.diff(shuffled(np.arange(100_000), 100_000, key=(0, 0, 0))))
    assert abs(neighbours.mean() / (100_000 / 3) - 1) < 0.02  # two draws are a third apart on average


def test_no_order_is_as_long_as_the_data():
    order = shuffled(np.array([0, 1, 10**12 - 1]), 10**12, key=(0, 0, 0))
    assert len(set(order.tolist())) == 3
    assert 0 <= order.min() <= order.max() < 10**12


def test_places_by_hand():
    langs = ["de", "de", "en", "de", "ja", "en"]
    found = mixture_lib.by_language(langs)
    assert {lang: places[np.arange(len(places))].tolist() for lang, places in found.items()} == {
        "de": [0, 1, 3],
        "en": [2, 5],
        "ja": [4],
    }
    both = mixture_lib.together([found["ja"], found["de"]])
    assert both[np.array([3, 0, 2])].tolist() == [4, 0, 3]
    assert len(mixture_lib.by_language([])) == 0
