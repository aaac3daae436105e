"""An exported folder opened by other people's software, on 64 texts in ten languages: the vectors of Model.encode, or a refusal.

Marker `deploy`. Run, not only written: sentence-transformers, transformers with the folder's own file, ONNX Runtime, and
llama.cpp where llama-cpp-python is installed (the gguf extra; the table says "not run" elsewhere). Not run, their names,
shapes and keys checked as their sources read them: text-embeddings-inference and vLLM.
"""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import moe_embed
from moe_embed import calibrate, config, export, gguf_file, quantize, sharding
from moe_embed.data import sources
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.hf_folder import read_safetensors
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("default")]  # warnings of other people's software
SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"
TOLERANCE = 1e-6  # of 1 - cosine, float32
FELT = 1e-3  # what something broken must change at least


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def texts():
    """Sections in five languages, headings in five more: as many of each, as they come."""
    found = []
    for language in ("de", "en", "ja", "ru", "zh"):
        found += list(sources.read_task(str(SAMPLE / "tasks" / f"libreoffice-help-{language}")).corpus.values())[:7]
    for language in ("es", "fr", "it", "ko", "pt"):
        found += list(
            sources.read_task(str(SAMPLE / "tasks" / f"xling-libreoffice-help-{language}-en")).queries.values()
        )[:6]
    assert len(set(found[:64])) == 64
    return found[:64]


