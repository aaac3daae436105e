"""Which pairs are in step s: a pure function of (seed, sizes, weights, batch size, step), the same on every host.

A global batch comes from one source, so that its in-batch negatives are of one kind (paper section 4.3). Nothing of it
has to be saved: resuming at step s asks for step s.
"""

import functools
from collections.abc import Sequence

import numpy as np


class Mixture:
    """Sources by deficit, pairs by a fresh permutation an epoch.

    The source of a step is the one furthest behind its share, so shares hold at every moment, not on average. Within a
    source, epochs are laid end to end and cut into batches: each pair is seen once an epoch, no tail is dropped.
    """

    def __init__(self, sizes: Sequence[int], *, weights: Sequence[float], batch_size: int, steps: int, seed: int):
        """`sizes` counts each source's pairs; `weights` () draws sources in proportion to them."""
        share = np.asarray(weights or sizes, np.float64)
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.source_of_step, self.turn_of_step = _schedule(share / share.sum(), steps)
        self._permutation = functools.lru_cache(maxsize=2 * len(self.sizes))(self._draw)

    def batch_at(self, step: int) -> tuple[int, np.ndarray]:
        """The source of step `step` and the int64 indices [batch_size] of its pairs."""
        source, turn = int(self.source_of_step[step]), int(self.turn_of_step[step])
        size = self.sizes[source]
        place = np.arange(turn * self.batch_size, (turn + 1) * self.batch_size)
        epoch, within = np.divmod(place, size)
        pairs = np.empty(self.batch_size, np.int64)
        for e in np.unique(epoch):
            pairs[epoch == e] = self._permutation(source, int(e))[within[epoch == e]]
        return source, pairs

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, source, epoch)).permutation(self.sizes[source])


def _schedule(share: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step its source, and how many earlier steps that source had."""
    source, turn = np.empty(steps, np.int32), np.empty(steps, np.int64)
    count = np.zeros(len(share), np.int64)
    for step in range(steps):
        source[step] = np.argmax(share * (step + 1) - count)
        turn[step] = count[source[step]]
        count[source[step]] += 1
    return source, turn
