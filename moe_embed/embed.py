"""Texts to vectors, or a search with your own words.

    python -m moe_embed.embed --model=runs/demo --input=texts.jsonl --output=E.npy --task=document
    echo '{"text": "Wie drucke ich?"}' | python -m moe_embed.embed --model=runs/demo --input=- --output=E.npy --task=query
    python -m moe_embed.embed --model=runs/demo --search=corpus.jsonl

Each line of the input is {"text": ...}; row i of the output is line i. The input may be larger than memory: it is read once to
check and count its lines, and then as it is encoded. Run again, a command that was stopped goes on. --search reads a BEIR corpus.jsonl and then
queries: a line each from the terminal, or from --input.
"""

import functools
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from moe_embed import fields, retrieval, vector_file, verb
from moe_embed.config import UserError
from moe_embed.data import corpus as corpus_lib
from moe_embed.data import sources
from moe_embed.load import Model, load


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("embed", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, or a folder written by export")
    parser.add_argument("--input", help="a .jsonl or .jsonl.gz file, or - for standard input")
    parser.add_argument("--output", type=verb.local_path, help="a .npy file: [lines, dim], unit norm")
    parser.add_argument("--task", help="the prompt to put in front: query, document, ... (default: none)")
    parser.add_argument("--dim", type=int, help="keep this many numbers of each vector")
    parser.add_argument("--dtype", choices=vector_file.DTYPES, help=f"of the output (default: {vector_file.DTYPES[0]})")
    parser.add_argument("--search", help="a corpus.jsonl to search instead of writing vectors")
    parser.add_argument("--top_k", type=int, default=3, help="documents shown for a query")
    arguments = parser.parse_args(argv)
    if bool(arguments.search) == bool(arguments.output):
        parser.error("give --output=E.npy to write vectors, or --search=corpus.jsonl to search")
    if arguments.output and not arguments.input:
        parser.error("--output needs --input=texts.jsonl, or --input=- for standard input")
    if arguments.search and (arguments.task is not None or arguments.dtype):
        parser.error("--task and --dtype are for --output; --search has its own prompts: query and document")
    if arguments.top_k < 1:
        raise UserError(f"--top_k={arguments.top_k} shows nothing; give 1 or more.")
    if arguments.output:
        verb.check_output(arguments.output, "--output")
        read, written = pathlib.Path(arguments.input), arguments.output
        if arguments.input != "-" and read.exists() and written.exists() and written.samefile(read):
            raise UserError(f"--output={arguments.output} is the --input, which would be lost; name another file.")
    if arguments.search:
        corpus = list(sources.read_corpus(arguments.search).values())
        queries = list(_read(arguments.input)) if arguments.input else _typed()
        search(load(arguments.model), corpus, queries, top_k=arguments.top_k, dim=arguments.dim)
    else:
        model, read = load(arguments.model), functools.partial(_read, arguments.input)
        dim = model.options(arguments.task, arguments.dim, None)[1]  # a fault of theirs is said before a long reading
        if arguments.input == "-":
            typed = list(read())  # a pipe is not read twice
            read = lambda: typed  # noqa: E731
        texts = vector_file.Texts(read, *corpus_lib.survey(read()))
        options = {"task": arguments.task, "dim": dim, "dtype": arguments.dtype or vector_file.DTYPES[0]}
        vector_file.write(model, arguments.output, texts, **options, progress=sys.stderr.isatty())
        print(f"{arguments.output}: {texts.count} vectors of {dim} numbers.")


def search(model: Model, corpus: Sequence[str], queries, *, top_k: int, dim: int | None = None) -> None:
    """Print, for each query, the documents of highest cosine, one line each, of as many letters as the terminal has columns."""
    document_CD = model.encode(corpus, model.prompt("document"), dim, progress=sys.stderr.isatty())
    width = shutil.get_terminal_size((100, 24)).columns
    for query in queries:
        query_ND = model.encode([query], model.prompt("query"), dim)
        scores, indices = retrieval.top_k(query_ND, document_CD, k=top_k)
        print(f"\n{query}")
        for score, index in zip(scores[0], indices[0], strict=True):
            print(fields.cut(f"  {score:.3f} {fields.one_line(corpus[index])}", width))


def _typed():
    """Lines from the terminal until it ends."""
    prompt = "\nsearch (empty line ends): " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8; the queries have to be.") from error
        if not line.strip():
            return
        yield line


def _read(path: str) -> Iterator[str]:
    return sources.read_texts("standard input", stream=sys.stdin.buffer) if path == "-" else sources.read_texts(path)


if __name__ == "__main__":
    verb.run(main)
