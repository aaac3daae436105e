"""Retrieval evaluation on BEIR folders: nDCG@10, recall@10, MRR@10 by trec_eval's own code, exact search.

    python -m moe_embed.evaluate --model=runs/demo --task=moe_embed/sample/tasks/xling-libreoffice-help-de-en --output=r.json
    python -m moe_embed.evaluate --model=runs/demo --task=A,B,C --dims=128,64 --output=r.json
    python -m moe_embed.evaluate --model=runs/demo --task=A,B,C --baseline=bm25 --output=r.json
    python -m moe_embed.evaluate --model=runs/demo --task=BIG --cache=DIR --output=r.json
    python -m moe_embed.evaluate --compare=r.json,base.json
    python -m moe_embed.evaluate --model=runs/demo --task=mteb:NanoBEIR,mteb:MIRACLRetrieval/de --output=r.json --mteb_results=DIR
    python -m moe_embed.evaluate --model=runs/demo --task=A,B --output=steps.jsonl --watch

Writes {"task": {"ndcg@10": ..., "interval": [low, high], "queries": {id: nDCG@10}}}: the interval is a bootstrap's, 95 %. Beside
them stands which model and which texts they are of (results.py). An earlier output is replaced, and said. With
--dims a task also has "dims": {"64": {...}}, with --precisions "precisions": {"int8": {...}}; with --baseline
{"moe_embed": {"task": ...}, "bm25": {"task": ...}}. --compare says which of two outputs is better, and how sure that is.
With --cache the texts of a corpus stay on disk and its vectors go there, for corpora that memory does not hold: the figures are
the same, and a run that was stopped goes on. Vectors are found again by texts and model; delete DIR when the code has changed.
Names after mteb: are fetched once (named_tasks.py; pip install -e ".[mteb]"). --watch measures every checkpoint of a run that
another process trains, a row of the output each, until the run's last step; started again, it goes on.
"""

import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

import moe_embed
from moe_embed import (
    bm25,
    bucket,
    fields,
    mteb_results,
    named_tasks,
    quantize,
    results_table,
    retrieval,
    significance,
    stored,
    vector_file,
    verb,
)
from moe_embed import results as results_lib
from moe_embed.config import UserError
from moe_embed.data.corpus import Corpus
from moe_embed.data.sources import Task, read_task
from moe_embed.load import Model, load
from moe_embed.watch import watch

