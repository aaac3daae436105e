"""Retrieval tasks by name, `mteb:SciFact`: fetched through mteb once, kept as BEIR folders, read from there ever after.

    mteb:SciFact              a task of mteb: all of its languages, of an aggregate task (CQADupstackRetrieval) all parts
    mteb:MIRACLRetrieval/de   one language of a task
    mteb:BEIR                 the retrieval tasks of a benchmark, as mteb lists them: NanoBEIR, MTEB(eng, v2), ...

A folder is FOLDER/<task>/<subset>/<split>, and its task.json (data/origin.py) has the revision of the data: a figure depends
on the network of the first day alone. Names, languages and splits are mteb's own, and so is what counts as one task.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

from moe_embed.config import UserError
from moe_embed.data import origin as origin_lib
from moe_embed.data import sources

PREFIX = "mteb:"
FOLDER = "~/.cache/moe_embed/tasks"
METRIC = "ndcg_at_10"  # the only main score that is measured here


def parts(text: str) -> list[str]:
    """Folders and names, separated by commas; those inside of parentheses belong to a name.

    >>> parts("mteb:MTEB(eng, v2),sample/tasks/a")
    ['mteb:MTEB(eng, v2)', 'sample/tasks/a']
    """
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]


def find(
    text: str, *, folder: str | pathlib.Path = FOLDER, split: str | None = None, say: Callable[[str], None] = print
) -> list[tuple[str, pathlib.Path]]:
    """(the task's name in tables, its folder) of all that `text` ("mteb:...") names; what is not there is fetched.

    `split` replaces the task's own. UserError without mteb, for a name it does not know, for what is no retrieval of texts
    measured by nDCG@10, and where the data cannot be fetched.
    """
    if importlib.util.find_spec("mteb") is None:
        raise UserError(f'{text} is found through mteb, which is not installed: pip install -e ".[mteb]"')
    name, _, subset = text.removeprefix(PREFIX).partition("/")
    root, found = pathlib.Path(folder).expanduser(), []
    for label, task in _tasks(name, say):
        if split is not None and split not in task.metadata.eval_splits:
            has = ", ".join(task.metadata.eval_splits)
            raise UserError(f"--split={split}: {task.metadata.name} has {has}; leave --split out for the task's own.")
        splits = list(task.eval_splits) if split is None else [split]
        if len(splits) > 1:
            raise UserError(f"{task.metadata.name} has the splits {', '.join(splits)}; choose one by --split.")
        subsets = list(task.hf_subsets)
        if subset and subset not in subsets:
            raise UserError(f"{text}: {task.metadata.name} has the parts {', '.join(subsets)}.")
        for one in [subset] if subset else subsets:
            place = root / task.metadata.name / one / splits[0]
            if not place.is_dir():
                say(f"fetching {task.metadata.name}, {one}, {splits[0]} to {place} ...")
                _fetch(task.metadata.name, one, splits[0], place)
            found.append((label if one == "default" else f"{label}/{one}", place))
    return found


def _tasks(name: str, say: Callable[[str], None]) -> Iterator[tuple[str, object]]:
    """(name in tables, task) of a task, an aggregate task or a benchmark."""
    import mteb

    whole = None
    try:
        task = mteb.get_task(name)
    except KeyError as no_task:
        try:
            whole = list(mteb.get_benchmark(name).tasks)
        except KeyError as no_benchmark:
            said = "; as a benchmark: ".join(
                str(error.args[0]).removeprefix("KeyError: ") for error in (no_task, no_benchmark)
            )
            raise UserError(f"mteb has no task and no benchmark {PREFIX}{name}: {said}") from no_task
    if whole is None:
        if fault := _unfit(task):
            raise UserError(f"{PREFIX}{name} {fault}; evaluate it with mteb itself and moe_embed.mteb_model.")
        whole = [task]
    others = [task for task in whole if _unfit(task)]
    if len(others) == len(whole):
        raise UserError(f"the benchmark {PREFIX}{name} has no task of text retrieval measured by nDCG@10.")
    if others:
        say(
            f"{PREFIX}{name}: {len(whole) - len(others)} tasks of retrieval; {len(others)} of another kind are left out."
        )
    for task in whole:
        if task not in others:
            own = task.metadata.name
            yield from (
                [(f"{own}/{part.metadata.name}", part) for part in task.tasks] if task.is_aggregate else [(own, task)]
            )


def _unfit(task) -> str:
    """Why a task of mteb cannot be measured here, "" if it can."""
    if task.is_aggregate:
        return next((fault for fault in map(_unfit, task.tasks) if fault), "")
    if task.metadata.type != "Retrieval" or list(task.metadata.modalities) != ["text"]:
        return f"is {task.metadata.type} of {' and '.join(task.metadata.modalities)}, not retrieval of texts"
    if task.metadata.main_score != METRIC:
        return f"is measured by {task.metadata.main_score}, not by nDCG@10"
    return "leaves out the first document found" if task.skip_first_result else ""


def _fetch(name: str, subset: str, split: str, place: pathlib.Path) -> None:
    """One part of a task through mteb to a BEIR folder at `place`, whole or not at all."""
    import mteb

    task = mteb.get_task(name, hf_subsets=[subset], eval_splits=[split])
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)  # what some tasks load is of mteb's first layout
        data = task.dataset[subset][split]
    except Exception as error:  # of the hub's client, of its transport, of the data's own loader
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{PREFIX}{name} ({subset}, {split}) cannot be fetched: {why}") from error
    origin = origin_lib.Origin(
        task=name,
        subset=subset,
        split=split,
        languages=tuple(task.metadata.hf_subsets_to_langscripts[subset]),
        revision=task.metadata.revision,
        mteb_version=importlib.metadata.version("mteb"),
        ignore_identical_ids=task.ignore_identical_ids,
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{split}-", dir=place.parent))
    try:
        write(scratch, data["corpus"], data["queries"], data["relevant_docs"], origin=origin)
        scratch.chmod(0o755)  # mkdtemp's folder is its maker's alone
        try:
            scratch.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster with the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write(
    folder: pathlib.Path,
    corpus: Iterable[Mapping],
    queries: Iterable[Mapping],
    relevance: Mapping[str, Mapping[str, int]],
    *,
    origin: origin_lib.Origin,
) -> None:
    """mteb's rows {"id", "text"[, "title"]} and judgements as a BEIR folder. UserError for rows that are no texts.

    A judgement of a query that is not there is left out, as nobody can ask it. One of a document that is not there stays,
    over an empty document: nobody can find it, and trec_eval counts it, as mteb does.
    """
    missing = dict.fromkeys(document for of in relevance.values() for document in of)
    asked = set()

    def document_lines():
        for row in corpus:
            missing.pop(row["id"], None)
            title = {"title": row["title"]} if row.get("title") else {}
            yield _line(row, origin, **title)
        yield from (_line({"id": document, "text": ""}, origin) for document in missing)

    def query_lines():
        for row in queries:
            if row["id"] in relevance:
                asked.add(row["id"])
                instruction = row.get("instruction")  # mteb puts it behind the query
                yield _line({**row, "text": f"{row['text']} {instruction}"} if instruction else row, origin)

    sources.write_lines(folder / "corpus.jsonl", document_lines())
    sources.write_lines(folder / "queries.jsonl", query_lines())
    (folder / "qrels").mkdir()
    grades = (f"{q}\t{d}\t{int(grade)}" for q, of in relevance.items() if q in asked for d, grade in of.items())
    sources.write_lines(folder / "qrels" / f"{origin.split}.tsv", ["query-id\tcorpus-id\tscore", *grades])
    origin_lib.write(folder, origin)


def _line(row: Mapping, origin: origin_lib.Origin, **more: str) -> str:
    if not isinstance(row["text"], str) or not isinstance(row["id"], str) or re.search(r"[\t\r\n]", row["id"]):
        raise UserError(
            f"{origin.task} has the row {row['id']!r:.60}: {row['text']!r:.60}, which is no text with an id."
        )
    return json.dumps({"_id": row["id"], **more, "text": row["text"]})
