"""Pairs to packed rows [M, B, L]: tokenise, pack each device's own texts, number the micro-batches.

A row holds several texts with segment ids from 1 and positions from 0; attention and pooling stay inside a segment, so a
text's embedding does not depend on where it is packed. M is the smallest of a few sizes (sizes.py) that holds the fullest
device: as many shapes to compile. Unused rows are empty; nothing spills into another step, nothing is cut beyond the caps.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_embed import config as config_lib
from moe_embed.data import mixture as mixture_lib
from moe_embed.data import sizes
from moe_embed.data.packing import Packed, fill_rows, pack
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import Source
from moe_embed.data.tokenizer import Tokenizer
from moe_embed.fields import count

SAMPLE = 16_384  # pairs whose lengths are looked at beforehand, to choose the sizes of M
DRAWS = 16  # batches of a group, drawn of those
LOOKED_AT = 64  # batches of the run that are measured beforehand where the data decides on the rows


def document_id(text: str) -> int:
    """A 31-bit number, equal for equal texts: how infonce finds copies of a document in a batch."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def query_ids(pairs: Sequence[Pair]) -> np.ndarray:
    """int32 [N]: equal for pairs of one query, which are those that share its text or an id, or are linked by such pairs."""
    first: dict[tuple[str, str], int] = {}  # the first pair with this text, and with this id
    leader = list(range(len(pairs)))

    def lead(n: int) -> int:
        while leader[n] != n:
            n = leader[n]
        return n

    for n, pair in enumerate(pairs):
        for name in (("text", pair.query), ("id", pair.id)):
            if name[1]:
                leader[lead(n)] = lead(first.setdefault(name, n))
    return np.array([document_id(pairs[lead(n)].query) for n in range(len(pairs))], np.int32)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's arrays, named by their dims, and what was counted while making them."""

    arrays: dict[str, np.ndarray]
    source: str  # the file, and the language where a batch has one
    counts: dict[str, float]  # texts, and those cut; useful: share of the tokens in the rows that belong to texts


class PackedShards(NamedTuple):
    """Own shards of a batch before they are put into rows: ids and where they go, the arrays of pairs, and a Batch's other facts."""

    shards: list[tuple[list[np.ndarray], Packed]]
    arrays: dict[str, np.ndarray]
    source: str
    counts: dict[str, float]


def fingerprint(sources: Sequence, tokenizer, c: config_lib.Data, *, seed: int) -> dict:
    """What the order of the data depends on, as plain JSON: files by name, size and digest, tokenizer, mixture."""
    return {
        "files": [[source.path.rsplit("/", 1)[-1], len(source), source.digest] for source in sources],
        "tokenizer": zlib.crc32(tokenizer.model_bytes),
        "seed": seed,
        "batch_size": c.batch_size,
        "weights": list(c.weights),
        "by_language": c.by_language,
        "smoothing": c.smoothing,
    }


def check_vocabulary(tokenizer, config: config_lib.Config) -> None:
    """UserError if the embedding table has no row for some id of the tokenizer."""
    if tokenizer.num_ids > config.encoder.vocab_size:
        raise config_lib.UserError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.num_ids} ids, more than "
            f"config.encoder.vocab_size={config.encoder.vocab_size}; set it to {-(-tokenizer.num_ids // 64) * 64}."
        )


