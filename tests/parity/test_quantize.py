"""Small vectors as sentence-transformers makes them."""

import numpy as np
import pytest
from sentence_transformers.util import quantization

from moe_embed import quantize
from tests.test_quantize import vectors

pytestmark = pytest.mark.parity


def test_as_sentence_transformers_does_it():
    x_ND, sample_ND = vectors(50), vectors(500, seed=1)
    ranges = quantize.ranges_of(sample_ND)
    found = quantization.quantize_embeddings(x_ND, "int8", ranges=np.stack(ranges))
    inside = (x_ND >= ranges.low_D) & (x_ND <= ranges.high_D)
    assert np.abs(found.astype(int) - quantize.int8(x_ND, ranges))[inside].max() <= 1  # they cut where we round
    np.testing.assert_array_equal(quantization.quantize_embeddings(x_ND, "ubinary"), quantize.binary(x_ND))
