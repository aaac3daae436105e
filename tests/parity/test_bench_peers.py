"""The benchmark's peers in torch, at toy size: they compute what we compute, else their times would mean nothing."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from moe_embed import export
from moe_embed.load import load
from tests.bench import cpu, torch_peers, workloads

pytestmark = pytest.mark.parity
SHAPE = dataclasses.replace(workloads.QUICK.encoder, num_layers=2, dim=16, ffn_dim=32, max_seq_length=16)
SIZE = dataclasses.replace(workloads.QUICK, encoder=SHAPE, texts=6, full_pairs=3, length=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(export, "_torch_is_here", lambda: False)  # what it would compare is compared below
        path = tmp_path_factory.mktemp("bench") / "model"
        workloads.write_model(SIZE, path)
        yield path


@pytest.fixture
def peers(folder):
    exported = torch_peers.open_model(folder, num_threads=2)
    return cpu.Peers(torch_peers.with_expert_loop(exported), exported)


def test_the_peers_give_our_vectors(folder, peers):
    model, texts = load(folder), workloads.mixed_texts(SIZE.texts)
    ids = model.tokenizer.encode(texts, max_length=SIZE.encoder.max_seq_length)[0]
    ours = model.encode(texts)
    kinds = [{type(module).__name__ for module in peer.modules()} for peer in peers]
    assert ["ExpertLoop" in kind for kind in kinds] == [True, False]
    for peer in peers:
        np.testing.assert_allclose(torch_peers.encode(peer, ids, batch=4), ours, atol=1e-5)
    with torch.no_grad():
        next(m for m in peers.a.modules() if type(m).__name__ == "ExpertLoop").mlp.w2 *= 2
    assert np.abs(torch_peers.encode(peers.a, ids, batch=4) - ours).max() > 1e-3
    np.testing.assert_allclose(torch_peers.encode(peers.b, ids, batch=4), ours, atol=1e-5)  # its weights are its own


def test_the_peers_take_our_steps(folder, peers):
    rows = 2 * SIZE.full_pairs
    c = workloads.train_config(SIZE, pairs=SIZE.full_pairs, rows=rows, row_length=SIZE.length, texts_per_row=1)
    batch, training = workloads.make_batch(c, workloads.long_pairs(SIZE)), cpu.Training(c, folder, peers)
    sides = training.sides(batch, chunk=4)
    first = {name: side() for name, side in sides.items() if "sorted" not in name}
    second = {name: side() for name, side in sides.items() if name != "(b) torch file"}  # (b) goes on sorted
    for losses in (first, second):
        np.testing.assert_allclose(list(losses.values()), losses["ours"], rtol=1e-5)
    assert second["ours"] < first["ours"] - 1e-3
    training.warm_up(batch, compare=False)
    with pytest.raises(SystemExit, match="the losses differ"):  # ours is a step ahead
        training.warm_up(batch, compare=True)
