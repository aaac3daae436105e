"""Packed rows to mask: no piece is lost, the count is exact, and a step is a function of seed and step alone."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed.config import UserError
from moe_embed.data.mlm_batches import MlmBatches
from moe_embed.data.sources import Texts
from moe_embed.data.tokenizer import PAD
from tests import tiny
from tests.tiny import WORDS, FakeTokenizer

BOS, EOS = 0, 2


def config(*, fraction=0.3, seed=0, **data) -> config_lib.Config:
    return tiny.config(loss={"objective": "mlm", "mask_fraction": fraction}, data=data, run={"seed": seed})


def make(texts, langs=None, *, num_shards=1, own=None, **changes) -> MlmBatches:
    source = Texts("folder/a.jsonl", list(texts), list(langs or [""] * len(texts)), 17)
    return MlmBatches([source], FakeTokenizer(), config(**changes), num_shards=num_shards, own=own)


def some_texts(count=150, *, longest=60, words=WORDS, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def ids(text: str) -> list[int]:
    return FakeTokenizer().encode([text], max_length=2**30)[0][0].tolist()


def flat(batch) -> dict[str, np.ndarray]:
    """The arrays of a batch without M: global rows in order."""
    return {name: array.reshape(-1, array.shape[-1]) for name, array in batch.arrays.items()}


def unmasked(made: MlmBatches, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of a step's rows as they were packed."""
    which, rows = made.mixture.batch_at(step)
    return made.tokens[which][rows], made.segments[which][rows]


def pieces(tokens_BL, segments_BL) -> list[list[int]]:
    return [
        tokens_L[segments_L == segment].tolist()
        for tokens_L, segments_L in zip(tokens_BL, segments_BL, strict=True)
        for segment in range(1, segments_L.max() + 1)
    ]


def test_rows_by_hand():
    """Rows of 8: fourteen pieces are cut into six, six and two, each with its own ends, and a short text fills up."""
    made = make(["kalominuperisotuvaxekalominu", "xe"], row_length=8, query_length=8, document_length=8, batch_size=2)
    tokens, segments = made.tokens[0], made.segments[0]
    assert tokens.tolist() == [
        [BOS, 4, 5, 6, 7, 8, 9, EOS],
        [BOS, 10, 11, 12, 13, 4, 5, EOS],
        [BOS, 6, 7, EOS, BOS, 13, EOS, PAD],
    ]
    assert segments.tolist() == [[1] * 8, [1] * 8, [1, 1, 1, 1, 2, 2, 2, 0]]
    batch = flat(made.batch_at(0))
    third = [row for row in range(2) if batch["segments_MBL"][row, -1] == 0]  # two rows of three are in a batch
    for row in range(2):
        expected = [0, 1, 2, 3, 0, 1, 2, 0] if row in third else list(range(8))
        assert batch["positions_MBL"][row].tolist() == expected
    assert make(["ka" * 12], row_length=8, query_length=8, document_length=8).tokens[0].shape == (2, 8)  # no empty rest


def packs_these(made: MlmBatches, texts) -> None:
    length, expected = made.c.row_length, []
    for text in texts:
        body = ids(text)[1:-1]
        while body:
            expected.append([BOS, *body[: length - 2], EOS])
            body = body[length - 2 :]
    found = [
        piece for rows in zip(made.tokens, made.segments, strict=True) for piece in pieces(*rows)
    ]  # of every group
    found.sort()
    expected.sort()
    # By a name: where CI is set pytest shows in full how two lists differ, which took 17 minutes for these.
    same = found == expected
    assert same
    for tokens_BL, segments_BL in zip(made.tokens, made.segments, strict=True):
        assert (tokens_BL[segments_BL == 0] == PAD).all()
        assert segments_BL.min(initial=0) >= 0
        assert segments_BL.max(1).min() >= 1
        assert segments_BL.max() <= made.c.texts_per_row
        assert tokens_BL.dtype == segments_BL.dtype == np.int32


def test_packing_loses_no_piece_and_long_texts_continue():
    texts, langs = some_texts(), ["de", "en", "ja"] * 50
    for made in (make(texts), make(texts, row_length=64, texts_per_row=3), make(texts, langs, by_language=True)):
        packs_these(made, texts)
        for other in (texts[1:], [*texts[1:], texts[0][:-2]], [*texts[1:], texts[0] + "ka"]):
            with pytest.raises(AssertionError):
                packs_these(made, other)
    assert max(len(ids(text)) for text in texts) > 32  # some are longer than a row


