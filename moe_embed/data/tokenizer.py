"""SentencePiece with XLM-R's ids: <s>=0 <pad>=1 </s>=2 <unk>=3, piece i of the model is i + 1, <mask> is last.

(XLM-R keeps fairseq's ids; arXiv 1911.02116. The model file has <unk>=0 <s>=1 </s>=2 and real pieces from 3.)
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import sentencepiece

from moe_embed.config import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
THREADS = 2


class Tokenizer:
    """`encode` texts to ids. `model_bytes` is the SentencePiece model, `num_ids` counts ids, <pad> and <mask> included."""

    def __init__(self, model_bytes: bytes, *, origin: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{origin} is not a SentencePiece model.") from error
        if not self._model.get_piece_size():
            raise UserError(f"{origin} is not a SentencePiece model.")
        special = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if special != (0, 1, 2):
            raise UserError(f"{origin} has <unk>, <s>, </s> = {special}; XLM-R's layout needs 0, 1, 2: train it so.")
        self.model_bytes = model_bytes
        self.num_ids = self._model.get_piece_size() + 2

    def encode(self, texts: Sequence[str], *, prompt: str = "", max_length: int) -> tuple[list[np.ndarray], int]:
        """Ids of `prompt + text` between <s> and </s>, int32, at most `max_length` of them.

        Returns:
          One array a text, and how many texts were cut.
        """
        pieces = self._model.encode([prompt + text for text in texts], num_threads=THREADS)
        cut = sum(len(ids) > max_length - 2 for ids in pieces)
        return [self._with_ends(ids[: max_length - 2]) for ids in pieces], cut

    def _with_ends(self, pieces: list[int]) -> np.ndarray:
        ids = np.empty(len(pieces) + 2, np.int32)
        ids[0], ids[-1] = BOS, EOS
        body = np.asarray(pieces, np.int32)
        ids[1:-1] = np.where(body == 0, UNK, body + 1)
        return ids


def read(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer in a SentencePiece file; UserError if there is none."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"the tokenizer {path} does not exist; data.tokenizer names a SentencePiece model file.")
    return Tokenizer(path.read_bytes(), origin=str(path))
