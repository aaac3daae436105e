"""The tokenizer of an export: SentencePiece translated into the tokenizers library's JSON, or the JSON a model came with.

`translate` is XLM-R's own file rebuilt from its SentencePiece model, and what `write` puts beside it is what transformers'
PreTrainedTokenizerFast reads. Special tokens typed by a user are text, here as there.
"""

import base64
import json
import pathlib
import unicodedata

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib

BLANK = "\u2581"  # how SentencePiece writes a blank inside pieces
XLM_R = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
         "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def write(
    tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer, folder: pathlib.Path, *, max_length: int
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json, and the SentencePiece model where there is one.

    UserError if the library would give other ids than `tokenizer` does.
    """
    if isinstance(tokenizer, tokenizer_lib.JsonTokenizer):
        special, as_bytes = BERT, tokenizer.model_bytes
        check_ends(tokenizer)
    else:
        special, found = XLM_R, translate(tokenizer.model_bytes)
        num_ids = len(found["model"]["vocab"])
        if num_ids != tokenizer.num_ids:
            raise UserError(f"tokenizer.json would have {num_ids} ids; the tokenizer has {tokenizer.num_ids}.")
        as_bytes = (json.dumps(found, ensure_ascii=False) + "\n").encode("utf-8")
        (folder / "sentencepiece.bpe.model").write_bytes(tokenizer.model_bytes)
    settings = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" typed by a user is text, as in SentencePiece
    }
    (folder / "tokenizer.json").write_bytes(as_bytes)
    for name, value in (("special_tokens_map.json", special), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pad_id(tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer) -> int:
    """The id that fills a row of a padded batch."""
    if isinstance(tokenizer, tokenizer_lib.JsonTokenizer):
        return tokenizers.Tokenizer.from_buffer(tokenizer.model_bytes).token_to_id(BERT["pad_token"])
    return tokenizer_lib.PAD


def translate(model_bytes: bytes) -> dict:
    """A SentencePiece unigram model as the tokenizers library's JSON, with XLM-R's ids.

    Piece i >= 3 becomes id i + 1 behind <s>, <pad>, </s>, <unk>; <mask> is last. Over 30,000 real texts and XLM-R's own
    model the ids equal SentencePiece's but for 34 texts, in which two cuts score the same. One case more is known, in a
    pruned model that keeps a piece and not the pieces of its letters: how a word with an unknown letter is cut.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    trainer, normalizer, piece_type = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.model_type != trainer.UNIGRAM or trainer.treat_whitespace_as_suffix:
        raise UserError("the tokenizer is no plain unigram model; tokenizer.json cannot say what it does.")
    if not (normalizer.add_dummy_prefix and normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces):
        raise UserError("the tokenizer does not treat blanks as XLM-R does; train it with SentencePiece's defaults.")
    for piece in proto.pieces[3:]:
        # A user-defined piece (a prompt) scores 0.0, the best there is, and so is always taken, here as there; but not
        # if Metaspace cuts it at an inner blank or if normalisation, which SentencePiece keeps off it, would change it.
        fixed = not {" ", BLANK} & set(piece.piece[1:]) and unicodedata.normalize("NFKC", piece.piece) == piece.piece
        if piece.type != piece_type.NORMAL and not (piece.type == piece_type.USER_DEFINED and fixed):
            raise UserError(f"the tokenizer has the special piece {piece.piece!r}; tokenizer.json cannot express it.")
    # XLM-R's own file scores these 0.0, the best there is, so that "</s>" typed by a user ends the text. No cut of six
    # characters into pieces scores as low as this, so (where "<", "/" and ">" are pieces) they are cut like other text.
    never = 8 * min(piece.score for piece in proto.pieces)
    vocab = [[special, never] for special in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [[piece.piece, piece.score] for piece in proto.pieces[3:]]
    vocab.append(["<mask>", never])
    steps: list[dict] = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if "nfkc" in normalizer.name:  # Precompiled does not join marks in graphemes of 6 bytes or more (half-width kana)
        steps.append({"type": "NFC"})
    steps += [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    metaspace = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "always", "split": True}
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(vocab) - 1}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": token == "<mask>", "rstrip": False,
         "normalized": False, "special": True}
        for token, i in ids.items()
    ]  # fmt: skip
    bos, eos = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first, eos],
            "pair": [bos, first, eos, eos, second, eos],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("<s>", "</s>")},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
    }


def check_ends(tokenizer: tokenizer_lib.JsonTokenizer) -> None:
    """UserError unless the file itself puts [CLS] and [SEP] around a text: transformers does what its post_processor says."""
    theirs = tokenizers.Tokenizer.from_buffer(tokenizer.model_bytes)
    theirs.no_truncation()
    theirs.no_padding()
    (ours,), _ = tokenizer.encode(["a"], max_length=512)
    if theirs.encode("a").ids != ours.tolist():
        raise UserError(
            "the model's tokenizer.json does not put [CLS] and [SEP] around a text by itself; give it BERT's post_processor."
        )
