"""Figures in mteb's own layout, a TaskResult a file, without mteb: what the field's scripts and leaderboards read.

    DIR/MIRACLRetrieval.json    {"task_name", "dataset_revision", "mteb_version", "evaluation_time", "scores": {"dev":
                                [{"hf_subset": "de", "languages": ["deu-Latn"], "main_score", "ndcg_at_10", ...}, ...]}}

The parts of one task (languages, splits) share a file. What a plain folder does not say stays unsaid: languages is empty then,
the revision "unknown" and the version null. mteb_version is that of the mteb which gave the data: the figures are trec_eval's.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from moe_embed.data.sources import Task

METRICS = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}
MAIN = "ndcg_at_10"


def write(folder: pathlib.Path, tasks: Sequence[Task], figures: Mapping[str, Mapping]) -> list[pathlib.Path]:
    """Write a file for each of mteb's tasks into `folder`, made if absent; returns the files.

    `figures` is what evaluate measured: {task's name: {"ndcg@10", "recall@10", "mrr@10", "seconds", ...}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of_task: dict[str, list[Task]] = {}
    for task in tasks:
        of_task.setdefault(task.origin.task, []).append(task)
    paths = []
    for name, members in of_task.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(task_result(members, figures), indent=2) + "\n", "utf-8")
    return paths


def task_result(tasks: Sequence[Task], figures: Mapping[str, Mapping]) -> dict:
    """One TaskResult of the parts of one task, in [0, 1] and seconds."""
    origin = tasks[0].origin
    scores: dict[str, list[dict]] = {}
    for task in tasks:
        found = {theirs: figures[task.name][ours] for ours, theirs in METRICS.items()}
        part = {"hf_subset": task.origin.subset, "languages": list(task.origin.languages)}
        version = {"mteb_version": task.origin.mteb_version}
        scores.setdefault(task.origin.split, []).append(found | {"main_score": found[MAIN]} | part | version)
    return {
        "dataset_revision": origin.revision,
        "task_name": origin.task,
        "mteb_version": origin.mteb_version,
        "scores": scores,
        "evaluation_time": sum(figures[task.name]["seconds"] for task in tasks),
        "kg_co2_emissions": None,
    }
