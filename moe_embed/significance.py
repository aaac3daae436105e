"""How sure a figure is: bootstrap intervals, and a paired test between two systems on the same queries.

A figure is a mean over tasks of means over queries, so queries are drawn again inside each task (Sakai, "Evaluating
evaluation metrics based on the bootstrap", SIGIR 2006; the randomisation test: Smucker et al., CIKM 2007). `weights` are the
tasks' shares of that mean, positive, of sum 1 (retrieval.shares); None weighs all alike.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moe_embed.fields import count

DRAWS = 10_000
LEVEL = 0.95
AT_ONCE = 1 << 22  # numbers drawn at once
# Fewer give no verdict: drawn 1,500 times of made-up differences, half of them 0, the 95 % interval of 20 queries held their
# mean 93 times in 100, that of 10 queries 89 times and that of 5 81 times.
SURE_QUERIES = 20


def interval(
    per_query: Sequence[np.ndarray], *, weights: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over tasks of the means of `per_query`, an array [queries] a task."""
    means = _resampled(per_query, lambda rng, shape: None, weights, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean(per_query: Sequence[np.ndarray], *, weights: Sequence[float] | None = None) -> float:
    """The mean over tasks of the means of `per_query`, an array [queries] a task."""
    return float(np.average([of_task.mean() for of_task in per_query], weights=weights))


def p_value(differences: Sequence[np.ndarray], *, weights: Sequence[float] | None = None, seed: int = 0) -> float:
    """Two-sided: how often a mean this far from 0 comes of signs thrown for each query, if the two systems were one."""
    found = abs(mean(differences, weights=weights))
    means = _resampled(differences, lambda rng, shape: rng.integers(0, 2, shape, np.int8) * 2 - 1, weights, seed)
    return float((np.sum(np.abs(means) >= found - 1e-12) + 1) / (DRAWS + 1))


def verdict(
    differences: Sequence[np.ndarray], *, names: Sequence[str], weights: Sequence[float] | None = None, doubt: str = ""
) -> str:
    """One sentence: which of two systems is better at nDCG@10, by how much and how sure, from differences a query.

    `doubt` is why nothing is to be concluded from them, whatever the interval, and fewer than SURE_QUERIES queries are such a
    reason; the figures are given all the same.
    """
    low, high = (100 * end for end in interval(differences, weights=weights))
    gain, p = 100 * mean(differences, weights=weights), p_value(differences, weights=weights)
    queries = sum(map(len, differences))
    measured_on = count(queries, "query", "queries")
    sure = f"95 % interval {low:+.1f} to {high:+.1f}, p = {p:.3g}, {measured_on}"
    if queries < SURE_QUERIES:
        doubt = " and ".join(filter(None, (doubt, f"measured on {measured_on}")))
    if doubt:
        return (
            f"too little to judge by ({doubt}): {names[0]} beside {names[1]}, {gain:+.1f} points of nDCG@10 ({sure})."
        )
    if low <= 0 <= high:
        return f"no difference is shown between {names[0]} and {names[1]}: {gain:+.1f} points of nDCG@10 ({sure})."
    return f"{names[0]} is {'better' if gain > 0 else 'worse'} than {names[1]} by {abs(gain):.1f} points of nDCG@10 ({sure})."


def _resampled(
    per_query: Sequence[np.ndarray], signs: Callable, weights: Sequence[float] | None, seed: int
) -> np.ndarray:
    """DRAWS means: of queries drawn with replacement where `signs` gives None, else of all queries with these signs."""
    rng, means = np.random.default_rng(seed), np.zeros(DRAWS)
    weights = [1 / len(per_query)] * len(per_query) if weights is None else weights
    for values, weight in zip(per_query, weights, strict=True):
        step = max(AT_ONCE // len(values), 1)
        for start in range(0, DRAWS, step):
            shape = min(step, DRAWS - start), len(values)
            thrown = signs(rng, shape)
            drawn = values[rng.integers(0, len(values), shape)] if thrown is None else values * thrown
            means[start : start + step] += drawn.mean(1) * weight
    return means
