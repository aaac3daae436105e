"""Hard negatives: for each query of a file of pairs, the nearest documents that do not answer it.

    python -m moe_embed.mine --model=runs/demo --pairs=pairs.jsonl.gz --output=mined.jsonl
    python -m moe_embed.mine --model=runs/demo --pairs='de/*.jsonl,en.csv' --corpus=corpus.jsonl --output=mined.jsonl.gz

The positive-aware percent margin (TopK-PercPos of NV-Retriever, arXiv 2407.15831; Nomic Embed v2, arXiv 2502.07972): of a
query's `depth` nearest documents, among all that the files and --corpus hold, the first `num_negatives` that are no known
positive and score at most `margin` times what its weakest positive scores. Known positives are all documents of all rows
with the same query, or with an id that one of those rows has (ids are a file's own). A document whose text is the query's is
no negative either. A weakest positive of zero or less has no percentage to take, and says that the model does not understand
this query: such a query gets no negatives, and is counted.

Each row is written as it was, with "negatives" and "scores": the model's cosine of its documents, then of its negatives
(in a row with BGE's columns: neg, pos_scores, neg_scores). Negatives and scores that it had before are replaced.

A run that was stopped continues with the same command: vectors and what was found lie in OUTPUT.work until the end.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tqdm

from moe_embed import retrieval, stored, verb
from moe_embed.config import UserError
from moe_embed.data import inputs, sources, tables
from moe_embed.data import pairs as pairs_lib
from moe_embed.load import Model, load

CHUNK = 2_048  # texts a device encodes between two marks of progress
LOCK, PROGRESS = "lock", "progress.json"  # in OUTPUT.work


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("mine", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, a model folder, or a Hugging Face folder")
    parser.add_argument(
        "--pairs", required=True, help=".jsonl, .jsonl.gz or .csv files or patterns, with commas between"
    )
    parser.add_argument("--output", required=True, type=verb.local_path, help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--corpus", help="more documents to find: a BEIR corpus.jsonl")
    parser.add_argument("--num_negatives", type=int, default=10, help="negatives a row (default: 10)")
    parser.add_argument("--margin", type=float, default=0.95, help="of the weakest positive's score (default: 0.95)")
    parser.add_argument("--depth", type=int, default=100, help="nearest documents looked at (default: 100)")
    parser.add_argument("--drop_incomplete", action="store_true", help="leave out rows with fewer negatives than asked")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the vectors on disk")
    parser.add_argument("--query", default="query", help="the column of the queries")
    parser.add_argument("--document", default="document", help="the column of the documents")
    a = parser.parse_args(argv)
    verb.check_output(a.output, "--output")
    if not a.output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output={a.output} is no .jsonl or .jsonl.gz file; name one.")
    if not (a.margin > 0 and math.isfinite(a.margin)):
        raise UserError(
            f"--margin={a.margin} is no share of a score; give a number above 0, 0.95 or 0.98 in the paper."
        )
    if not 1 <= a.num_negatives <= a.depth:
        raise UserError(f"--num_negatives={a.num_negatives} is not between 1 and --depth={a.depth}.")
    paths = inputs.find(a.pairs)
    if os.path.realpath(a.output) in map(inputs.same, [*paths, a.corpus] if a.corpus else paths):
        raise UserError(f"--output={a.output} is one of --pairs or --corpus; name another.")
    texts = collect(paths, corpus=a.corpus, query=a.query, document=a.document)
    print(
        f"{len(texts.rows):,} rows; {len(texts.queries):,} distinct queries among {len(texts.documents):,} documents."
    )
    options = {name: getattr(a, name) for name in ("num_negatives", "margin", "depth", "drop_incomplete", "dtype")}
    print(summary(mine(load(a.model), texts, a.output, **options), a.output, **options))


@dataclasses.dataclass(frozen=True)
class Collection:
    """The distinct texts of some files of pairs, numbered as they come, and who answers whom."""

    paths: Sequence[str]
    columns: dict[str, str]  # the names of "query" and "document" in the files
    queries: list[str]
    documents: list[str]
    rows: list[tuple[int, ...]]  # of all files in order: the number of the row's query, then those of its documents
    answers: list[set[int]]  # for each query, the documents of its rows
    ids: list[set[tuple[int, str]]]  # for each query, the (file, id) of its rows
    answers_of_id: dict[tuple[int, str], set[int]]
    same: list[int]  # for each query, the document that has its text, or -1
    crc_of: dict[str, int]  # of each file that was read
    digest: str  # of the files, in their order, and of the columns


def collect(
    paths: Sequence[str], *, corpus: str | None = None, query: str = "query", document: str = "document"
) -> Collection:
    """Read files of pairs, and a BEIR corpus.jsonl, once. UserError names file, line and fault."""
    for path in paths:
        tables.kind(path)  # to the digest a name of another kind would be a file that does not exist
    files = [*paths, corpus] if corpus else paths
    crc_of = {path: tables.digest(path) for path in files}
    queries, documents = {}, {}
    rows, answers, ids, answers_of_id = [], [], [], {}
    for file, path in enumerate(paths):
        for row in pairs_lib.read_rows(path, query=query, document=document):
            number = queries.setdefault(row.pairs[0].query, len(queries))
            found = [documents.setdefault(pair.document, len(documents)) for pair in row.pairs]
            if number == len(answers):
                answers.append(set())
                ids.append(set())
            answers[number].update(found)
            if row.pairs[0].id:
                ids[number].add((file, row.pairs[0].id))
                answers_of_id.setdefault((file, row.pairs[0].id), set()).update(found)
            rows.append((number, *found))
    for text in sources.read_corpus(corpus).values() if corpus else ():
        documents.setdefault(text, len(documents))
    same = [documents[text] if text in documents else -1 for text in queries]
    check_unchanged(crc_of)
    digest = hashlib.blake2b(json.dumps([query, document]).encode(), digest_size=16)
    for path in files:
        digest.update(crc_of[path].to_bytes(4, "little"))
    columns, texts = {"query": query, "document": document}, (list(queries), list(documents))
    return Collection(paths, columns, *texts, rows, answers, ids, answers_of_id, same, crc_of, digest.hexdigest())


def check_unchanged(crc_of: dict[str, int]) -> None:
    """UserError where the bytes of a file are others than they were."""
    for path, crc in crc_of.items():
        if tables.digest(path) != crc:
            raise UserError(f"{path} changed while it was mined; run it again.")


def positives(texts: Collection, query: int) -> set[int]:
    """The documents that are known to answer a query."""
    return texts.answers[query].union(*(texts.answers_of_id[name] for name in texts.ids[query]))


def mine(
    model: Model,
    texts: Collection,
    output: pathlib.Path,
    *,
    num_negatives: int = 10,
    margin: float = 0.95,
    depth: int = 100,
    drop_incomplete: bool = False,
    dtype: str = "float32",
) -> dict[str, float]:
    """Write the rows of `texts` to `output` with hard negatives, and return what was counted (see `summary`).

    Continues what an earlier call left in OUTPUT.work. UserError if that was of another model, files or dtype, if another
    process works there, if a file is no longer what `collect` read, or if no row is left to write. Another `depth` searches
    again; other options need no work to be done twice.
    """
    chunk = CHUNK * (model.mesh.size if model.mesh else 1)

    def encoded(some: Sequence[str], task: str, first: int) -> Iterator[tuple[np.ndarray]]:
        for start in range(first, len(some), chunk):
            x_ND = model.encode(some[start : start + chunk], model.prompt(task))
            if not np.isfinite(x_ND).all():
                raise UserError(f"the model gives a {task} vector that is not finite; nothing can be found with it.")
            yield (x_ND.astype(dtype),)

    made_of = {"model": model.digest, "pairs and corpus": texts.digest, "dtype": dtype}
    with _begun(output, made_of) as work:
        (document_CD,) = _fill(
            work, ["documents"], len(texts.documents), lambda n: encoded(texts.documents, "document", n)
        )
        (query_ND,) = _fill(work, ["queries"], len(texts.queries), lambda n: encoded(texts.queries, "query", n))
        depth = min(depth, len(texts.documents))
        names = [f"scores_{depth}", f"indices_{depth}"]
        search = lambda n: retrieval.search(query_ND, document_CD, k=depth, mesh=model.mesh, first=n)  # noqa: E731
        score_NC, index_NC = _fill(work, names, len(texts.queries), search)
        counts = {"queries": len(texts.queries), "documents": len(texts.documents)}
        options = {"num_negatives": num_negatives, "margin": margin, "drop_incomplete": drop_incomplete}
        lines = mined(texts, query_ND, document_CD, score_NC, index_NC, counts, **options)
        sources.write_lines(output, _while_unchanged(texts, lines))
        _delete(work)
    return counts


def _while_unchanged(texts: Collection, lines: Iterator[str]) -> Iterator[str]:
    """The lines. Before they end, UserError if a file has changed: its rows were read a second time to write them."""
    try:
        yield from lines
    except Exception:
        check_unchanged(texts.crc_of)  # fewer rows, or none that is a pair: whatever it was, this is the cause
        raise
    check_unchanged(texts.crc_of)


def mined(
    texts: Collection,
    query_ND: np.ndarray,
    document_CD: np.ndarray,
    score_NC: np.ndarray,
    index_NC: np.ndarray,
    counts: dict[str, float],
    *,
    num_negatives: int,
    margin: float,
    drop_incomplete: bool,
) -> Iterator[str]:
    """The lines of all rows with their negatives, from what was found for each query (retrieval.top_k). Fills `counts`.

    UserError if there is none.
    """
    names = "rows pairs positive hard_rows hard candidates dropped incomplete without not_positive known written"
    counts |= dict.fromkeys(names.split(), 0)
    rows = (row for path in texts.paths for row in pairs_lib.read_rows(path, **texts.columns))
    bar = tqdm.tqdm(rows, "writing", len(texts.rows), unit="row", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for row, (query, *own) in zip(bar, texts.rows, strict=True):
        known = sorted(positives(texts, query))
        similar_N = np.einsum("ND,D->N", document_CD[known].astype(np.float32), query_ND[query].astype(np.float32))
        score_of = dict(zip(known, similar_N, strict=True))
        # By the query's own answers: an id may stand over translations, of which the farthest would set the limit.
        limit = limit_of(min(score_of[number] for number in texts.answers[query]), margin)
        excluded = {*known, texts.same[query]}
        chosen, dropped, seen = choose(
            index_NC[query], score_NC[query], excluded=excluded, limit=limit, count=num_negatives
        )
        negatives = [texts.documents[index_NC[query, place]] for place in chosen]
        scores = [*(score_of[number] for number in own), *score_NC[query, chosen]]
        complete = len(chosen) == num_negatives
        counts["rows"] += 1
        counts["pairs"] += len(own)
        counts["positive"] += float(sum(score_of[number] for number in own))
        counts["candidates"] += seen
        counts["dropped"] += dropped
        counts["incomplete"] += not complete
        counts["not_positive"] += limit == -math.inf
        if chosen:
            counts["hard_rows"] += 1
            counts["hard"] += float(score_NC[query, chosen[0]])
        else:
            counts["without"] += 1
        # Counted from the texts that are written, not from the numbers that they were chosen by.
        answers = {pair.document for pair in row.pairs} | {texts.documents[number] for number in known}
        counts["known"] += sum(text in answers for text in negatives)
        if complete or not drop_incomplete:
            counts["written"] += 1
            exact = [float(str(score)) for score in scores]  # the shortest decimal that is this float32
            yield pairs_lib.with_negatives(row, negatives, exact, document=texts.columns["document"])
    if counts["known"]:
        raise AssertionError(f"{counts['known']} known positives among the negatives")
    if not counts["written"]:
        raise UserError(f"no row has {num_negatives} negatives; raise --depth or --margin, or keep incomplete rows.")


def limit_of(weakest: float, margin: float) -> float:
    """The score a negative may have, from that of the query's weakest positive; -inf where that is not above zero."""
    return margin * float(weakest) if weakest > 0 else -math.inf


