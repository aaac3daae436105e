"""Consistency filtering: keep a pair only if its query finds its document again.

    python -m moe_embed.filter --model=runs/demo --pairs=pairs.jsonl.gz --output=kept.jsonl.gz
    python -m moe_embed.filter --model=runs/demo --pairs='de/*.jsonl,en.csv' --output=kept --top_k=20

A pair stays if its document is among the `top_k` distinct documents nearest to its query, of all documents of its shard
(E5, arXiv 2212.03533; Nomic Embed v2, arXiv 2502.07972: top 2 in shards of a million). A shard is a run of pairs of one
file. A file is cut into as few as hold `shard` pairs each, all of one size: in a small rest everything would pass. Copies of
a document are that document, and one that scores as high as the last of the top_k, to the rounding of float32, is among
them. Other answers of a query are rivals, as in E5: of many, `top_k` stay. Every pair is judged.

Rows that stay are written as they stand (a CSV row as JSON); of a row with several documents, those that pass. One file
goes to a file, several or a pattern to a folder, under their names. The vectors of a shard are held in memory.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe_embed import fields, retrieval, verb
from moe_embed.config import UserError
from moe_embed.data import inputs, sources, tables
from moe_embed.data import pairs as pairs_lib
from moe_embed.load import Model, load

ROUNDING = 1e-6  # of a cosine in float32, summed in another order
EXAMPLES = 3  # dropped pairs that are shown


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("filter", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, a model folder, or a Hugging Face folder")
    parser.add_argument("--pairs", required=True, help=".jsonl(.gz) or .csv files or patterns, with commas between")
    parser.add_argument(
        "--output", required=True, type=verb.local_path, help="a .jsonl(.gz) file; for several, a folder"
    )
    parser.add_argument("--top_k", type=int, default=2, help="how far down a pair's document may be (default: 2)")
    parser.add_argument("--shard", type=int, default=1_000_000, help="pairs judged together (default: a million)")
    parser.add_argument("--query", default="query", help="the column of the queries")
    parser.add_argument("--document", default="document", help="the column of the documents")
    a = parser.parse_args(argv)
    if a.top_k < 1 or a.shard < 1:
        raise UserError(f"--top_k={a.top_k} and --shard={a.shard} must both be 1 or more.")
    outputs = plan(a.pairs, a.output)
    columns = {"query": a.query, "document": a.document}
    # Read twice: a fault is said before any work, and how many pairs there are decides on the shards.
    totals = {path: sum(len(row.pairs) for row in pairs_lib.read_rows(path, **columns)) for path in outputs}
    model = load(a.model)
    counts, examples = collections.Counter(), []
    for path, output in outputs.items():
        rows, options = pairs_lib.read_rows(path, **columns), {"top_k": a.top_k, "shard": a.shard}
        lines = kept(model, rows, totals[path], path, counts, examples, document=a.document, **options)
        sources.write_lines(output, lines)
    print(summary(counts, examples))


def plan(pairs: str, output: pathlib.Path) -> dict[str, pathlib.Path]:
    """Each file of --pairs and where its rows go; makes the folder for several. UserError where that cannot be."""
    paths = inputs.find(pairs)
    if paths == [pairs]:
        verb.check_output(output, "--output")
        if not output.name.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"--output={output} is no .jsonl or .jsonl.gz file; name one.")
        outputs = {pairs: output}
    else:
        if output.is_file():
            raise UserError(f"--output={output} is a file; several files of pairs need a folder.")
        outputs = {path: output / name_of_output(path) for path in paths}
        if len(set(outputs.values())) < len(paths):
            raise UserError(f"--pairs={pairs} has two files that would be one in --output={output}; filter them apart.")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output={output} cannot be made: {error.strerror}.") from error
    written = set(map(os.path.realpath, outputs.values()))
    for path in outputs:
        if inputs.same(path) in written:
            raise UserError(f"--output={output} would write over {path}; name another.")
    return outputs


def name_of_output(path: str) -> str:
    """The file's name as one of JSON lines, packed if it was: a.csv.gz -> a.jsonl.gz, a.parquet -> a.jsonl."""
    name = pathlib.Path(path).name
    packed = next((suffix for suffix in tables.PACKED if name.endswith(suffix)), "")
    return name.removesuffix(packed).removesuffix(tables.kind(path)) + ".jsonl" + (".gz" if packed else "")


