"""What an output of evaluate holds: figures by task, and with each task which model they are of, of which texts, made when.

    {"TASK": {"ndcg@10": ..., "queries": {...}, "model": {"name": "runs/a", "loaded": "runs/a (step 600)", "began_with": null,
              "digest": "5f0c..."}, "task": {"documents": 900, "queries": 474, "judgements": 474, "digest": "91be..."},
              "date": "2026-11-24T03:10:00+00:00", "versions": {"moe_embed": "0.1.0", ...}}}

The facts stand with every task, so that a file which somebody put together of several still says what each figure is of.
"""

import datetime
import itertools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from moe_embed import bucket, stored
from moe_embed.config import UserError
from moe_embed.data import corpus as corpus_lib
from moe_embed.data.sources import Task
from moe_embed.load import DESCRIPTION, Model, read_description


def of_model(model: Model, *, name: str) -> dict[str, str | None]:
    """What a model is known by: the path as given, what was loaded from it, what that began with, and all of its parameters."""
    root, began = bucket.path_of(name), None
    if bucket.is_file(root / DESCRIPTION):
        description = read_description(root)
        began = description.init_from or description.made_by
    return {"name": name, "loaded": model.origin, "began_with": began, "digest": model.digest}


def of_task(task: Task) -> dict[str, int | str]:
    """A task's counts, and a digest of its documents, queries, judgements and rule; the same wherever the texts lie."""
    texts, queries = task.corpus, task.queries
    of_texts = texts.digest if isinstance(texts, corpus_lib.Corpus) else corpus_lib.survey(texts.values())[1]
    judged = [f"{q}\t{d}\t{grade}" for q, found in task.relevance.items() for d, grade in found.items()]
    rule = ["a query's own document counts as found for none"] if task.origin.ignore_identical_ids else []
    parts = itertools.chain([of_texts], map(str, texts), itertools.chain(*queries.items()), judged, rule)
    digest = corpus_lib.survey(parts)[1]
    return {"documents": len(texts), "queries": len(queries), "judgements": len(judged), "digest": digest}


def with_facts(
    figures: Mapping[str, Mapping], tasks: Sequence[Task], *, model: Mapping, version: str
) -> dict[str, dict]:
    """`figures`, by task, and beside each what it is of. `model` is what of_model says, or a baseline's name; `version` is ours."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"moe_embed": version} | {m.__name__: m.__version__ for m in (jax, np)}
    return {
        task.name: {
            **figures[task.name],
            "model": dict(model),
            "task": of_task(task),
            "date": now,
            "versions": versions,
        }
        for task in tasks
    }


def read(path: pathlib.Path, flag: str) -> dict[str, dict[str, dict]]:
    """What an earlier run wrote, by system: {"moe_embed": {task: {...}}[, "bm25": ...]}. UserError if it is something else."""
    try:
        results = stored.read_json(path)
        first = next(iter(next(iter(results.values())).values()))
        results = results if isinstance(first, dict) and "ndcg@10" in first else {"moe_embed": results}
        for tasks in results.values():
            for values in tasks.values():
                if "ndcg@10" not in values:
                    raise ValueError("a task without ndcg@10")
                if not all(isinstance(values[key], dict) for key in ("model", "task") if key in values):
                    raise ValueError("a task of an unknown model")
                low, high = values["interval"] if "interval" in values else (0, 0)
                of_queries = values["queries"].values() if "queries" in values else ()
                dims, precisions = (values[key] if key in values else {} for key in ("dims", "precisions"))
                if not all(int(dim) > 0 and str(int(dim)) == dim for dim in dims):
                    raise ValueError("a dimension that is no whole number")
                of_sizes = [size["ndcg@10"] for size in (*dims.values(), *precisions.values())]
                numbers = (values["ndcg@10"], values["recall@10"], low, high, *of_queries, *of_sizes)
                if not all(isinstance(number, int | float) for number in numbers):
                    raise ValueError("a figure that is no number")
        return results
    except FileNotFoundError as error:
        raise UserError(f"{flag}={path} does not exist.") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, StopIteration) as error:
        raise UserError(f"{flag}={path} is no output of evaluate ({error}).") from error


def sizes(tasks: Mapping[str, Mapping], kind: str) -> list[str]:
    """The "dims" or "precisions" that all tasks have, in the first one's order: a mean of some would be another mean."""
    first, *others = [of_task[kind] if kind in of_task else {} for of_task in tasks.values()]
    return [size for size in first if all(size in of_task for of_task in others)]


def says(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Of which model the first system's figures are, for a person; several where a file has several."""
    found = {}
    for values in next(iter(results.values())).values():
        if "model" not in values:
            return "a model that is not named (an older output)"
        model = values["model"]
        began = f", from {model['began_with']}" if model.get("began_with") else ""
        digest = f", parameters {str(model['digest'])[:12]}" if "digest" in model else ""
        date = f", {str(values['date'])[:10]}" if "date" in values else ""
        found[f"{model.get('loaded') or model.get('name')}{began}{digest}{date}"] = None
    return "; ".join(found)


def check_same_texts(results: Sequence[Mapping[str, Mapping[str, Mapping]]], *, names: Sequence[str]) -> None:
    """UserError where two outputs have a task of one name and of other texts: that difference would be the texts'."""
    first, second = (next(iter(of.values())) for of in results)
    for task in first.keys() & second.keys():
        if "task" in first[task] and "task" in second[task] and first[task]["task"] != second[task]["task"]:
            raise UserError(
                f"{names[0]} and {names[1]} measured {task} on other documents, queries or judgements; evaluate both on the same."
            )


def check_output(path: pathlib.Path, flag: str) -> str:
    """What will be lost when an output is written at `path`, a sentence, "" for nothing.

    As with an export, an earlier one is replaced. UserError, before any work, if anything else is there.
    """
    if not path.is_file() or not path.stat().st_size:
        return ""
    try:
        before = read(path, flag)
    except UserError as error:
        raise UserError(f"{flag}={path} exists and is no output of evaluate; name another file, or move it.") from error
    return f"{path} holds an evaluation of {says(before)}; it will be replaced."
