"""Texts to masked rows [M, B, L] for masked language modelling: pack once, then draw rows, and mask as BERT does.

Every text of a group is tokenised, cut into pieces that fit a row, and packed beforehand, as Nomic packs CC100 (arXiv
2502.07972). The item of a step is a packed row; which rows, and which of their pieces are masked, depends on (seed, step)
alone. Where a batch is of one language, so is a row.
"""

from collections.abc import Sequence

import numpy as np

from moe_embed import config as config_lib
from moe_embed.data import batches, mixture, packing
from moe_embed.data.sources import Texts
from moe_embed.fields import count


class MlmBatches:
    """Step -> Batch, of the shards `own` (None: all) of `num_shards`. `sizes` holds the one count of micro-batches M there is."""

    def __init__(
        self,
        sources: Sequence[Texts],
        tokenizer,
        config: config_lib.Config,
        *,
        num_shards: int,
        own: Sequence[int] | None = None,
    ):
        self.sources, self.tokenizer, self.c, self.num_shards = sources, tokenizer, config.data, num_shards
        self.own = list(range(num_shards)) if own is None else list(own)
        self.fraction, self.seed = config.loss.mask_fraction, config.run.seed
        rows = self.c.rows * num_shards
        if self.c.batch_size % rows:
            nearest = [n for n in (self.c.batch_size // rows * rows, -(-self.c.batch_size // rows) * rows) if n]
            raise config_lib.UserError(
                f"config.data.batch_size={self.c.batch_size} packed rows are no multiple of config.data.rows="
                f"{self.c.rows} x {num_shards} devices; nearest: {', '.join(map(str, nearest))}."
            )
        batches.check_vocabulary(tokenizer, config)
        self.sizes = (self.c.batch_size // rows,)
        self.num_masked = int(np.ceil(self.fraction * self.c.row_length))
        packed = [self._pack_source(source) for source in sources]
        places = [mixture.by_language(langs) for _, _, langs in packed]
        self.groups = mixture.make_groups(places, each_language=self.c.by_language, batch_size=self.c.batch_size)
        members = [group.members[np.arange(len(group.members))] for group in self.groups]
        self.tokens = [
            packed[g.source][0][m] for g, m in zip(self.groups, members, strict=True)
        ]  # int32 [rows, L] each
        self.segments = [packed[g.source][1][m] for g, m in zip(self.groups, members, strict=True)]
        counts_V = np.bincount(np.concatenate([t[s > 0] for t, s, _ in packed]), minlength=config.encoder.vocab_size)
        counts_V[tokenizer.special_ids] = 0
        self.log_frequency_V = np.log((counts_V + 1) / (counts_V + 1).sum()).astype(np.float32)  # one more: none is 0
        self.unigram_entropy = _entropy(counts_V)
        self.replacements = np.setdiff1d(np.arange(tokenizer.num_ids), tokenizer.special_ids)
        self.mixture = mixture.Mixture(
            [len(tokens) for tokens in self.tokens],
            share=mixture.shares(self.groups, weights=self.c.weights, smoothing=self.c.smoothing),
            batch_size=self.c.batch_size,
            steps=config.run.steps,
            seed=config.run.seed,
        )

    @property
    def fingerprint(self) -> dict:
        """What the order of the data depends on; a checkpoint keeps it, and a resume compares."""
        of_rows = {
            "row_length": self.c.row_length,
            "texts_per_row": self.c.texts_per_row,
        }  # what is drawn are packed rows
        return batches.fingerprint(self.sources, self.tokenizer, self.c, seed=self.seed) | of_rows

    @property
    def summary(self) -> str:
        """One line for a person: how much text, and what a model that knows only how common pieces are would score."""
        texts, rows = sum(map(len, self.sources)), sum(self.mixture.sizes)
        return (
            f"{count(texts, 'text')} in {count(len(self.sources), 'source')}, {count(rows, 'packed row')}; "
            f"{count(self.c.batch_size, 'row')} a step; the "
            f"unigram entropy of the text is {self.unigram_entropy:.3f} nats: the loss should go below it"
        )

    def batch_at(self, step: int) -> batches.Batch:
        """The arrays of step `step` that objectives.mlm takes. Own shards stand side by side along B."""
        which, rows = self.mixture.batch_at(step)
        tokens_BL, segments_BL = self.tokens[which][rows], self.segments[which][rows]
        masked_BL, place_BZ, target_BZ = self._mask(tokens_BL, segments_BL, np.random.default_rng((self.seed, 1, step)))
        arrays = {
            "tokens": masked_BL, "segments": segments_BL, "positions": _positions(segments_BL),
            "place": place_BZ, "target": target_BZ,
        }  # fmt: skip
        shape = self.sizes[0], self.num_shards, self.c.rows
        letters = {"place": "Z", "target": "Z"}
        named = {
            f"{name}_MB{letters[name] if name in letters else 'L'}": _beside(array.reshape(*shape, -1)[:, self.own])
            for name, array in arrays.items()
        }
        group = self.groups[which]
        counts = {"useful": float((segments_BL > 0).mean()), "unigram_entropy": self.unigram_entropy}
        return batches.Batch(named, f"{self.sources[group.source].path} {group.lang}".strip(), counts)

    def names(self, step: int) -> list[str]:
        """Each packed row of step `step`, by its place in the source, counted from 0."""
        which, rows = self.mixture.batch_at(step)
        return [str(i) for i in self.groups[which].members[rows]]

    def _pack_source(self, source: Texts) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Tokens and segments [rows, L] of a source, and each row's language: one row, one language, where that counts."""
        langs = np.asarray(source.langs if self.c.by_language else [""] * len(source), dtype=str)
        names = np.unique(langs)
        parts = [self._pack([source.texts[i] for i in np.flatnonzero(langs == name)]) for name in names]
        tokens, segments = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if not len(tokens):
            raise config_lib.UserError(f"{source.path} has no text with a piece in it.")
        return tokens, segments, [name for name, (rows, _) in zip(names, parts, strict=True) for _ in rows]

    def _pack(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> tokens and segments [rows, L]; a text longer than a row becomes several, each with its own ends."""
        length = self.c.row_length
        pieces = []
        for ids in self.tokenizer.encode(texts, max_length=2**30)[0]:
            body = ids[1:-1]
            for start in range(0, len(body), length - 2):
                pieces.append(np.concatenate([ids[:1], body[start : start + length - 2], ids[-1:]]))
        lengths = [len(piece) for piece in pieces]
        packed = packing.pack(lengths, row_length=length, texts_per_row=self.c.texts_per_row)
        rows = packing.fill_rows(pieces, packed, num_rows=packed.num_rows, row_length=length)
        return rows["tokens_BL"], rows["segments_BL"]

    def _mask(self, tokens_BL: np.ndarray, segments_BL: np.ndarray, rng: np.random.Generator):
        """BERT's masking (arXiv 1810.04805, section 3.1): of a row's pieces, special ones left out, `fraction` are chosen;
        80 % of those become <mask>, 10 % another piece, 10 % stay. The count is exact in each row, so its shape is fixed."""
        maskable_BL = (segments_BL > 0) & ~np.isin(tokens_BL, self.tokenizer.special_ids)
        count_B = np.round(self.fraction * maskable_BL.sum(1)).astype(int)
        count_B = np.maximum(count_B, maskable_BL.any(1))  # one at least: a step with none would have no loss
        order_BL = np.argsort(np.where(maskable_BL, rng.random(tokens_BL.shape), 2.0), axis=1)
        place_BZ = order_BL[:, : self.num_masked].astype(np.int32)
        chosen_BZ = np.arange(self.num_masked) < count_B[:, None]
        true_BZ = np.take_along_axis(tokens_BL, place_BZ, axis=1)
        draw_BZ = rng.random(place_BZ.shape)
        others_BZ = rng.choice(self.replacements, place_BZ.shape)
        new_BZ = np.where(draw_BZ < 0.8, self.tokenizer.mask_id, np.where(draw_BZ < 0.9, others_BZ, true_BZ))
        masked_BL = tokens_BL.copy()
        np.put_along_axis(masked_BL, place_BZ, np.where(chosen_BZ, new_BZ, true_BZ).astype(np.int32), axis=1)
        place_BZ = np.where(chosen_BZ, place_BZ, 0)
        return masked_BL, place_BZ.astype(np.int32), np.where(chosen_BZ, true_BZ, -1).astype(np.int32)


def _beside(x_MSBL: np.ndarray) -> np.ndarray:
    """Shards [M, shard, B, ...] side by side along B."""
    return x_MSBL.reshape(x_MSBL.shape[0], -1, x_MSBL.shape[-1])


def _positions(segments_BL: np.ndarray) -> np.ndarray:
    """Counted from 0 in each text, 0 in padding."""
    place_L = np.arange(segments_BL.shape[1], dtype=np.int32)
    starts_BL = np.diff(segments_BL, axis=1, prepend=0) != 0
    first_BL = np.maximum.accumulate(np.where(starts_BL, place_L, 0), axis=1)
    return np.where(segments_BL > 0, place_L - first_BL, 0).astype(np.int32)


def _entropy(counts_V: np.ndarray) -> float:
    """Of the distribution of pieces, in nats: the cross-entropy of the best guess that looks at no context."""
    p = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p * np.log(p)).sum())