def kept(
    model: Model,
    rows: Iterable[pairs_lib.Row],
    total: int,
    path: str,
    counts: collections.Counter,
    examples: list["Dropped"],
    *,
    top_k: int,
    shard: int,
    document: str = "document",
) -> Iterator[str]:
    """The lines of the rows that stay, in order; the rows have `total` pairs.

    Adds the pairs to `counts` by (path, language, whether they stay).
    """
    draw = random.Random(0)
    for some in shards(rows, total, shard):
        pairs = [pair for row in some for pair in row.pairs]
        stays_N, dropped = judge(model, pairs, top_k=top_k)
        counts.update((path, pair.lang, stays) for pair, stays in zip(pairs, stays_N.tolist(), strict=True))
        examples += draw.sample(dropped, min(EXAMPLES, len(dropped)))
        verdicts = iter(stays_N.tolist())
        for row in some:
            keep = list(itertools.islice(verdicts, len(row.pairs)))
            if any(keep):
                yield pairs_lib.with_documents(row, keep, document=document)


def shards(rows: Iterable[pairs_lib.Row], total: int, size: int) -> Iterator[list[pairs_lib.Row]]:
    """Rows of `total` pairs in order, in as few runs as hold `size` pairs each, equal but for one pair (and the others of its row)."""
    count, seen = -(-total // size), 0

    def number(row: pairs_lib.Row) -> int:
        nonlocal seen
        first, seen = seen, seen + len(row.pairs)
        return first * count // total

    for _, run in itertools.groupby(rows, key=number):
        yield list(run)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A pair that does not pass, and the document that its query finds instead."""

    pair: pairs_lib.Pair
    score: float
    best: str
    best_score: float


def judge(model: Model, pairs: Sequence[pairs_lib.Pair], *, top_k: int) -> tuple[np.ndarray, list[Dropped]]:
    """Whether each document is among the top_k distinct documents of all `pairs` for its query: bool [N], and who is not."""
    queries, documents = ({}, {})
    query_N = np.array([queries.setdefault(pair.query, len(queries)) for pair in pairs])
    document_N = np.array([documents.setdefault(pair.document, len(documents)) for pair in pairs])
    tty = sys.stderr.isatty()
    document_CD = model.encode(list(documents), model.prompt("document"), progress=tty)
    query_ND = model.encode(list(queries), model.prompt("query"), progress=tty)
    score_NC, index_NC = retrieval.top_k(query_ND, document_CD, k=top_k, mesh=model.mesh, progress=tty)
    if not np.isfinite(score_NC).all():
        raise UserError("the model gives vectors that are not finite; nothing can be found with them.")
    own_N = np.concatenate([
        np.einsum("ND,ND->N", query_ND[query_N[some]], document_CD[document_N[some]])
        for some in (slice(i, i + retrieval.BLOCK) for i in range(0, len(pairs), retrieval.BLOCK))
    ])  # fmt: skip
    stays_N = own_N >= score_NC[query_N, -1] - ROUNDING
    names = list(documents)
    dropped = [
        Dropped(pairs[i], float(own_N[i]), names[index_NC[query_N[i], 0]], float(score_NC[query_N[i], 0]))
        for i in np.flatnonzero(~stays_N)
    ]
    return stays_N, dropped


def summary(counts: collections.Counter, examples: Sequence[Dropped]) -> str:
    """The share that stays by file and by language, and EXAMPLES dropped pairs, for a person to look at."""

    def table(title: str, place: int) -> Iterator[str]:
        stays, all_of = collections.Counter(), collections.Counter()
        for key, n in counts.items():
            names = [key[place] or "none given", "all"]
            all_of.update(dict.fromkeys(names, n))
            stays.update(dict.fromkeys(names, n * key[-1]))
        names = [name for name in all_of if name != "all"] + ["all"] * (len(all_of) > 2)
        width = max(map(len, [*names, title]))
        yield f"{title:<{width}}        kept       pairs"
        for name in names:
            yield f"{name:<{width}}  {stays[name]:>10,}  {all_of[name]:>10,}  {stays[name] / all_of[name]:6.1%}"

    lines = [*table("file", 0)]
    if any(lang for _, lang, _ in counts):
        lines += ["", *table("language", 1)]
    cut = lambda text: fields.cut(fields.one_line(text), 100)  # noqa: E731
    for example in random.Random(0).sample(list(examples), min(EXAMPLES, len(examples))):
        lines += ["", f"dropped: {cut(example.pair.query)}", f"  {example.score:.3f}  {cut(example.pair.document)}"]
        lines.append(f"  {example.best_score:.3f}  {cut(example.best)}  (found first)")
    return "\n".join(lines)


if __name__ == "__main__":
    verb.run(main)
