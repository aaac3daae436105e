"""The torch side of tests/bench/gpu.py at toy size: it runs, it learns, and it is the model that our torch file is."""

import time

import pytest
import torch

from moe_embed import hf_config
from tests.bench import gpu, gpu_parts, gpu_torch

pytestmark = pytest.mark.parity


def test_every_row_is_measured():
    part = gpu.run_part("torch", deadline=time.monotonic() + 100, peak=None, sizes=gpu_parts.TOY)
    assert part["versions"] == {"torch": torch.__version__}
    assert [row["what"].split(":")[0] for row in part["rows"]] == ["torch"] * 3
    assert all(row["ms"] > 0 for row in part["rows"])
    assert not any("fault" in row for row in part["rows"])


def test_without_a_mask_it_is_the_same_model():
    c = gpu_parts.configuration(gpu_parts.TOY)
    model = gpu_torch.model_of(hf_config.hf_config(c.encoder, c.moe), device="cpu", compiled=False).float()
    tokens = torch.randint(4, 64, (3, 16))
    with torch.no_grad():
        got, expected = gpu_torch.hidden(model, tokens), model(tokens, torch.ones_like(tokens)).last_hidden_state
        torch.testing.assert_close(got, expected)
        assert (gpu_torch.hidden(model, tokens.flip(1)) - expected).abs().max() > 0.1
