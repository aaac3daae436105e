"""The map between our parameters and theirs: hand-written indices, shapes at full size, and every refusal by name."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_embed import hf_layout
from moe_embed.config import Encoder, Moe, UserError
from moe_embed.model import encoder as encoder_lib
from tests import hf_tiny
from tests.hf_tiny import BERT, DENSE, MOE, NOMIC, XLM_R, random_params

FULL = Encoder(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=512)


@pytest.mark.parametrize(("encoder", "moe"), hf_tiny.ALL.values(), ids=hf_tiny.ALL)
@pytest.mark.parametrize("with_head", [False, True])
def test_round_trip_is_bit_equal(encoder, moe, with_head):
    if with_head and hf_layout.model_type(encoder, moe) not in hf_layout.HEAD:
        params = random_params(encoder, moe) | {"head": {"b_V": np.zeros(96, np.float32)}}
        with pytest.raises(UserError, match="parameter head/b_V is unknown"):
            hf_layout.to_tensors(params, encoder=encoder, moe=moe)
        return
    params = random_params(encoder, moe, with_head=with_head)
    tensors = hf_layout.to_tensors(params, encoder=encoder, moe=moe)
    shapes = hf_layout.tensor_shapes(encoder, moe, with_head=with_head)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    again = hf_layout.from_tensors(tensors, encoder=encoder, moe=moe, with_head=with_head)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_the_model_says_which_layout_holds_it():
    found = [hf_layout.model_type(encoder, moe) for encoder, moe in hf_tiny.ALL.values()]
    assert found == [*["nomic_bert"] * 4, "bert", "xlm-roberta", "moe_embed", "moe_embed"]


def test_attention_indices_by_hand():
    params = random_params(NOMIC, MOE)
    tensors = hf_layout.to_tensors(params, encoder=NOMIC, moe=MOE)
    dim, heads, head_dim = 8, 2, 4
    for layer in range(4):
        repeat, block = divmod(layer, 2)
        ours, theirs = params["unit"][str(block)]["attention"], f"encoder.layers.{layer}.attn"
        for g in range(3):
            for h in range(heads):
                for k in range(head_dim):
                    row = g * dim + h * head_dim + k  # all of q, then k, then v; a head's rows together
                    assert tensors[f"{theirs}.Wqkv.bias"][row] == ours["b_qkv_RGHK"][repeat, g, h, k]
                    for d in range(dim):
                        assert tensors[f"{theirs}.Wqkv.weight"][row, d] == ours["w_qkv_RDGHK"][repeat, d, g, h, k]
        for h in range(heads):
            for k in range(head_dim):
                for d in range(dim):
                    out = tensors[f"{theirs}.out_proj.weight"][d, h * head_dim + k]
                    assert out == ours["w_out_RHKD"][repeat, h, k, d]


def test_expert_indices_by_hand():
    params = random_params(NOMIC, MOE)
    tensors = hf_layout.to_tensors(params, encoder=NOMIC, moe=MOE)
    for layer in (1, 3):
        ours, theirs = params["unit"]["1"]["moe"], f"encoder.layers.{layer}.mlp"
        w1, w2 = (tensors[f"{theirs}.experts.mlp.{name}"] for name in ("w1", "w2"))
        for e in range(3):
            for f in range(6):
                for d in range(8):
                    assert w1[e * 6 + f, d] == ours["w_up_REDF"][layer // 2, e, d, f]
                    assert w2[e * 6 + f, d] == ours["w_down_REFD"][layer // 2, e, f, d]
        np.testing.assert_array_equal(tensors[f"{theirs}.router.layer.weight"], ours["w_router_RED"][layer // 2])
        np.testing.assert_array_equal(tensors[f"{theirs}.experts.bias"], ours["b_out_RD"][layer // 2])
        misread = w2.reshape(3, 8, 6).transpose(0, 2, 1)  # [E, D, F] fits as well; it must not pass for the right one
        assert not np.array_equal(misread, ours["w_down_REFD"][layer // 2])
    for layer in (0, 2):
        fc1 = tensors[f"encoder.layers.{layer}.mlp.fc1.weight"]
        np.testing.assert_array_equal(fc1.T, params["unit"]["0"]["mlp"]["w_up_RDF"][layer // 2])


@pytest.mark.parametrize("encoder", [BERT, XLM_R], ids=["bert", "xlm-roberta"])
def test_bert_indices_by_hand(encoder):
    params = random_params(encoder, DENSE)
    tensors = hf_layout.to_tensors(params, encoder=encoder, moe=DENSE)
    ours, block = params["embedding"], params["unit"]["0"]
    for name, leaf in (("word", "word_VD"), ("position", "position_PD"), ("token_type", "type_YD")):
        np.testing.assert_array_equal(tensors[f"embeddings.{name}_embeddings.weight"], ours[leaf])
    np.testing.assert_array_equal(tensors["embeddings.LayerNorm.bias"], ours["norm"]["bias_D"])
    for layer in range(4):
        theirs = f"encoder.layer.{layer}"
        for g, part in enumerate(("query", "key", "value")):
            for h in range(2):
                for k in range(4):
                    bias = tensors[f"{theirs}.attention.self.{part}.bias"][h * 4 + k]
                    assert bias == block["attention"]["b_qkv_RGHK"][layer, g, h, k]
                    for d in range(8):
                        weight = tensors[f"{theirs}.attention.self.{part}.weight"][h * 4 + k, d]
                        assert weight == block["attention"]["w_qkv_RDGHK"][layer, d, g, h, k]
                        out = tensors[f"{theirs}.attention.output.dense.weight"][d, h * 4 + k]
                        assert out == block["attention"]["w_out_RHKD"][layer, h, k, d]
        for name, part, leaf in (
            ("attention.output.dense.bias", "attention", "b_out_RD"),
            ("attention.output.LayerNorm.weight", "norm1", "scale_RD"),
            ("attention.output.LayerNorm.bias", "norm1", "bias_RD"),
            ("intermediate.dense.bias", "mlp", "b_up_RF"),
            ("output.dense.bias", "mlp", "b_down_RD"),
            ("output.LayerNorm.weight", "norm2", "scale_RD"),
            ("output.LayerNorm.bias", "norm2", "bias_RD"),
        ):
            np.testing.assert_array_equal(tensors[f"{theirs}.{name}"], block[part][leaf][layer])
        np.testing.assert_array_equal(tensors[f"{theirs}.intermediate.dense.weight"].T, block["mlp"]["w_up_RDF"][layer])
        np.testing.assert_array_equal(tensors[f"{theirs}.output.dense.weight"].T, block["mlp"]["w_down_RFD"][layer])


@pytest.mark.parametrize(("encoder", "dense", "norm", "bias"), [
    (BERT, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    (XLM_R, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
], ids=["bert", "xlm-roberta"])  # fmt: skip
def test_head_indices_by_hand(encoder, dense, norm, bias):
    params = random_params(encoder, DENSE, with_head=True)
    tensors, head = hf_layout.to_tensors(params, encoder=encoder, moe=DENSE), params["head"]
    assert not np.array_equal(head["w_DU"], head["w_DU"].T)
    np.testing.assert_array_equal(tensors[f"{dense}.weight"], head["w_DU"].T)
    for name, leaf in (
        (f"{dense}.bias", "b_U"),
        (f"{norm}.weight", "scale_U"),
        (f"{norm}.bias", "bias_U"),
        (bias, "b_V"),
    ):
        np.testing.assert_array_equal(tensors[name], head[leaf])


def test_full_size_is_the_released_model():
    tensors = hf_layout.tensor_shapes(FULL, Moe())
    assert len(tensors) == 148
    assert sum(map(math.prod, tensors.values())) == 475_292_928
    assert hf_layout.num_parameters(FULL, Moe()) == (475_292_928, 305_423_616)
    assert tensors["embeddings.word_embeddings.weight"] == (250_048, 768)
    assert tensors["encoder.layers.0.attn.Wqkv.weight"] == (2304, 768)
    assert tensors["encoder.layers.11.mlp.experts.mlp.w1"] == tensors["encoder.layers.1.mlp.experts.mlp.w2"]
    assert tensors["encoder.layers.11.mlp.experts.mlp.w1"] == (24_576, 768)
    assert "encoder.layers.10.mlp.fc2.bias" in tensors
    assert "encoder.layers.10.mlp.experts.bias" not in tensors


def test_active_parameters_are_all_but_the_experts_a_token_skips():
    assert len(set(hf_layout.num_parameters(XLM_R, DENSE))) == 1
    total, active = hf_layout.num_parameters(XLM_R, MOE)
    one_more = dataclasses.replace(MOE, num_experts=4)
    expert = 2 * 6 * 8  # two matrices, in each of two layers
    assert hf_layout.num_parameters(XLM_R, one_more) == (total + 2 * (expert + 8), active + 2 * 8)  # the router's row
    assert total - active == 2 * expert


@pytest.mark.parametrize("moe", [Moe(), Moe(num_experts=0), Moe(every=3)])
@pytest.mark.parametrize("positions", [{}, {"position": "learned", "num_positions": 514, "position_offset": 2}])
@pytest.mark.parametrize("with_head", [False, True])
def test_our_encoder_has_these_parameters_at_full_size(moe, positions, with_head):
    full = dataclasses.replace(FULL, **positions)
    with_head = with_head and hf_layout.model_type(full, moe) in hf_layout.HEAD
    params = jax.eval_shape(lambda: encoder_lib.init(full, moe, key=jax.random.key(0), with_head=with_head))
    found = {path: leaf.shape for path, leaf in hf_layout.flatten(params)}
    assert found == hf_layout.param_shapes(full, moe, with_head=with_head)


def test_what_is_missing_unknown_or_mis_shaped_is_named():
    tensors = hf_layout.to_tensors(random_params(NOMIC, MOE), encoder=NOMIC, moe=MOE)
    name = "encoder.layers.3.mlp.experts.bias"
    without = {key: value for key, value in tensors.items() if key != name}
    for wrong in (without, tensors | {"lm_head.weight": np.zeros(3)}, tensors | {name: np.zeros((8, 1), np.float32)}):
        with pytest.raises(UserError) as error:
            hf_layout.from_tensors(wrong, encoder=NOMIC, moe=MOE)
        assert (name if "lm_head.weight" not in wrong else "lm_head.weight") in str(error.value)
        assert len(error.value.args) == 1
    params = random_params(NOMIC, MOE)
    params["unit"]["1"]["moe"]["w_upp_REDF"] = params["unit"]["1"]["moe"].pop("w_up_REDF")
    with pytest.raises(UserError, match="w_up_REDF is missing") as error:
        hf_layout.to_tensors(params, encoder=NOMIC, moe=MOE)
    assert "w_upp_REDF is unknown" in str(error.value)
