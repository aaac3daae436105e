"""What the report says on retrieval: dev nDCG@10 over the steps, held-out pairs, what evaluate measured of the finished models."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_embed import charts, held_out, page, retrieval
from moe_embed import results as results_lib
from moe_embed.config import UserError
from moe_embed.fields import count
from moe_embed.report_sections import Run

EVALUATION = "evaluation.json"  # of a workdir


def held_out_says(run: Run) -> str:
    """What a run's held-out pairs say of it, one sentence; "" where they do not yet, or it has none."""
    try:
        found = held_out.read(run.workdir)
    except UserError as error:
        return str(error)
    if found is None or found.after is None:
        return ""
    if found.before.keys() != found.after.keys():
        return f"Held-out pairs: {found.verdict}"
    before, after = (100 * statistics.fmean(figures.values()) for figures in (found.before, found.after))
    steps = count(found.steps, "step")
    return f"Held-out pairs: nDCG@10 {before:.1f} before training, {after:.1f} after {steps}; {found.verdict}"


def held_out_of(runs: Sequence[Run]) -> list[str]:
    """What is said of each run's held-out pairs, with its name where there are several."""
    said = [(run.name, sentence) for run in runs if (sentence := held_out_says(run))]
    return [sentence if len(runs) == 1 else f"{name}: {sentence}" for name, sentence in said]


def quality(runs: Sequence[Run], results: Sequence[Mapping[str, Mapping] | None], *, found: bool = False) -> str:
    """nDCG@10 over the steps; and by task, dimension and precision of evaluate's outputs, one a run in their order, None for none.

    Outputs that do not go together are a UserError, or, where they were `found` in the workdirs and not named, a sentence.
    """
    said, series, color = "", [], len(runs)
    said += "".join(map(page.say, held_out_of(runs)))
    for run in runs:
        if not run.evaluations:
            why = "a masked-language-model run searches for nothing" if run.config.loss.objective == "mlm" else (
                "it was trained without config.data.dev and config.run.eval_every")  # fmt: skip
            said += page.say(f"{run.name} has no evaluations: {why}.", missing=True)
            continue
        steps = [row["step"] for row in run.evaluations]
        series.append(run.line(f"{run.name}: mean", steps, [row["ndcg"] for row in run.evaluations], points=True))
        tasks = [name for name in run.evaluations[-1] if name.startswith("ndcg/")]
        for task in tasks if 1 < len(tasks) <= 8 else []:
            there = [row for row in run.evaluations if task in row]
            label = f"{run.name}: {task.removeprefix('ndcg/')}"
            series.append(run.line(label, [row["step"] for row in there], [row[task] for row in there], color=color))
            color += 1
    figures = [charts.lines(series, title="dev nDCG@10", x_label="step", share=True)]
    measured = [(run, tasks) for run, tasks in zip(runs, results, strict=True) if tasks] if results else []
    if measured:
        try:
            more_said, more = of_outputs(*zip(*measured, strict=True))
            said, figures = said + more_said, figures + more
        except UserError as error:
            if not found:
                raise
            said += page.say(f"No test tasks are drawn. {error}", missing=True)
    if lacking := [run.name for run in runs if run.index not in [of.index for of, _ in measured]]:
        whose = f" of {', '.join(lacking)}" if measured else ""
        said += page.say(
            f"Matryoshka dimensions, int8 and binary vectors, test tasks{whose}: give evaluate's output as --evaluation=r.json, "
            f"or put it into the workdir as {EVALUATION}.",
            missing=True,
        )
    return said + page.grid(figures)


def of_outputs(runs: Sequence[Run], results: Sequence[Mapping[str, Mapping]]) -> tuple[str, list[str]]:
    """Sentences and figures of evaluate's outputs. UserError where they do not go together."""
    check_same_tasks(runs, results)
    sized = [[size for kind in ("dims", "precisions") for size in results_lib.sizes(tasks, kind)] for tasks in results]
    figures, said = [by_size(runs, results) if any(sized) else "", by_task(runs, results)], ""
    for run, of_run, tasks in zip(runs, sized, results, strict=True):
        said += page.say(f"Test tasks of {run.name}: measured with {results_lib.says({'': tasks})}.")
        if not of_run:
            some = any({"dims", "precisions"} & of_task.keys() for of_task in tasks.values())
            what = (
                "with no --dims or --precisions that all its tasks have" if some else "without --dims and --precisions"
            )
            said += page.say(f"{run.name} was evaluated {what}.", missing=True)
    return said, figures


def check_same_tasks(runs: Sequence[Run], results: Sequence[dict[str, dict]]) -> None:
    """UserError where two runs were evaluated on different tasks: their means would say nothing about each other."""
    for run, tasks in zip(runs, results, strict=True):
        if tasks.keys() != results[0].keys():
            other = sorted(tasks.keys() ^ results[0].keys())[0]
            raise UserError(
                f"--evaluation: {other} is a task of only one of {runs[0].name} and {run.name}; evaluate both on the same."
            )


def by_task(runs: Sequence[Run], results: Sequence[dict[str, dict]]) -> str:
    """nDCG@10 of each task, a bar a run, with its interval where all have one."""
    names = list(results[0])
    values = np.array([[tasks[name]["ndcg@10"] for tasks in results] for name in names])
    known = all("interval" in of_task for tasks in results for of_task in tasks.values())
    intervals = np.array([[tasks[name]["interval"] for tasks in results] for name in names]) if known else None
    return charts.bars(values, rows=names, series=[run.name for run in runs], title="nDCG@10 by task", intervals=intervals,
                       share=True, colors=[run.index for run in runs], note="with 95 % intervals" if known else "")  # fmt: skip


def by_size(runs: Sequence[Run], results: Sequence[dict[str, dict]]) -> str:
    """nDCG@10, mean of all tasks, over the numbers of a vector; int8 and binary vectors as points. UserError for another model's."""
    series, color = [], 1 + max(run.index for run in runs)
    for run, tasks in zip(runs, results, strict=True):
        whole = run.config.encoder.dim

        def mean(pick: Callable[[Mapping], Mapping], tasks=tasks) -> float:
            return retrieval.mean_of({name: pick(of_task) for name, of_task in tasks.items()}, list(tasks), "ndcg@10")

        cut = sorted(map(int, results_lib.sizes(tasks, "dims")))
        if cut and cut[-1] > whole:
            raise UserError(
                f"--evaluation of {run.name} has vectors of {cut[-1]} numbers, its model {whole}: it is another model's."
            )
        at = {dim: mean(lambda of, d=str(dim): of["dims"][d]) for dim in cut} | {whole: mean(lambda of: of)}
        series.append(run.line(f"{run.name}: float32", list(at), list(at.values()), points=True))
        for precision in results_lib.sizes(tasks, "precisions"):
            value = mean(lambda of, p=precision: of["precisions"][p])
            series.append(run.line(f"{run.name}: {precision}", [whole], [value], color=color, points=True))
            color += 1
    return charts.lines(
        series,
        title="nDCG@10 by dimension",
        x_label="numbers of a vector",
        log_x=True,
        share=True,
        note="mean of all tasks",
    )
