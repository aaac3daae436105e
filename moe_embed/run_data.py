"""What a run reads: its tokenizer, sources, held-out pairs and dev tasks, opened together, with every fault said at once."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_embed import held_out, stored
from moe_embed.config import Config, UserError
from moe_embed.data import batches as batches_lib
from moe_embed.data import inputs
from moe_embed.data import sources as sources_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.mlm_batches import MlmBatches

CARD = "DATA.md"  # in a folder that prepare made, and in a workdir
WORTH_SAYING = 0.01  # share of texts that were cut


class Files(NamedTuple):
    """What `read_files` found."""

    tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer | None
    named: list[list]  # the sources of each of config.data.sources
    tasks: list[sources_lib.Task]  # of config.data.dev


def read_files(config: Config, *, with_tokenizer: bool) -> Files:
    """Read every source, every dev task and, unless the model brings its own, the tokenizer. No weights are needed for it.

    UserError names every file that is at fault, not only the first.
    """
    c, faults = config.data, []

    def read(reader, *arguments, **keywords):
        try:
            return reader(*arguments, **keywords)
        except UserError as error:
            faults.extend(error.args)
            return []

    tokenizer = read(tokenizer_lib.read, c.tokenizer) if with_tokenizer else None
    named = read(read_sources, config)
    tasks = [read(sources_lib.read_task, folder, split="dev") for folder in c.dev]
    names = [task.name for task in tasks if task]  # of one that cannot be read there is []
    faults += [
        f"config.data.dev has more than one task named {name}; results go by a folder's name."
        for name, count in Counter(names).items() if count > 1
    ]  # fmt: skip
    if faults:
        raise UserError(*faults)
    return Files(tokenizer, named, tasks)


def open_data(
    config: Config,
    *,
    num_shards: int,
    files: Files | None = None,
    tokenizer=None,
    own: Sequence[int] | None = None,
    agree=None,
):
    """Keep pairs out, and choose the shapes of the batches: of `files`, which are read here if they have not been.

    `tokenizer` is the model's, None the files'. `own` and `agree` are what this process makes of a batch, and how it learns
    of the others' (batches.Batches). Returns (config with what the data decides, Batches or MlmBatches, tokenizer, [Task],
    the held-out Task or None).
    """
    files, c = files or read_files(config, with_tokenizer=tokenizer is None), config.data
    tokenizer, named = tokenizer or files.tokenizer, files.named
    kind = MlmBatches if config.loss.objective == "mlm" else batches_lib.Batches
    sources = [source for some in named for source in some]
    for source in sources:
        if source.left_out:
            print(f"left out    {source.left_out}")
    held = None
    if c.held_out:
        sources, held = held_out.split(sources, share=c.held_out)
    config = held_out.fit(config, num_pairs=sum(map(len, sources)), num_shards=num_shards)
    weights = _weights(named, c.weights, smoothing=c.smoothing)
    data = dataclasses.replace(config.data, sources=tuple(source.path for source in sources), weights=weights)
    share = {"num_shards": num_shards, "own": own}
    if agree and kind is batches_lib.Batches:
        share["agree"] = agree
    batches = kind(sources, tokenizer, dataclasses.replace(config, data=data), **share)
    return config, batches, tokenizer, files.tasks, held


def read_sources(config: Config) -> list[list]:
    """The sources that each of config.data.sources stands for. UserError names every file that is at fault."""
    c, faults, named = config.data, [], []
    options = {"max_bad_fraction": c.max_bad_fraction}
    if config.loss.objective == "mlm":
        reader, options = sources_lib.read_text_sources, options | {"column": c.document}
    else:
        reader, options = (
            sources_lib.read_sources,
            options | {"query": c.query, "document": c.document, "teacher": c.teacher},
        )
    begun: set[str] = set()
    for name in c.sources:
        try:
            paths = inputs.find(name)
            if again := [path for path in paths if inputs.same(path) in begun]:
                raise UserError(
                    f"{again[0]} stands twice in config.data.sources; its pairs would be seen twice an epoch."
                )
            begun |= set(map(inputs.same, paths))
            named.append([source for path in paths for source in reader(path, **options)])
        except UserError as error:
            faults.extend(error.args)
    if faults:
        raise UserError(*faults)
    return named


def keep_cards(config: Config, workdir: pathlib.Path) -> None:
    """Copy to `workdir` what prepare said of the data (DATA.md), for the card of an export."""
    cards = [pathlib.Path(path, CARD) for name in config.data.sources for path in inputs.find(name)]
    texts = [card.read_text("utf-8") for card in cards if card.is_file()]
    if texts:
        stored.write_bytes(workdir / CARD, "\n".join(texts).encode())


def what_was_cut(rows: Sequence[dict], config: Config) -> str:
    """Which share of the texts was longer than what is read of them; "" where hardly any was.

    `rows` are those of a single process: of several each counts what it cut of its own pairs alone. Rows of older versions do
    not say how many texts there were, hard negatives among them, and are passed over.
    """
    said = []
    for side, things in (("query", "queries"), ("document", "documents")):
        longest = min(getattr(config.data, f"{side}_length"), config.encoder.max_seq_length)
        counted = [row for row in rows if things in row]
        encoded, cut = (sum(row[name] for row in counted) for name in (things, f"cut_{things}"))
        if cut > WORTH_SAYING * encoded:
            said.append(f"{cut / encoded:.0%} of the {things} were longer than {longest} tokens")
    return f"cut         {' and '.join(said)}: the rest of them was not read" if said else ""


def _weights(named: list[list], weights: tuple[float, ...], *, smoothing: float) -> tuple[float, ...]:
    """One weight a source; what a name stands for shares its weight by size."""
    found: list[float] = []
    for sources, weight in zip(named, weights, strict=False):  # () stays ()
        size = np.array([len(source) for source in sources], np.float64) ** smoothing
        found += (weight * size / size.sum()).tolist()
    return tuple(found)