MANY_TEXTS = 1_000  # take long enough to be said
MANY = {"query": "queries", "document": "documents"}


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("evaluate", __doc__)
    parser.add_argument("--model", help="a workdir, or a folder written by export")
    parser.add_argument("--task", help="BEIR folders, or mteb:NAME of tasks and benchmarks, separated by commas")
    parser.add_argument("--output", type=verb.local_path, help="a .json file; with --watch a .jsonl file")
    parser.add_argument("--show", type=pathlib.Path, help="print the table of an earlier output instead")
    parser.add_argument("--split", help="the qrels to use (default: test, of a named task its own)")
    parser.add_argument(
        "--downloads", default=named_tasks.FOLDER, help="where named tasks are kept (default: %(default)s)"
    )
    parser.add_argument("--dims", default="", help="also with vectors cut to these lengths, separated by commas")
    parser.add_argument("--precisions", default="", help="also with vectors of int8, binary or both: int8,binary")
    parser.add_argument("--baseline", choices=("bm25",), help="also measure this, in the same table")
    parser.add_argument(
        "--runs", type=verb.local_path, help="also write each task's ranking there: TASK.trec, TREC's run format"
    )
    parser.add_argument("--mteb_results", type=verb.local_path, help="also write mteb's TASK.json files there")
    parser.add_argument("--watch", action="store_true", help="measure each checkpoint of the workdir as it comes")
    parser.add_argument(
        "--cache", type=verb.local_path, help="keep documents' vectors in this folder, and texts on disk"
    )
    parser.add_argument("--compare", help="two earlier outputs, R.json,BASE.json: is the first better?")
    arguments = parser.parse_args(argv)
    if arguments.show:
        results = results_lib.read(arguments.show, "--show")
        print(f"{results_table.table(results)}\nof {results_lib.says(results)}")
        return
    if arguments.compare:
        paths = arguments.compare.split(",")
        if len(paths) != 2:
            raise UserError(f"--compare={arguments.compare} must name two outputs of evaluate, as in r.json,base.json.")
        both = [results_lib.read(pathlib.Path(path), "--compare") for path in paths]
        results_lib.check_same_texts(both, names=paths)
        queries = (results_table.queries_of(of, path) for of, path in zip(both, paths, strict=True))
        compared = results_table.comparison(*queries, names=paths)
        for label, path, of in zip(("first", "second"), paths, both, strict=True):
            print(f"{label:<6}  {path}: {results_lib.says(of)}")
        print(compared)
        return
    if not (arguments.model and arguments.task and arguments.output):
        parser.error("give --model, --task and --output, or --show=R.json, or --compare=R.json,BASE.json")
    verb.check_output(arguments.output, "--output")
    others = {
        "--cache": arguments.cache,
        "--baseline": arguments.baseline,
        "--runs": arguments.runs,
        "--mteb_results": arguments.mteb_results,
    }
    if arguments.watch and (set_ := [flag for flag, value in others.items() if value]):
        raise UserError(f"--watch measures steps, without {set_[0]}; evaluate the finished run with that.")
    if not arguments.watch and (lost := results_lib.check_output(arguments.output, "--output")):
        print(lost)
    tasks = open_tasks(
        arguments.task, split=arguments.split, downloads=arguments.downloads, on_disk=bool(arguments.cache)
    )
    if arguments.runs:
        _check_ids(tasks)
    dims, precisions = _dims(arguments.dims), _precisions(arguments.precisions)
    of_model = functools.partial(
        evaluate, tasks=tasks, dims=dims, precisions=precisions, runs=arguments.runs, cache=arguments.cache
    )
    if arguments.watch:
        names = [task.name for task in tasks]
        watch(bucket.path_of(arguments.model), arguments.output, lambda model: summary(of_model(model)), tasks=names)
        return
    for flag in ("--runs", "--cache", "--mteb_results"):
        if folder := others[flag]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{flag}={folder} cannot be made: {error.strerror}.") from error
    verb.say(f"reading {arguments.model} ...")
    model = load(arguments.model)
    for dim in dims:
        _check_dim(dim, model.encoder.dim)
    if arguments.mteb_results:
        mteb_results.check(arguments.mteb_results, tasks, digest=model.digest)
    name = results_lib.of_model(model, name=arguments.model)
    found = results_lib.with_facts(of_model(model), tasks, model=name, version=moe_embed.__version__)
    results = {"moe_embed": found}
    if arguments.baseline:
        verb.say("ranking by BM25 ...")
        ranked = {task.name: measured(task, bm25.rank(task)) for task in tasks}
        results["bm25"] = results_lib.with_facts(ranked, tasks, model={"name": "bm25"}, version=moe_embed.__version__)
    print(results_table.table(results))
    stored.write_json(arguments.output, results if arguments.baseline else found)
    if arguments.mteb_results:
        mteb_results.write(arguments.mteb_results, tasks, found, digest=model.digest)


