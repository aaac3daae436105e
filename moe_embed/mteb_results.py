"""Figures in mteb's own layout, a TaskResult a file, without mteb: what the field's scripts and leaderboards read.

    DIR/MIRACLRetrieval.json    {"task_name", "dataset_revision", "mteb_version", "evaluation_time", "scores": {"dev":
                                [{"hf_subset": "de", "languages": ["deu-Latn"], "main_score", "ndcg_at_10", ...}, ...]}}

The parts of one task (languages, splits) share a file, also those of later calls with the same model, whose digest each part has. What a plain folder does not say stays unsaid: languages is empty then,
the revision "unknown" and the version null. mteb_version is that of the mteb which gave the data: the figures are trec_eval's.
"""

import pathlib
from collections.abc import Mapping, Sequence

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.data.sources import Task

METRICS = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}
MAIN = "ndcg_at_10"


def write(
    folder: pathlib.Path, tasks: Sequence[Task], figures: Mapping[str, Mapping], *, digest: str
) -> list[pathlib.Path]:
    """Write a file for each of mteb's tasks into `folder`, made if absent; returns the files.

    `figures` is what evaluate measured: {task's name: {"ndcg@10", "recall@10", "mrr@10", "seconds", ...}}, of the model with
    this Model.digest. Other parts of a task stay as they are there. UserError as in `check`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, members in _by_task(tasks).items():
        path, found = folder / f"{name}.json", task_result(members, figures, digest=digest)
        stored.write_json(path, _merged(_earlier(path, members, digest), found))
        paths.append(path)
    return paths


def check(folder: pathlib.Path, tasks: Sequence[Task], *, digest: str) -> None:
    """UserError, before any work, where `folder` has a task's file of another revision of the data or of another model (or of one
    that is not named), or something that is no TaskResult, and for a task whose name is no file's."""
    for name, members in _by_task(tasks).items():
        _earlier(folder / f"{name}.json", members, digest)


def _by_task(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    of_task: dict[str, list[Task]] = {}
    for task in tasks:
        try:
            of_task.setdefault(stored.name_within(task.origin.task), []).append(task)
        except ValueError as error:
            raise UserError(
                f"the task {task.origin.task!r:.80} cannot name a file of --mteb_results: {error}."
            ) from error
    return of_task


def _earlier(path: pathlib.Path, tasks: Sequence[Task], digest: str) -> dict | None:
    """What `path` has of the same data and model; None where nothing is."""
    if not path.exists():
        return None
    try:
        found = stored.read_json(path)
        revision, seconds = found["dataset_revision"], found["evaluation_time"]
        all_parts = [part for of_split in found["scores"].values() for part in of_split]
        parts = [part["hf_subset"] for part in all_parts]
        others = {part["model"] if "model" in part else None for part in all_parts} - {digest}
        if not isinstance(seconds, int | float) or not all(isinstance(part, str) for part in parts):
            raise ValueError("its evaluation_time or a hf_subset is of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no TaskResult of mteb ({error!r:.100}); move it away, or name another folder."
        ) from error
    if revision != tasks[0].origin.revision:
        raise UserError(
            f"{path} is of revision {revision!r} of the data, and these are of {tasks[0].origin.revision!r}: "
            "move it away, or name another folder."
        )
    if others:
        raise UserError(
            f"{path} has figures of another model ({', '.join(str(other)[:12] for other in others)}; this one is {digest[:12]}): "
            "move it away, or name another folder."
        )
    return found


def _merged(earlier: dict | None, found: dict) -> dict:
    """`found`, and of `earlier` the parts (split and subset) that it lacks; seconds are of all calls then."""
    if earlier is None:
        return found
    new = {(split, part["hf_subset"]) for split, parts in found["scores"].items() for part in parts}
    kept = {split: [part for part in parts if (split, part["hf_subset"]) not in new]
            for split, parts in earlier["scores"].items()}  # fmt: skip
    if not any(kept.values()):
        return found
    scores = {split: [*(kept[split] if split in kept else ()), *parts] for split, parts in found["scores"].items()}
    scores |= {split: parts for split, parts in kept.items() if parts and split not in scores}
    return found | {"scores": scores, "evaluation_time": earlier["evaluation_time"] + found["evaluation_time"]}


def task_result(tasks: Sequence[Task], figures: Mapping[str, Mapping], *, digest: str) -> dict:
    """One TaskResult of the parts of one task, in [0, 1] and seconds, each with the digest of the model."""
    origin = tasks[0].origin
    scores: dict[str, list[dict]] = {}
    for task in tasks:
        found = {theirs: figures[task.name][ours] for ours, theirs in METRICS.items()}
        part = {"hf_subset": task.origin.subset, "languages": list(task.origin.languages)}
        of = {"mteb_version": task.origin.mteb_version, "model": digest}
        scores.setdefault(task.origin.split, []).append(found | {"main_score": found[MAIN]} | part | of)
    return {
        "dataset_revision": origin.revision,
        "task_name": origin.task,
        "mteb_version": origin.mteb_version,
        "scores": scores,
        "evaluation_time": sum(figures[task.name]["seconds"] for task in tasks),
        "kg_co2_emissions": None,
    }
