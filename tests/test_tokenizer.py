"""Ids by hand: the SentencePiece model's, shifted to XLM-R's, between <s> and </s>."""

import io
import pathlib

import numpy as np
import pytest
import sentencepiece

from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib

MODEL = pathlib.Path(tokenizer_lib.__file__).parent.parent / "sample" / "tokenizer.model"
TEXTS = ["Insert a table", "Wie ändere ich die Seitenränder?", "表を挿入する", "a 𐍈 b", "Как изменить поля страницы?"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.read(MODEL)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def train(**options) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model, **settings)
    return model.getvalue()


def by_hand(pieces, text: str) -> list[int]:
    return [0] + [3 if i == 0 else i + 1 for i in pieces.encode(text)] + [2]


def test_ids_by_hand(tokenizer, pieces):
    found, cut = tokenizer.encode(TEXTS, max_length=100)
    assert cut == 0
    for ids, text in zip(found, TEXTS, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == by_hand(pieces, text)
    assert found[0].tolist() != by_hand(pieces, TEXTS[0] + ".")
    assert 0 in pieces.encode("a 𐍈 b")  # the letter is unknown to the model, so this text shows <unk>
    assert tokenizer_lib.UNK in found[3].tolist()


def test_the_ends_of_the_id_range(tokenizer, pieces):
    assert (tokenizer_lib.BOS, tokenizer_lib.PAD, tokenizer_lib.EOS, tokenizer_lib.UNK) == (0, 1, 2, 3)
    assert pieces.id_to_piece([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert tokenizer.num_ids == pieces.get_piece_size() + 2  # <pad> before, <mask> after
    ids = np.concatenate(tokenizer.encode(TEXTS, max_length=100)[0])
    assert not (ids == tokenizer_lib.PAD).any()
    assert ids.max() < tokenizer.num_ids - 1


def test_a_cap_keeps_the_first_pieces_and_both_ends_and_is_counted(tokenizer):
    whole, _ = tokenizer.encode(TEXTS, max_length=100)
    cap = len(whole[0])  # the first text fits exactly
    found, cut = tokenizer.encode(TEXTS, max_length=cap)
    assert cut == sum(len(ids) > cap for ids in whole) > 0
    assert found[0].tolist() == whole[0].tolist()
    for ids, full in zip(found, whole, strict=True):
        assert ids.tolist() == (full.tolist() if len(full) <= cap else [*full[: cap - 1].tolist(), 2])
    assert tokenizer.encode(TEXTS[:1], max_length=cap - 1)[1] == 1
    assert [len(ids) for ids in tokenizer.encode(TEXTS, max_length=3)[0]] == [3] * len(TEXTS)


@pytest.mark.parametrize("prompt", ["search_query: ", "search_document: "])
def test_a_prompt_is_one_piece(tokenizer, pieces, prompt):
    piece = "▁" + prompt.strip()
    assert pieces.encode(prompt + TEXTS[1], out_type=str)[0] == piece
    with_prompt, without = (tokenizer.encode([TEXTS[1]], prompt=p, max_length=100)[0][0] for p in (prompt, ""))
    assert with_prompt.tolist() == [0, pieces.piece_to_id(piece) + 1, *without[1:].tolist()]
    assert piece != "▁" + pieces.encode("some_prompt: ", out_type=str)[0]


def test_no_text_is_no_ids(tokenizer):
    assert tokenizer.encode([], max_length=8) == ([], 0)


def test_the_bytes_make_the_same_tokenizer(tokenizer):
    again = tokenizer_lib.Tokenizer(tokenizer.model_bytes, origin="a copy")
    for a, b in zip(again.encode(TEXTS, max_length=9)[0], tokenizer.encode(TEXTS, max_length=9)[0], strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("content", [b"no model", b'{"query": "a"}\n', MODEL.read_bytes()[:5000]])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "t.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.model is not a SentencePiece model"):
        tokenizer_lib.read(path)


def test_an_empty_file(tmp_path):
    (tmp_path / "t.model").touch()
    with pytest.raises(UserError, match=r"t\.model"):
        tokenizer_lib.read(tmp_path / "t.model")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.model does not exist; data\.tokenizer"):
        tokenizer_lib.read(tmp_path / "none.model")
    with pytest.raises(UserError, match="does not exist"):
        tokenizer_lib.read(tmp_path)


def test_wrong_special_ids(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(pad_id=0, unk_id=1, bos_id=2, eos_id=3))
    with pytest.raises(UserError, match=r"t\.model has .*\(1, 2, 3\).* needs 0, 1, 2"):
        tokenizer_lib.read(path)
    path.write_bytes(train())
    assert tokenizer_lib.read(path).encode(["Insert"], max_length=3)[0][0].tolist()[::2] == [0, 2]
