"""The verb export without torch: what is written, that it reads back, that nothing half-done or foreign is touched."""

import dataclasses
import io
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece

import moe_embed
from moe_embed import checkpoint, config, export, hf_folder, hf_layout, sharding
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load, write_description
from moe_embed.model import encoder as encoder_lib
from tests import hf_tiny

SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"
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


def small_model(*, moe=None, tokenizer=None, seed=0, with_head=False, **shape) -> Model:
    """A random encoder whose biases, norms and shared bias are not what they start as, so that a lost one shows."""
    tokenizer, moe = tokenizer or small_tokenizer(), moe or config.Moe(num_experts=4, top_k=2)
    rows = -(-tokenizer.num_ids // 64) * 64
    encoder = config.Encoder(vocab_size=rows, num_layers=4, dim=32, num_heads=4, ffn_dim=48, max_seq_length=64, **shape)
    rng = np.random.default_rng(seed)
    params = encoder_lib.init(encoder, moe, key=jax.random.key(seed), with_head=with_head)
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


LEARNED = {"position": "learned", "num_positions": 66, "position_offset": 2}
FROM_ROW_0 = {"position": "learned", "num_positions": 64, "num_token_types": 2, "norm_epsilon": 1e-12}
FORMS = {
    "dense": (config.Moe(num_experts=0), {}, "nomic_bert"),
    "every layer": (config.Moe(num_experts=4, every=1), {}, "nomic_bert"),
    "bert": (config.Moe(num_experts=0), FROM_ROW_0, "bert"),
    "xlm-roberta": (config.Moe(num_experts=0), LEARNED, "xlm-roberta"),
    "moe_embed": (config.Moe(num_experts=4), LEARNED, "moe_embed"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sentencepiece", "word pieces"])
def test_every_form_exports_and_reads_back_bit_for_bit(form, kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)
    moe, shape, model_type = FORMS[form]
    tokenizer = None
    if kind == "word pieces":
        tokenizer = tokenizer_lib.JsonTokenizer(hf_tiny.word_pieces(export.TEXTS), origin="a test")
    model = small_model(moe=moe, tokenizer=tokenizer, with_head=True, **shape)
    if (form, kind) == ("xlm-roberta", "word pieces"):  # its positions are counted from <pad>, which is 0 here
        with pytest.raises(config.UserError, match="cannot be written as XLM-R"):
            export.export(model, tmp_path / "out")
        return
    report = export.export(model, tmp_path / "out")
    assert report["moe_embed"] <= 1e-5
    out, err = capsys.readouterr()
    assert "the head of masked language modelling is not exported" in out
    assert [line.split()[0] for line in err.splitlines()] == ["writing", "comparing"]  # before each long part
    out, native = tmp_path / "out", model_type in ("bert", "xlm-roberta")
    files = FILES - ({"modeling_moe_embed.py"} if native else set())
    assert {path.name for path in out.iterdir()} == files - ({"sentencepiece.bpe.model"} if tokenizer else set())
    assert read(out / "config.json")["model_type"] == model_type
    assert ("auto_map" in read(out / "config.json")) == (not native)
    again = load(out)
    assert (again.encoder, again.moe) == (model.encoder, model.moe)
    assert set(again.params) == {"embedding", "unit"}
    ours = {name: model.params[name] for name in again.params}
    assert jax.tree.structure(again.params) == jax.tree.structure(ours)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours))
    assert again.tokenizer.model_bytes == model.tokenizer.model_bytes
    monkeypatch.setattr(export, "_parity", lambda *_, **__: report)  # measured above
    export.export(again, tmp_path / "again")  # and the second export is the first, byte for byte
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    for name in files - {"modeling_moe_embed.py", "parity.json", "README.md", "1_Pooling"}:
        if (out / name).exists():
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


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
        patch.setattr(export.model_card, "model_card", lambda *_, **__: 1 / 0)
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
    (tmp_path / "out" / "model.gguf").write_text("made from the export")
    with pytest.raises(config.UserError, match=r"it also holds model\.gguf"):
        export.export(model, tmp_path / "out")
    (tmp_path / "out" / "model.gguf").unlink()
    (tmp_path / "out" / "onnx").mkdir()
    (tmp_path / "out" / "onnx" / "model_qint8.onnx").write_text("made from the export")
    with pytest.raises(config.UserError, match=r"it also holds onnx/model_qint8\.onnx"):
        export.export(model, tmp_path / "out")
    (tmp_path / "out" / "onnx" / "model_qint8.onnx").unlink()
    with open(tmp_path / "out" / "README.md", "a") as card:
        card.write("Evaluated by hand: fine.\n")
    with pytest.raises(config.UserError, match=r"as export left it \(README\.md changed\)"):
        export.export(model, tmp_path / "out")
    export.export(model, tmp_path / "out", force=True)
    assert "by hand" in (tmp_path / "out.bak2" / "README.md").read_text()
    prompts = tmp_path / "out" / "config_sentence_transformers.json"
    written = prompts.read_text()
    prompts.write_text(written.replace("search_query: ", "query: "))
    assert prompts.read_text() != written
    with pytest.raises(config.UserError, match=r"as export left it \(config_sentence_transformers\.json changed\)"):
        export.export(model, tmp_path / "out")
    prompts.write_text(written)
    export.export(model, tmp_path / "out")
    parity = read(tmp_path / "out" / "parity.json")
    (tmp_path / "out" / "parity.json").write_text(json.dumps({k: v for k, v in parity.items() if k != "files"}))
    with pytest.raises(config.UserError, match=r"says what its files were"):
        export.export(model, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out.bak")
    with pytest.raises(config.UserError, match="is not empty"):
        export.export(model, tmp_path / "link")


def test_a_failure_at_the_very_end_keeps_the_new_export(model, tmp_path, monkeypatch):
    export.export(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    whole = shutil.rmtree

    def halfway(path, *rest, **options):  # ctrl-C while what was there is deleted
        if old := list(pathlib.Path(path).rglob("model.safetensors")):
            old[0].unlink()
            raise KeyboardInterrupt
        whole(path, *rest, **options)

    monkeypatch.setattr("shutil.rmtree", halfway)
    with pytest.raises(KeyboardInterrupt):
        export.export(small_model(seed=1), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_mount_point_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(config.UserError, match="out is a mount point"):
        export.export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_file_patched_by_hand_is_somebodys_work(model, tmp_path):
    export.export(model, tmp_path / "out")
    with open(tmp_path / "out" / export.MODEL_FILE, "a") as file:
        file.write("# faster on my machine\n")
    with pytest.raises(config.UserError, match=r"as export left it \(modeling_moe_embed\.py changed\)"):
        export.export(model, tmp_path / "out")


@pytest.mark.parametrize("flags", [(), ("--force",)])
def test_the_model_that_is_read_is_not_replaced(model, tmp_path, monkeypatch, flags):
    export.export(model, tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    monkeypatch.setattr(export, "load", lambda *_, **__: pytest.fail("work was done"))
    for name in ("m", "link", "x/../m"):
        with pytest.raises(config.UserError, match="is the model that is read; it would be replaced"):
            export.main([f"--model={tmp_path / 'm'}", f"--output={tmp_path / name}", *flags])
    with pytest.raises(config.UserError, match="gs:// is no folder of this machine"):
        export.main([f"--model={tmp_path / 'm'}", "--output=gs://b/out", *flags])
    with pytest.raises(pytest.fail.Exception):
        export.main([f"--model={tmp_path / 'm'}", f"--output={tmp_path / 'other'}"])


def test_the_card_names_the_folder_or_the_repository(model, tmp_path):
    texts = [f"{text} {i}" for i in range(4) for text in export.TEXTS]
    export.export(model, tmp_path / "out", calibration_texts=texts)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# out\n" in card
    assert 'SentenceTransformer("out", trust' in card
    export.export(model, tmp_path / "out", calibration_texts=texts, name="acme/m")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# acme/m\n" in card
    assert 'SentenceTransformer("acme/m", trust' in card
    assert 'hf_hub_download("acme/m", "calibration.json")' in card
    assert not any(
        f"{before}out" in card for before in ('"', "# ", "=", "`")
    )  # nor does the folder's name stand elsewhere


def test_what_is_pushed_has_the_repositorys_name_and_replaces_an_earlier_export(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(export, "load", lambda *_, **__: small_model())
    report = {"moe_embed": 0.0, "torch": "not run"}
    monkeypatch.setattr(export, "export", lambda *_, **given: asked.update(given) or report)
    monkeypatch.setattr(export.push, "push", lambda *_, **given: asked.update(given) or "address")
    export.main(["--model=m", f"--output={tmp_path / 'out'}", "--push=acme/m"])
    assert (asked["name"], asked["replaces"]) == ("acme/m", export.FILES)
    export.main(["--model=m", f"--output={tmp_path / 'out'}"])
    assert not asked["name"]


def test_facts_and_weights_are_of_one_step(tmp_path, monkeypatch):
    """A run that is still training: each look finds a newer step."""
    c = config.load("configs/demo.py:tiny")
    params = jax.tree.map(np.asarray, encoder_lib.init(c.encoder, c.moe, key=jax.random.key(0)))
    (tmp_path / "w").mkdir()
    write_description(tmp_path / "w", c, tokenizer_lib.read(c.data.tokenizer), prompts={})

    def train_on() -> None:
        step = len(looks) + 1
        state = {"step": step, "params": jax.tree.map(lambda x: x * step, params)}
        checkpoint.save(tmp_path / "w" / "checkpoints", state, facts={}, keep=9)

    looks, newest, found = [], checkpoint.newest_verified, {}

    def look(folder, **options):
        step = newest(folder, **options)
        looks.append(step)
        train_on()
        return step

    train_on()
    monkeypatch.setattr(checkpoint, "newest_verified", look)
    report = {"moe_embed": 0.0, "torch": "not run"}
    monkeypatch.setattr(export, "export", lambda model, *_, **given: found.update(given, model=model) or report)
    export.main([f"--model={tmp_path / 'w'}", f"--output={tmp_path / 'out'}"])
    assert f"(step {found['facts'].steps})" in found["model"].origin
    assert found["facts"].steps in looks
    ours, theirs = (jax.tree.leaves(jax.tree.map(np.asarray, p)) for p in (found["model"].params, params))
    assert all(np.array_equal(x, y * found["facts"].steps) for x, y in zip(ours, theirs, strict=True))
    assert not all(np.array_equal(x, y * (found["facts"].steps + 1)) for x, y in zip(ours, theirs, strict=True))


def test_onnx_is_refused_without_its_packages_and_where_others_write_it(model, tmp_path, monkeypatch):
    with pytest.raises(config.UserError, match=r"--onnx needs .*\[deploy\]"):
        export.export(model, tmp_path / "out", onnx=True)
    monkeypatch.setattr(export, "_torch_is_here", lambda: True)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name)
    plain = small_model(moe=config.Moe(num_experts=0), position="learned", num_positions=66, position_offset=0)
    with pytest.raises(config.UserError, match=r"--onnx writes models with their own torch file.*optimum"):
        export.export(plain, tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
    export._check_onnx("nomic_bert")
    export._check_onnx("moe_embed")


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
    reading, error = done.stderr.splitlines()
    assert reading.startswith("reading ")
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_verb_says_which_form_it_chose(form, tmp_path, capsys, monkeypatch):
    moe, shape, model_type = FORMS[form]
    monkeypatch.setattr(export, "load", lambda path, *, step: small_model(moe=moe, **shape))
    monkeypatch.setattr(export, "export", lambda *_, **__: {"moe_embed": 0.0, "torch": "not run"})
    export.main(["--model=m", f"--output={tmp_path / 'out'}"])
    out, err = capsys.readouterr()
    assert f"wrote {tmp_path / 'out'}: {export.FORMS[model_type]}\n" in out
    assert err == "reading m ...\n"
    assert set(export.FORMS) == {"nomic_bert", "bert", "xlm-roberta", "moe_embed"}


@pytest.mark.slow
def test_full_size_exports_and_reads_back_bit_for_bit(tmp_path, monkeypatch):
    """475,292,928 parameters. Peak memory of this process and the seconds are in the captured output."""
    monkeypatch.setattr(export, "_torch_is_here", lambda: False)
    tokenizer = tokenizer_lib.read(SAMPLE / "tokenizer.model")
    encoder = config.Encoder(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=512)
    mesh = sharding.make_mesh(config.Mesh(data=1), devices=jax.devices()[:1])
    params = jax.tree.map(np.asarray, encoder_lib.init(encoder, config.Moe(), key=jax.random.key(0)))
    model = Model(encoder, config.Moe(), params, tokenizer, {"query": "search_query: "}, mesh, "full size")
    start = time.perf_counter()
    report = export.export(model, tmp_path / "out")
    print(
        f"{time.perf_counter() - start:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
    assert report["moe_embed"] <= 1e-5
    stored = hf_folder.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert len(stored) == 148
    assert sum(tensor.size for tensor in stored.values()) == 475_292_928
    assert "of which 305,423,616 are active" in (tmp_path / "out" / "README.md").read_text()
    assert {name: tensor.shape for name, tensor in stored.items()} == hf_layout.tensor_shapes(encoder, config.Moe())
    del stored
    again = hf_folder.read_folder(tmp_path / "out")
    assert (again.encoder, again.moe) == (encoder, config.Moe())
    assert jax.tree.structure(again.params) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
    again.params["unit"]["1"]["moe"]["w_down_REFD"][5, 7, 3071, 767] += 1
    assert not jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
