"""Which pairs are in step s: a pure function of (seed, sizes, shares, batch size, step), the same on every host.

A global batch comes from one group, a source or one language of it, so that its in-batch negatives are of one kind
(arXiv 2502.07972, section 4.3). Nothing of it has to be saved: resuming at step s asks for step s. Nothing in it is as long
as the data either: places are stretches of a source, and an epoch's order is a function of the place.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

ROUNDS = 6  # of the Feistel network behind `shuffled`; four are a pseudorandom permutation (Luby and Rackoff, 1988)


class Places:
    """Ascending places in a source as stretches: `places[k]` for an int64 array k, `len(places)`."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int]):
        self.starts, self.lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        self.before = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def __getitem__(self, k: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self.before, k, side="right") - 1
        return self.starts[which] + k - self.before[which]


def by_language(langs: Sequence[str]) -> dict[str, Places]:
    """Items' languages in order -> the places of each language."""
    langs = np.asarray(langs, dtype=str)
    starts = np.flatnonzero(np.r_[True, langs[1:] != langs[:-1]]) if len(langs) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(langs)])
    return {str(name): Places(starts[langs[starts] == name], lengths[langs[starts] == name])
            for name in np.unique(langs)}  # fmt: skip


def together(parts: Sequence[Places]) -> Places:
    """The places of all parts, which share none."""
    starts = np.concatenate([part.starts for part in parts])
    order = np.argsort(starts, kind="stable")
    return Places(starts[order], np.concatenate([part.lengths for part in parts])[order])


def shuffled(place: np.ndarray, size: int, *, key: Sequence[int]) -> np.ndarray:
    """int64 places in [0, size) under a permutation of them that `key` chooses: a function, never an array of `size`.

    A Feistel network over the least 4 ** h >= size numbers, walked until it falls below size (Black and Rogaway, 2002).
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)
    x = np.array(place, np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> shift, x[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        x[todo] = left << shift | right
        todo = todo[x[todo] >= size]
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every bit of 64 depends on every bit."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@dataclasses.dataclass(frozen=True)
class Group:
    """What one global batch is drawn from."""

    source: int
    lang: str  # "" where groups are whole sources; "+"-joined where languages too small for a batch were put together
    members: Places  # in the source


def make_groups(sources: Sequence[Mapping[str, Places]], *, each_language: bool, batch_size: int) -> list[Group]:
    """The groups of sources whose languages are at these places: a source each, or a language of a source each.

    Languages that cannot fill one batch share a group, if need be with the smallest that can: nothing is dropped, and no
    batch is a few pairs over and over (unless the whole source is).
    """
    groups = []
    for source, places in enumerate(sources):
        if not each_language:
            groups.append(Group(source, "", together(list(places.values()))))
            continue
        names = sorted(places)
        small = [name for name in names if len(places[name]) < batch_size]
        large = [name for name in names if len(places[name]) >= batch_size]
        if small and large and sum(len(places[name]) for name in small) < batch_size:
            smallest = min(large, key=lambda name: len(places[name]))
            large.remove(smallest)
            small = sorted([*small, smallest])
        groups += [Group(source, name, places[name]) for name in large]
        if small:
            groups.append(Group(source, "+".join(small), together([places[name] for name in small])))
    return groups


def shares(groups: Sequence[Group], *, weights: Sequence[float], smoothing: float) -> np.ndarray:
    """How often each group is drawn, sums to 1: in proportion to size ** smoothing (arXiv 1911.02116, section 3.1).

    The size is that of a language over all sources, however it is spread over files; its groups divide it by their own.
    `weights`, one a source, fix what the groups of a source have together; () leaves that to the sizes too.
    """
    size = np.array([float(len(group.members)) for group in groups])
    if not weights:
        key = [group.lang or f"source {group.source}" for group in groups]  # no language: a whole source
        _, which = np.unique(key, return_inverse=True)
        total = np.bincount(which, weights=size)[which]
        share = total**smoothing * size / total
    else:
        share = size**smoothing
        source = np.array([group.source for group in groups])
        share *= np.asarray(weights, np.float64)[source] / np.bincount(source, weights=share)[source]
    return share / share.sum()


class Mixture:
    """Groups by deficit, pairs by a fresh order an epoch.

    The group of a step is the one furthest behind its share, so shares hold at every moment, not on average. Within a
    group, epochs are laid end to end and cut into batches: each pair is seen once an epoch, no tail is dropped.
    """

    def __init__(self, sizes: Sequence[int], *, share: Sequence[float], batch_size: int, steps: int, seed: int):
        """`sizes` counts each group's pairs; `share` is how often each is drawn (they are made to sum to 1)."""
        share = np.asarray(share, np.float64)
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.group_of_step, self.turn_of_step = _schedule(share / share.sum(), steps)

    def batch_at(self, step: int) -> tuple[int, np.ndarray]:
        """The group of step `step` and the int64 places [batch_size] of its pairs in the group."""
        group, turn = int(self.group_of_step[step]), int(self.turn_of_step[step])
        size = self.sizes[group]
        place = np.arange(turn * self.batch_size, (turn + 1) * self.batch_size)
        epoch, within = np.divmod(place, size)
        pairs = np.empty(self.batch_size, np.int64)
        for e in np.unique(epoch):
            pairs[epoch == e] = shuffled(within[epoch == e], size, key=(self.seed, group, int(e)))
        return group, pairs


def _schedule(share: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step its group, and how many earlier steps that group had."""
    group, turn = np.empty(steps, np.int32), np.empty(steps, np.int64)
    count = np.zeros(len(share), np.int64)
    for step in range(steps):
        group[step] = np.argmax(share * (step + 1) - count)
        turn[step] = count[group[step]]
        count[group[step]] += 1
    return group, turn
