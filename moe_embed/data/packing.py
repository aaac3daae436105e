"""Texts of many lengths to rows of one: where each goes, and the rows themselves."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_embed.data.tokenizer import PAD


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where each text of one device went, and how many rows that took."""

    row_N: np.ndarray  # int32
    segment_N: np.ndarray  # int32, from 0
    start_N: np.ndarray  # int32, the first token's place in the row
    num_rows: int


def pack(lengths: Sequence[int], *, row_length: int, texts_per_row: int) -> Packed:
    """Best-fit decreasing: the longest text first, each into the fullest row that still holds it. Deterministic.

    A text of length 0 takes no place; it is said to be in row 0, segment 0.
    """
    lengths = np.asarray(lengths, np.int32)
    row_N, segment_N, start_N = (np.zeros(len(lengths), np.int32) for _ in range(3))
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the space they have left
    has_open = 0  # bit s: some open row has the space s
    used, texts = [], []
    for n in np.argsort(-lengths, kind="stable"):
        length = int(lengths[n])
        if not length:
            break
        fitting = has_open >> length << length  # the bits of spaces that are large enough
        space = (fitting & -fitting).bit_length() - 1
        if space < 0:
            row = len(used)
            used.append(0)
            texts.append(0)
        else:
            row = open_rows[space].pop()
            has_open &= ~(0 if open_rows[space] else 1 << space)
        row_N[n], segment_N[n], start_N[n] = row, texts[row], used[row]
        used[row] += length
        texts[row] += 1
        if texts[row] < texts_per_row and used[row] < row_length:
            open_rows[row_length - used[row]].append(row)
            has_open |= 1 << row_length - used[row]
    return Packed(row_N, segment_N, start_N, len(used))


def fill_rows(ids: Sequence[np.ndarray], packed: Packed, *, num_rows: int, row_length: int) -> dict[str, np.ndarray]:
    """Packed texts -> tokens_BL, segments_BL, positions_BL, int32, `num_rows` of them."""
    tokens_BL = np.full((num_rows, row_length), PAD, np.int32)
    segments_BL, positions_BL = np.zeros_like(tokens_BL), np.zeros_like(tokens_BL)
    for text, row, segment, start in zip(ids, packed.row_N, packed.segment_N, packed.start_N, strict=True):
        place = row, slice(start, start + len(text))
        tokens_BL[place], segments_BL[place], positions_BL[place] = text, segment + 1, np.arange(len(text))
    return {"tokens_BL": tokens_BL, "segments_BL": segments_BL, "positions_BL": positions_BL}
