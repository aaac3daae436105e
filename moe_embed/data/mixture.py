"""Which pairs are in step s: a pure function of (seed, sizes, shares, batch size, step), the same on every host.

A global batch comes from one group, a source or one language of it, so that its in-batch negatives are of one kind
(arXiv 2502.07972, section 4.3). Nothing of it has to be saved: resuming at step s asks for step s.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """What one global batch is drawn from."""

    source: int
    lang: str  # "" where groups are whole sources; "+"-joined where languages too small for a batch were put together
    members: np.ndarray  # int64 places in the source


def make_groups(langs: Sequence[Sequence[str]], *, by_language: bool, batch_size: int) -> list[Group]:
    """The groups of sources whose items have these languages: a source each, or a language of a source each.

    Languages that cannot fill one batch share a group, if need be with the smallest that can: nothing is dropped, and no
    batch is a few pairs over and over (unless the whole source is).
    """
    groups = []
    for source, of_items in enumerate(langs):
        if not by_language:
            groups.append(Group(source, "", np.arange(len(of_items))))
            continue
        names, which = np.unique(np.asarray(of_items, dtype=str), return_inverse=True)
        counts = np.bincount(which, minlength=len(names))
        small = [i for i in range(len(names)) if counts[i] < batch_size]
        large = [i for i in range(len(names)) if counts[i] >= batch_size]
        if small and large and counts[small].sum() < batch_size:
            smallest = min(large, key=lambda i: counts[i])
            large.remove(smallest)
            small = sorted([*small, smallest])
        groups += [Group(source, str(names[i]), np.flatnonzero(which == i)) for i in large]
        if small:
            together = "+".join(str(names[i]) for i in small)
            groups.append(Group(source, together, np.flatnonzero(np.isin(which, small))))
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
    """Groups by deficit, pairs by a fresh permutation an epoch.

    The group of a step is the one furthest behind its share, so shares hold at every moment, not on average. Within a
    group, epochs are laid end to end and cut into batches: each pair is seen once an epoch, no tail is dropped.
    """

    def __init__(self, sizes: Sequence[int], *, share: Sequence[float], batch_size: int, steps: int, seed: int):
        """`sizes` counts each group's pairs; `share` is how often each is drawn (they are made to sum to 1)."""
        share = np.asarray(share, np.float64)
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.group_of_step, self.turn_of_step = _schedule(share / share.sum(), steps)
        self._permutation = functools.lru_cache(maxsize=2 * len(self.sizes))(self._draw)

    def batch_at(self, step: int) -> tuple[int, np.ndarray]:
        """The group of step `step` and the int64 places [batch_size] of its pairs in the group."""
        group, turn = int(self.group_of_step[step]), int(self.turn_of_step[step])
        size = self.sizes[group]
        place = np.arange(turn * self.batch_size, (turn + 1) * self.batch_size)
        epoch, within = np.divmod(place, size)
        pairs = np.empty(self.batch_size, np.int64)
        for e in np.unique(epoch):
            pairs[epoch == e] = self._permutation(group, int(e))[within[epoch == e]]
        return group, pairs

    def _draw(self, group: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, group, epoch)).permutation(self.sizes[group])


def _schedule(share: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step its group, and how many earlier steps that group had."""
    group, turn = np.empty(steps, np.int32), np.empty(steps, np.int64)
    count = np.zeros(len(share), np.int64)
    for step in range(steps):
        group[step] = np.argmax(share * (step + 1) - count)
        turn[step] = count[group[step]]
        count[group[step]] += 1
    return group, turn