@pytest.fixture(scope="module", params=["rotary", "learned"])
def model(request):
    """Random, with the shipped tokenizer, and with biases and norms away from their first values, so that a lost one shows."""
    learned = {"position": "learned", "num_positions": 130, "position_offset": 2} if request.param == "learned" else {}
    tokenizer = tokenizer_lib.read(SAMPLE / "tokenizer.model")
    rows = -(-tokenizer.num_ids // 64) * 64
    encoder = config.Encoder(
        vocab_size=rows, num_layers=4, dim=32, num_heads=4, ffn_dim=48, max_seq_length=128, **learned
    )
    moe = config.Moe(num_experts=4, top_k=2, every=2)
    rng = np.random.default_rng(0)
    params = encoder_lib.init(encoder, moe, key=jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    prompts = {"query": "search_query: ", "document": "search_document: "}
    mesh = sharding.make_mesh(config.Mesh(), devices=jax.devices()[:1])
    return Model(encoder, moe, params, tokenizer, prompts, mesh, "a test model")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "small"
    report = export.export(model, output, onnx=True)
    assert report["onnx"] <= export.TOLERANCE
    assert report["onnx_flops"] == pytest.approx(flops_ratio(model), abs=0.005)
    return output


@pytest.fixture(scope="module")
def expected(model, texts):
    return model.encode(texts, "query")


def flops_ratio(model) -> float:
    e, m = model.encoder, model.moe
    one = 2 * e.dim * e.ffn_dim  # an expert, or a dense MLP
    layers, mixtures = e.num_layers, e.num_layers // m.every
    rest = layers * 4 * e.dim**2 + (layers - mixtures) * one + mixtures * m.num_experts * e.dim
    return (rest + mixtures * m.num_experts * one) / (rest + mixtures * m.top_k * one)


def least_cosine(a_ND, b_ND) -> float:
    unit = lambda x: x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)  # noqa: E731
    return float((unit(a_ND) * unit(b_ND)).sum(1).min())


def test_sentence_transformers(model, folder, texts, expected, note):
    import sentence_transformers

    st = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    cosine = least_cosine(st.encode(texts, prompt_name="query", batch_size=16), expected)
    note("sentence-transformers", "sentence-transformers", form=model.encoder.position, cosine=cosine)
    assert cosine > 1 - TOLERANCE
    assert least_cosine(st.encode(texts, prompt_name="document"), expected) < 1 - FELT


def by_transformers(folder, texts, *, mask=True):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoder = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    rows = tokenizer(["search_query: " + text for text in texts], padding=True, truncation=True, return_tensors="pt")
    if not mask:
        rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
    with torch.no_grad():
        hidden_NLD = encoder(rows["input_ids"], rows["attention_mask"]).last_hidden_state
    return (hidden_NLD * rows["attention_mask"][..., None]).sum(1).numpy()


def test_transformers_with_the_folders_own_file(model, folder, texts, expected, note):
    cosine = least_cosine(by_transformers(folder, texts), expected)
    note("transformers, the folder's own file", "transformers", form=model.encoder.position, cosine=cosine)
    assert cosine > 1 - TOLERANCE
    assert least_cosine(by_transformers(folder, texts, mask=False), expected) < 1 - FELT


def test_transformers_own_class_refuses_the_folder(model, folder, tmp_path):
    """It is dense and gated: without the guard it opens the folder without an exception, and fills what is missing by chance."""
    import sentence_transformers
    import transformers

    for opens in (transformers.AutoModel.from_pretrained, sentence_transformers.SentenceTransformer):
        with pytest.raises(Exception, match="trust_remote_code"):
            opens(str(folder))
    if model.encoder.position == "learned":  # model_type moe_embed: transformers has no class of that name
        return
    with pytest.raises(Exception, match="load this model with trust_remote_code=True"):
        transformers.NomicBertModel.from_pretrained(folder)
    unguarded = tmp_path / "unguarded"
    shutil.copytree(folder, unguarded)
    settings = json.loads((unguarded / "config.json").read_text())
    del settings["classifier_dropout"]
    # The sizes that it does not read are 768 and 12 layers by its own default, as the released model's are.
    settings |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    (unguarded / "config.json").write_text(json.dumps(settings))
    opened = transformers.NomicBertModel.from_pretrained(unguarded)
    assert not [name for name, _ in opened.named_parameters() if "expert" in name]


def by_onnx(folder, texts, *, batch, mask=True):
    """ONNX Runtime and tokenizer.json: no torch."""
    import onnxruntime
    import tokenizers

    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]
    }  # fmt: skip
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "config.json").read_text())
    tokenizer.enable_truncation(json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"])
    tokenizer.enable_padding(pad_id=settings["pad_token_id"])
    found = []
    for start in range(0, len(texts), batch):
        rows = tokenizer.encode_batch(["search_query: " + text for text in texts[start : start + batch]])
        ids = np.array([row.ids for row in rows], np.int64)
        real = np.array([row.attention_mask for row in rows], np.int64) if mask else np.ones_like(ids)
        found.append(session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": real})[0])
    return np.concatenate(found)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_onnx_runtime(model, folder, texts, expected, batch, note):
    vectors = by_onnx(folder, texts, batch=batch)
    cosine = least_cosine(vectors, expected)
    note(f"ONNX Runtime, batches of {batch}", "onnxruntime", form=model.encoder.position, cosine=cosine)
    assert cosine > 1 - TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_onnx_runtime_notices_padding_that_is_read(folder, texts, expected):
    assert least_cosine(by_onnx(folder, texts, batch=64, mask=False), expected) < 1 - FELT


def faults_for_servers(settings: dict, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What stands in the way of TEI's and vLLM's readers of this layout (their sources, read on 2026-11-23)."""
    wanted = {
        "model_type": "nomic_bert", "architectures": ["NomicBertModel"], "activation_function": "gelu", "prenorm": False,
        "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True, "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
        "moe_normalize_expert_weights": False, "pad_token_id": 1,
    }  # fmt: skip
    faults = [f"{key} is not {value}" for key, value in wanted.items() if settings.get(key, "absent") != value]
    numbers = ("n_embd", "n_head", "n_inner", "n_layer", "n_positions", "vocab_size", "type_vocab_size", "num_experts",
               "moe_top_k", "moe_every_n_layers", "layer_norm_epsilon", "rotary_emb_base", "max_trained_positions")  # fmt: skip
    faults += [f"{key} is no positive number" for key in numbers if not settings.get(key, 0) > 0]
    if faults:
        return faults
    D, F, E = settings["n_embd"], settings["n_inner"], settings["num_experts"]
    needed = {
        "embeddings.word_embeddings.weight": (settings["vocab_size"], D),
        "embeddings.token_type_embeddings.weight": (settings["type_vocab_size"], D),
        "emb_ln.weight": (D,), "emb_ln.bias": (D,),
    }  # fmt: skip
    for i in range(settings["n_layer"]):
        mixture = i % settings["moe_every_n_layers"] == 1
        needed |= {f"encoder.layers.{i}.{name}": shape for name, shape in {
            "attn.Wqkv.weight": (3 * D, D), "attn.Wqkv.bias": (3 * D,), "attn.out_proj.weight": (D, D), "attn.out_proj.bias": (D,),
            "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
            **({"mlp.router.layer.weight": (E, D), "mlp.experts.mlp.w1": (E * F, D), "mlp.experts.mlp.w2": (E * F, D),
                "mlp.experts.bias": (D,)} if mixture else
               {"mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,), "mlp.fc2.weight": (D, F), "mlp.fc2.bias": (D,)}),
        }.items()}  # fmt: skip
    return [
        f"{name}: {shapes.get(name)}, wanted {needed.get(name)}"
        for name in sorted(needed.keys() | shapes.keys())
        if shapes.get(name) != needed.get(name)
    ]


def test_names_shapes_and_keys_are_those_that_servers_read(model, folder):
    import transformers

    settings = json.loads((folder / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in read_safetensors(folder / "model.safetensors").items()}
    faults = faults_for_servers(settings, shapes)
    if model.encoder.position == "learned":  # under another name, so that none of them takes it for the released layout
        assert "model_type is not nomic_bert" in faults
        return
    assert faults == []
    bias = "encoder.layers.1.mlp.experts.bias"
    assert faults_for_servers(settings, {k: v for k, v in shapes.items() if k != bias}) == [
        f"{bias}: None, wanted (32,)"
    ]
    assert faults_for_servers(settings | {"vocab_size": 16_002}, shapes)
    assert faults_for_servers(settings | {"prenorm": True}, shapes) == ["prenorm is not False"]
    read = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(read).__name__ == "NomicBertConfig"  # vLLM asserts it
    assert (read.hidden_size, read.num_attention_heads, read.num_hidden_layers) == (32, 4, 4)
    sentence = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert sentence["prompts"]["document"] == sentence["prompts"]["passage"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]


def test_int8_codes_are_sentence_transformers(model, texts, expected, tmp_path):
    from sentence_transformers.util.quantization import quantize_embeddings

    calibrate.write(model, texts, tmp_path)
    ranges = np.array(json.loads((tmp_path / calibrate.FILE).read_text())["ranges"], np.float32)  # as the card says
    theirs = quantize_embeddings(expected, precision="int8", ranges=ranges)
    np.testing.assert_array_equal(quantize.int8(expected, calibrate.read(tmp_path)), theirs)
    assert (quantize.int8(expected, quantize.ranges_of(expected)) != theirs).any()
    np.testing.assert_array_equal(quantize.binary(expected), quantize_embeddings(expected, precision="ubinary"))


@pytest.fixture(scope="module")
def gguf_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / gguf_file.FILE
    if model.encoder.position == "learned":
        with pytest.raises(config.UserError, match="learned positions"):
            gguf_file.check(model.encoder, model.moe, model.tokenizer)
        return None
    shape = {"encoder": model.encoder, "moe": model.moe, "tokenizer": model.tokenizer}
    gguf_file.check(*shape.values())
    gguf_file.write(path, model.params, **shape, name="small")
    return path


def test_the_gguf_file_has_what_llama_cpp_reads(model, gguf_path):
    """The names, shapes and keys of llama.cpp's load_arch_tensors and load_arch_hparams for nomic-bert-moe."""
    import gguf

    if gguf_path is None:
        return
    opened = gguf.GGUFReader(gguf_path)
    D, F, E, V = 32, 48, 4, model.encoder.vocab_size
    needed = {
        "token_embd.weight": (D, V),
        "token_types.weight": (D, 1),
        "token_embd_norm.weight": (D,),
        "token_embd_norm.bias": (D,),
    }
    for i in range(4):
        needed |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_qkv.weight": (D, 3 * D), "attn_qkv.bias": (3 * D,), "attn_output.weight": (D, D), "attn_output.bias": (D,),
            **{f"{norm}_norm.{part}": (D,) for norm in ("attn_output", "layer_output") for part in ("weight", "bias")},
            **({"ffn_gate_inp.weight": (D, E), "ffn_up_exps.weight": (D, F, E), "ffn_down_exps.weight": (F, D, E)} if i % 2 else
               {"ffn_up.weight": (D, F), "ffn_up.bias": (F,), "ffn_down.weight": (F, D), "ffn_down.bias": (D,)}),
        }.items()}  # fmt: skip
    assert {tensor.name: tuple(tensor.shape.tolist()) for tensor in opened.tensors} == needed
    keys = {key: opened.get_field(f"nomic-bert-moe.{key}").contents() for key in (
        "context_length", "expert_count", "expert_used_count", "moe_every_n_layers", "attention.causal", "pooling_type", "block_count")}  # fmt: skip
    assert list(keys.values()) == [128, 4, 2, 2, False, 1, 4]
    assert len(opened.get_field("tokenizer.ggml.tokens").contents()) == V
    assert opened.get_field("tokenizer.ggml.mask_token_id").contents() == model.tokenizer.mask_id


def test_llama_cpp(model, gguf_path, texts, expected, tmp_path, note):
    if gguf_path is None or importlib.util.find_spec("llama_cpp") is None:
        return  # the table says so
    prompted = ["search_query: " + text for text in texts]
    found, same = gguf_file.vectors(gguf_path, prompted, model=model)
    cosine = least_cosine(found[same], expected[same])
    note(f"llama.cpp, f16, {same.sum()} of 64 cut alike", "llama_cpp_python", form="rotary", cosine=cosine)
    assert same.sum() >= 60  # a text longer than the model reads loses its </s> there
    assert cosine >= gguf_file.COSINE
    mixture = model.params["unit"]["1"]["moe"]
    without = {**model.params["unit"]["1"], "moe": mixture | {"b_out_RD": 0 * mixture["b_out_RD"]}}
    params = {**model.params, "unit": {**model.params["unit"], "1": without}}
    dropped = dataclasses.replace(model, params=params).encode(texts, "query")  # what llama.cpp's converter makes of it
    assert least_cosine(dropped, expected) < gguf_file.COSINE
