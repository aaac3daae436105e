"""The exported tokenizer: XLM-R's ids from a SentencePiece model, BERT's file as it is, and what cannot be said."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from moe_embed import config, export, tokenizer_json
from moe_embed.data import tokenizer as tokenizer_lib
from tests import hf_tiny


def small_tokenizer(**options) -> tokenizer_lib.Tokenizer:
    """A SentencePiece model with XLM-R's special ids, trained on the texts that export itself looks at."""
    model = io.BytesIO()
    settings = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(export.TEXTS), model_writer=model, **settings)
    return tokenizer_lib.Tokenizer(model.getvalue(), origin="a test")


def test_tokenizer_json_has_xlm_r_ids():
    tokenizer = small_tokenizer()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    found = tokenizer_json.translate(tokenizer.model_bytes)
    vocab = [piece for piece, _ in found["model"]["vocab"]]
    assert vocab[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert vocab[4:-1] == [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    assert vocab[-1] == "<mask>"
    assert len(vocab) == tokenizer.num_ids
    assert {token["content"]: token["id"] for token in found["added_tokens"]}["<mask>"] == len(vocab) - 1
    lowest = min(score for _, score in found["model"]["vocab"][4:-1])
    assert all(score < 6 * lowest for piece, score in found["model"]["vocab"] if piece in ("<s>", "</s>", "<mask>"))


@pytest.mark.parametrize(("options", "words"), [
    ({"model_type": "bpe"}, "no plain unigram"),
    ({"add_dummy_prefix": False}, "blanks"),
    ({"user_defined_symbols": ["search query:"]}, "special piece"),
    ({"user_defined_symbols": ["½"]}, "special piece"),
])  # fmt: skip
def test_a_tokenizer_that_the_format_cannot_say_is_refused(options, words):
    with pytest.raises(config.UserError, match=words):
        tokenizer_json.translate(small_tokenizer(**options).model_bytes)


def test_written_files_give_our_ids(tmp_path):
    texts = [*export.TEXTS, "what is it", "[CLS] [MASK] </s> What"]
    for tokenizer, pad in (
        (small_tokenizer(required_chars="</>[]"), 1),
        (tokenizer_lib.JsonTokenizer(hf_tiny.word_pieces(), origin="a test"), 0),
    ):
        folder = tmp_path / tokenizer.file_name
        folder.mkdir()
        tokenizer_json.write(tokenizer, folder, max_length=64)
        assert tokenizer_json.pad_id(tokenizer) == pad
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        written.encode_special_tokens = settings["split_special_tokens"]
        assert written.token_to_id(settings["pad_token"]) == pad
        wanted = tokenizer.encode(texts, max_length=512)[0]
        assert [written.encode(text).ids for text in texts] == [ids.tolist() for ids in wanted]
        assert written.encode("what is").ids != written.encode("is what").ids
        assert settings["model_max_length"] == 64
        assert settings.items() >= json.loads((folder / "special_tokens_map.json").read_text()).items()
        assert (folder / "sentencepiece.bpe.model").exists() == (pad == 1)


def test_a_json_without_a_post_processor_is_refused(tmp_path):
    bare = json.loads(hf_tiny.word_pieces()) | {"post_processor": None}
    tokenizer = tokenizer_lib.JsonTokenizer(json.dumps(bare).encode(), origin="a test")
    with pytest.raises(config.UserError, match="does not put"):
        tokenizer_json.write(tokenizer, tmp_path, max_length=64)
    longest = json.loads(hf_tiny.word_pieces())  # a length and padding in the file are the caller's to change
    longest |= {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}}
    tokenizer = tokenizer_lib.JsonTokenizer(json.dumps(longest).encode(), origin="a test")
    tokenizer_json.write(tokenizer, tmp_path, max_length=64)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.model_bytes
