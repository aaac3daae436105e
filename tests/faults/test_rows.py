"""Faults 19, 20 and 21: shards that are damaged, rows that are no texts, pairs that contradict themselves."""

import dataclasses
import gzip
import json
import os

import numpy as np
import pytest

import moe_embed
from moe_embed import config as config_lib
from moe_embed import infonce, prepare
from moe_embed.config import UserError
from moe_embed.data import batches, prepared, sources
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.pairs import Pair
from tests import tiny
from tests.faults import runs
from tests.hf_tiny import DENSE, NOMIC, word_pieces, write_folder

pytestmark = pytest.mark.faults
MODEL = (runs.ROOT / "moe_embed/sample/tokenizer.model").read_bytes()
LONG = ("ab " * 350_000, "a" * 2**20)
KEPT = ("</s> what", "<s>[SEP]</s><mask>[MASK][CLS]<pad>[PAD]", "what \u202e is it", "a\0b", "\u200bx\ufeff", *LONG)
NO_TEXT = (None, 7, 0.5, float("nan"), True, ["what"], {"what": 1}, [])
NOTHING = ("", "   ", "\t\n", "\0", "\u200b\u200d\ufeff", "\u202e", "\u00a0\u3000", "\ud800", "a \udfff")


def rows(path):
    """Every hostile value as a query and as a document, and one line that is no UTF-8; the number of bad ones."""
    lines = []
    for value in (*KEPT, *NO_TEXT, *NOTHING):
        lines += [{"query": value, "document": "what is it"}, {"query": "the page", "document": value}]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path.write_bytes(data + b'{"query": "\xff\xfe", "document": "d"}\n')
    return str(path), 2 * len(NO_TEXT + NOTHING) + 1


def test_hostile_rows_are_counted_and_the_rest_is_kept(tmp_path, capsys):
    path, bad = rows(tmp_path / "a.jsonl")
    source = sources.read_source(path, max_bad_fraction=0.9)
    assert [pair.query for pair in source.pairs[::2]] == list(KEPT)
    assert [pair.document for pair in source.pairs[1::2]] == list(KEPT)
    assert f"{bad} of {bad + 2 * len(KEPT)} rows were left out" in source.left_out
    for reason, count in (("no text", 2 * len(NO_TEXT)), ("empty text", 2 * len(NOTHING)), ("not UTF-8", 1)):
        assert f"{reason}: {count}" in source.left_out
    with pytest.raises(UserError, match=rf"a\.jsonl:{2 * len(KEPT) + 1} has 'query': None"):
        sources.read_source(path)
    prepare.main([f"--input={path}", f"--output={tmp_path / 'out'}", "--processes=1", "--max_bad_fraction=0.9"])
    card = prepared.read_manifest(tmp_path / "out")["card"]["inputs"][0]
    assert card["left_out"] == {
        "no text": 2 * len(NO_TEXT),
        "empty text": 2 * len(NOTHING),
        "not UTF-8": 1,
        "too long": 4,
    }
    found = {
        text for one in sources.read_sources(str(tmp_path / "out")) for p in one.pairs for text in (p.query, p.document)
    }
    assert found == {*KEPT, "what is it", "the page"} - set(LONG)
    assert "no text" in capsys.readouterr().out


