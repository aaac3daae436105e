"""Smaller vectors: int8 and binary, as sentence-transformers and vector databases make them.

A search over either keeps the order of the scores that those make: inner products of int8 numbers, Hamming distances of bits.
"""

from typing import NamedTuple

import numpy as np

PRECISIONS = ("int8", "binary")


class Ranges(NamedTuple):
    """What int8 is calibrated by: the least and the greatest of each dim over a sample of vectors."""

    low_D: np.ndarray
    high_D: np.ndarray


def ranges_of(sample_ND: np.ndarray) -> Ranges:
    """Of float vectors, at least one."""
    return Ranges(sample_ND.min(0), sample_ND.max(0))


def int8(x_ND: np.ndarray, ranges: Ranges) -> np.ndarray:
    """255 steps over each dim's range -> int8 [N, D], rounded down; what lies outside of the range is cut to it.

    The codes of sentence_transformers.quantize_embeddings(x_ND, precision="int8", ranges=np.stack(ranges)), version 6.
    """
    step_D = np.where(ranges.high_D > ranges.low_D, (ranges.high_D - ranges.low_D) / 255, 1)
    return (np.clip(np.floor((x_ND - ranges.low_D) / step_D), 0, 255) - 128).astype(np.int8)


def binary(x_ND: np.ndarray) -> np.ndarray:
    """A bit a dim, set above 0, eight in a byte: uint8 [N, ceil(D / 8)]."""
    return np.packbits(x_ND > 0, axis=-1)


def for_search(x_ND: np.ndarray, precision: str, ranges: Ranges) -> np.ndarray:
    """float32 vectors whose inner products order documents as the small ones do: bits become -1 and 1."""
    if precision == "int8":
        return int8(x_ND, ranges).astype(np.float32)
    return np.where(x_ND > 0, np.float32(1), np.float32(-1))
