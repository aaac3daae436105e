"""How many micro-batches M a step may have: few counts, each compiled once when it first occurs, that waste little."""

from collections.abc import Sequence

import numpy as np

MOST = 8
WASTE = 0.005  # share of the rows that may stand in empty micro-batches where one more count would save them


def choose(needed: Sequence[int], weight: Sequence[float], *, worst: int) -> tuple[int, ...]:
    """The fewest counts, at most MOST and `worst` among them, that hold what is needed with at most WASTE left empty.

    Args:
      needed: micro-batches that batches like those of the run need.
      weight: how often each occurs.
      worst: what no batch can exceed.

    Returns:
      Counts in ascending order; a batch takes the smallest that holds it.
    """
    size, which = np.unique(np.asarray(needed, np.int64), return_inverse=True)
    mass = np.bincount(which, weights=np.asarray(weight, np.float64))
    size, mass = size[mass > 0], mass[mass > 0]
    useful = size @ mass
    before = np.concatenate([[0.0], np.cumsum(mass)])
    # held[j]: micro-batches run for all that need at most size[j - 1], with the counts so far, size[j - 1] among them
    held = np.where(np.arange(len(size) + 1) > 0, np.inf, 0.0)
    chosen: list[tuple[int, ...]] = [()] * (len(size) + 1)
    for _ in range(MOST - 1):
        cost = held[:, None] + (before[None, :] - before[:, None]) * np.concatenate([[0], size])[None, :]
        cost[np.tril_indices(len(size) + 1)] = np.inf
        last = cost.argmin(0)
        better = cost.min(0) < held
        chosen = [(*chosen[last[j]], int(size[j - 1])) if better[j] else chosen[j] for j in range(len(size) + 1)]
        held = np.minimum(held, cost.min(0))
        if held[-1] <= useful * (1 + WASTE):
            break
    return tuple(sorted({*chosen[-1], max(worst, int(size[-1]))}))
