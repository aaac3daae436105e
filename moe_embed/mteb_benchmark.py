"""A whole benchmark of mteb, by mteb's own code: every kind of task, the means its leaderboard shows, its result files.

    python -m moe_embed.mteb_benchmark --model=runs/demo --benchmark="MTEB(eng, v2)" --output=r.json     # pip install -e ".[mteb]"

Writes {"benchmark", "mean", "mean_of_types", "types": {"Retrieval": ...}, "tasks": {name: main score}}, in [0, 1]: the mean over tasks,
and the mean over kinds of task of each kind's mean. mteb keeps each task's result in --results under the model's name and the
digest of its parameters: run again, what is there is not done again. Retrieval alone is faster by moe_embed.evaluate.
"""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed import push, verb
from moe_embed.config import UserError
from moe_embed.mteb_model import mteb_model

RESULTS = "~/.cache/moe_embed/mteb"


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("mteb_benchmark", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, or a folder written by export")
    parser.add_argument("--benchmark", required=True, help="a benchmark of mteb, as in NanoBEIR or MTEB(eng, v2)")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a .json file")
    parser.add_argument("--results", default=RESULTS, help="mteb's own result files (default: %(default)s)")
    arguments = parser.parse_args(argv)
    verb.check_output(arguments.output, "--output")
    if importlib.util.find_spec("mteb") is None:
        raise UserError('benchmarks are run by mteb, which is not installed: pip install -e ".[mteb]"')
    found = run(arguments.model, arguments.benchmark, results=pathlib.Path(arguments.results).expanduser())
    for kind, value in found["types"].items():
        print(f"{kind:<28} {100 * value:6.2f}")
    print(f"{'mean of tasks':<28} {100 * found['mean']:6.2f}")
    print(f"{'mean of kinds of task':<28} {100 * found['mean_of_types']:6.2f}")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def run(model: str, benchmark: str, *, results: pathlib.Path) -> dict:
    """What `main` writes. UserError for a benchmark that mteb does not know, and for data that cannot be fetched."""
    import mteb

    try:
        tasks = list(mteb.get_benchmark(benchmark).tasks)
    except KeyError as error:
        raise UserError(f"--benchmark={benchmark}: {error.args[0]}") from error
    wrapped, cache = mteb_model(model), mteb.ResultCache(cache_path=results)
    scores, kinds = {}, {}
    for number, task in enumerate(tasks, start=1):
        name = task.metadata.name
        print(f"{number} of {len(tasks)}: {name}", flush=True)
        try:
            done = mteb.evaluate(wrapped, task, cache=cache, co2_tracker=False, show_progress_bar=sys.stderr.isatty())
        except push.network_faults() as error:
            why = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"{name} cannot be fetched: {why}") from error
        scores[name], kinds[name] = float(done.task_results[0].get_score()), task.metadata.type
    return {"benchmark": benchmark, **means(scores, kinds), "tasks": scores}


def means(scores: Mapping[str, float], kinds: Mapping[str, str]) -> dict:
    """{"mean", "mean_of_types", "types": {kind: mean}} of tasks' main scores, as mteb's leaderboard takes them."""
    types = {kind: float(np.mean([scores[n] for n in scores if kinds[n] == kind])) for kind in kinds.values()}
    return {
        "mean": float(np.mean(list(scores.values()))),
        "mean_of_types": float(np.mean(list(types.values()))),
        "types": types,
    }


if __name__ == "__main__":
    verb.run(main)
