"""Pruning: what stays, in which order, and that text made of kept pieces has the same pieces and the same vector."""

import dataclasses
import gzip
import io
import json
import pathlib

import jax
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from moe_embed import config, sharding
from moe_embed.config import UserError
from moe_embed.data import sources, vocabulary
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib

SAMPLE = pathlib.Path(tokenizer_lib.__file__).parent.parent / "sample"
PROMPTS = ("search_query: ", "search_document: ")
KEEP = 6_000
LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.read(SAMPLE / "tokenizer.model")


@pytest.fixture(scope="module")
def texts():
    """4,000 sections and their headings, in ten languages and no order."""
    pairs = sources.read_source(str(SAMPLE / "pairs" / "monolingual.jsonl.gz")).pairs[::7]
    texts = [text for pair in pairs for text in (pair.query, pair.document)]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


@pytest.fixture(scope="module")
def pruned(tokenizer, texts):
    """By half of the texts: the others show what the choice did not see."""
    return vocabulary.prune(tokenizer, vocabulary.count(tokenizer, texts[::2]), keep=KEEP, prompts=PROMPTS)


def pieces_of(tokenizer):
    return list(sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes).pieces)


def by_hand(pieces: dict[str, float], **kinds) -> tokenizer_lib.Tokenizer:
    """A unigram model of exactly these pieces and scores."""
    proto = sentencepiece_model_pb2.ModelProto()
    kind = proto.SentencePiece
    for piece, number in (("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)):
        proto.pieces.add(piece=piece, score=0.0, type=number)
    for piece, score in pieces.items():
        proto.pieces.add(piece=piece, score=score, type=getattr(kind, kinds[piece]) if piece in kinds else kind.NORMAL)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.normalizer_spec.name = "identity"
    return tokenizer_lib.Tokenizer(proto.SerializeToString(), origin="a test")


def cuts(tokenizer, text: str) -> list[str]:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).encode(text, out_type=str)


def test_counts_by_hand(tokenizer):
    ids = [tokenizer.encode([text], max_length=LONG)[0][0] for text in ("Tabelle", "Tabelle einfügen")]
    count_V = vocabulary.count(tokenizer, iter(["Tabelle", "Tabelle einfügen"]))
    assert count_V.dtype == np.int64
    assert count_V.tolist() == np.bincount(np.concatenate(ids), minlength=tokenizer.num_ids).tolist()
    assert count_V[0] == count_V[2] == 2
    assert vocabulary.count(tokenizer, []).sum() == 0


def test_a_chunk_is_no_border(tokenizer, texts, monkeypatch):
    whole = vocabulary.count(tokenizer, texts[:50])
    monkeypatch.setattr(vocabulary, "CHUNK", 7)
    np.testing.assert_array_equal(vocabulary.count(tokenizer, texts[:50]), whole)


def is_unchanged(ids, old_V: np.ndarray) -> np.ndarray:
    """Whether a text with these ids of the whole vocabulary keeps all its pieces, bool [N]."""
    return np.array([bool(np.isin(one, old_V).all()) for one in ids])


def test_text_of_kept_pieces_has_the_same_pieces(tokenizer, pruned, texts):
    full, small = (t.encode(texts, max_length=LONG)[0] for t in (tokenizer, pruned.tokenizer))
    unchanged = is_unchanged(full, pruned.old_V)
    assert 0.2 < unchanged.mean() < 0.9  # enough on both sides to say something
    assert unchanged[1::2].sum() > 500  # of texts that were not counted
    for same, before, after in zip(unchanged, full, small, strict=True):
        assert (len(before) == len(after) and (pruned.old_V[after] == before).all()) == same


def test_text_made_by_gluing_kept_pieces(tokenizer, pruned):
    rng = np.random.default_rng(0)
    pieces = [piece.piece for piece in pieces_of(pruned.tokenizer)[3:]]
    glued = ["".join(rng.choice(pieces, rng.integers(1, 12))).replace("▁", " ") + "." for _ in range(3_000)]
    full, small = (t.encode(glued, max_length=LONG)[0] for t in (tokenizer, pruned.tokenizer))
    unchanged = is_unchanged(full, pruned.old_V)
    assert unchanged.sum() > 200
    for i in np.flatnonzero(unchanged):
        assert pruned.old_V[small[i]].tolist() == full[i].tolist()


def test_vectors_are_the_same_bit_for_bit(tokenizer, pruned, texts):
    c = config.Encoder(vocab_size=16_064, num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_seq_length=64)
    params = encoder_lib.init(c, config.Moe(num_experts=0), key=jax.random.key(0))
    mesh = sharding.make_mesh(config.Mesh(data=1), devices=jax.devices()[:1])
    before = Model(c, config.Moe(num_experts=0), params, tokenizer, {}, mesh, "a test")
    word_VD = vocabulary.cut_rows(params["embedding"]["word_VD"], pruned.old_V)
    after = dataclasses.replace(
        before,
        encoder=dataclasses.replace(c, vocab_size=len(word_VD)),
        params=params | {"embedding": params["embedding"] | {"word_VD": word_VD}},
        tokenizer=pruned.tokenizer,
    )
    unchanged = is_unchanged(tokenizer.encode(texts[:400], max_length=LONG)[0], pruned.old_V)
    same = [text for text, is_same in zip(texts, unchanged, strict=False) if is_same]
    assert len(same) > 50
    np.testing.assert_array_equal(before.encode(same), after.encode(same))
    other = [text for text, is_same in zip(texts, unchanged, strict=False) if not is_same]
    assert np.abs(before.encode(other) - after.encode(other)).max() > 1e-3


def test_places_scores_and_ids(tokenizer, pruned):
    old, new = pieces_of(tokenizer), pieces_of(pruned.tokenizer)
    assert len(new) == KEEP
    assert pruned.tokenizer.num_ids == KEEP + 2 == len(pruned.old_V)
    assert [piece.piece for piece in new[:3]] == ["<unk>", "<s>", "</s>"]
    assert pruned.old_V[:4].tolist() == [0, 1, 2, 3]
    assert pruned.old_V[-1] == tokenizer.mask_id
    assert (np.diff(pruned.old_V) > 0).all()
    for i, piece in enumerate(new[3:], start=3):
        before = old[pruned.old_V[i + 1] - 1]
        assert (piece.piece, piece.score, piece.type) == (before.piece, before.score, before.type)
    kept = {piece.piece for piece in new}
    assert {piece.piece for piece in old if piece.type == piece.USER_DEFINED} <= kept


def test_what_has_to_stay_stays(tokenizer, pruned, texts):
    kept = {piece.piece for piece in pieces_of(pruned.tokenizer)}
    counted = vocabulary.count(tokenizer, texts[::2])
    old = pieces_of(tokenizer)
    characters = {letter for i, piece in enumerate(old) if i > 2 and counted[i + 1] for letter in piece.piece}
    assert {piece.piece for piece in old[3:] if len(piece.piece) == 1 and piece.piece in characters} <= kept
    normal = [piece for piece in old if piece.type == piece.NORMAL]
    assert min(normal, key=lambda piece: piece.score).piece in kept
    assert max(normal, key=lambda piece: piece.score).piece in kept
    unknown = [(t.encode(texts[::2], max_length=LONG)[0]) for t in (tokenizer, pruned.tokenizer)]
    before, after = (sum(int((ids == tokenizer_lib.UNK).sum()) for ids in one) for one in unknown)
    assert before == after  # no character that was counted became unknown


def test_the_most_frequent_pieces_then_the_likeliest():
    tokenizer = by_hand({"▁a": -1.0, "b": -2.0, "▁ab": -3.0, "▁abb": -4.0, "▁ccc": -5.0, "▁ddd": -6.0, "zz": -9.0})
    count_V = np.zeros(tokenizer.num_ids, np.int64)
    names = [piece.piece for piece in pieces_of(tokenizer)]
    for piece, number in (("▁ab", 2), ("▁abb", 5)):
        count_V[names.index(piece) + 1] = number
    found = []
    for keep in (7, 8, 9):
        kept = {piece.piece for piece in pieces_of(vocabulary.prune(tokenizer, count_V, keep=keep).tokenizer)}
        found.append(kept - {"<unk>", "<s>", "</s>"})
    # Always "▁a" (the highest), "zz" (the lowest) and the counted character "b"; then by count, then by score.
    assert found == [
        {"▁a", "zz", "b", "▁abb"},
        {"▁a", "zz", "b", "▁abb", "▁ab"},
        {"▁a", "zz", "b", "▁abb", "▁ab", "▁ccc"},
    ]


def test_the_pieces_of_the_prompts_stay():
    tokenizer = by_hand({"▁q": -1.0, "u": -2.0, "▁que": -3.0, "ry": -4.0, ":": -5.0, "▁x": -5.5, "zz": -9.0})
    count_V = vocabulary.count(tokenizer, ["x x x x"])
    with_prompt, without = (
        {piece.piece for piece in pieces_of(vocabulary.prune(tokenizer, count_V, keep=8, prompts=p).tokenizer)}
        for p in (["query: "], [])
    )
    assert {"▁que", "ry", ":"} <= with_prompt
    assert not {"▁que", "ry", ":"} <= without


def test_coverage_by_hand():
    tokenizer = by_hand({"▁a": -1.0, "▁b": -2.0, "▁c": -3.0, "▁d": -4.0, "▁e": -5.0})
    pruned = vocabulary.prune(tokenizer, vocabulary.count(tokenizer, ["a a a b b c c c c d"]), keep=6)
    assert [piece.piece for piece in pieces_of(pruned.tokenizer)[3:]] == ["▁a", "▁c", "▁e"]
    assert pruned.coverage == 0.7  # 3 a and 4 c of 10


def test_the_lowest_piece_is_what_makes_it_exact():
    """Without it an unknown character costs less than before, and a cut with one wins."""
    pieces = {"▁a": -1.0, "bcd": -1.0, "▁awb": -75.0, "cd": -75.0, "lowest": -200.0, "▁other": -3.0}
    tokenizer = by_hand(pieces)
    assert cuts(tokenizer, "awbcd") == ["▁awb", "cd"]
    pruned = vocabulary.prune(tokenizer, vocabulary.count(tokenizer, ["awbcd"] * 3), keep=8)
    assert cuts(pruned.tokenizer, "awbcd") == ["▁awb", "cd"]
    del pieces["lowest"]
    assert cuts(by_hand(pieces), "awbcd") == ["▁a", "w", "bcd"]  # w is unknown


def test_the_highest_piece_is_what_user_defined_ones_score_by():
    pieces = {"▁x": -0.5, "▁": -4.0, "user": 0.0, "▁us": -2.0, "er": -2.0, "lowest": -9.0}
    tokenizer = by_hand(pieces, user="USER_DEFINED")
    pruned = vocabulary.prune(tokenizer, np.zeros(tokenizer.num_ids, np.int64), keep=6)
    assert {"▁x", "user", "lowest"} <= {piece.piece for piece in pieces_of(pruned.tokenizer)}


def test_cut_rows():
    array = np.arange(30, dtype=np.float32).reshape(10, 3)
    rows = vocabulary.cut_rows(array, np.array([0, 1, 2, 3, 7, 9]))
    assert rows.shape == (64, 3)
    assert rows[:6].tolist() == array[[0, 1, 2, 3, 7, 9]].tolist()
    assert not rows[6:].any()
    assert vocabulary.cut_rows(array[:, 0], np.arange(10)).shape == (64,)
    assert vocabulary.cut_rows(np.zeros((200, 2)), np.arange(128)).shape == (128, 2)


def test_refusals(tokenizer):
    count_V = vocabulary.count(tokenizer, ["Tabelle"])
    with pytest.raises(UserError, match=r"keep=16000 keeps everything: .* 16000 pieces"):
        vocabulary.prune(tokenizer, count_V, keep=16_000)
    with pytest.raises(UserError, match=r"keep=9 is too few: \d+ pieces have to stay"):
        vocabulary.prune(tokenizer, count_V, keep=9)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Insert a table", "Change the margins"] * 9), model_writer=model, vocab_size=40,
        hard_vocab_limit=False, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    bpe = tokenizer_lib.Tokenizer(model.getvalue(), origin="bpe")
    with pytest.raises(UserError, match="no unigram model"):
        vocabulary.prune(bpe, np.zeros(bpe.num_ids, np.int64), keep=10)


def test_texts_of_both_kinds_of_files(tmp_path):
    rows = [{"text": "eins"}, {"text": "zwei", "query": "no"}]
    pairs = [{"query": "a", "document": "b", "negatives": ["c"]}, {"query": "d", "pos": ["e", "f"], "neg": []}]
    plain, packed = tmp_path / "t.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in pairs).encode()))
    assert list(vocabulary.read_texts(str(plain))) == ["eins", "zwei"]
    assert list(vocabulary.read_texts(str(packed))) == ["a", "b", "c", "d", "e", "d", "f"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ('{"text": "a"}\n{"text": ""}\n', r"t\.jsonl:2"),
        ('{"title": "a"}\n', r"t\.jsonl:1 has no column 'query'; it has 'title'"),
        ("no json\n", r"t\.jsonl:1 is not JSON"),
    ],
)
def test_files_at_fault(tmp_path, content, words):
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content, "utf-8")
    with pytest.raises(UserError, match=words):
        list(vocabulary.read_texts(str(tmp_path / "t.jsonl")))
