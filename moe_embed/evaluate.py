"""Retrieval evaluation on BEIR folders: nDCG@10, recall@10, MRR@10 by trec_eval's own code, exact search.

    python -m moe_embed.evaluate --model=runs/demo --task=moe_embed/sample/tasks/xling-libreoffice-help-de-en --output=r.json
    python -m moe_embed.evaluate --model=runs/demo --task=A,B,C --dims=128,64 --output=r.json
    python -m moe_embed.evaluate --model=runs/demo --task=A,B,C --baseline=bm25 --output=r.json

Writes {"task": {"ndcg@10": ...}}; with --dims a task also has "dims": {"64": {...}}; with --baseline
{"moe_embed": {"task": ...}, "bm25": {"task": ...}}.
"""

import argparse
import itertools
import json
import logging
import pathlib
import re
import sys
from collections.abc import Sequence

import bm25s
import numpy as np

from moe_embed import retrieval, verb
from moe_embed.config import UserError
from moe_embed.data.sources import Task, read_task
from moe_embed.load import Model, load

LETTERS = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]+|[^\W぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]+")
CJK = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]")
K1, B = 0.9, 0.4  # BM25 as BEIR and Anserini set it


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moe_embed.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a workdir, or a folder written by export")
    parser.add_argument("--task", help="BEIR folders, separated by commas")
    parser.add_argument("--output", type=pathlib.Path, help="a .json file")
    parser.add_argument("--show", type=pathlib.Path, help="print the table of an earlier output instead")
    parser.add_argument("--split", default="test", help="the qrels to use (default: test)")
    parser.add_argument("--dims", default="", help="also with vectors cut to these lengths, separated by commas")
    parser.add_argument("--baseline", choices=("bm25",), help="also measure this, in the same table")
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(table(read_results(arguments.show)))
        return
    if not (arguments.model and arguments.task and arguments.output):
        parser.error("give --model, --task and --output, or --show=R.json")
    verb.check_output(arguments.output, "--output")
    folders = [folder for folder in arguments.task.split(",") if folder]
    if not folders:
        raise UserError(f"--task={arguments.task} names no folder.")
    tasks = [read_task(folder, split=arguments.split) for folder in folders]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"--task={arguments.task} has two folders of one name; results go by the folder's name.")
    dims = _dims(arguments.dims)
    results = {"moe_embed": evaluate(load(arguments.model), tasks, dims=dims)}
    if arguments.baseline:
        results["bm25"] = {task.name: retrieval.measure(task, bm25(task)) for task in tasks}
    print(table(results))
    arguments.output.write_text(json.dumps(results if arguments.baseline else results["moe_embed"], indent=1) + "\n")


def read_results(path: pathlib.Path) -> dict[str, dict[str, dict]]:
    """What an earlier run wrote, by system: {"moe_embed": {task: {...}}[, "bm25": ...]}."""
    try:
        results = json.loads(path.read_text("utf-8"))
        first = next(iter(next(iter(results.values())).values()))
        results = results if isinstance(first, dict) else {"moe_embed": results}
        if not all("ndcg@10" in values for tasks in results.values() for values in tasks.values()):
            raise ValueError("a task without ndcg@10")
        return results
    except (OSError, ValueError, AttributeError, TypeError, StopIteration) as error:
        raise UserError(f"--show={path} is no output of evaluate ({error}).") from error


def evaluate(model: Model, tasks: Sequence[Task], *, dims: Sequence[int] = ()) -> dict[str, dict]:
    """{task: {"ndcg@10": x, "recall@10": x, "mrr@10": x[, "dims": {"64": {...}}]}}, fractions in [0, 1]."""
    results = {}
    encode = lambda texts, name: model.encode(texts, model.prompt(name), progress=sys.stderr.isatty())  # noqa: E731
    for task, query_ND, document_CD in retrieval.embed_tasks(encode, tasks):
        results[task.name] = retrieval.measure(task, retrieval.run_of(task, query_ND, document_CD))
        if dims:
            results[task.name]["dims"] = {
                str(dim): retrieval.measure(task, retrieval.run_of(task, _cut(query_ND, dim), _cut(document_CD, dim)))
                for dim in dims
            }
    return results


def bm25(task: Task) -> dict[str, dict[str, float]]:
    """A BM25 run (k1 0.9, b 0.4): lower-cased words, Chinese, Japanese and Korean as character bigrams, no stemming."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    documents = list(task.corpus)
    corpus = [words(text) for text in task.corpus.values()]
    if not any(corpus):
        return {query_id: {} for query_id in task.queries}
    retriever = bm25s.BM25(k1=K1, b=B)
    retriever.index(corpus, show_progress=False)
    depth = min(retrieval.DEPTH, len(documents))
    run = {}
    for query_id, text in task.queries.items():
        known = [word for word in words(text) if word in retriever.vocab_dict]
        if not known:
            run[query_id] = {}
            continue
        found, scores = retriever.retrieve([known], k=depth, show_progress=False)
        run[query_id] = {documents[i]: float(s) for i, s in zip(found[0], scores[0], strict=True) if s > 0}
    return run


def words(text: str) -> list[str]:
    """Lower-cased words; a run of CJK letters becomes its bigrams, alone a letter stays.

    >>> words("Die Tabelle 表を挿入")
    ['die', 'tabelle', '表を', 'を挿', '挿入']
    """
    found = []
    for word in LETTERS.findall(text.lower()):
        if CJK.match(word) and len(word) > 1:
            found += [a + b for a, b in itertools.pairwise(word)]
        else:
            found.append(word)
    return found


def table(results: dict[str, dict[str, dict]]) -> str:
    """A table of percentages: a row a task, nDCG@10 and recall@10 for each system, and means by kind of task."""
    systems = list(results)
    names = list(results[systems[0]])
    width = max(map(len, [*names, "mean cross-lingual"]))
    lines = [" " * width + "".join(f"  {system:>17}" for system in systems)]
    lines.append("task".ljust(width) + "  nDCG@10 recall@10" * len(systems))

    def row(label: str, members: list[str]) -> str:
        cells = ""
        for system in systems:
            ndcg, recall = (100 * np.mean([results[system][n][m] for n in members]) for m in ("ndcg@10", "recall@10"))
            cells += f"  {ndcg:7.1f} {recall:9.1f}"
        return label.ljust(width) + cells

    lines += [row(name, [name]) for name in names]
    lines.append("-" * len(lines[1]))
    groups = {
        "mean monolingual": [name for name in names if not name.startswith("xling-")],
        "mean cross-lingual": [name for name in names if name.startswith("xling-")],
    }
    lines += [row(label, members) for label, members in groups.items() if members]
    own = results[systems[0]]
    if "dims" in own[names[0]]:
        lines.append("nDCG@10 of shorter vectors, mean of all tasks:")
        for dim in own[names[0]]["dims"]:
            lines.append(f"  {dim:>5}  {100 * np.mean([own[name]['dims'][dim]['ndcg@10'] for name in names]):5.1f}")
    return "\n".join(lines)


def _dims(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--dims={text} is not a list of positive integers, as in --dims=128,64.")
    return [int(part) for part in parts]


def _cut(x_ND: np.ndarray, dim: int) -> np.ndarray:
    if dim > x_ND.shape[1]:
        raise UserError(f"--dims asks for {dim} numbers; the model's vectors have {x_ND.shape[1]}.")
    cut_ND = x_ND[:, :dim]
    return cut_ND / np.maximum(np.linalg.norm(cut_ND, axis=1, keepdims=True), 1e-12)


if __name__ == "__main__":
    verb.run(main)