class Batches:
    """Step -> Batch, for `num_shards` devices. `sizes` are the micro-batch counts M that can occur.

    A process tokenises and packs `own` of the shards alone (None: all). M depends on the fullest shard of all: `agree`(step,
    rows) gives the largest number of rows that any process needs; steps are asked for in order then.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        config: config_lib.Config,
        *,
        num_shards: int,
        own: Sequence[int] | None = None,
        agree: Callable[[int, int], int] = lambda step, rows: rows,
    ):
        self.sources, self.tokenizer, self.c, self.num_shards = sources, tokenizer, config.data, num_shards
        self.own, self.agree = list(range(num_shards)) if own is None else list(own), agree
        check_vocabulary(tokenizer, config)
        self.distill = config.loss.distill
        if self.distill == "scores" and not any(pair.scores for source in sources for pair in source.pairs):
            paths = ", ".join(source.path for source in sources)
            raise config_lib.UserError(f'config.loss.distill="scores" finds no "scores" in {paths}; mine writes them.')
        self.groups = mixture_lib.make_groups(
            [source.by_language() for source in sources],
            each_language=self.c.by_language,
            batch_size=self.c.batch_size,
        )
        self.mixture = mixture_lib.Mixture(
            [len(group.members) for group in self.groups],
            share=mixture_lib.shares(self.groups, weights=self.c.weights, smoothing=self.c.smoothing),
            batch_size=self.c.batch_size,
            steps=config.run.steps,
            seed=config.run.seed,
        )
        if self.c.rows and self.c.row_length:
            self.sizes = self._choose_sizes(config.run.steps)
        else:
            self.c, self.sizes = self._fit_rows(config.run.steps)

    @property
    def fingerprint(self) -> dict:
        """What the order of the data depends on; a checkpoint keeps it, and a resume compares."""
        return fingerprint(self.sources, self.tokenizer, self.c, seed=self.mixture.seed)

    @property
    def summary(self) -> str:
        """One line for a person: how many pairs, of what."""
        pairs = sum(self.mixture.sizes)
        groups = f", {len(self.groups)} groups" if len(self.groups) > len(self.sources) else ""
        epochs = len(self.mixture.group_of_step) * self.c.batch_size / pairs
        return (
            f"{count(pairs, 'pair')} in {count(len(self.sources), 'source')}{groups}; {count(self.c.batch_size, 'pair')} a step, "
            f"{count(len(self.mixture.group_of_step), 'step')} = {epochs:.2f} epochs"
        )

    def batch_at(self, step: int) -> Batch:
        """The arrays of step `step` that objectives.contrastive takes. Own shards stand side by side along B and N."""
        return self.filled(step, self.packed(step))

    def packed(self, step: int) -> PackedShards:
        """The work of a batch: its pairs read, and the own ones tokenised and packed. Another process may do it."""
        group, pairs = self.pairs_at(step)
        queries, documents, document_ids, counts = self._texts([pairs[n] for n in self._of_own(np.arange(len(pairs)))])
        arrays = {"document_id_N": document_ids, "query_id_N": self._of_own(query_ids([pair for pair, _ in pairs]))}
        teacher = self._teacher(group.source, pairs)
        arrays |= {name: self._of_own(array) for name, array in teacher.items()}
        shards = [self._pack_shard(ids) for ids in self._shards(queries, documents)]
        return PackedShards(shards, arrays, f"{self.sources[group.source].path} {group.lang}".strip(), counts)

    def filled(self, step: int, work: PackedShards) -> Batch:
        """What `packed` made of a step, in rows of the shape that all processes agree on."""
        shards = work.shards
        rows_needed = self.agree(step, max(packed.num_rows for _, packed in shards))
        num_micro = next(size for size in self.sizes if size * self.c.rows >= rows_needed)
        arrays = {"query_slot_N": [], "document_slot_N": []}
        rows = {"tokens": [], "segments": [], "positions": []}
        for ids, packed in shards:
            filled = fill_rows(ids, packed, num_rows=num_micro * self.c.rows, row_length=self.c.row_length)
            for name in rows:
                rows[name].append(filled[f"{name}_BL"].reshape(num_micro, self.c.rows, self.c.row_length))
            slot = packed.row_N * self.c.texts_per_row + packed.segment_N
            num_queries = self.c.batch_size // self.num_shards
            arrays["query_slot_N"].append(slot[:num_queries])
            arrays["document_slot_N"].append(slot[num_queries:])
        arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
        arrays |= {f"{name}_MBL": np.concatenate(parts, axis=1) for name, parts in rows.items()}
        counts = {"useful": float((arrays["segments_MBL"] > 0).mean())} | work.counts
        return Batch(arrays | work.arrays, work.source, counts)

    def __getstate__(self) -> dict:
        """For a process that makes `packed` work: it has nobody to agree with."""
        return {name: value for name, value in self.__dict__.items() if name != "agree"}

    def names(self, step: int) -> list[str]:
        """Each pair of step `step`, for a person: its place in the source, counted from 0 among those kept, and id or query."""
        return [f"{place} {pair.id or pair.query}" for pair, place in self.pairs_at(step)[1]]

    def pairs_at(self, step: int) -> tuple[mixture_lib.Group, list[tuple[Pair, int]]]:
        """The group of step `step` and all of its pairs, each with its place in the source."""
        which, places = self.mixture.batch_at(step)
        group = self.groups[which]
        members = group.members[places]
        return group, list(zip(self.sources[group.source].take(members), map(int, members), strict=True))

    def _of_own(self, array: np.ndarray) -> np.ndarray:
        """Of an array with every shard's part side by side, those of this process."""
        return np.concatenate([array.reshape(self.num_shards, -1, *array.shape[1:])[i] for i in self.own])

    def _texts(self, pairs: Sequence[tuple[Pair, int]]):
        """Ids of the queries [N] and documents [N * (1 + h)] of pairs, positive first; the documents' numbers; and counts."""
        h = self.c.num_negatives
        texts, ids = [], []
        for pair, _ in pairs:
            negatives = pair.negatives[:h]
            texts += [pair.document, *negatives]
            ids += [document_id(text) for text in (pair.document, *negatives)] + [-1] * (h - len(negatives))
        queries, cut_queries = self.tokenizer.encode(
            [pair.query for pair, _ in pairs], prompt=self.c.query_prompt, max_length=self.c.query_length
        )
        encoded, cut_documents = self.tokenizer.encode(
            texts, prompt=self.c.document_prompt, max_length=self.c.document_length
        )
        there = iter(encoded)
        documents = [next(there) if i >= 0 else np.zeros(0, np.int32) for i in ids]  # a missing negative has no tokens
        counts = {"queries": len(queries), "cut_queries": cut_queries}
        counts |= {"documents": len(encoded), "cut_documents": cut_documents}
        return queries, documents, np.asarray(ids, np.int32), counts

    def _teacher(self, source: int, pairs: list[tuple[Pair, int]]) -> dict[str, np.ndarray]:
        """What another model says of these pairs (infonce.Teacher): scores from their rows, or vectors from side files."""
        if self.distill == "embeddings":
            places = [place for _, place in pairs]
            return {f"teacher_{side}_ND": np.asarray(vectors[places], np.float32)
                    for side, vectors in self.sources[source].teacher.items()}  # fmt: skip
        if self.distill == "scores":
            h = self.c.num_negatives
            score_NS = np.full((len(pairs), 1 + h), np.nan, np.float32)
            for row, (pair, _) in zip(score_NS, pairs, strict=True):
                row[: len(pair.scores[: 1 + h])] = pair.scores[: 1 + h]
            return {"teacher_score_N": score_NS.reshape(-1)}
        return {}

    def _shards(self, queries, documents) -> Iterator[list[np.ndarray]]:
        n, d = len(queries) // len(self.own), len(documents) // len(self.own)
        for i in range(len(self.own)):
            yield queries[i * n : (i + 1) * n] + documents[i * d : (i + 1) * d]

    def _pack_shard(self, ids: list[np.ndarray]) -> tuple[list[np.ndarray], Packed]:
        lengths = [len(text) for text in ids]
        return ids, pack(lengths, row_length=self.c.row_length, texts_per_row=self.c.texts_per_row)

    def _choose_sizes(self, steps: int) -> tuple[int, ...]:
        """The counts of micro-batches, from the lengths of a sample of each group's pairs and batches drawn of them."""
        c, n = self.c, max(self.c.batch_size // self.num_shards, 1)  # 0 is for program.build to refuse
        drawn = np.bincount(self.mixture.group_of_step, minlength=len(self.groups)) / steps
        needed, weight = [], []
        for group, share in zip(self.groups, drawn, strict=True):
            if not share:
                continue
            rng = np.random.default_rng((self.mixture.seed, 2, group.source))
            places = np.unique(rng.integers(0, len(group.members), max(SAMPLE // len(self.groups), 64)))
            texts_of = self._lengths(self.sources[group.source].take(group.members[places]))
            tokens_of = np.array([sum(lengths) for lengths in texts_of])
            some = rng.integers(0, len(places), n)
            lengths = list(itertools.chain.from_iterable(texts_of[i] for i in some))
            rows = pack(lengths, row_length=c.row_length, texts_per_row=c.texts_per_row).num_rows
            tokens = tokens_of[rng.integers(0, len(places), (DRAWS, self.num_shards, n))].sum(-1).max(-1)
            micro = np.ceil(tokens * rows / sum(lengths) / c.rows).astype(int)
            needed += [*micro, micro.max() + 1]  # the fullest of a run is a little fuller than the fullest of a few
            weight += [*[share] * DRAWS, share / DRAWS]
        return sizes.choose(needed, weight, worst=-(-self._worst_rows(c) // c.rows))

    def _fit_rows(self, steps: int) -> tuple[config_lib.Data, tuple[int, ...]]:
        """The config with the rows and the row_length that suit the lengths of the run's own batches, and the counts of M.

        LOOKED_AT batches at most are measured, spread over the run; they are all of a short one, and then nothing is guessed.
        """
        c, known = self.c, {}
        most = min(steps, LOOKED_AT, max(SAMPLE // c.batch_size, 4))
        looked_at = np.unique(np.linspace(0, steps - 1, most).astype(int))
        batches = []
        for step in looked_at:
            group, pairs = self.pairs_at(int(step))
            names = [(group.source, place) for _, place in pairs]
            new = {name: pair for name, (pair, _) in zip(names, pairs, strict=True) if name not in known}
            known |= dict(zip(new, self._lengths(list(new.values())), strict=True))
            n = len(names) // self.num_shards
            shards = (names[i * n : (i + 1) * n] for i in range(self.num_shards))
            batches.append([list(itertools.chain.from_iterable(known[name] for name in shard)) for shard in shards])
        all_of_them = len(looked_at) == steps
        longest = max(max(of) for of in known.values()) if all_of_them else max(c.query_length, c.document_length)
        chosen = {"row_length": c.row_length, "rows": c.rows}
        length, rows, needed = sizes.fit(batches, longest=longest, texts_per_row=c.texts_per_row, **chosen)
        worst = max(needed)
        if not all_of_them:
            needed.append(worst + 1)  # the fullest of a run is a little fuller than the fullest of a few
            worst = -(-self._worst_rows(dataclasses.replace(c, row_length=length)) // rows)
        few = sizes.choose(needed, np.ones(len(needed)), worst=worst, most=sizes.FEW + 1)
        return dataclasses.replace(c, row_length=length, rows=rows), few

    def _worst_rows(self, c: config_lib.Data) -> int:
        """Rows of a device that no batch exceeds."""
        # A row that refuses a text of at most `cap` tokens already holds row_length // cap texts, or texts_per_row.
        cap = max(c.query_length, c.document_length)
        num_texts = self.c.batch_size // self.num_shards * (2 + c.num_negatives)
        return -(-num_texts // min(c.row_length // cap, c.texts_per_row))

    def _lengths(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The tokens of each text of each pair, as they will be packed."""
        c = self.c
        queries = self.tokenizer.count([c.query_prompt + pair.query for pair in pairs])
        texts = [(pair.document, *pair.negatives[: c.num_negatives]) for pair in pairs]
        found = iter(self.tokenizer.count([c.document_prompt + text for of_pair in texts for text in of_pair]))
        return [
            [min(int(query), c.query_length), *(min(int(next(found)), c.document_length) for _ in of_pair)]
            for query, of_pair in zip(queries, texts, strict=True)
        ]
