"""evaluate's outputs for a person: the table of one, and two of them compared.

Means are by retrieval.shares: the forums of CQADupStack, or the languages of MIRACL, count as one task.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed import results as results_lib
from moe_embed import retrieval, significance
from moe_embed.config import UserError

WIDTH = 100  # columns of a table


def queries_of(results: dict[str, dict[str, dict]], path: str) -> dict[str, dict[str, float]]:
    """The model's nDCG@10 of each query in what was read from `path`: task -> query id -> value."""
    own = next(iter(results.values()))
    without = [task for task, values in own.items() if "queries" not in values]
    if without:
        raise UserError(f"{path} has no figures of single queries ({without[0]}); evaluate that model again.")
    return {task: values["queries"] for task, values in own.items()}


def comparison(first: dict, second: dict, *, names: Sequence[str]) -> str:
    """A table of two systems' nDCG@10, task by task on the queries of both, and one line that says which is better."""
    tasks = [task for task in first if task in second]
    if not tasks:
        raise UserError(f"{names[0]} and {names[1]} have no task in common.")
    for task in tasks:
        if first[task].keys() != second[task].keys():
            raise UserError(f"{names[0]} and {names[1]} have other queries for {task}; evaluate both on the same task.")
    of_first, of_second = ([np.array([of[task][q] for q in first[task]]) for task in tasks] for of in (first, second))
    differences = [a - b for a, b in zip(of_first, of_second, strict=True)]
    width = max(map(len, [*tasks, "mean"]))
    lines = ["task".ljust(width) + f"  {'first':>7}  {'second':>7}  {'difference, 95 % interval':>28}"]

    def row(label: str, members: slice) -> str:
        weights = retrieval.shares(tasks[members])
        a, b = (100 * significance.mean(of[members], weights=weights) for of in (of_first, of_second))
        low, high = (100 * end for end in significance.interval(differences[members], weights=weights))
        return label.ljust(width) + f"  {a:7.1f}  {b:7.1f}  {a - b:+8.1f}   {low:+6.1f} to {high:+6.1f}"

    lines += [row(task, slice(i, i + 1)) for i, task in enumerate(tasks)]
    if len(tasks) > 1:
        lines += ["-" * len(lines[0]), row("mean", slice(None))]
    return "\n".join([*lines, significance.verdict(differences, names=names, weights=retrieval.shares(tasks))])


def table(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """A table of percentages: a row a task, nDCG@10 and recall@10 for each system, and means by kind of task.

    A task's nDCG@10 has its 95 % interval, a baseline's as well where that leaves the table within WIDTH columns. The rows
    are the first system's tasks; what another system was not measured on is a dash, and so are the means with it.
    """
    systems = list(results)
    names = list(results[systems[0]])
    whole = {f"mean of {name.partition('/')[0]}": name.partition("/")[0] for name in names if "/" in name}
    width = max(map(len, [*names, *whole, "mean cross-lingual"]))
    sure = [system for system in systems if all("interval" in of_task for of_task in results[system].values())]
    if width + 19 * len(systems) + 15 * len(sure) > WIDTH:
        sure = [system for system in sure if system == systems[0]]
    lines = [" " * width + "".join(f"  {system:>{32 if system in sure else 17}}" for system in systems)]
    heads = ("  nDCG@10  95 % interval recall@10" if system in sure else "  nDCG@10 recall@10" for system in systems)
    lines.append("task".ljust(width) + "".join(heads))

    def row(label: str, members: list[str]) -> str:
        cells = ""
        for system in systems:
            ndcg = recall = "-"
            between = " " * 15 if system in sure else ""
            if all(name in results[system] for name in members):
                ndcg, recall = (
                    f"{100 * retrieval.mean_of(results[system], members, metric):.1f}"
                    for metric in ("ndcg@10", "recall@10")
                )
                if between and label in names:
                    low, high = (100 * end for end in results[system][label]["interval"])
                    between = f"{f'{low:.1f} to {high:.1f}':>15}"
            cells += f"  {ndcg:>7}{between} {recall:>9}"
        return label.ljust(width) + cells

    lines += [row(name, [name]) for name in names]
    lines.append("-" * len(lines[1]))
    lines += [row(title, [name for name in names if name.startswith(f"{label}/")]) for title, label in whole.items()]
    miracl = [name for name in names if name.lower().startswith("miracl") and "/" in name]
    sixteen = [name for name in miracl if not name.endswith(retrieval.SURPRISE)]
    if 0 < len(sixteen) < len(miracl):
        lines.append(row("without de and yo", sixteen))
    groups = {
        "mean monolingual": [name for name in names if not name.startswith("xling-")],
        "mean cross-lingual": [name for name in names if name.startswith("xling-")],
    }
    lines += [row(label, members) for label, members in groups.items() if members]
    own = results[systems[0]]
    for kind, title in (("dims", "shorter vectors"), ("precisions", "smaller numbers")):
        if sizes := results_lib.sizes(own, kind):
            lines.append(f"nDCG@10 of {title}, mean of all tasks:")
        for size in sizes:
            of_size = {name: own[name][kind][size] for name in names}
            lines.append(f"  {size:>6}  {100 * retrieval.mean_of(of_size, names, 'ndcg@10'):5.1f}")
    return "\n".join(lines)
