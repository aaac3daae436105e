"""The map to the released tensors: hand-written indices, shapes at full size, and every refusal by name."""

import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_embed import hf_layout
from moe_embed.config import Encoder, Moe, UserError
from moe_embed.model import encoder as encoder_lib

SMALL = Encoder(vocab_size=10, num_layers=4, dim=8, num_heads=2, ffn_dim=6, max_seq_length=16)
MOE = Moe(num_experts=3, top_k=2, every=2)
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


def random_params(encoder, moe):
    rng, params = np.random.default_rng(0), {}
    for path, shape in hf_layout.param_shapes(encoder, moe).items():
        *keys, leaf = path.split("/")
        node = params
        for key in keys:
            node = node.setdefault(key, {})
        node[leaf] = rng.normal(size=shape).astype(np.float32)
    return params


def write_folder(folder, *, encoder=SMALL, moe=MOE, **config):
    folder.mkdir(exist_ok=True)
    params = random_params(encoder, moe)
    tensors = hf_layout.to_tensors(params, encoder=encoder, moe=moe)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_layout.hf_config(encoder, moe) | config))
    (folder / "sentencepiece.bpe.model").write_bytes(b"not looked at here")
    return params


@pytest.mark.parametrize("moe", [MOE, Moe(num_experts=3, every=1), Moe(num_experts=3, every=4), Moe(num_experts=0)])
def test_round_trip_is_bit_equal(moe):
    params = random_params(SMALL, moe)
    tensors = hf_layout.to_tensors(params, encoder=SMALL, moe=moe)
    assert {name: tensor.shape for name, tensor in tensors.items()} == hf_layout.tensor_shapes(SMALL, moe)
    again = hf_layout.from_tensors(tensors, encoder=SMALL, moe=moe)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_attention_indices_by_hand():
    params = random_params(SMALL, MOE)
    tensors = hf_layout.to_tensors(params, encoder=SMALL, moe=MOE)
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
    params = random_params(SMALL, MOE)
    tensors = hf_layout.to_tensors(params, encoder=SMALL, moe=MOE)
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


def test_full_size_is_the_released_model():
    tensors = hf_layout.tensor_shapes(FULL, Moe())
    assert len(tensors) == 148
    assert sum(map(math.prod, tensors.values())) == 475_292_928
    assert tensors["embeddings.word_embeddings.weight"] == (250_048, 768)
    assert tensors["encoder.layers.0.attn.Wqkv.weight"] == (2304, 768)
    assert tensors["encoder.layers.11.mlp.experts.mlp.w1"] == tensors["encoder.layers.1.mlp.experts.mlp.w2"]
    assert tensors["encoder.layers.11.mlp.experts.mlp.w1"] == (24_576, 768)
    assert "encoder.layers.10.mlp.fc2.bias" in tensors
    assert "encoder.layers.10.mlp.experts.bias" not in tensors


@pytest.mark.parametrize("moe", [Moe(), Moe(num_experts=0), Moe(every=3)])
def test_our_encoder_has_these_parameters_at_full_size(moe):
    params = jax.eval_shape(lambda: encoder_lib.init(FULL, moe, key=jax.random.key(0)))
    found = {path: leaf.shape for path, leaf in hf_layout._flatten(params)}
    assert found == hf_layout.param_shapes(FULL, moe)


def test_what_is_missing_unknown_or_mis_shaped_is_named():
    tensors = hf_layout.to_tensors(random_params(SMALL, MOE), encoder=SMALL, moe=MOE)
    name = "encoder.layers.3.mlp.experts.bias"
    without = {key: value for key, value in tensors.items() if key != name}
    for wrong in (without, tensors | {"lm_head.weight": np.zeros(3)}, tensors | {name: np.zeros((8, 1), np.float32)}):
        with pytest.raises(UserError) as error:
            hf_layout.from_tensors(wrong, encoder=SMALL, moe=MOE)
        assert (name if "lm_head.weight" not in wrong else "lm_head.weight") in str(error.value)
        assert len(error.value.args) == 1
    params = random_params(SMALL, MOE)
    params["unit"]["1"]["moe"]["w_upp_REDF"] = params["unit"]["1"]["moe"].pop("w_up_REDF")
    with pytest.raises(UserError, match="w_up_REDF is missing") as error:
        hf_layout.to_tensors(params, encoder=SMALL, moe=MOE)
    assert "w_upp_REDF is unknown" in str(error.value)


