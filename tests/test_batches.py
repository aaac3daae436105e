"""Packed rows: nothing overlaps, nothing is lost, and every text can be read back through its slot."""

import contextlib
import dataclasses
import json
import pathlib
import zlib

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import run_data
from moe_embed.config import UserError
from moe_embed.data import batches as batches_lib
from moe_embed.data import sources as sources_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import Source

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "moe_embed" / "sample"
WORDS = ["insert", "table", "page", "margin", "die", "Seite", "ändern", "Formel", "Zelle", "ページ", "余白", "документ"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.read(SAMPLE / "tokenizer.model")


@pytest.fixture(scope="module")
def crosslingual():
    return sources_lib.read_source(str(SAMPLE / "pairs" / "crosslingual.jsonl.gz"))


def config(*, steps=12, **data) -> config_lib.Config:
    base = config_lib.load(f"{ROOT / 'configs' / 'demo.py'}:tiny")
    data = {"batch_size": 16, "weights": (), "sources": ("a",), "rows": 2, "row_length": 64, "texts_per_row": 6} | data
    run = dataclasses.replace(base.run, steps=steps)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **data), run=run)


def some_source(name="a", *, size=40, longest=30, negatives=0, seed=0) -> Source:
    rng = np.random.default_rng(seed)
    text = lambda i: " ".join([name, str(i), *rng.choice(WORDS, rng.integers(1, longest))])  # noqa: E731
    pairs = [Pair(text(i), text(i), tuple(text(i) for _ in range(i % (negatives + 1)))) for i in range(size)]
    return Source(path=f"folder/{name}.jsonl", pairs=pairs, digest=zlib.crc32(name.encode()))


def read_back(batch, c: config_lib.Data, slot: int, shard: int) -> tuple[list[int], list[int]]:
    """Tokens and positions of the text in one shard's slot."""
    row, segment = divmod(int(slot), c.texts_per_row)
    place = row // c.rows, shard * c.rows + row % c.rows
    inside = batch.arrays["segments_MBL"][place] == segment + 1
    return batch.arrays["tokens_MBL"][place][inside].tolist(), batch.arrays["positions_MBL"][place][inside].tolist()


