"""The verb export without torch: what is written, that it reads back, that nothing half-done or foreign is touched."""

import dataclasses
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

from moe_embed import config, export, sharding
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load
from moe_embed.model import encoder as encoder_lib

FILES = {
    "config.json", "model.safetensors", "modeling_moe_embed.py", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "sentencepiece.bpe.model", "modules.json", "1_Pooling", "sentence_bert_config.json",
    "config_sentence_transformers.json", "README.md", "parity.json",
}  # fmt: skip


def small_tokenizer(**options) -> tokenizer_lib.Tokenizer:
    """A SentencePiece model with XLM-R's special ids, trained on the texts that export itself looks at."""
    model = io.BytesIO()
    settings = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(export.TEXTS), model_writer=model, **settings)
    return tokenizer_lib.Tokenizer(model.getvalue(), origin="a test")


def small_model(*, moe=None, tokenizer=None, seed=0) -> Model:
    """A random encoder whose biases, norms and shared bias are not what they start as, so that a lost one shows."""
    tokenizer, moe = tokenizer or small_tokenizer(), moe or config.Moe(num_experts=4, top_k=2)
    rows = -(-tokenizer.num_ids // 64) * 64
    encoder = config.Encoder(vocab_size=rows, num_layers=4, dim=32, num_heads=4, ffn_dim=48, max_seq_length=64)
    rng = np.random.default_rng(seed)
    params = encoder_lib.init(encoder, moe, key=jax.random.key(seed))
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    prompts = {"query": "search_query: ", "document": "search_document: "}
    return Model(encoder, moe, params, tokenizer, prompts, sharding.make_mesh(config.Mesh()), "a test model")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)  # tests/parity has torch
    return small_model()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_is_complete_and_reads_back(model, tmp_path):
    output = tmp_path / "deep" / "out"
    report = export.export(model, output)
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == ["out"]  # nothing temporary is left
    assert report == read(output / "parity.json")
    assert report["moe_embed"] <= 1e-5
    assert report["torch"] == "not run"
    again = load(output)
    assert (again.encoder, again.moe) == (model.encoder, model.moe)
    assert again.prompts == model.prompts | {"passage": "search_document: "}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    texts = ["Wo ist der Bahnhof?", "x" * 500]
    found, wanted = again.encode(texts, task="query"), model.encode(texts, task="query")
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    assert np.abs(found - model.encode(texts, task="document")).max() > 1e-3
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode


def test_what_sentence_transformers_and_servers_read(model, tmp_path):
    export.export(model, tmp_path / "out")
    out = tmp_path / "out"
    stored = safetensors.numpy.load_file(out / "model.safetensors")
    assert read(out / "config.json")["vocab_size"] == len(stored["embeddings.word_embeddings.weight"])
    assert read(out / "sentence_bert_config.json")["max_seq_length"] == 64
    assert [m["type"].rsplit(".", 1)[1] for m in read(out / "modules.json")] == ["Transformer", "Pooling", "Normalize"]
    pooling = read(out / "1_Pooling" / "config.json")
    assert pooling["pooling_mode_mean_tokens"]
    assert pooling["word_embedding_dimension"] == 32
    sentence = read(out / "config_sentence_transformers.json")
    assert sentence["similarity_fn_name"] == "cosine"
    assert sentence["prompts"] == model.prompts | {"passage": "search_document: "}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in card
    assert "search_query: " in card
    assert "a test model" not in card


def test_tokenizer_json_has_xlm_r_ids():
    tokenizer = small_tokenizer()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    found = export.tokenizer_json(tokenizer.model_bytes)
    vocab = [piece for piece, _ in found["model"]["vocab"]]
    assert vocab[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert vocab[4:-1] == [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    assert vocab[-1] == "<mask>"
    assert len(vocab) == tokenizer.num_ids
    assert {token["content"]: token["id"] for token in found["added_tokens"]}["<mask>"] == len(vocab) - 1
    lowest = min(score for _, score in found["model"]["vocab"][4:-1])
    assert all(score < 6 * lowest for piece, score in found["model"]["vocab"] if piece in ("<s>", "</s>", "<mask>"))


@pytest.mark.parametrize(("options", "words"), [
    ({"model_type": "bpe"}, "no plain unigram"),
    ({"add_dummy_prefix": False}, "blanks"),
    ({"user_defined_symbols": ["search query:"]}, "special piece"),
    ({"user_defined_symbols": ["½"]}, "special piece"),
])  # fmt: skip
def test_a_tokenizer_that_the_format_cannot_say_is_refused(options, words):
    with pytest.raises(config.UserError, match=words):
        export.tokenizer_json(small_tokenizer(**options).model_bytes)


@pytest.mark.parametrize("moe", [config.Moe(num_experts=0), config.Moe(num_experts=4, every=1)])
def test_other_shapes_export_too(moe, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)
    model = small_model(moe=moe)
    assert export.export(model, tmp_path / "out")["moe_embed"] <= 1e-5
    assert load(tmp_path / "out").moe.num_experts == moe.num_experts


def test_a_wrong_layout_is_noticed_and_nothing_is_left(model, tmp_path, monkeypatch):
    right = export.hf_layout.to_tensors

    def swapped(params, **shape):
        tensors = right(params, **shape)
        for name in [name for name in tensors if name.endswith("experts.mlp.w2")]:
            misread = tensors[name].reshape(4, 48, 32).transpose(0, 2, 1).reshape(192, 32)
            tensors[name] = np.ascontiguousarray(misread)
        return tensors

    monkeypatch.setattr(export.hf_layout, "to_tensors", swapped)
    with pytest.raises(config.UserError, match="moe_embed reads other vectors"):
        export.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_earlier_export(model, tmp_path, monkeypatch):
    export.export(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(export, "_model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export(small_model(seed=1), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    export.export(small_model(seed=1), tmp_path / "out")  # an earlier export is replaced
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_foreign_folder_is_refused_or_moved_aside(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(config.UserError, match="is not empty and is no earlier export"):
        export.export(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    export.export(model, tmp_path / "out", force=True)
    assert (tmp_path / "out.bak" / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_numbers_that_are_not_finite_and_a_foreign_tokenizer_are_refused(model, tmp_path):
    model.params["embedding"]["norm"]["bias_D"][3] = np.nan
    with pytest.raises(config.UserError, match=r"not finite, in emb_ln\.bias"):
        export.export(model, tmp_path / "out")
    small = dataclasses.replace(model.encoder, vocab_size=64)
    with pytest.raises(config.UserError, match="ids; the embedding table has 64 rows"):
        export.export(dataclasses.replace(model, encoder=small), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_users_error_is_one_sentence_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "moe_embed.export", f"--model={tmp_path / 'none'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
