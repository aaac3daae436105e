"""Ids by hand: the SentencePiece model's, shifted to XLM-R's, between <s> and </s>; a WordPiece's, between [CLS] and [SEP]."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece
import tokenizers

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


WORDPIECES = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "insert",
    "a",
    "table",
    "##s",
    "##au",
    "tab",
    "[",
    "]",
    "sep",
    "!",
)


def wordpiece(*, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> tokenizers.Tokenizer:
    """A BERT tokenizer of the words above, lower-cased, as Hugging Face writes it: it cuts at 4 and pads to 9."""
    ids = {piece: i for i, piece in enumerate(WORDPIECES)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    made.add_special_tokens(list(special))
    made.enable_truncation(max_length=4)
    made.enable_padding(length=9)
    return made


@pytest.fixture
def json_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    wordpiece().save(str(path))
    return tokenizer_lib.read(path)


def test_wordpiece_ids_by_hand(json_tokenizer):
    assert isinstance(json_tokenizer, tokenizer_lib.JsonTokenizer)
    found, cut = json_tokenizer.encode(["Insert a Tables", "tableau qq", "tabs!"], max_length=100)
    assert [ids.tolist() for ids in found] == [[2, 5, 6, 7, 8, 3], [2, 7, 9, 1, 3], [2, 10, 8, 14, 3]]
    assert cut == 0  # the file's own cut at 4 and padding to 9 are not ours
    assert all(ids.dtype == np.int32 for ids in found)
    with_prompt = json_tokenizer.encode(["table"], prompt="insert a ", max_length=100)[0][0]
    assert with_prompt.tolist() == [2, 5, 6, 7, 3]
    assert json_tokenizer.encode([], max_length=8) == ([], 0)


def test_wordpiece_cap_and_facts(json_tokenizer):
    found, cut = json_tokenizer.encode(["Insert a Tables", "a"], max_length=4)
    assert ([ids.tolist() for ids in found], cut) == ([[2, 5, 6, 3], [2, 6, 3]], 1)
    assert json_tokenizer.num_ids == len(WORDPIECES)
    assert json_tokenizer.mask_id == 4
    assert json_tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]
    again = tokenizer_lib.JsonTokenizer(json_tokenizer.model_bytes, origin="a copy")
    assert again.encode(["tableau"], max_length=9)[0][0].tolist() == [2, 7, 9, 3]


def test_special_tokens_in_a_text_are_text(json_tokenizer):
    text = "a [SEP] table [MASK]!"
    found = json_tokenizer.encode([text], max_length=100)[0][0].tolist()
    assert found == [2, 6, 11, 13, 12, 7, 11, 1, 12, 14, 3]
    theirs = wordpiece()
    theirs.no_truncation()
    theirs.no_padding()
    assert theirs.encode(text).ids == [2, 6, 3, 7, 4, 14, 3]  # Hugging Face's default: the text ends itself
    theirs.encode_special_tokens = True  # their split_special_tokens
    assert theirs.encode(text).ids == found


def test_a_piece_behind_the_vocabulary_counts(tmp_path):
    made = wordpiece()
    made.add_tokens(["extra"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_lib.read(tmp_path / "tokenizer.json").num_ids == len(WORDPIECES) + 1


def test_a_json_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json that"):
        tokenizer_lib.read(path)
    made = json.loads(wordpiece().to_str())
    made["added_tokens"] = []
    for piece in ("[MASK]", "[CLS]"):
        del made["model"]["vocab"][piece]
    made["post_processor"] = None
    path.write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"tokenizer\.json has no \[CLS\], \[MASK\]: only BERT's"):
        tokenizer_lib.read(path)
