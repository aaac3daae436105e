"""Where texts go in rows: nothing overlaps, nothing is lost, few rows."""

import numpy as np
import pytest

from moe_embed.data import packing
from moe_embed.data.tokenizer import PAD


@pytest.mark.parametrize(("row_length", "texts_per_row", "longest"), [(64, 16, 64), (50, 3, 20), (512, 16, 256)])
def test_pack_against_a_naive_check(row_length, texts_per_row, longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 300)
    packed = packing.pack(lengths, row_length=row_length, texts_per_row=texts_per_row)
    taken = np.zeros((packed.num_rows, row_length), int)
    for length, row, start in zip(lengths, packed.row_N, packed.start_N, strict=True):
        assert start + length <= row_length
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    for row in range(packed.num_rows):
        segments = sorted(packed.segment_N[packed.row_N == row].tolist())
        assert segments == list(range(len(segments)))
        assert 1 <= len(segments) <= texts_per_row
    assert packed.num_rows >= -(-lengths.sum() // row_length)
    again = packing.pack(lengths.tolist(), row_length=row_length, texts_per_row=texts_per_row)
    assert (packed.row_N.tolist(), packed.start_N.tolist()) == (again.row_N.tolist(), again.start_N.tolist())
    other = packing.pack(lengths[::-1], row_length=row_length, texts_per_row=texts_per_row)
    assert not np.array_equal(packed.row_N, other.row_N)


def test_pack_and_fill_rows_by_hand():
    packed = packing.pack([2, 5, 3, 6], row_length=8, texts_per_row=2)  # 6 + 2, 5 + 3
    assert packed.num_rows == 2
    assert packed.row_N.tolist() == [0, 1, 1, 0]
    assert packed.start_N.tolist() == [6, 0, 5, 0]
    assert packed.segment_N.tolist() == [1, 0, 1, 0]
    ids = [np.arange(n) + 10 * (i + 1) for i, n in enumerate([2, 5, 3, 6])]
    rows = packing.fill_rows(ids, packed, num_rows=3, row_length=8)
    pad = [PAD] * 8
    assert rows["tokens_BL"].tolist() == [[40, 41, 42, 43, 44, 45, 10, 11], [20, 21, 22, 23, 24, 30, 31, 32], pad]
    assert rows["segments_BL"].tolist() == [[1] * 6 + [2] * 2, [1] * 5 + [2] * 3, [0] * 8]
    assert rows["positions_BL"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2], [0] * 8]
    assert all(array.dtype == np.int32 for array in rows.values())
    assert packing.pack([2, 5, 3, 6], row_length=8, texts_per_row=1).num_rows == 4