def is_masked_by_the_rules(batch: dict, tokens_BL, segments_BL, *, fraction: float) -> None:
    tokenizer = FakeTokenizer()
    for row, (old_L, segment_L) in enumerate(zip(tokens_BL, segments_BL, strict=True)):
        new_L = batch["tokens_MBL"][row]
        maskable = [i for i in range(len(old_L)) if segment_L[i] and old_L[i] not in tokenizer.special_ids]
        targets = batch["target_MBZ"][row]
        places = batch["place_MBZ"][row][targets >= 0].tolist()
        assert len(places) == round(fraction * len(maskable))
        assert len(set(places)) == len(places)
        assert set(places) <= set(maskable)
        assert targets[targets >= 0].tolist() == old_L[places].tolist()
        assert (targets[len(places) :] == -1).all()
        assert not batch["place_MBZ"][row][len(places) :].any()
        rest = [i for i in range(len(old_L)) if i not in places]
        assert new_L[rest].tolist() == old_L[rest].tolist()
        new = new_L[places]
        assert not np.isin(new, tokenizer.special_ids[:-1]).any()  # a piece, or <mask>
        assert (new < tokenizer.num_ids).all()
        assert batch["segments_MBL"][row].tolist() == segment_L.tolist()
        counted = collections.Counter()
        for i, segment in enumerate(segment_L):
            assert batch["positions_MBL"][row][i] == (counted[segment] if segment else 0)
            counted[segment] += 1


@pytest.mark.parametrize("fraction", [0.3, 0.15])
def test_masked_places_are_exact_in_number_and_say_what_stood_there(fraction):
    made = make(some_texts(), fraction=fraction)
    assert made.num_masked == math.ceil(fraction * 32)
    for step in range(4):
        batch, (tokens_BL, segments_BL) = flat(made.batch_at(step)), unmasked(made, step)
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            f"{name}_MB{letter}": ((16, 32 if letter == "L" else made.num_masked), np.dtype(np.int32))
            for name, letter in (
                ("tokens", "L"),
                ("segments", "L"),
                ("positions", "L"),
                ("place", "Z"),
                ("target", "Z"),
            )
        }
        is_masked_by_the_rules(batch, tokens_BL, segments_BL, fraction=fraction)
        first = np.argwhere(batch["target_MBZ"] >= 0)[0]
        row, place = first[0], batch["place_MBZ"][tuple(first)]
        chosen = batch["place_MBZ"][row][batch["target_MBZ"][row] >= 0]
        beside = next(i for i in range(1, 32) if i not in chosen)
        broken = {"target_MBZ": tuple(first), "place_MBZ": tuple(first), "tokens_MBL": (row, beside),
                  "positions_MBL": (row, place), "segments_MBL": (row, place)}  # fmt: skip
        for name, where in broken.items():
            other = batch | {name: batch[name].copy()}
            other[name][where] = 0 if name == "place_MBZ" else other[name][where] + 1  # 0 is <s>: never masked
            with pytest.raises(AssertionError):
                is_masked_by_the_rules(other, tokens_BL, segments_BL, fraction=fraction)
    assert (batch["target_MBZ"] < 0).any()  # rows have fewer: special pieces and padding are not masked


def test_eight_in_ten_become_mask_one_another_piece_and_one_stays():
    made = make(some_texts(800), batch_size=256)
    kinds = collections.Counter()
    others = []
    for step in range(8):
        batch, (tokens_BL, _) = flat(made.batch_at(step)), unmasked(made, step)
        row, z = np.nonzero(batch["target_MBZ"] >= 0)
        place = batch["place_MBZ"][row, z]
        new, old = batch["tokens_MBL"][row, place], tokens_BL[row, place]
        kinds.update(mask=(new == made.tokenizer.mask_id).sum(), same=(new == old).sum(), all=len(new))
        others += new[(new != old) & (new != made.tokenizer.mask_id)].tolist()
    by_chance = 0.1 / len(made.replacements)  # "another" is drawn from all, and may be the same again
    deviation = 5 * math.sqrt(0.16 / kinds["all"])  # a standard deviation or five
    assert deviation < 0.02
    assert kinds["mask"] / kinds["all"] == pytest.approx(0.8, abs=deviation)
    assert kinds["same"] / kinds["all"] == pytest.approx(0.1 + by_chance, abs=deviation)
    assert len(others) / kinds["all"] == pytest.approx(0.1 - by_chance, abs=deviation)
    assert set(others) == set(range(60)) - set(
        FakeTokenizer.special_ids.tolist()
    )  # each piece there is, no special one
    assert kinds["mask"] / kinds["all"] != pytest.approx(0.9, abs=deviation)


