"""config.json both ways, and every key that asks for what is not computed, refused by name."""

import json

import pytest

from moe_embed import hf_config
from moe_embed.config import Encoder, Moe, UserError
from tests import hf_tiny
from tests.hf_tiny import BERT, DENSE, MOE, NOMIC, XLM_R

FULL = Encoder(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=512)
# The released config.json, the keys that say something about the maths or the size.
RELEASED = {
    "activation_function": "gelu", "causal": False, "expert_choice_router": False, "ffn_div": 1,
    "layer_norm_epsilon": 1e-05, "max_trained_positions": 2048, "mlp_fc1_bias": True, "mlp_fc2_bias": True,
    "model_type": "nomic_bert", "moe_every_n_layers": 2, "moe_normalize_expert_weights": False, "moe_top_k": 2,
    "n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 12, "n_positions": 2048, "num_experts": 8,
    "num_shared_experts": 0, "parallel_block": False, "prenorm": False, "qkv_proj_bias": True, "use_rms_norm": None,
    "rotary_emb_base": 10000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "type_vocab_size": 1, "vocab_size": 250048,
}  # fmt: skip
# xlm-roberta-base's, the keys that matter.
XLM_R_BASE = {
    "model_type": "xlm-roberta", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 250002, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(("encoder", "moe"), hf_tiny.ALL.values(), ids=hf_tiny.ALL)
def test_config_round_trip(encoder, moe):
    written = json.loads(json.dumps(hf_config.hf_config(encoder, moe)))
    assert hf_config.read_hf_config(written) == (encoder, moe)


def test_released_config_reads_and_ours_agrees_with_it():
    encoder, moe = hf_config.read_hf_config(RELEASED)
    assert (encoder.dim, encoder.num_layers, encoder.vocab_size, moe) == (768, 12, 250_048, Moe())
    ours = hf_config.hf_config(FULL, Moe())
    assert {key: ours[key] for key in RELEASED} == RELEASED


def test_xlm_r_reads_and_ours_agrees_with_it():
    encoder, moe = hf_config.read_hf_config(XLM_R_BASE)
    assert (encoder.position, encoder.num_positions, encoder.position_offset) == ("learned", 514, 2)
    assert (encoder.max_seq_length, encoder.norm_epsilon, moe) == (512, 1e-5, DENSE)
    ours = hf_config.hf_config(encoder, moe)
    assert {key: ours[key] for key in XLM_R_BASE} == XLM_R_BASE
    bert = hf_config.read_hf_config(XLM_R_BASE | {"model_type": "bert", "max_position_embeddings": 512})[0]
    assert (bert.num_positions, bert.position_offset, bert.max_seq_length) == (512, 0, 512)


@pytest.mark.parametrize(("key", "value"), [
    ("prenorm", True), ("activation_function", "swiglu"), ("activation_function", "gelu_new"),
    ("num_shared_experts", 1), ("rotary_emb_fraction", 0.5), ("rotary_emb_interleaved", True),
    ("rotary_emb_scale_base", 512), ("moe_normalize_expert_weights", True), ("expert_choice_router", True),
    ("model_type", "roberta"), ("model_type", None), ("use_rms_norm", True), ("causal", True), ("qkv_proj_bias", False),
    ("moe_top_k", None), ("n_inner", None), ("n_head", 5), ("n_embd", "a"),
    ("rope_parameters", [1]), ("rope_parameters", "x"), ("rope_parameters", {"rope_type": "yarn"}),
])  # fmt: skip
def test_what_we_do_not_compute_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        hf_config.read_hf_config(RELEASED | {key: value})


@pytest.mark.parametrize("wrong", [{"moe_every_n_layers": 3}, {"moe_top_k": 9}, {"n_layer": 11}])
def test_experts_in_other_places_are_refused(wrong):
    """The reference has them where i % n == 1: with n = 3 that is not the last layer of a unit."""
    with pytest.raises(UserError, match="it must be i % n == n - 1"):
        hf_config.read_hf_config(RELEASED | wrong)


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_act", "gelu_new"), ("hidden_act", "relu"), ("hidden_act", None), ("is_decoder", True),
    ("add_cross_attention", True), ("position_embedding_type", "relative_key"), ("pruned_heads", {"0": [1]}),
    ("layer_norm_eps", None), ("layer_norm_eps", 0), ("vocab_size", "a"), ("hidden_size", 770), ("pad_token_id", None),
    ("pad_token_id", -1), ("max_position_embeddings", 4), ("type_vocab_size", 0), ("num_hidden_layers", True),
])  # fmt: skip
def test_what_bert_may_say_that_we_do_not_compute_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        hf_config.read_hf_config(XLM_R_BASE | {key: value})


@pytest.mark.parametrize("key", hf_config.BERT_SIZES)
def test_a_size_that_is_not_written_is_not_guessed(key):
    with pytest.raises(UserError, match=key):
        hf_config.read_hf_config({name: value for name, value in XLM_R_BASE.items() if name != key})


def test_our_own_form_is_no_nomic_bert_and_says_where_positions_start():
    ours = hf_config.hf_config(XLM_R, MOE)
    assert ours["model_type"] == "moe_embed"
    assert ours["architectures"] == ["MoeEmbedModel"]
    assert not [key for key in ours if key.startswith("rotary")]
    assert (ours["max_position_embeddings"], ours["position_offset"]) == (18, 2)
    for wrong, words in (
        ({"position_offset": None}, "position_offset"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
        ({"num_experts": 0}, "no experts"),
        ({"max_position_embeddings": 3}, "of which 2 come before any text"),
    ):
        with pytest.raises(UserError, match=words):
            hf_config.read_hf_config(ours | wrong)


def test_pad_id_is_the_tokenizers_and_xlm_r_counts_from_it():
    for encoder, moe in ((NOMIC, MOE), (BERT, DENSE), (XLM_R, MOE)):
        assert hf_config.hf_config(encoder, moe, pad_id=0)["pad_token_id"] == 0
    assert hf_config.hf_config(XLM_R, DENSE)["pad_token_id"] == 1
    with pytest.raises(UserError, match="cannot be written as XLM-R"):
        hf_config.hf_config(XLM_R, DENSE, pad_id=0)