def open_tasks(
    text: str, *, split: str | None = None, downloads: str = named_tasks.FOLDER, on_disk: bool = False
) -> list[Task]:
    """The tasks of --task: folders, and names that are fetched to `downloads`. UserError for none, or two of one name."""
    tasks = []
    for part in named_tasks.parts(text):
        if part.startswith(named_tasks.PREFIX):
            found = named_tasks.find(part, folder=downloads, split=split)
            tasks += [dataclasses.replace(read_task(str(folder), on_disk=on_disk), name=name) for name, folder in found]
        else:
            tasks.append(read_task(part, split=split, on_disk=on_disk))
    if not tasks:
        raise UserError(f"--task={text} names no folder.")
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"--task={text} has two tasks of one name; results go by a folder's name.")
    return tasks


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    *,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = (),
    runs: pathlib.Path | None = None,
    cache: pathlib.Path | None = None,
) -> dict[str, dict]:
    """{task: `measured`, "seconds"[, "dims": {"64": {...}}][, "precisions": {"int8": {...}}]}; rankings go to the folder `runs`.

    The vectors of tasks that were read with on_disk go to the folder `cache`.
    """
    results, tty, start = {}, sys.stderr.isatty(), time.perf_counter()

    def encode(texts: Sequence[str] | Corpus, name: str) -> np.ndarray:
        if not results or len(texts) >= MANY_TEXTS:  # the first compiles
            verb.say(f"encoding {fields.count(len(texts), name, MANY[name])} ...")
        if isinstance(texts, Corpus):
            on_disk = vector_file.Texts(texts.values, len(texts), texts.digest)
            return vector_file.cached(model, cache, on_disk, task=model.prompt(name), progress=tty)
        return model.encode(texts, model.prompt(name), progress=tty)

    for task, query_ND, document_CD in retrieval.embed_tasks(encode, tasks):
        rank = functools.partial(retrieval.run_of, task, mesh=model.mesh)
        run = rank(query_ND, document_CD)
        results[task.name] = measured(task, run)

        def of(f, task=task, rank=rank, query_ND=query_ND, document_CD=document_CD) -> dict[str, float]:
            return retrieval.measure(task, rank(f(query_ND), retrieval.Rows(document_CD, f)))

        if dims:
            cut = {str(dim): functools.partial(_cut, dim=dim) for dim in dims}
            results[task.name]["dims"] = {name: of(f) for name, f in cut.items()}
        if precisions:
            ranges = quantize.ranges_of(document_CD)
            small = {name: functools.partial(quantize.for_search, precision=name, ranges=ranges) for name in precisions}
            results[task.name]["precisions"] = {name: of(f) for name, f in small.items()}
        if runs:
            (runs / f"{task.name.replace('/', '-')}.trec").write_text(
                "".join(trec_lines(retrieval.counted(task, run))), "utf-8"
            )
        results[task.name]["seconds"], start = time.perf_counter() - start, time.perf_counter()
    return results


def summary(figures: dict[str, dict]) -> dict:
    """A row of --watch: means over the tasks as the table has them, seconds, and each task without its queries' figures."""
    means = {metric: retrieval.mean_of(figures, list(figures), metric) for metric in retrieval.METRICS}
    tasks = {name: {k: v for k, v in values.items() if k != "queries"} for name, values in figures.items()}
    return means | {"seconds": sum(values["seconds"] for values in figures.values()), "tasks": tasks}


def measured(task: Task, run: dict[str, dict[str, float]]) -> dict:
    """nDCG@10, recall@10 and MRR@10 in [0, 1]; of nDCG@10 also its 95 % interval and each query's value."""
    per_query = retrieval.measure_queries(task, run)
    figures: dict = {name: float(values.mean()) for name, values in per_query.items()}
    ndcg = per_query["ndcg@10"]
    queries = dict(zip(task.queries, map(float, ndcg), strict=True))
    return figures | {"interval": significance.interval([ndcg]), "queries": queries}


def trec_lines(run: dict[str, dict[str, float]]) -> Iterator[str]:
    """TREC's run format, what trec_eval and ir_measures read: query, Q0, document, rank, score, system."""
    for query_id, scores in run.items():
        for rank, (document_id, score) in enumerate(sorted(scores.items(), key=lambda item: -item[1]), start=1):
            yield f"{query_id} Q0 {document_id} {rank} {score:.8g} moe_embed\n"


def _check_ids(tasks: Sequence[Task]) -> None:
    """UserError for ids that a line of `trec_lines` cannot hold: its readers split it at white space."""
    for task in tasks:
        for name in itertools.chain(task.queries, task.corpus):
            if len(name.split()) != 1 or name != name.strip():
                raise UserError(
                    f"--runs: {task.name} has the id {name!r:.60}; TREC's format takes none with white space."
                )


def _dims(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--dims={text} is not a list of positive integers, as in --dims=128,64.")
    return [int(part) for part in parts]


def _precisions(text: str) -> list[str]:
    parts = [part for part in text.split(",") if part]
    if not set(parts) <= set(quantize.PRECISIONS):
        raise UserError(f"--precisions={text} is not a list of {' and '.join(quantize.PRECISIONS)}.")
    return parts


def _check_dim(dim: int, largest: int) -> None:
    if dim > largest:
        raise UserError(f"--dims asks for {dim} numbers; the model's vectors have {largest}.")


def _cut(x_ND: np.ndarray, dim: int) -> np.ndarray:
    _check_dim(dim, x_ND.shape[1])
    cut_ND = x_ND[:, :dim]
    return cut_ND / np.maximum(np.linalg.norm(cut_ND, axis=1, keepdims=True), 1e-12)


if __name__ == "__main__":
    verb.run(main)