def assert_same(a, b) -> None:
    assert a.source == b.source
    assert a.counts == b.counts
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    texts = some_texts()
    made, again = make(texts), make(texts)
    backwards = {step: again.batch_at(step) for step in reversed(range(8))}
    for step in range(8):
        assert_same(made.batch_at(step), backwards[step])
        with pytest.raises(AssertionError):
            assert_same(made.batch_at(step), backwards[(step + 1) % 8])
    with pytest.raises(AssertionError):
        assert_same(made.batch_at(0), make(texts, seed=1).batch_at(0))


def test_one_row_is_masked_otherwise_each_time_it_comes():
    made = make(["kalominupe" * 6] * 4, batch_size=4, rows=4, row_length=32)  # equal texts, so that all rows are equal
    first, second = (flat(made.batch_at(step)) for step in (0, 1))
    assert not np.array_equal(first["place_MBZ"], second["place_MBZ"])
    assert not np.array_equal(first["place_MBZ"][0], first["place_MBZ"][1])


def test_the_global_rows_do_not_depend_on_devices_and_micro_batches():
    texts = some_texts()
    expected, sizes = flat(make(texts).batch_at(3)), set()
    for num_shards, rows in ((1, 1), (2, 2), (4, 1), (8, 2), (16, 1)):
        made = make(texts, num_shards=num_shards, rows=rows)
        batch = made.batch_at(3)
        assert made.sizes == (16 // (num_shards * rows),)
        assert batch.arrays["tokens_MBL"].shape == (*made.sizes, num_shards * rows, 32)
        for name, array in flat(batch).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        sizes |= set(made.sizes)
    assert sizes == {1, 4, 16}
    assert not np.array_equal(flat(make(texts).batch_at(4))["tokens_MBL"], expected["tokens_MBL"])


def test_a_batch_is_of_one_language_and_small_ones_are_put_together():
    words = {"de": WORDS[:3], "en": WORDS[3:6], "fr": WORDS[6:8], "ja": WORDS[8:]}
    texts, langs = [], []
    for i, (lang, count) in enumerate({"de": 80, "en": 40, "fr": 5, "ja": 6}.items()):
        texts += some_texts(count, words=words[lang], seed=i)
        langs += [lang] * count
    order = np.random.default_rng(0).permutation(len(texts))
    texts, langs = [texts[i] for i in order], [langs[i] for i in order]

    def spoken(made, step) -> set[str]:
        tokens_BL, segments_BL = unmasked(made, step)
        found = set(tokens_BL[segments_BL > 0].tolist()) - {BOS, EOS}
        return {lang for lang, some in words.items() if found & {4 + WORDS.index(word) for word in some}}

    made = make(texts, langs, by_language=True)
    sources = [made.batch_at(step).source for step in range(10)]
    for step, source in enumerate(sources):
        assert source == f"folder/a.jsonl {'+'.join(sorted(spoken(made, step)))}"
    assert set(sources) == {"folder/a.jsonl de", "folder/a.jsonl en", "folder/a.jsonl fr+ja"}
    mixed = make(texts, langs)
    assert mixed.batch_at(0).source == "folder/a.jsonl"
    assert any(len(spoken(mixed, step)) == 4 for step in range(10))


def test_two_sources_keep_their_shares_and_their_names():
    sources = [Texts(f"{name}.jsonl", some_texts(60, seed=i), [""] * 60, i) for i, name in enumerate("ab")]
    made = MlmBatches(sources, FakeTokenizer(), config(sources=("a", "b"), weights=(0.7, 0.3)), num_shards=2)
    assert collections.Counter(made.batch_at(step).source for step in range(10)) == {"a.jsonl": 7, "b.jsonl": 3}


@pytest.mark.parametrize(
    ("batch_size", "rows", "num_shards", "nearest"),
    [(15, 2, 1, "14, 16"), (12, 2, 8, "16"), (20, 1, 8, "16, 24")],
)
def test_rows_that_do_not_fill_the_devices_are_refused(batch_size, rows, num_shards, nearest):
    with pytest.raises(UserError) as caught:
        make(some_texts(), batch_size=batch_size, rows=rows, num_shards=num_shards)
    (sentence,) = caught.value.args
    assert f"config.data.batch_size={batch_size} " in sentence
    assert f"config.data.rows={rows} x {num_shards} devices" in sentence
    assert sentence.endswith(f"nearest: {nearest}.")
    for size in map(int, nearest.split(", ")):
        assert make(some_texts(), batch_size=size, rows=rows, num_shards=num_shards).sizes == (
            size // rows // num_shards,
        )


def test_a_table_with_fewer_rows_than_ids_is_refused():
    c = dataclasses.replace(config(), encoder=dataclasses.replace(config().encoder, vocab_size=56))
    with pytest.raises(UserError, match=r"60 ids, more than config\.encoder\.vocab_size=56; set it to 64"):
        MlmBatches([Texts("a", some_texts(), [""] * 150, 0)], FakeTokenizer(), c, num_shards=1)


def test_the_unigram_entropy_by_hand():
    texts = ["kaka", "lo", "mi"]  # 1/2, 1/4, 1/4: <s>, </s> and padding are no pieces
    made = make(texts, batch_size=2)
    assert made.unigram_entropy == pytest.approx(1.5 * math.log(2))
    assert make(["kaka", "lolo"], batch_size=2).unigram_entropy == pytest.approx(math.log(2))
    assert make(["ka"], batch_size=2).unigram_entropy == 0.0
    assert made.batch_at(0).counts["unigram_entropy"] == made.unigram_entropy
    assert (
        "3 texts in 1 source, 1 packed row; 2 rows a step; the unigram entropy of the text is 1.040 nats"
        in made.summary
    )


def test_log_frequencies_by_hand():
    """Each piece counted once more than it is there, so that none is impossible: what a head's bias begins with."""
    found = make(["kaka", "lo", "mi"], batch_size=2).log_frequency_V
    assert (found.shape, found.dtype) == ((64,), np.float32)
    expected = np.ones(64) / (64 + 4)  # <s> and </s> are not counted, though there are three of each
    expected[[4, 5, 6]] = [3 / 68, 2 / 68, 2 / 68]
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5)
    assert np.exp(found).sum() == pytest.approx(1)