def assert_holds_its_texts(made: batches_lib.Batches, step: int) -> None:
    """Tokenise the pairs of a step again, and find exactly these texts, each in its slot, and nothing else."""
    c, batch, shards = made.c, made.batch_at(step), made.num_shards
    source, indices = made.mixture.batch_at(step)
    pairs = [made.sources[source].pairs[i] for i in indices]
    documents = []
    for pair in pairs:
        some = [pair.document, *pair.negatives[: c.num_negatives]]
        documents += some + [None] * (1 + c.num_negatives - len(some))  # a missing negative: slot 0, no tokens
    total = 0
    queries = [pair.query for pair in pairs]
    for texts, prompt, cap, name in ((queries, c.query_prompt, c.query_length, "query_slot_N"),
                                     (documents, c.document_prompt, c.document_length, "document_slot_N")):  # fmt: skip
        there = iter(made.tokenizer.encode([t for t in texts if t], prompt=prompt, max_length=cap)[0])
        ids = [next(there) if text else () for text in texts]
        slots = batch.arrays[name]
        assert slots.shape == (len(texts),)
        for n, (expected, slot) in enumerate(zip(ids, slots, strict=True)):
            if not len(expected):
                assert (slot, batch.arrays["document_id_N"][n]) == (0, -1)
                continue
            found = read_back(batch, c, slot, n // (len(texts) // shards))
            assert found == (expected.tolist(), list(range(len(expected))))
        total += sum(map(len, ids))
    real = batch.arrays["segments_MBL"] > 0
    assert real.sum() == total  # nothing beside the texts
    assert np.all(batch.arrays["tokens_MBL"][~real] == tokenizer_lib.PAD)
    assert batch.counts["useful"] == pytest.approx(real.mean())


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("num_negatives", [0, 2])
def test_every_text_is_read_back_through_its_slot(tokenizer, num_shards, num_negatives):
    c = config(num_negatives=num_negatives)
    made = batches_lib.Batches([some_source(negatives=3)], tokenizer, c, num_shards=num_shards)
    for step in range(6):
        assert_holds_its_texts(made, step)
        assert made.batch_at(step).arrays["tokens_MBL"].shape[1:] == (2 * num_shards, 64)
    broken = made.batch_at(0)
    broken.arrays["query_slot_N"] = np.roll(broken.arrays["query_slot_N"], 1)
    made.batch_at = lambda step: broken
    with pytest.raises(AssertionError):
        assert_holds_its_texts(made, 0)


def test_hard_negatives_and_missing_ones(tokenizer):
    source, crc = some_source(negatives=3), batches_lib.document_id
    made = batches_lib.Batches([source], tokenizer, config(num_negatives=2), num_shards=1)
    expected = []
    for pair in (source.pairs[i] for i in made.mixture.batch_at(0)[1]):
        expected += ([crc(pair.document)] + [crc(text) for text in pair.negatives[:2]] + [-1, -1])[:3]
    found = made.batch_at(0).arrays["document_id_N"]
    assert found.tolist() == expected
    assert (found.dtype, -1 in found) == (np.int32, True)
    assert crc("a") == crc("a") == zlib.crc32(b"a") % 2**31 != crc("b")


def test_sizes_are_few_and_the_smallest_that_holds_is_taken(tokenizer):
    sources = [some_source("a", longest=6), some_source("b", longest=60, seed=1)]
    made = batches_lib.Batches(sources, tokenizer, config(steps=30, weights=(0.7, 0.3)), num_shards=2)
    assert 1 < len(made.sizes) <= 8
    for step in range(30):
        batch = made.batch_at(step)
        num_micro = batch.arrays["tokens_MBL"].shape[0]
        rows = max(int(batch.arrays[name].reshape(2, -1).max(1)[i]) // 6 + 1
                   for name in ("query_slot_N", "document_slot_N") for i in range(2))  # fmt: skip
        assert num_micro == min(size for size in made.sizes if size * 2 >= rows)
        assert batch.source == sources[made.mixture.batch_at(step)[0]].path
    assert len({made.batch_at(step).arrays["tokens_MBL"].shape[0] for step in range(30)}) > 1


@pytest.mark.parametrize(("row_length", "texts_per_row"), [(64, 6), (127, 2), (200, 16), (200, 1)])
def test_the_worst_case_fits(tokenizer, monkeypatch, row_length, texts_per_row):
    monkeypatch.setattr(batches_lib, "SAMPLE", 1)  # only the first step is looked at: the short source's
    sources = [some_source("a", longest=3), Source("b", [Pair("page " * 400, "page " * 400)] * 20, 1)]
    c = config(weights=(0.9, 0.1), row_length=row_length, texts_per_row=texts_per_row)
    made = batches_lib.Batches(sources, tokenizer, c, num_shards=2)
    full = [step for step in range(12) if made.mixture.batch_at(step)[0] == 1]
    assert full
    assert 0 not in full
    for step in full:
        assert_holds_its_texts(made, step)
        assert tuple(made.batch_at(step).counts[f"cut_{side}"] for side in ("queries", "documents")) == (16, 16)
    assert made.batch_at(0).counts["cut_queries"] == 0


def test_what_is_encoded_is_counted(tokenizer):
    made = batches_lib.Batches([Source("a", TWO, 0)], tokenizer, config(batch_size=4, num_negatives=2), num_shards=2)
    assert (made.batch_at(0).counts["queries"], made.batch_at(0).counts["documents"]) == (4, 9)  # of 12 places
    made = batches_lib.Batches([Source("a", TWO, 0)], tokenizer, config(batch_size=4, num_negatives=1), num_shards=2)
    assert (made.batch_at(0).counts["queries"], made.batch_at(0).counts["documents"]) == (4, 7)


def test_rows_of_real_pairs_are_at_least_nine_tenths_useful(tokenizer, crosslingual):
    c = config(batch_size=256, row_length=512, rows=4, texts_per_row=64)  # pairs are short: 22 texts fill a row
    made = batches_lib.Batches([crosslingual], tokenizer, c, num_shards=1)
    assert np.mean([made.batch_at(step).counts["useful"] for step in range(12)]) >= 0.9
    assert_holds_its_texts(made, 3)


def test_the_fingerprint_follows_the_data_and_a_small_vocabulary_is_refused(tokenizer):
    make = lambda s, **data: batches_lib.Batches([s], tokenizer, config(steps=1, **data), num_shards=1).fingerprint  # noqa: E731
    first = make(some_source())
    assert first == make(dataclasses.replace(some_source(), path="elsewhere/a.jsonl"))
    assert first["files"] == [["a.jsonl", 40, zlib.crc32(b"a")]]
    other = make(dataclasses.replace(some_source(), digest=1))
    assert first not in (other, make(some_source(), batch_size=8), make(some_source(size=41)))
    c = dataclasses.replace(config(), encoder=dataclasses.replace(config().encoder, vocab_size=16_000))
    with pytest.raises(UserError, match=r"16002 ids, .*vocab_size=16000; set it to 16064"):
        batches_lib.Batches([some_source()], tokenizer, c, num_shards=1)


TWO = [
    Pair("who?", "she", ("he", "it"), id="a", scores=(0.9, 0.5, 0.1)),
    Pair("who is it?", "Ada", id="a", scores=(0.8,)),
    Pair("where?", "here", ("there", "nowhere"), scores=()),
    Pair("when?", "now", ("then",), id="b", scores=(0.7, 0.2)),
]


def with_loss(c: config_lib.Config, **loss) -> config_lib.Config:
    return dataclasses.replace(c, loss=dataclasses.replace(c.loss, **loss))


def test_a_teachers_scores_stand_beside_the_documents(tokenizer):
    c = with_loss(config(batch_size=4, num_negatives=2, steps=1), distill="scores")
    made = batches_lib.Batches([Source("a", TWO, 0)], tokenizer, c, num_shards=1)
    nan = float("nan")
    by_pair = np.array([[0.9, 0.5, 0.1], [0.8, nan, nan], [nan] * 3, [0.7, 0.2, nan]], np.float32)
    order = made.mixture.batch_at(0)[1]
    found = made.batch_at(0).arrays["teacher_score_N"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(4, 3), by_pair[order])
    assert sorted(order) == [0, 1, 2, 3]
    assert not np.array_equal(found.reshape(4, 3), by_pair[(order + 1) % 4], equal_nan=True)
    missing = made.batch_at(0).arrays["document_id_N"] < 0
    assert np.isnan(found[missing]).all()
    # One negative is taken of two: its score too, and the order of the scores is that of the documents.
    c = with_loss(config(batch_size=4, num_negatives=1, steps=1), distill="scores")
    made = batches_lib.Batches([Source("a", TWO, 0)], tokenizer, c, num_shards=2)
    np.testing.assert_array_equal(
        made.batch_at(0).arrays["teacher_score_N"].reshape(4, 2), by_pair[made.mixture.batch_at(0)[1], :2]
    )
    plain = batches_lib.Batches([Source("a", TWO, 0)], tokenizer, config(batch_size=4, steps=1), num_shards=1)
    assert not [name for name in plain.batch_at(0).arrays if name.startswith("teacher")]


def test_a_teachers_vectors_are_those_of_the_pairs_in_the_batch(tokenizer):
    pairs = some_source(size=24).pairs
    vectors = {
        side: np.arange(72, dtype=np.float16).reshape(24, 3) + 1000 * i for i, side in enumerate(("query", "document"))
    }
    c = with_loss(config(batch_size=8, by_language=True), distill="embeddings")
    langs = ["de", "en", "de"] * 8  # places in a group are not places in the file
    pairs = [dataclasses.replace(pair, lang=lang) for pair, lang in zip(pairs, langs, strict=True)]
    made = batches_lib.Batches([Source("a", pairs, 0, vectors)], tokenizer, c, num_shards=2)
    row_of = {batches_lib.document_id(pair.document): i for i, pair in enumerate(pairs)}
    for step in range(4):
        batch = made.batch_at(step).arrays
        rows = [row_of[i] for i in batch["document_id_N"].tolist()]
        for side in vectors:
            assert batch[f"teacher_{side}_ND"].dtype == np.float32
            np.testing.assert_array_equal(batch[f"teacher_{side}_ND"], vectors[side][rows])
            assert not np.array_equal(batch[f"teacher_{side}_ND"], vectors[side][rows[::-1]])


def test_pairs_of_one_query_share_its_number():
    """One query are pairs of one text, or of one id, and pairs linked through another."""
    pairs = [
        Pair("a", "1", id="x"),
        Pair("b", "2"),
        Pair("a", "3", id="y"),
        Pair("c", "4", id="y"),
        Pair("b", "5", id="z"),
    ]
    ids = batches_lib.query_ids([*pairs, Pair("x", "6"), Pair("d", "7", id="b")])
    assert ids.dtype == np.int32
    assert ids[0] == ids[2] == ids[3]  # "a" by its text, "c" by its id
    assert ids[1] == ids[4]
    assert len(set(ids.tolist())) == 4  # the text "x" is not the id "x", the id "b" not the text "b"


def test_a_batch_numbers_its_queries(tokenizer):
    pairs = [*TWO, Pair("where?", "everywhere"), Pair("a", "another")]
    made = batches_lib.Batches([Source("a", pairs, 0)], tokenizer, config(batch_size=6, steps=1), num_shards=2)
    order = made.mixture.batch_at(0)[1]
    found = made.batch_at(0).arrays["query_id_N"]
    np.testing.assert_array_equal(found, batches_lib.query_ids([pairs[i] for i in order]))
    assert len(set(found.tolist())) < 6


def test_a_batch_by_language_holds_one_language(tokenizer):
    langs = ["de"] * 20 + ["en"] * 18 + ["fr"] * 9 + ["ja"] * 8
    source = some_source(size=55)
    pairs = [dataclasses.replace(pair, lang=lang) for pair, lang in zip(source.pairs, langs, strict=True)]
    lang_of = {batches_lib.document_id(pair.document): pair.lang for pair in pairs}

    def spoken(**data) -> list[tuple[str, set[str]]]:
        c = config(batch_size=16, **data)
        made = batches_lib.Batches([Source("folder/a.jsonl", pairs, 0)], tokenizer, c, num_shards=1)
        batches = [made.batch_at(step) for step in range(10)]
        return [(batch.source, {lang_of[i] for i in batch.arrays["document_id_N"].tolist()}) for batch in batches]

    found = spoken(by_language=True)
    assert {source for source, _ in found} == {f"folder/a.jsonl {lang}" for lang in ("de", "en", "fr+ja")}
    for source, langs in found:  # languages too small for a batch are put together
        assert source == f"folder/a.jsonl {'+'.join(sorted(langs))}"
    assert all(source == "folder/a.jsonl" and len(langs) > 1 for source, langs in spoken())


def test_distilling_scores_needs_some(tokenizer):
    c = config(batch_size=4, num_negatives=1, steps=1)
    c = dataclasses.replace(c, loss=dataclasses.replace(c.loss, distill="scores"))
    batches_lib.Batches([Source("a", TWO, 0)], tokenizer, c, num_shards=1)
    without = [dataclasses.replace(pair, scores=()) for pair in TWO]
    with pytest.raises(config_lib.UserError, match='finds no "scores" in b'):
        batches_lib.Batches([Source("b", without, 0)], tokenizer, c, num_shards=1)


@pytest.mark.parametrize("own", [([0, 1], [2, 3]), ([0, 2], [1, 3])])
def test_processes_make_their_own_shards_of_the_same_batch(tokenizer, own):
    sources = [some_source("a", longest=60)]
    c = config(steps=6, num_negatives=1)
    whole = batches_lib.Batches(sources, tokenizer, c, num_shards=4)
    rows = {}  # step -> the rows each needs

    def agree(step: int, needed: int) -> int:
        rows.setdefault(step, []).append(needed)
        return max(rows[step]) if len(rows[step]) == 2 else 10**6

    for step in range(6):
        rows.clear()
        for part in own:  # the first to come waits for the second
            with contextlib.suppress(StopIteration):
                batches_lib.Batches(sources, tokenizer, c, num_shards=4, own=part, agree=agree).batch_at(step)
        largest = max(rows[step])
        expected = whole.batch_at(step).arrays
        for part in own:
            made = batches_lib.Batches(
                sources, tokenizer, c, num_shards=4, own=part, agree=lambda step, needed, largest=largest: largest
            )
            found = made.batch_at(step).arrays
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                split = 1 if name.endswith("_MBL") else 0
                parts = np.split(array, 4, axis=split)
                assert np.array_equal(found[name], np.concatenate([parts[i] for i in part], axis=split)), name
                assert not np.array_equal(found[name], np.concatenate([parts[3 - i] for i in part], axis=split)), name


@pytest.mark.parametrize(("size", "shards"), [(120, 1), (1_000, 1), (5_000, 1), (5_000, 2)])
def test_a_small_finetuning_computes_little_padding(size, shards, tmp_path):
    """configs/finetune_pairs.py on short English and German pairs: 0.22 to 0.44 useful with 8 rows of 512 for all."""
    pairs = sources_lib.read_source(str(SAMPLE / "pairs" / "monolingual.jsonl.gz")).pairs
    once = {p.document: p for p in {p.query: p for p in pairs if p.lang in ("en", "de")}.values()}
    some = list(once.values())[:size]
    assert len(some) == size
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"query": p.query, "document": p.document}) + "\n" for p in some)
    )
    overrides = [
        f"--config.data.sources={tmp_path / 'p.jsonl'}",
        f"--config.data.tokenizer={SAMPLE / 'tokenizer.model'}",
    ]

    def useful(*more: str) -> float:
        c = config_lib.load(str(ROOT / "configs" / "finetune_pairs.py"), [*overrides, *more])
        c, made, *_ = run_data.open_data(c, num_shards=shards)
        steps = range(0, c.run.steps, 5)
        for step in steps[:2]:
            assert_holds_its_texts(made, step)
        found = [made.batch_at(step) for step in steps]
        if not more:
            assert len({batch.arrays["tokens_MBL"].shape for batch in found}) <= 3
        return np.mean([batch.counts["useful"] for batch in found])

    assert useful() >= 0.8
    if size == 120:
        assert useful("--config.data.rows=8", "--config.data.row_length=512") < 0.5


def test_of_a_long_run_some_batches_are_measured_and_any_batch_fits(tokenizer):
    c = config(steps=200, rows=0, row_length=0, query_length=60, document_length=70)
    made = batches_lib.Batches([some_source(size=400, longest=40)], tokenizer, c, num_shards=2)
    assert made.c.row_length >= 70  # a text as long as the cap may come
    assert len(made.sizes) <= 4
    assert made.sizes[-1] * made.c.rows >= 16 * 2 // 2 // (made.c.row_length // 70)
    for step in range(0, 200, 9):
        assert_holds_its_texts(made, step)
    again = batches_lib.Batches([some_source(size=400, longest=40)], tokenizer, c, num_shards=2)
    assert (again.c, again.sizes) == (made.c, made.sizes)
    other = batches_lib.Batches([some_source(size=400, longest=10)], tokenizer, c, num_shards=2)
    assert (other.c.rows, other.sizes) != (made.c.rows, made.sizes)
