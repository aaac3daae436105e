"""An honest answer from one file of pairs: some are kept out of training, and searched for before and after it.

What shares a text goes together: a document that a held-out query asks for is never trained on, under no other query either,
nor pushed away as another query's hard negative. Grouping by negatives too would not do: mined ones join nearly all pairs.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from moe_embed import bucket, significance, stored
from moe_embed.config import Config, UserError
from moe_embed.data import hygiene
from moe_embed.data import origin as origin_lib
from moe_embed.data.sources import Pair, Source, Task
from moe_embed.fields import count

NAME = "held-out"
FILE = "held_out.json"  # in the workdir: the fields of Measured; the last three once the run has ended
FEW_QUERIES = 100  # fewer say little: of a small file more than the share is kept out, up to MOST_SHARE of the pairs
MOST_SHARE = 0.2
MOST_QUERIES = 1_000
MOST_PAIRS = 2_000_000  # that are read whole, to keep some of them out
MOST_DOCUMENTS = 20_000  # of the corpus; what no held-out query asks for beyond that is left out
BATCHES, BATCH, EPOCHS, WARM_UP = 8, 256, 3, 0.1  # what `fit` aims at


def split(sources: Sequence[Source], *, share: float, say: Callable[[str], None] = print) -> tuple[list[Source], Task]:
    """Keep a share of the pairs out: the sources without them, and the task to find their documents among all documents.

    A group is pairs that share a text (as query or as document) or, in one file, a query's id. Groups are chosen by a hash of
    their texts: more rows in the file leave those before where they are, mostly. UserError where there are fewer than two groups,
    more than MOST_PAIRS pairs, or a source would be left without pairs.

    A query or document that is kept out is also taken from the hard negatives (and their scores) of the pairs that stay, and
    `say` is told how many: seen in training as a wrong answer alone, it would be found less often than a new document is.
    """
    if (number := sum(map(len, sources))) > MOST_PAIRS:
        raise UserError(
            f"config.data.held_out={share} reads all pairs into memory, and there are {number:,}; keep a file of pairs out "
            "yourself, set it to 0, and name a BEIR folder in config.data.dev."
        )
    pairs = [pair for source in sources for pair in source.pairs]
    id_N = [[(number, pair.id)] if pair.id else [] for number, source in enumerate(sources) for pair in source.pairs]
    group_N = _groups([(p.query, p.document, *of) for p, of in zip(pairs, id_N, strict=True)])
    query_N = _groups(
        [(p.query, *of) for p, of in zip(pairs, id_N, strict=True)]
    )  # as batches.query_ids and mine have it
    hash_of = {}
    for pair, group in zip(pairs, group_N, strict=True):
        of_pair = zlib.crc32(f"{pair.query}\n{pair.document}".encode())
        hash_of[group] = min(of_pair, hash_of[group]) if group in hash_of else of_pair
    if len(hash_of) < 2:
        raise UserError(
            f"{', '.join(source.path for source in sources)} has {_all_of(len(pairs))}: none can be kept out to measure with. Give pairs with other texts, or --config.data.held_out=0."
        )
    sizes, queries = dict.fromkeys(hash_of, 0), {group: set() for group in hash_of}
    for group, query in zip(group_N, query_N, strict=True):
        sizes[group] += 1
        queries[group].add(query)
    order = sorted(hash_of, key=lambda group: (hash_of[group], group))
    wanted, room = min(share * len(pairs), MOST_QUERIES), max(share, MOST_SHARE) * len(pairs)
    out, num_out, asked = set(), 0, 0
    for group in order:
        enough = num_out >= wanted and asked >= FEW_QUERIES
        if not enough and num_out + sizes[group] <= room:  # a group that is half of the data is no sample of it
            out.add(group)
            num_out, asked = num_out + sizes[group], asked + len(queries[group])
    out = out or {min(order, key=lambda group: sizes[group])}
    is_out = [group in out for group in group_N]
    texts = {text for pair in itertools.compress(pairs, is_out) for text in (pair.query, pair.document)}
    places = iter(is_out)
    kept = [
        dataclasses.replace(source, pairs=[_without(pair, texts) for pair in source.pairs if not next(places)])
        for source in sources
    ]
    for source in kept:
        if not source.pairs:
            raise UserError(
                f"{source.path}: all of its pairs would be held out; join it with another file, or lower config.data.held_out."
            )
    negatives = lambda pairs: sum(len(pair.negatives) for pair in pairs)  # noqa: E731
    stay = negatives(pair for pair, out in zip(pairs, is_out, strict=True) if not out)
    if left_out := stay - sum(negatives(source.pairs) for source in kept):
        say(f"negatives   {left_out:,} of {stay:,} are texts of held-out pairs: left out")
    return kept, _task(pairs, query_N, is_out)


def _all_of(num_pairs: int) -> str:
    return "a single pair" if num_pairs == 1 else f"{num_pairs:,} pairs that all share texts with each other"


def _without(pair: Pair, texts: Collection[str]) -> Pair:
    """The pair without the hard negatives that are among `texts`."""
    return hygiene.with_negatives(pair, [text not in texts for text in pair.negatives])


def _groups(keys: Sequence[tuple]) -> list[int]:
    """The group of each item, by the first item in it; items with a key in common are in one group (union-find)."""
    parent, first = list(range(len(keys))), {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, of_item in enumerate(keys):
        for key in of_item:
            a, b = sorted((root(first.setdefault(key, i)), root(i)))
            parent[b] = a
    return [root(i) for i in range(len(keys))]


def _task(pairs: Sequence[Pair], query_N: Sequence[int], is_out: Sequence[bool]) -> Task:
    """The held-out queries, each to find its documents among those of all pairs and their negatives.

    query_N says which pairs are one query's. It is named by a digest of its text: by number, other data would have the same names.
    Where pairs go both ways a query stands among the documents: it has the query's name there, and does not count as found.
    """
    name_of, queries, relevant = {}, {}, {}
    for pair, query, out in zip(pairs, query_N, is_out, strict=True):
        if out:
            name = name_of.setdefault(query, hashlib.blake2b(pair.query.encode(), digest_size=8).hexdigest())
            queries.setdefault(name, pair.query)
            relevant.setdefault(name, {})[pair.document] = 1
    texts = dict.fromkeys(itertools.chain.from_iterable(relevant.values()))
    for text in (text for pair in pairs for text in (pair.document, *pair.negatives)):
        if len(texts) < MOST_DOCUMENTS:
            texts.setdefault(text)
    own = {text: name for name, text in queries.items() if text not in relevant[name]}
    ids = {text: own[text] if text in own else f"d{i}" for i, text in enumerate(texts)}
    relevance = {name: {ids[text]: 1 for text in texts} for name, texts in relevant.items()}
    origin = origin_lib.Origin(NAME, ignore_identical_ids=True)
    return Task(NAME, {name: text for text, name in ids.items()}, queries, relevance, origin)


def fit(config: Config, *, num_pairs: int, num_shards: int = 1) -> Config:
    """`config` with what 0 leaves to the data: batch_size a power of two, BATCHES of them or more in an epoch; EPOCHS in steps.

    The warm-up is a tenth of the steps where both are left to the data. Where `num_shards` devices do not divide the batch, it is
    the next multiple of them.
    """
    data, run, optim = config.data, config.run, config.optim
    if not data.batch_size:
        batch = min(BATCH, max(1 << int(math.log2(max(num_pairs / BATCHES, 1))), 2))
        data = dataclasses.replace(data, batch_size=-(-batch // num_shards) * num_shards)
    if not run.steps:
        run = dataclasses.replace(run, steps=max(math.ceil(EPOCHS * num_pairs / data.batch_size), 1))
        optim = dataclasses.replace(optim, warmup_steps=optim.warmup_steps or int(WARM_UP * run.steps))
    return dataclasses.replace(config, data=data, run=run, optim=optim)


def remember(workdir: pathlib.Path, per_query: dict[str, float]) -> None:
    """Write down what the held-out queries scored before training."""
    stored.write_json(workdir / FILE, {"before": per_query})


def as_begun(config: Config, before: Config) -> Config:
    """`config` of a run that continues, with what 0 leaves to the data as it was chosen when the run began (`before`)."""
    data, run, optim = config.data, config.run, config.optim
    if not data.batch_size:
        data = dataclasses.replace(data, batch_size=before.data.batch_size)
    if not run.steps:
        run = dataclasses.replace(run, steps=before.run.steps)
        optim = dataclasses.replace(optim, warmup_steps=optim.warmup_steps or before.optim.warmup_steps)
    return dataclasses.replace(config, data=data, run=run, optim=optim)


class Measured(NamedTuple):
    """What the workdir says of its held-out queries, each by its name: nDCG@10 before training, and after so many steps."""

    before: dict[str, float]
    after: dict[str, float] | None = None
    steps: int = 0
    verdict: str = ""  # what `conclude` said


def read(workdir: pathlib.Path) -> Measured | None:
    """None where nothing is measured yet. UserError where the file is damaged: a figure that is none, a part that is absent."""
    path = workdir / FILE
    if not bucket.is_file(path):
        return None
    try:
        found = stored.read_json(path)
        ended = found.keys() != {"before"}
        figures = [{name: _figure(x) for name, x in found[when].items()} for when in ("before", "after")[: 1 + ended]]
        if not all(figures):
            raise ValueError("no figure is in it")
        return Measured(*figures, int(found["steps"]), str(found["verdict"])) if ended else Measured(*figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} does not say what the held-out queries scored ({error!r:.100}); remove {workdir} and run again."
        ) from error


def _figure(value) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.80} is no nDCG@10")
    return float(value)


def concluded(workdir: pathlib.Path, *, steps: int) -> str:
    """The verdict of a run that measured after so many steps; "" where it has not yet. UserError as in `read`."""
    measured = read(workdir)
    return measured.verdict if measured and measured.after is not None and measured.steps == steps else ""


def conclude(workdir: pathlib.Path, per_query: dict[str, float], *, steps: int, warmup_steps: int) -> str:
    """One sentence on before and after, with its interval, also written to the workdir. UserError where `read` has none of before.

    After so few steps or of so few queries that they say little, the sentence is that; and so where the data has changed since.
    """
    if (measured := read(workdir)) is None:
        raise UserError(
            f"{workdir / FILE} is gone, and with it what the held-out queries scored before training; remove {workdir} and run again."
        )
    before = measured.before
    if per_query.keys() != before.keys():
        said = "no verdict: the data has changed, and other queries were kept out before training than now."
    else:
        differences = np.array([per_query[query] - before[query] for query in per_query])
        names = ("the trained model", "what it began with")
        said = significance.verdict([differences], names=names, doubt=doubt(steps=steps, warmup_steps=warmup_steps))
        if not differences.any():
            said += " No query scores otherwise than before: a larger config.optim.learning_rate or more steps would change more."
    stored.write_json(workdir / FILE, Measured(before, per_query, steps, said)._asdict())
    return said


def doubt(*, steps: int, warmup_steps: int) -> str:
    """Why training for so few steps says little; "" where it does not."""
    if steps > max(warmup_steps, BATCHES - 1):
        return ""
    return f"trained for {count(steps, 'step')}" + (", all of them warm-up" if steps <= warmup_steps else "")