@pytest.mark.parametrize("moe", [MOE, Moe(num_experts=4, top_k=1, every=4), Moe(num_experts=0)])
def test_config_round_trip(moe):
    assert hf_layout.read_hf_config(json.loads(json.dumps(hf_layout.hf_config(SMALL, moe)))) == (SMALL, moe)


def test_released_config_reads_and_ours_agrees_with_it():
    encoder, moe = hf_layout.read_hf_config(RELEASED)
    assert (encoder.dim, encoder.num_layers, encoder.vocab_size, moe) == (768, 12, 250_048, Moe())
    ours = hf_layout.hf_config(FULL, Moe())
    assert {key: ours[key] for key in RELEASED} == RELEASED


@pytest.mark.parametrize(("key", "value"), [
    ("prenorm", True), ("activation_function", "swiglu"), ("activation_function", "gelu_new"),
    ("num_shared_experts", 1), ("rotary_emb_fraction", 0.5), ("rotary_emb_interleaved", True),
    ("rotary_emb_scale_base", 512), ("moe_normalize_expert_weights", True), ("expert_choice_router", True),
    ("model_type", "bert"), ("use_rms_norm", True), ("causal", True), ("qkv_proj_bias", False),
    ("moe_top_k", None), ("n_inner", None), ("n_head", 5), ("n_embd", "a"),
])  # fmt: skip
def test_what_we_do_not_compute_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        hf_layout.read_hf_config(RELEASED | {key: value})


@pytest.mark.parametrize("wrong", [{"moe_every_n_layers": 3}, {"moe_top_k": 9}, {"n_layer": 11}])
def test_experts_in_other_places_are_refused(wrong):
    """The reference has them where i % n == 1: with n = 3 that is not the last layer of a unit."""
    with pytest.raises(UserError, match="it must be i % n == n - 1"):
        hf_layout.read_hf_config(RELEASED | wrong)


def test_folder_round_trip_with_prompts_and_length(tmp_path):
    params = write_folder(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "passage": "d: "}}')
    encoder, moe, found, prompts, tokenizer = hf_layout.read_folder(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found))  # through the file: a view would be scrambled
    assert (moe, encoder.max_seq_length, encoder.dim) == (MOE, 12, 8)
    assert prompts == {"query": "q: ", "passage": "d: ", "document": "d: "}
    assert tokenizer.name == "sentencepiece.bpe.model"


def test_half_precision_is_widened_exactly_and_integers_are_refused(tmp_path):
    write_folder(tmp_path)
    tensors = hf_layout.read_safetensors(tmp_path / "model.safetensors")
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    params = hf_layout.read_folder(tmp_path)[2]
    word = params["embedding"]["word_VD"]
    assert word.dtype == np.float32
    np.testing.assert_array_equal(word, half["embeddings.word_embeddings.weight"].astype(np.float32))
    safetensors.numpy.save_file(tensors | {"emb_ln.bias": np.zeros(8, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"emb_ln\.bias as int8"):
        hf_layout.read_folder(tmp_path)


def test_untrusted_weights_are_refused_before_they_are_read(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    size = int.from_bytes(good[:8], "little")
    lying = good[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    for bad, words in (
        (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00.", "not a safetensors file"),
        ((1 << 62).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        ((200 << 20).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        (good[:8] + b"[" * size + good[8 + size :], "damaged safetensors header"),
        (good[:8] + b"7" + b" " * (size - 1) + good[8 + size :], "damaged safetensors header"),
        (good[:-4], "cut short"),
        (good[:8] + lying + good[8 + size :], "cannot be read"),
    ):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            hf_layout.read_folder(tmp_path)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="in shards"):
        hf_layout.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        hf_layout.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        hf_layout.read_folder(tmp_path)
