"""A run at a glance: in the terminal, or as one HTML file that needs nothing else.

    python -m moe_embed.report --workdir=runs/demo
    python -m moe_embed.report --workdir=runs/demo --output=report.html
    python -m moe_embed.report --workdir=runs/a,runs/b --output=report.html --evaluation=a.json,b.json --plan=plan.json
    python -m moe_embed.report --workdir=runs/ablations/top1-seed0,runs/ablations/top1-seed1,runs/ablations/top2-seed0

In the terminal: the loss, the held-out figures and their verdict, and which experts read which language; several runs become a table of their last
dev figures, runs whose paths differ in -seedN alone in one row. The page has curves, experts over time and by language and source, how
the vectors lie, nDCG@10 by dimension and precision (--evaluation: outputs of evaluate, in the runs' order;
else those in the workdirs), a matrix of
translations and a plan's memory; several runs are laid over each other. It is drawn with what is there, and says what is not.
"""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from moe_embed import (
    bucket,
    expert_maps,
    model_sections,
    page,
    report_sections,
    results,
    retrieval_section,
    verb,
)
from moe_embed.config import UserError
from moe_embed.load import Model
from moe_embed.report_sections import Run

BARS = "▁▂▃▄▅▆▇█"
SHADES = ((-0.25, "    "), (0.0, "  · "), (0.25, "  ░ "), (0.5, "  ▒ "), (1.0, "  ▓ "), (np.inf, "  █ "))
WIDTH = 60
PLAN = "plan.json"  # of a workdir


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="what train wrote; several, separated by commas, are compared")
    parser.add_argument("--output", type=pathlib.Path, help="an HTML file to write, instead of text")
    parser.add_argument(
        "--evaluation",
        default="",
        help="for the page: evaluate's output, one a run, separated by commas "
        f"(default: WORKDIR/{retrieval_section.EVALUATION} where there)",
    )
    parser.add_argument(
        "--plan", type=pathlib.Path, help=f"for the page: plan's output (default: WORKDIR/{PLAN} if there)"
    )
    arguments = parser.parse_args(argv)
    workdirs = [bucket.path_of(part) for part in arguments.workdir.split(",") if part]
    if not workdirs:
        raise UserError(f"--workdir={arguments.workdir} names no run.")
    if arguments.output is not None:
        evaluations = [pathlib.Path(part) for part in arguments.evaluation.split(",") if part]
        write_page(arguments.output, workdirs, evaluations=evaluations, plan=arguments.plan)
        return
    if arguments.evaluation or arguments.plan:
        raise UserError("--evaluation and --plan are drawn in the page: name it with --output=report.html.")
    runs = report_sections.read_runs(workdirs)
    if len(runs) != 1:
        print(comparison(runs), *retrieval_section.held_out_of(runs), sep="\n")
        return
    print(training(runs[0]), *retrieval_section.held_out_of(runs), sep="\n")
    if runs[0].config.moe.num_experts:
        asked = model_sections.ask(runs[0])
        if missing := asked.no_model or asked.no_texts:
            print(missing)
        elif asked.texts.languages:
            print(experts(asked.model, asked.texts.languages))


