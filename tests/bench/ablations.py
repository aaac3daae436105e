"""Which of two variants is better, over seeds and queries: what launch/ablations.sh prints last.

    python -m tests.bench.ablations --run=runs/ablations --against=top2

Reads RUN/VARIANT-seedN.json, written by evaluate, and prints a variant a line: the mean nDCG@10 over tasks and seeds, the seeds'
standard deviation, and its difference from --against with a 95 % interval. Seeds are drawn again and, inside, queries are
(a bootstrap of two levels): three seeds are few, and an interval over queries alone would not know of them.
"""

import argparse
import collections
import itertools
import pathlib
import re
import sys

import numpy as np

from moe_embed import results as results_lib

DRAWS = 10_000


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    parser.add_argument("--against", default="top2", help="the variant that the others are compared with")
    flags = parser.parse_args(argv)
    print(table(read(flags.run), against=flags.against), end="")


def read(run: pathlib.Path) -> dict[str, list[list[np.ndarray]]]:
    """variant -> for each seed, for each task, nDCG@10 a query; tasks and queries in the same order everywhere."""
    found = collections.defaultdict(list)
    for path in sorted(run.glob("*-seed*.json")):
        variant = re.fullmatch(r"(.+)-seed\d+", path.stem)[1]
        (tasks,) = results_lib.read(path, "--run").values()
        found[variant].append(
            [np.array([q[i] for i in sorted(q)]) for q in (tasks[t]["queries"] for t in sorted(tasks))]
        )
    return dict(found)


def difference(a: list[list[np.ndarray]], b: list[list[np.ndarray]], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean of a - b, low, high): seeds of each side drawn again, then the queries of each task, the same for both sides."""
    rng, draws = np.random.default_rng(seed), np.zeros(DRAWS)
    sides = [np.array([np.concatenate(tasks) for tasks in side]) for side in (a, b)]  # [seeds, queries of all tasks]
    weight = np.concatenate([np.full(len(task), 1 / len(task) / len(a[0])) for task in a[0]])
    starts = np.cumsum([0, *map(len, a[0])])
    for i in range(DRAWS):
        chosen = np.concatenate([rng.integers(s, e, e - s) for s, e in itertools.pairwise(starts)])
        means = [side[rng.integers(0, len(side), len(side))].mean(0)[chosen] @ weight for side in sides]
        draws[i] = means[0] - means[1]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(sides[0].mean(0) @ weight - sides[1].mean(0) @ weight), float(low), float(high)


def table(found: dict[str, list[list[np.ndarray]]], *, against: str) -> str:
    """Markdown, in %."""
    lines = [f"| variant | nDCG@10 | over seeds | minus `{against}` | 95 % interval |", "|---|---:|---:|---:|---|"]
    for variant, seeds in found.items():
        means = [100 * np.mean([task.mean() for task in tasks]) for tasks in seeds]
        spread = f"{np.std(means, ddof=1):.1f} ({len(means)})" if len(means) > 1 else "(1)"
        gain, low, high = (100 * x for x in difference(seeds, found[against]))
        rest = "| |" if variant == against else f"{gain:+.1f} | {low:+.1f} to {high:+.1f} |"
        lines.append(f"| `{variant}` | {np.mean(means):.1f} | {spread} | {rest}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
