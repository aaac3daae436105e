"""The sections of the HTML report that come from what a run wrote down: its steps, its experts, its evaluations, its plan.

Each takes the runs to be laid over each other and gives HTML: pictures, or a sentence on what is not there and why.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed import bars, bucket, charts, config, heat_map, metrics, page, stored
from moe_embed.charts import Line
from moe_embed.config import Config, UserError
from moe_embed.load import DESCRIPTION, read_description

CURVES = {
    "loss": "loss", "accuracy": "accuracy", "learning_rate": "learning rate", "gradient_norm": "gradient norm",
    "tokens_per_second": "useful tokens/s",
}  # fmt: skip
SHARES = ("accuracy",)  # of the curves: within 0 and 1
NEEDED = {"metrics": ("loss",), "evaluations": ("ndcg",), "events": ("event", "time")}  # in every row of a file
CELLS = 12_000  # of all maps of experts over time together; what a run has more is averaged


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir as it was written. `index` is its place among the runs of the page: its colour and its dashes."""

    name: str
    workdir: pathlib.Path
    index: int
    config: Config
    rows: list[dict]
    evaluations: list[dict]
    events: list[dict]

    def of(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a column of metrics.jsonl, where it has one."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def line(self, label: str, x: Sequence, y: Sequence, *, color: int | None = None, points: bool = False) -> Line:
        """A curve in this run's colour and dashes."""
        return Line(label, x, y, color=self.index if color is None else color, dashed=self.index > 0, points=points)


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of the page. UserError for what is no run's workdir."""
    runs, names = [], unique([whole(workdir).name for workdir in workdirs], workdirs)
    for i, workdir in enumerate(workdirs):
        if not bucket.is_file(workdir / DESCRIPTION):
            raise UserError(f"{workdir} is no workdir: it has no {DESCRIPTION}; train writes one.")
        of_run = read_description(workdir).config
        if of_run is None:
            raise UserError(
                f"{workdir} is a model folder (import_hf, upcycle, soup), not a run: there is nothing to report."
            )
        runs.append(Run(names[i], workdir, i, of_run, *(read_rows(workdir, kind) for kind in NEEDED)))
    return runs


def read_rows(workdir: pathlib.Path, kind: str) -> list[dict]:
    """The rows of WORKDIR/KIND.jsonl. UserError for one that lacks what a page needs, or has a word where a number belongs."""
    path = workdir / f"{kind}.jsonl"
    rows = metrics.read(path)
    fullest = max(rows, key=len, default={})
    needed = {*NEEDED[kind], *(name for name in fullest if name.startswith("router_load/"))}
    for row in rows:
        missing = sorted(needed - row.keys())
        wrong = [name for name, value in row.items() if not isinstance(value, str if name == "event" else int | float)]
        if missing or wrong:
            what = f"has no {missing[0]}" if missing else f"has {row[wrong[0]]!r:.40} as its {wrong[0]}"
            raise UserError(f"{path}: the row of step {row['step']} {what}; mend or remove the file.")
    return rows


def whole(workdir: pathlib.Path) -> pathlib.Path:
    """A path with a name of its own: "." has none."""
    return workdir if bucket.is_remote(workdir) else workdir.resolve()


def unique(names: Sequence[str], paths: Sequence[pathlib.Path]) -> list[str]:
    """The names where they differ, else the paths as they were given."""
    return list(names) if len(set(names)) == len(names) else list(map(str, paths))


def glance(runs: Sequence[Run]) -> str:
    """A table: what became of each run; and its whole config to unfold."""
    columns = ["run", "steps", "skipped", "loss", "accuracy", "dev nDCG@10", "useful tokens/s", "goodput", "resumed"]
    rows = []
    for run in runs:
        last = {name: values[-1] for name in CURVES if (values := run.of(name)[1])}
        rates, flow = run.of("tokens_per_second")[1], goodput(run)[1]
        rows.append([
            run.name, f"{len(run.rows):,} of {run.config.run.steps:,}", int(sum(run.of("skipped")[1])),
            *(last[name] if name in last else None for name in ("loss", "accuracy")),
            run.evaluations[-1]["ndcg"] if run.evaluations else None,
            float(np.median(rates)) if rates else None, f"{flow[-1]:.0%}" if flow else None,
            sum(event["event"] == "resume" for event in run.events),
        ])  # fmt: skip
    folded = "".join(
        f"<details><summary>config of {page.text(run.name)}</summary><pre>{page.text(json.dumps(config.to_dict(run.config), indent=1, ensure_ascii=False))}</pre></details>"
        for run in runs
    )
    return page.table(columns, rows) + folded


def training(runs: Sequence[Run]) -> str:
    """Loss, accuracy, learning rate, gradient norm, useful tokens/s and goodput over the steps."""
    said, marks = "", [marks_of(run) for run in runs]
    for run in runs:
        if not run.rows:
            said += page.say(f"{run.name} has no metrics yet.", missing=True)
        elif "accuracy" not in run.rows[-1]:
            said += page.say(f"{run.name} writes no accuracy.", missing=True)
        if run.rows and len(goodput(run)[0]) < 2:
            said += page.say(
                f"{run.name} has no goodput over steps: fewer than two saves are in its events.jsonl.", missing=True
            )
    figures = [
        charts.lines(
            [run.line(run.name, *run.of(name)) for run in runs],
            title=label,
            x_label="step",
            marks=marks,
            share=name in SHARES,
        )
        for name, label in CURVES.items()
    ]
    figures.append(charts.lines(
        [run.line(run.name, *goodput(run), points=True) for run in runs if len(goodput(run)[0]) > 1], title="goodput",
        x_label="step", marks=marks, share=True, note="share of the time since the run first began that went into steps that count",
    ))  # fmt: skip
    keys = page.say(
        "Above each frame: ▲ save, ◆ resume, ✕ skipped step, ● evaluation; where many are near, one stands for them. A long curve is the "
        "mean of each stretch, in a band from its least to its greatest. Goodput leaves out compilation, evaluation, saving, work done "
        "twice and the time a run lay still."
    )
    return keys + said + page.grid(figures)


def marks_of(run: Run) -> dict[str, list[int]]:
    """The steps of a run's saves, resumes, skipped steps and evaluations."""
    found = {name: [event["step"] for event in run.events if event["event"] == name] for name in ("save", "resume")}
    steps, skipped = run.of("skipped")
    found["skipped"] = [step for step, is_skipped in zip(steps, skipped, strict=True) if is_skipped]
    return found | {"evaluation": [row["step"] for row in run.evaluations]}


def goodput(run: Run) -> tuple[list[int], list[float]]:
    """At each save the time of the steps up to it over the time since the run's beginning; of a step saved twice the later."""
    if not run.events or not run.rows:
        return [], []
    began, useful = run.events[0]["time"], dict(zip(*_running(run), strict=True))
    saves = {event["step"]: event["time"] for event in run.events if event["event"] == "save"}
    saves = {step: time for step, time in sorted(saves.items()) if step - 1 in useful and time > began}
    return list(saves), [min(useful[step - 1] / (time - began), 1.0) for step, time in saves.items()]


def _running(run: Run) -> tuple[list[int], list[float]]:
    steps, seconds = run.of("seconds")
    return steps, np.cumsum(seconds).tolist()


def loads(rows: Sequence[Mapping]) -> np.ndarray:
    """Each expert's share of the choices times E at each step: float [steps, R, E], R = 0 of a dense run."""
    names = [name for name in rows[0] if name.startswith("router_load/")] if rows else []
    if not names:
        return np.zeros((len(rows), 0, 0))
    shape = tuple(1 + max(int(name.split("/")[i]) for name in names) for i in (1, 2))
    return np.array([[row[name] for name in names] for row in rows]).reshape(-1, *shape)


def routers(runs: Sequence[Run]) -> str:
    """Layer x expert utilisation over time."""
    said, figures = "", []
    curves = {"expert_utilisation": "experts at work, share of all (worst layer)", "dead_expert_frac": "dead experts, share (worst layer)"}  # fmt: skip
    for name, label in curves.items():
        some = [run.line(run.name, *run.of(name)) for run in runs if run.of(name)[0]]
        figures.append(
            charts.lines(some, title=label, x_label="step", marks=[marks_of(run) for run in runs], share=True)
        )
    for run in runs:
        rows = [row for row in run.rows if np.isfinite(row["loss"])] if run.config.moe.num_experts else []
        load_TRE = loads(rows)
        if not load_TRE.size:
            what = "has no step yet" if run.config.moe.num_experts else "is dense: it has no experts"
            said += page.say(f"{run.name} {what}.", missing=True)
            continue
        num_bins = int(np.clip(CELLS // (len(runs) * load_TRE[0].size), 12, 96))
        parts = np.array_split(np.arange(len(rows)), min(num_bins, len(rows)))
        mean_CRE = np.stack([load_TRE[part].mean(0) for part in parts])
        columns = [charts.short(rows[part[0]]["step"]) for part in parts]
        axis = step_axis(run, [rows[part[0]]["step"] for part in parts], end=rows[-1]["step"] + 1)
        for r in range(load_TRE.shape[1]):
            load_EC = mean_CRE[:, r].T
            figures.append(heat_map.heat_map(
                np.log2(np.maximum(load_EC, 2.0**-6)), shown=load_EC, limit=2.0, rows=[f"e{e}" for e in range(len(load_EC))],
                columns=columns, title=f"{run.name}: mixture layer {r + 1}", note="expert x step; CSV: share of the choices times E",
                low="a quarter of an even share", high="4 x", axis=axis,
            ))  # fmt: skip
    return said + page.grid(figures)


def step_axis(run: Run, starts: Sequence[int], *, end: int) -> heat_map.Axis:
    """Round steps and the run's marks along columns that begin at these steps; `end` is the last step's end."""
    at = lambda step: float(np.interp(step, [*starts, end], range(len(starts) + 1)))  # noqa: E731
    marks = {name: list(map(at, steps)) for name, steps in marks_of(run).items()}
    return heat_map.Axis([(at(step), charts.short(step)) for step in charts.steps(starts[0], end)], marks, run.index)


def memory(plan: Mapping | None) -> str:
    """The bars of a plan.json: what a device would hold."""
    if plan is None:
        return page.say("No plan: write one with python -m moe_embed.plan and give it as --plan=plan.json, or put it into the workdir.",
                        missing=True)  # fmt: skip
    hbm = plan["hbm"]
    where = f"{plan['config']} on {plan['topology']['name']}: {plan['verdict']}"
    svg = bars.as_svg(hbm["bars"], limit=hbm["limit"], title="").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    rows = [*hbm["bars"].items(), ("limit", hbm["limit"])]
    note = f"of one device, {hbm['source']}; an estimate, nothing was run"
    return page.figure(svg, title=where, columns=["part", "bytes"], rows=rows, note=note, kind="memory")


def read_plan(path: pathlib.Path) -> dict:
    """A plan.json. UserError for anything else."""
    try:
        plan = stored.read_json(path)
        of_plan = plan["config"], plan["verdict"], plan["topology"]["name"], plan["hbm"]["source"], plan["hbm"]["limit"]
        if not all(size >= 0 for size in plan["hbm"]["bars"].values()) or not of_plan[-1] > 0:
            raise ValueError("its sizes are no bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no output of plan ({error!r}); python -m moe_embed.plan --output={path.name} writes one."
        ) from error
    return plan