def write_page(
    output: pathlib.Path,
    workdirs: Sequence[pathlib.Path],
    *,
    evaluations: Sequence[pathlib.Path] = (),
    plan: pathlib.Path | None = None,
) -> None:
    """Write the HTML report of these runs. UserError, before any work, for what is no workdir, evaluation or plan."""
    verb.check_output(output, "--output")
    runs = report_sections.read_runs(workdirs)
    if evaluations and len(evaluations) != len(runs):
        raise UserError(f"--evaluation names {len(evaluations)} files and --workdir {len(runs)} runs; give one a run.")
    measured = evaluations_of(runs, evaluations)
    there = [run.workdir / PLAN for run in runs if bucket.is_file(run.workdir / PLAN)]
    plan = there[0] if plan is None and there else plan
    planned = report_sections.read_plan(plan) if plan else None
    asked = [model_sections.ask(run) for run in runs]
    written = page.document(
        title=" and ".join(run.name for run in runs),
        lead="A report of moe_embed. Every picture's numbers are in the CSV link below it.",
        sections={
            "glance": ("At a glance", report_sections.glance(runs)),
            "training": ("Training", report_sections.training(runs)),
            "routers": ("Experts over time", report_sections.routers(runs)),
            "maps": ("Experts by language and source", model_sections.maps(asked)),
            "vectors": ("How the vectors lie", model_sections.shape_of_vectors(asked)),
            "quality": ("Retrieval", retrieval_section.quality(runs, measured, found=not evaluations)),
            "translations": ("Translations", model_sections.translations(asked)),
            "memory": ("Memory", report_sections.memory(planned)),
        },
    )
    output.write_text(written, "utf-8")
    print(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB; open it in a browser.")


def evaluations_of(runs: Sequence[Run], named: Sequence[pathlib.Path]) -> list[dict[str, dict] | None]:
    """What evaluate measured of each run, by task: of the files that are named, else of those in the workdirs, None for none."""
    paths = named or [run.workdir / retrieval_section.EVALUATION for run in runs]
    read = lambda path: next(iter(results.read(path, "--evaluation").values()))  # noqa: E731
    return [read(path) if named or bucket.is_file(path) else None for path in paths]


def comparison(runs: Sequence[Run]) -> str:
    """A row for each group of runs, PATH-seed0, PATH-seed1, ...: the last dev nDCG@10 in %, mean, spread and each run's.

    A run without dev figures is a "-".
    """
    groups: dict[pathlib.Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(without_seed(report_sections.whole(run.workdir)), []).append(run)
    given = [without_seed(group[0].workdir) for group in groups.values()]
    names = report_sections.unique([path.name for path in groups], given)
    width = max(map(len, names))
    lines = [f"{'run':<{width}}  dev nDCG@10   spread  each seed"]
    for name, group in zip(names, groups.values(), strict=True):
        values = [100 * run.evaluations[-1]["ndcg"] for run in group if run.evaluations]
        mean = f"{np.mean(values):.1f}" if values else "-"
        spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "-"
        each = ", ".join(f"{100 * run.evaluations[-1]['ndcg']:.1f}" if run.evaluations else "-" for run in group)
        lines.append(f"{name:<{width}}  {mean:>11}  {spread:>7}  {each}")
    return "\n".join(lines) + "\n(spread: standard deviation over seeds)"


def without_seed(workdir: pathlib.Path) -> pathlib.Path:
    """The path that the seeds of a run share."""
    return workdir.parent / re.sub(r"-seed[0-9]+$", "", workdir.name)


def training(run: Run) -> str:
    """Loss, accuracy and speed over the steps as sparklines, and the evaluations."""
    if not run.rows:
        return f"{run.workdir} has no metrics yet."
    finite = [row for row in run.rows if np.isfinite(row["loss"])]
    skipped = len(run.rows) - len(finite)
    if not finite:
        return f"{skipped} steps, and none of them finite."
    lines = [f"{len(run.rows)} steps" + (f", {skipped} of them not finite" if skipped else "")]
    for name in ("loss", "accuracy", "tokens_per_second"):
        values = np.array([row[name] for row in finite if name in row])
        if len(values):
            lines.append(f"{name:<18} {sparkline(values)} {values[0]:,.3f} -> {values[-1]:,.3f}")
    if run.evaluations:
        values = np.array([row["ndcg"] for row in run.evaluations])
        lines.append(f"{'dev nDCG@10':<18} {sparkline(values)} {values[0]:.3f} -> {values[-1]:.3f}")
    return "\n".join(lines)


def sparkline(values: np.ndarray) -> str:
    """At most WIDTH bars, each the mean of its stretch.

    >>> sparkline(np.array([0.0, 1.0]))
    '▁█'
    """
    means = np.array([part.mean() for part in np.array_split(values, min(WIDTH, len(values)))])
    span = means.max() - means.min()
    return "".join(BARS[int(7 * (mean - means.min()) / span) if span else 0] for mean in means)


def experts(model: Model, texts: dict[str, list[str]]) -> str:
    """Expert x language: how much more often than on average an expert is chosen for a language's tokens.

    A picture a mixture layer, and the mutual information of expert and language over the entropy of the experts.
    """
    languages, share = list(texts), expert_maps.shares(model, texts)
    lines = []
    for r in range(share.shape[1]):
        mean_E = share[:, r].mean(0)
        ratio, information = expert_maps.against_mean(share[:, r])
        lines.append(f"\nmixture layer {r + 1}: expert x language (normalised mutual information {information:.2f})")
        lines.append("      " + "".join(f"{lang:>4}" for lang in languages) + "   mean of languages")
        for e in range(share.shape[2]):
            cells = "".join(next(shade for limit, shade in SHADES if value <= limit) for value in ratio[:, e])
            lines.append(f"  e{e:<3} {cells}   {mean_E[e]:6.1%}")
    lines.append("  chosen by a language, beside the mean:  · as often  ░ more  ▒ 1.2x  ▓ 1.4x  █ 2x  (blank: less)")
    return "\n".join(lines)


if __name__ == "__main__":
    verb.run(main, copies=True)