def choose(
    index_C: np.ndarray, score_C: np.ndarray, *, excluded: set[int], limit: float, count: int
) -> tuple[list[int], int, int]:
    """Places in the list (best first) of the first `count` candidates that score at most `limit`.

    Returns them, and over the whole list how many candidates scored more, and how many there were: `excluded` ones are none.
    """
    candidate_C = np.array([index not in excluded for index in index_C.tolist()], bool)
    below_C = candidate_C & (score_C.astype(np.float64) <= limit)
    return np.flatnonzero(below_C)[:count].tolist(), int((candidate_C & ~below_C).sum()), int(candidate_C.sum())


def summary(counts: dict[str, float], output: pathlib.Path, *, num_negatives: int, drop_incomplete: bool, **_) -> str:
    """What a person wants to know of a run, in a few lines."""
    share = lambda part, whole: f"{part / whole if whole else 0:.1%}"  # noqa: E731
    mean = lambda total, count: f"{total / count:.3f}" if count else "-"  # noqa: E731
    n = counts
    return "\n".join(
        (
            f"{output}: {n['written']:,} of {n['rows']:,} rows, up to {num_negatives} negatives each.",
            f"  pairs                  {n['pairs']:,} of {n['queries']:,} distinct queries; {n['documents']:,} distinct documents",
            f"  mean cosine            {mean(n['positive'], n['pairs'])} of a pair, "
            f"{mean(n['hard'], n['hard_rows'])} of a row's hardest negative",
            f"  dropped by the margin  {share(n['dropped'], n['candidates'])} of {n['candidates']:,} candidates",
            f"  rows incomplete        {n['incomplete']:,} ({share(n['incomplete'], n['rows'])}), "
            f"{'left out' if drop_incomplete else 'kept'}; {n['without']:,} of them have no negative, "
            f"{n['not_positive']:,} because a positive scores 0 or less",
            f"  known positives among the negatives: {n['known']}",
        )
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    folder: pathlib.Path
    done: dict[str, int]  # rows of each array that are on disk


@contextlib.contextmanager
def _begun(output: pathlib.Path, made_of: dict[str, str]) -> Iterator[_Work]:
    """OUTPUT.work, new or as an earlier run left it, for this process alone. UserError if that run was made of something else."""
    folder = output.with_name(output.name + ".work")
    if folder.is_file():
        raise UserError(f"{folder} is a file, and the work of --output={output} needs a folder there.")
    try:
        folder.mkdir(exist_ok=True)
        there = {path.name for path in folder.iterdir()}
        if PROGRESS not in there and there - {LOCK, f"{PROGRESS}.partial"}:  # no lock is put in somebody's folder
            raise UserError(f"{folder} holds something else, and the work of --output={output} is kept there; move it.")
        lock = stored.open_alone(folder / LOCK)
    except BlockingIOError as error:
        raise UserError(f"another process mines {output}; wait for it, or name another --output.") from error
    except OSError as error:
        raise UserError(f"{folder}, where the work is kept, cannot be made: {error.strerror}.") from error
    with lock:
        yield _Work(folder, _rows_done(folder, made_of))


def _rows_done(folder: pathlib.Path, made_of: dict[str, str]) -> dict[str, int]:
    path = folder / PROGRESS
    if not path.is_file():
        stored.write_json(path, {"made_of": made_of, "done": {}})
        return {}
    try:
        before = stored.read_json(path)
        before, done = before["made_of"], before["done"]
        other = [name for name in made_of if before[name] != made_of[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {folder} to start over.") from error
    if other:
        raise UserError(f"{folder} holds the work of a run with another {' and another '.join(other)}; "
                        "delete it to start over, or name another --output.")  # fmt: skip
    return done


def _delete(work: _Work) -> None:
    """What this verb has put there, the lock last: who comes before that is told, and who comes after begins there."""
    progress = work.folder / PROGRESS
    # First nobody counts on the arrays: after a kill amid the deleting the same command starts over.
    stored.write_json(progress, stored.read_json(progress) | {"done": {}})
    for path in [*work.folder.glob("*.npy"), progress, work.folder / LOCK]:
        path.unlink()
    with contextlib.suppress(OSError):  # somebody has begun there, or keeps other things there
        work.folder.rmdir()


def _fill(
    work: _Work, names: Sequence[str], total: int, parts: Callable[[int], Iterator[tuple[np.ndarray, ...]]]
) -> list[np.ndarray]:
    """Arrays of `total` rows on disk, one a name, from `parts(first row)`: what is there already is not made again."""
    paths, arrays = [work.folder / f"{name}.npy" for name in names], []
    first = done = work.done[names[0]] if names[0] in work.done else 0
    if 0 < first < total:
        print(f"continuing {work.folder}: {first:,} of {total:,} {names[0]} are there.")
    tty = sys.stderr.isatty()
    with tqdm.tqdm(desc=names[0], total=total, initial=done, unit="row", disable=not tty, dynamic_ncols=True) as bar:
        for some in parts(first) if first < total else ():
            if not arrays:
                arrays = [_open(path, total, part, new=not done) for path, part in zip(paths, some, strict=True)]
            for array, part in zip(arrays, some, strict=True):
                array[done : done + len(part)] = part
                array.flush()  # on disk before it counts
            done += len(some[0])
            work.done[names[0]] = done
            progress = work.folder / PROGRESS
            stored.write_json(progress, stored.read_json(progress) | {"done": work.done})
            bar.update(len(some[0]))
    return [_open(path) for path in paths]


def _open(path: pathlib.Path, total: int = 0, part: np.ndarray | None = None, *, new: bool = False) -> np.ndarray:
    """An array on disk: `new` with `total` rows like those of `part`, to be gone on with, or (no `part`) to be read."""
    if new:
        needed, free = total * part[:1].nbytes, shutil.disk_usage(path.parent).free
        if needed > free:  # a memory map finds out late, by a signal
            raise UserError(f"{path} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")
        return np.lib.format.open_memmap(path, mode="w+", dtype=part.dtype, shape=(total, *part.shape[1:]))
    try:
        array = stored.map_array(path)
        if part is None:
            return array
        if array.dtype != part.dtype or array.shape != (
            total,
            *part.shape[1:],
        ):  # opened to write, it would be made so long
            raise ValueError(f"it is {array.dtype} {list(array.shape)}")
        return stored.map_array(path, mode="r+")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {path.parent} to start over.") from error


if __name__ == "__main__":
    verb.run(main)
