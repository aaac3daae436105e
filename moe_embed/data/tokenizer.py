"""Text to ids: SentencePiece with XLM-R's ids, or any tokenizer in Hugging Face's JSON (BERT's WordPiece).

XLM-R keeps fairseq's ids (arXiv 1911.02116): <s>=0 <pad>=1 </s>=2 <unk>=3, piece i of the model is i + 1, <mask> is last;
the model file has <unk>=0 <s>=1 </s>=2 and real pieces from 3.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from moe_embed import bucket, stored
from moe_embed.config import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
THREADS = 2
MOST = 2**28  # bytes of a tokenizer's file: XLM-R's has 5 MB, as JSON 17


class Tokenizer:
    """`encode` texts to ids. `model_bytes` is the SentencePiece model, `num_ids` counts ids, <pad> and <mask> included."""

    file_name = "tokenizer.model"

    def __init__(self, model_bytes: bytes, *, origin: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{origin} is not a SentencePiece model.") from error
        # What comes behind the pieces: a file cut off between two of them loads without a word (6 of 100 cuts of XLM-R's).
        whole = sentencepiece_model_pb2.ModelProto.FromString(model_bytes).HasField("normalizer_spec")
        if not self._model.get_piece_size() or not whole:
            raise UserError(f"{origin} is not a SentencePiece model.")
        special = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if special != (0, 1, 2):
            raise UserError(f"{origin} has <unk>, <s>, </s> = {special}; XLM-R's layout needs 0, 1, 2: train it so.")
        self.model_bytes = model_bytes
        self.num_ids = self._model.get_piece_size() + 2
        self.mask_id = self.num_ids - 1
        self.special_ids = np.array([BOS, PAD, EOS, UNK, self.mask_id])

    def encode(self, texts: Sequence[str], *, prompt: str = "", max_length: int) -> tuple[list[np.ndarray], int]:
        """Ids of `prompt + text` between <s> and </s>, int32, at most `max_length` of them.

        Returns:
          One array a text, and how many texts were cut.
        """
        pieces = self._model.encode([prompt + text for text in texts], num_threads=THREADS)
        cut = sum(len(ids) > max_length - 2 for ids in pieces)
        return [self._with_ends(ids[: max_length - 2]) for ids in pieces], cut

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [N]: how many ids each text has, <s> and </s> among them."""
        return np.array([len(ids) + 2 for ids in self._model.encode(list(texts), num_threads=1)], np.int64)

    def _with_ends(self, pieces: list[int]) -> np.ndarray:
        body = np.asarray(pieces, np.int32)
        return _between(BOS, np.where(body == 0, UNK, body + 1), EOS)


class JsonTokenizer:
    """The same for a tokenizer.json with [CLS], [SEP], [PAD], [UNK] and [MASK]; special tokens in a text are text."""

    file_name = "tokenizer.json"

    def __init__(self, model_bytes: bytes, *, origin: str):
        try:
            self._model = tokenizers.Tokenizer.from_buffer(model_bytes)
        except BaseException as error:  # the package raises nothing narrower, and Rust's panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{origin} is not a tokenizer.json that the tokenizers package reads: {error}.") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        names = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
        ids = {name: self._model.token_to_id(name) for name in names}
        missing = [name for name, i in ids.items() if i is None]
        if missing:
            raise UserError(
                f"{origin} has no {', '.join(missing)}: only BERT's special tokens are known in this format."
            )
        self._first, self._last = ids["[CLS]"], ids["[SEP]"]
        self.model_bytes = model_bytes
        self.num_ids = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.mask_id = ids["[MASK]"]
        self.special_ids = np.array(sorted(ids.values()))

    def encode(self, texts: Sequence[str], *, prompt: str = "", max_length: int) -> tuple[list[np.ndarray], int]:
        """As Tokenizer.encode, between [CLS] and [SEP]."""
        found = self._model.encode_batch([prompt + text for text in texts], add_special_tokens=False)
        cut = sum(len(one.ids) > max_length - 2 for one in found)
        return [_between(self._first, one.ids[: max_length - 2], self._last) for one in found], cut

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """As Tokenizer.count."""
        found = self._model.encode_batch(list(texts), add_special_tokens=False)
        return np.array([len(one.ids) + 2 for one in found], np.int64)


def _between(first: int, body: Sequence[int], last: int) -> np.ndarray:
    ids = np.empty(len(body) + 2, np.int32)
    ids[0], ids[1:-1], ids[-1] = first, body, last
    return ids


def read(path: str | pathlib.Path) -> Tokenizer | JsonTokenizer:
    """The tokenizer in a SentencePiece file or a tokenizer.json; UserError if there is none."""
    path = bucket.path_of(path)
    if not path.is_file():
        raise UserError(
            "no tokenizer is named: give the model to begin with, --init_from=MODEL, or --config.data.tokenizer=FILE."
            if path == pathlib.Path("")
            else f"the tokenizer {path} does not exist; data.tokenizer names a SentencePiece model or tokenizer.json."
        )
    kind = JsonTokenizer if path.suffix == ".json" else Tokenizer
    try:
        model_bytes = stored.read_bytes(path, most=MOST)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error}.") from error
    return kind(model_bytes, origin=str(path))
