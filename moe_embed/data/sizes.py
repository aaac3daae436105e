"""The shapes of a step's rows: how many micro-batches M it may have, and where the data decides it, how many rows of what length.

M takes few counts, each compiled once when it first occurs, that waste little.
"""

from collections.abc import Sequence

import numpy as np

from moe_embed.data.packing import pack

MOST = 8
WASTE = 0.005  # share of the rows that may stand in empty micro-batches where one more count would save them
FEW = 3  # counts of M where the data decides on the rows: such runs are short, and a count costs a compilation
TOKENS = 4096  # of a micro-batch on a device, at most, where the data decides
LENGTHS = (64, 128, 192, 256, 384, 512)  # of rows, of those that hold the longest text
LANES = 128  # rows of a multiple of that have kernels on accelerators (model/attention.py)
CLOSE = 1.08  # shapes that compute so little more than the best are as good: then the fewest micro-batches, which each add up all gradients


def fit(
    batches: Sequence[Sequence[Sequence[int]]], *, longest: int, row_length: int, rows: int, texts_per_row: int
) -> tuple[int, int, list[int]]:
    """Rows for batches of these texts: those that compute little padding, in few micro-batches, with FEW counts of M.

    Args:
      batches: for each batch, for each device, the tokens of each text.
      longest: the most tokens that any text of the run can have.
      row_length, rows: what they must be; 0 where they are to be chosen.

    Returns:
      (row_length, rows of a micro-batch on one device, and for each batch the micro-batches that it then needs).
    """
    whole = -(-longest // LANES) * LANES
    lengths = [row_length] if row_length else sorted({whole, *(n for n in LENGTHS if n >= longest)})
    found = []
    for length in lengths:
        packed = [max(pack(of, row_length=length, texts_per_row=texts_per_row).num_rows for of in b) for b in batches]
        for count in [rows] if rows else range(1, max(TOKENS // length, 1) + 1):
            needed = [-(-max(n, 1) // count) for n in packed]
            sizes = choose(needed, np.ones(len(needed)), worst=max(needed), most=FEW + 1)  # the worst is among FEW
            run = sum(next(size for size in sizes if size >= n) for n in needed) * count * length
            found.append((run, length % LANES != 0, -count * length, length, count, needed))
    least = min(run for run, *_ in found)
    _, _, _, length, count, needed = min(
        (one for one in found if one[0] <= CLOSE * least), key=lambda one: (one[1], one[2], one[0], one[3])
    )
    return length, count, needed


def choose(needed: Sequence[int], weight: Sequence[float], *, worst: int, most: int = MOST) -> tuple[int, ...]:
    """The fewest counts, at most `most` and `worst` among them, that hold what is needed with at most WASTE left empty.

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
    for _ in range(most - 1):
        cost = held[:, None] + (before[None, :] - before[:, None]) * np.concatenate([[0], size])[None, :]
        cost[np.tril_indices(len(size) + 1)] = np.inf
        last = cost.argmin(0)
        better = cost.min(0) < held
        chosen = [(*chosen[last[j]], int(size[j - 1])) if better[j] else chosen[j] for j in range(len(size) + 1)]
        held = np.minimum(held, cost.min(0))
        if held[-1] <= useful * (1 + WASTE):
            break
    return tuple(sorted({*chosen[-1], max(worst, int(size[-1]))}))
