"""The fold of the experts' shared bias is the same function; what llama.cpp cannot compute is refused. The file: tests/deploy."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_embed import config, export, gguf_file, hf_layout
from moe_embed.data import tokenizer as tokenizer_lib
from tests import hf_tiny
from tests.test_export import small_model


def with_folded(model, **changed):
    params = gguf_file.fold_shared_bias(model.params, moe=model.moe)
    return dataclasses.replace(model, params=params, **changed)


def test_a_folded_model_has_no_shared_bias_and_the_same_vectors():
    model = small_model()
    folded = with_folded(model)
    assert jax.tree.structure(folded.params) == jax.tree.structure(model.params)
    assert not folded.params["unit"]["1"]["moe"]["b_out_RD"].any()
    wanted = model.encode(export.TEXTS)
    np.testing.assert_allclose(folded.encode(export.TEXTS), wanted, atol=gguf_file.FOLD, rtol=0)
    changed = {
        name
        for name, x in hf_layout.flatten(folded.params)
        if not np.array_equal(x, dict(hf_layout.flatten(model.params))[name])
    }
    assert changed == {
        f"unit/1/{name}" for name in ("norm1/bias_RD", "moe/w_up_REDF", "moe/w_router_RED", "moe/b_out_RD")
    }


@pytest.mark.parametrize("part", ["norm1/bias_RD", "moe/w_up_REDF", "moe/w_router_RED"])
def test_each_part_of_the_fold_is_needed(part):
    model = small_model()
    folded, (group, name) = with_folded(model), part.split("/")
    folded.params["unit"]["1"] = {**folded.params["unit"]["1"]}
    folded.params["unit"]["1"][group] = folded.params["unit"]["1"][group] | {
        name: model.params["unit"]["1"][group][name]
    }
    assert np.abs(folded.encode(export.TEXTS) - model.encode(export.TEXTS)).max() > 1e-3


def test_where_beta_and_bias_cancel_the_norm_behind_helps():
    """sum((beta + b) / gamma) = 0: without a number on all dims there would be no direction."""
    model = small_model()
    norm = model.params["unit"]["1"]["norm1"]
    shift_RD = (norm["bias_RD"] + model.params["unit"]["1"]["moe"]["b_out_RD"]) / norm["scale_RD"]
    norm["bias_RD"] = norm["bias_RD"] - norm["scale_RD"] * shift_RD.mean(1, keepdims=True)
    np.testing.assert_allclose(
        with_folded(model).encode(export.TEXTS), model.encode(export.TEXTS), atol=gguf_file.FOLD, rtol=0
    )


def test_a_zero_scale_is_refused_and_a_zero_bias_changes_nothing():
    model = small_model()
    model.params["unit"]["1"]["norm1"]["scale_RD"][1, 3] = 0
    with pytest.raises(config.UserError, match="layer 3: a scale of norm1 is 0"):
        gguf_file.fold_shared_bias(model.params, moe=model.moe)
    model.params["unit"]["1"]["moe"]["b_out_RD"] = 0 * model.params["unit"]["1"]["moe"]["b_out_RD"]
    same = gguf_file.fold_shared_bias(model.params, moe=model.moe)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, model.params))


def test_what_llama_cpp_does_not_compute_is_refused(monkeypatch):
    tokenizer, moe = small_model().tokenizer, config.Moe(num_experts=4, top_k=2)
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.UserError, match=r"--gguf needs gguf: pip install"):
        gguf_file.check(hf_tiny.NOMIC, moe, tokenizer)
    gguf_file.check(hf_tiny.NOMIC, moe, tokenizer, flag="--fold_shared_bias")  # needs no package
    for encoder, other, said in (
        (hf_tiny.NOMIC, config.Moe(num_experts=0), "no experts"),
        (hf_tiny.NOMIC, config.Moe(num_experts=4, every=1), "experts in every 1 layers"),  # theirs: i % n == 1
        (hf_tiny.NOMIC, config.Moe(num_experts=4, every=4), "experts in every 4 layers"),
        (hf_tiny.XLM_R, moe, "learned positions"),
    ):
        with pytest.raises(config.UserError, match=said):
            gguf_file.check(encoder, other, tokenizer)
    word_pieces = tokenizer_lib.JsonTokenizer(hf_tiny.word_pieces(export.TEXTS), origin="a test")
    with pytest.raises(config.UserError, match="word pieces"):
        gguf_file.check(hf_tiny.NOMIC, moe, word_pieces)


def test_a_bfloat16_model_is_compared_in_float32(monkeypatch, tmp_path):
    """Its own rounding is no fault of the fold."""
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)
    for name in ("check", "write"):  # need the package gguf
        monkeypatch.setattr(gguf_file, name, lambda *_, **__: None)
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    model = small_model(dtype="bfloat16")
    assert export.export(model, tmp_path / "out", gguf=True)["fold"] <= gguf_file.FOLD
    assert np.abs(with_folded(model).encode(export.TEXTS) - model.encode(export.TEXTS)).max() > gguf_file.FOLD


def test_an_export_with_the_bias_folded_is_compared_with_the_model_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)
    model = small_model()
    report = export.export(model, tmp_path / "out", fold_shared_bias=True)
    assert report["shared_bias"] == "folded"
    assert "bias is folded into other weights" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not export.load(tmp_path / "out").params["unit"]["1"]["moe"]["b_out_RD"].any()
    monkeypatch.setattr(gguf_file, "fold_shared_bias", lambda params, **_: jax.tree.map(lambda x: 1.1 * x, params))
    with pytest.raises(config.UserError, match="reads other vectors"):
        export.export(model, tmp_path / "wrong", fold_shared_bias=True)
    assert not (tmp_path / "wrong").exists()