@pytest.fixture(scope="module", params=["SentencePiece", "WordPiece"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "f"
    if request.param == "WordPiece":
        write_folder(folder, NOMIC, DENSE, tokenizer=word_pieces())
    else:
        write_folder(folder, dataclasses.replace(NOMIC, vocab_size=16_064), DENSE)
        (folder / "tokenizer.json").unlink()
        (folder / "sentencepiece.bpe.model").write_bytes(MODEL)
    return moe_embed.load(folder)


def test_every_text_that_is_kept_has_a_vector(model):
    vectors_ND = model.encode(list(KEPT))
    assert np.isfinite(vectors_ND).all()
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-5)
    for value in (*NO_TEXT, *NOTHING):
        with pytest.raises(UserError, match="text 1 is empty or no text"):
            model.encode(["what", value])


def test_no_text_becomes_a_special_id_but_unknown(model):
    ids, _ = model.tokenizer.encode(list(KEPT), max_length=50)
    special = set(model.tokenizer.special_ids.tolist())
    unknown = tokenizer_lib.UNK if isinstance(model.tokenizer, tokenizer_lib.Tokenizer) else 1
    for some in ids:
        assert len(some) > 2
        assert not (special - {unknown}) & set(some[1:-1].tolist())
        assert {int(some[0]), int(some[-1])} < special


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared data set of 200 pairs in two shards, and the file of its pairs."""
    root = tmp_path_factory.mktemp("data")
    lines = [{"query": f"what is {i}", "document": f"it is {i}"} for i in range(200)]
    (root / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.main([f"--input={root / 'a.jsonl'}", f"--output={root / 'out'}", "--processes=1", "--shard_size=100"])
    return root


def test_training_on_damaged_data_ends_in_a_sentence(data, tmp_path):
    whole = (data / "a.jsonl").read_bytes()
    damages = {
        "cut.jsonl.gz": gzip.compress(whole)[:-300],
        "flipped.jsonl.gz": (packed := gzip.compress(whole))[:300] + bytes([packed[300] ^ 4]) + packed[301:],
        "empty.jsonl": b"",
        "empty.jsonl.gz": b"",
        "columns.jsonl": whole.replace(b'"document"', b'"documnet"'),
        "no.parquet": whole,
    }
    for name, content in damages.items():
        (tmp_path / name).write_bytes(content)
    shard = prepared.shard_name(1, 2)
    good = (data / "out" / shard).read_bytes()
    shards = {
        "cut": good[: len(good) // 2],
        "nothing": b"",
        "flipped": bytes(byte ^ 4 if i % 50 == 49 else byte for i, byte in enumerate(good)),
        "zeros": bytes(len(good)),
        "missing": None,
    }
    for name, content in shards.items():
        (tmp_path / name).mkdir()
        for file in (data / "out").iterdir():
            if file.name != shard or content is not None:
                (tmp_path / name / file.name).write_bytes(content if file.name == shard else file.read_bytes())
    names = [*damages, *shards, "absent.jsonl"]
    commands = [
        ["train", *runs.flags(tmp_path / name, "run.steps=20"), f"--workdir={tmp_path / f'w-{name}'}"] for name in names
    ]
    said = runs.all_refused(commands)
    for name in names:
        assert str(tmp_path / name) in said, name
    assert len(os.listdir(data / "out")) == len(os.listdir(tmp_path / "cut"))


def test_a_share_of_bad_rows_is_allowed_and_no_source_of_nothing(data, tmp_path):
    lines = (data / "a.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines[:96]) + b"{\n" * 4)
    assert len(sources.read_source(str(path), max_bad_fraction=0.04)) == 96
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.03 allows less"):
        sources.read_source(str(path), max_bad_fraction=0.03)
    path.write_bytes(b"{\n" * 4)
    with pytest.raises(UserError, match="4 of 4 rows were left out"):
        sources.read_source(str(path), max_bad_fraction=1.0)


def test_a_positive_among_its_own_negatives_and_a_copy_in_the_batch_count_as_absent(data):
    """As plain files are trained on: prepare leaves the first out, and counts it."""
    tokenizer = tokenizer_lib.read(runs.ROOT / "moe_embed/sample/tokenizer.model")
    pairs = [Pair(f"what is {i}", f"it is {i}", (f"no {i}",)) for i in range(8)]
    bad = [dataclasses.replace(pairs[0], negatives=("it is 0",)), dataclasses.replace(pairs[1], document="it is 2")]
    bad += [dataclasses.replace(pairs[3], negatives=("it is 4",)), *pairs[2:3], *pairs[4:]]
    c = tiny.config(data={"batch_size": 8, "num_negatives": 1}, encoder={"vocab_size": 16_064}, run={"steps": 1})
    found = batches.Batches([sources.Source("a", bad, 0)], tokenizer, c, num_shards=1).batch_at(0).arrays
    document_N, query_N = (np.asarray(found[f"{side}_id_N"]).reshape(-1) for side in ("document", "query"))
    rng = np.random.default_rng(0)
    query_ND, document_ND = (rng.normal(size=(count, 6)).astype(np.float32) for count in (8, 16))
    order = [[batches.document_id(pair.query) for pair in bad].index(i) for i in query_N.tolist()]
    masked = np.zeros((8, 16), bool)
    for i, n in enumerate(order):
        for j, m in enumerate(order):
            for k, text in enumerate((bad[m].document, *bad[m].negatives)):
                masked[i, 2 * j + k] = text == bad[n].document and (i, 0) != (j, k)
    assert masked.sum() == 4  # its own negative, a copy either way, and another's negative that is its answer
    cosine = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    score = cosine(query_ND) @ cosine(document_ND).T / 0.1
    by_hand = lambda s: np.mean(np.log(np.exp(s).sum(1)) - s[np.arange(8), 2 * np.arange(8)])  # noqa: E731
    terms = config_lib.Loss(temperature=0.1, balance_coefficient=0.0)
    loss, _ = infonce.infonce(query_ND, document_ND, infonce.Ids(document_N, query_N), c=terms)
    np.testing.assert_allclose(loss, by_hand(np.where(masked, -np.inf, score)), rtol=1e-5)
    assert abs(float(loss) - by_hand(score)) > 1e-3