def test_what_part_of_the_rows_is_text_is_counted():
    made = make(some_texts())
    for step in range(3):
        assert made.batch_at(step).counts["useful"] == pytest.approx((unmasked(made, step)[1] > 0).mean())
    assert make(["ka"], batch_size=2).batch_at(0).counts["useful"] == 3 / 32


def test_the_fingerprint_follows_the_data():
    texts = some_texts()
    first = make(texts).fingerprint
    assert first["files"] == [["a.jsonl", 150, 17]]
    assert first == make(texts, num_shards=4, rows=1).fingerprint
    others = [make(texts[1:]), make(texts, seed=1), make(texts, batch_size=8), make(texts, smoothing=0.3)]
    others.append(make(texts, by_language=True))
    assert all(first != other.fingerprint for other in others)
    assert first != make(texts, row_length=128).fingerprint  # what a step draws are packed rows
    source = Texts("folder/a.jsonl", texts, [""] * 150, 18)
    assert first != MlmBatches([source], FakeTokenizer(), config(), num_shards=1).fingerprint


def test_a_row_with_a_piece_has_a_masked_one_and_a_source_has_pieces():
    made = make(some_texts(), fraction=0.001)
    assert (flat(made.batch_at(0))["target_MBZ"] >= 0).sum(1).tolist() == [1] * made.c.batch_size
    with pytest.raises(UserError, match=r"folder/a\.jsonl has no text with a piece in it"):
        make([""])


def test_processes_take_their_own_shards_of_the_same_batch():
    texts = some_texts(400)
    whole = make(texts, batch_size=16, rows=2, num_shards=4).batch_at(1).arrays
    for own in ([0, 1], [3, 1]):
        found = make(texts, batch_size=16, rows=2, num_shards=4, own=own).batch_at(1).arrays
        for name, array in whole.items():
            shards = np.split(array, 4, axis=1)
            assert np.array_equal(found[name], np.concatenate([shards[i] for i in own], axis=1))
            assert not np.array_equal(found[name], np.concatenate([shards[i - 1] for i in own], axis=1))
