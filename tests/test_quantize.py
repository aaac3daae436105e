"""Small vectors by hand, and as sentence-transformers makes them."""

import numpy as np
import pytest

from moe_embed import quantize


def vectors(count: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    x_ND = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def test_int8_by_hand():
    ranges = quantize.ranges_of(np.array([[0.0, -1.0, 2.0], [2.55, 1.55, 2.0]], np.float32))
    found = quantize.int8(np.array([[0.0, -1.0, 2.0], [2.55, 9.0, 2.0], [0.109, -9.0, 2.0]], np.float32), ranges)
    assert found.dtype == np.int8
    assert found.tolist() == [[-128, -128, -128], [127, 127, -128], [-118, -128, -128]]


def test_binary_by_hand():
    assert quantize.binary(np.array([[1.0, -1, 0, 2, 3, -4, -5, 6, 7]])).tolist() == [[0b10011001, 0b10000000]]


@pytest.mark.parametrize("precision", quantize.PRECISIONS)
def test_a_search_ranks_as_the_small_vectors_do(precision):
    query_ND, document_CD = vectors(5), vectors(200, seed=1)
    ranges = quantize.ranges_of(document_CD)
    a, b = (quantize.for_search(x, precision, ranges) for x in (query_ND, document_CD))
    if precision == "int8":
        exact = quantize.int8(query_ND, ranges).astype(np.int64) @ quantize.int8(document_CD, ranges).astype(np.int64).T
    else:
        bits = [np.unpackbits(quantize.binary(x), axis=1).astype(int) for x in (query_ND, document_CD)]
        exact = -(bits[0][:, None] != bits[1][None]).sum(-1)
    np.testing.assert_array_equal(np.argsort(-(a @ b.T), 1, kind="stable"), np.argsort(-exact, 1, kind="stable"))
    assert len({tuple(row) for row in b.tolist()}) == 200
