"""The released model itself, for who has its folder: bash launch/test.sh -m released --released=DIR

nomic-ai/nomic-embed-text-v2-moe with config.json, model.safetensors, sentencepiece.bpe.model and the sentence-transformers
files. What its paper and its model card say has to come out of our encoder.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from moe_embed import config, export, hf_folder, hf_layout, sharding
from moe_embed.load import load

pytestmark = pytest.mark.released
CARD = 0.9118  # the card's similarity of its two example sentences, four digits
TEXTS = ["Hello!", "¡Hola!"]


@pytest.fixture(scope="module")
def released(request) -> pathlib.Path:
    return pathlib.Path(request.config.getoption("--released"))


@pytest.fixture(scope="module")
def model(released):
    """On one device: on the eight virtual ones of tests/conftest.py it would be there eight times."""
    return load(released, mesh=sharding.make_mesh(config.Mesh(data=1), devices=jax.devices()[:1]))


def similarity(model) -> float:
    a_D, b_D = model.encode(TEXTS, task="passage")
    return float(a_D @ b_D)


def test_it_has_the_published_tensors(released):
    folder = hf_folder.read_folder(released)
    stored = hf_folder.read_safetensors(released / "model.safetensors")
    assert len(stored) == 148
    assert sum(tensor.size for tensor in stored.values()) == 475_292_928
    assert {name: tensor.shape for name, tensor in stored.items()} == hf_layout.tensor_shapes(
        folder.encoder, folder.moe
    )
    assert hf_layout.num_parameters(folder.encoder, folder.moe) == (475_292_928, 305_423_616)
    assert folder.left_out == []


def test_the_cards_pair_is_as_similar_as_the_card_says(model):
    assert abs(similarity(model) - CARD) <= 1e-4


def test_a_misread_layout_would_show(model):
    """w2 of the experts read as [E, D, F], which fits."""

    def misread(w_down_REFD):
        w = np.asarray(w_down_REFD)
        return w.reshape(*w.shape[:2], w.shape[3], w.shape[2]).swapaxes(2, 3)

    params = jax.tree_util.tree_map_with_path(
        lambda path, x: misread(x) if "w_down_REFD" in jax.tree_util.keystr(path) else x, model.params
    )
    assert abs(similarity(dataclasses.replace(model, params=params)) - CARD) > 1e-2


def test_it_exports_with_the_same_bytes_and_torch_agrees(released, model, tmp_path):
    report = export.export(model, tmp_path / "out")
    assert report["torch"] <= export.TOLERANCE
    before = hf_folder.read_safetensors(released / "model.safetensors")
    after = hf_folder.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(np.float32), err_msg=name)
