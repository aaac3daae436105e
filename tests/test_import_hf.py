"""The verb on a tiny BERT folder written here by hand: what it writes is that model, and every refusal is one sentence."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from moe_embed import config as config_lib
from moe_embed import import_hf, load
from moe_embed.config import UserError
from moe_embed.data import sources, vocabulary
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from tests import hf_tiny

SAMPLE = pathlib.Path(tokenizer_lib.__file__).parent.parent / "sample"
TEXTS = ["Tabelle", "Wie ändere ich die Seitenränder?", "表を挿入する", "How do I change the page margins? " * 3]
D, F, LAYERS, HEADS, ROWS, POSITIONS = 8, 12, 2, 2, 16_010, 40  # 16,002 ids and a few rows more, as XLM-R has
CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": ROWS,
    "num_attention_heads": HEADS, "intermediate_size": F, "max_position_embeddings": POSITIONS, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
}  # fmt: skip


def bert_tensors(*, head: bool = False) -> dict[str, np.ndarray]:
    """transformers' names and shapes, random numbers; a pooler, which no vector depends on."""
    rng = np.random.default_rng(0)
    t = {f"embeddings.{kind}_embeddings.weight": rng.normal(size=(rows, D))
         for kind, rows in (("word", ROWS), ("position", POSITIONS), ("token_type", 2))}  # fmt: skip
    shapes = {"embeddings.LayerNorm": (D,), "pooler.dense": (D, D)}
    for i in range(LAYERS):
        name = f"encoder.layer.{i}."
        shapes |= {f"{name}attention.self.{part}": (D, D) for part in ("query", "key", "value")}
        shapes |= {f"{name}attention.output.dense": (D, D), f"{name}attention.output.LayerNorm": (D,)}
        shapes |= {f"{name}intermediate.dense": (F, D), f"{name}output.dense": (D, F), f"{name}output.LayerNorm": (D,)}
    for name, shape in shapes.items():
        t[f"{name}.weight"], t[f"{name}.bias"] = rng.normal(size=shape), rng.normal(size=shape[:1])
    if head:
        t = {f"bert.{name}": array for name, array in t.items()}
        for name, shape in (("transform.dense.weight", (D, D)), ("transform.dense.bias", D), ("bias", ROWS),
                            ("transform.LayerNorm.weight", D), ("transform.LayerNorm.bias", D)):  # fmt: skip
            t[f"cls.predictions.{name}"] = rng.normal(size=shape)
    return {name: array.astype(np.float32) for name, array in t.items()}


def write_folder(path, tensors=None, *, prompts=None, config=CONFIG) -> pathlib.Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "sentencepiece.bpe.model").write_bytes((SAMPLE / "tokenizer.model").read_bytes())
    safetensors.numpy.save_file(bert_tensors() if tensors is None else tensors, path / "model.safetensors")
    if prompts is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hf") / "bert")


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("model") / "d"
    import_hf.main([f"--model={folder}", f"--output={output}", "--query_prompt=query: ", "--document_prompt=passage: "])
    return output


@pytest.fixture(scope="module")
def texts():
    """Real headings and their translations."""
    pairs = sources.read_source(str(SAMPLE / "pairs" / "titles.jsonl.gz")).pairs[::40]
    return [text for pair in pairs for text in (pair.query, pair.document)]


@pytest.fixture(scope="module")
def file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::2]), "utf-8")
    return path


def bert_by_hand(t: dict, ids: np.ndarray) -> np.ndarray:
    """The mean of BERT's last states, of unit length, as slowly as it can be said (arXiv 1810.04805)."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    words, places, types = (t[f"embeddings.{k}_embeddings.weight"] for k in ("word", "position", "token_type"))
    x = norm(words[ids].astype(np.float64) + places[: len(ids)] + types[0], "embeddings.LayerNorm")
    size = D // HEADS
    for i in range(LAYERS):
        name = f"encoder.layer.{i}."
        q, k, v = (dense(x, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for h in (slice(a, a + size) for a in range(0, D, size)):
            weights = np.exp(q[:, h] @ k[:, h].T / math.sqrt(size))
            mixed[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h]
        x = norm(x + dense(mixed, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm")
        up = dense(x, f"{name}intermediate.dense")
        up = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = norm(x + dense(up, f"{name}output.dense"), f"{name}output.LayerNorm")
    return x.mean(0) / np.linalg.norm(x.mean(0))


def test_what_is_written_is_the_model(imported):
    model, t = load(imported), bert_tensors()
    assert model.prompts == {"query": "query: ", "document": "passage: "}
    assert (model.encoder.position, model.encoder.max_seq_length) == ("learned", POSITIONS)
    ids = model.tokenizer.encode(TEXTS, prompt="query: ", max_length=POSITIONS)[0]
    expected = np.stack([bert_by_hand(t, row) for row in ids])
    found = model.encode(TEXTS, "query")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    t["embeddings.position_embeddings.weight"] = np.roll(t["embeddings.position_embeddings.weight"], 2, axis=0)
    assert np.abs(np.stack([bert_by_hand(t, row) for row in ids]) - found).max() > 1e-2


def test_the_summary(folder, tmp_path, capsys):
    import_hf.main([f"--model={folder}", f"--output={tmp_path / 'd'}", "--query_prompt=query: "])
    out = capsys.readouterr().out
    params = sum(array.size for name, array in bert_tensors().items() if not name.startswith("pooler"))
    for words in ("model type  bert: 2 layers, dim 8", f"parameters  {params:,}", f"learned, {POSITIONS} rows",
                  f"max_seq_length, {POSITIONS} tokens", "SentencePiece, 16,002 ids", "prompts     query 'query: '",
                  "mlm head    none", "left out    pooler.dense.bias, pooler.dense.weight\n"):  # fmt: skip
        assert words in out
    assert "made_by" in json.loads((tmp_path / "d" / "workdir.json").read_text())


def test_no_prompts_is_a_warning(folder, tmp_path, capsys):
    import_hf.main([f"--model={folder}", f"--output={tmp_path / 'd'}"])
    assert "prompts     none: the folder names none and no --query_prompt" in capsys.readouterr().out
    assert load(tmp_path / "d").prompts == {}


def test_prompts_the_folder_has_come_first(tmp_path):
    found = {"query": "Q: ", "document": "", "clustering": "C: "}
    given = {"query": "Q: ", "document": "D: "}
    together = {"query": "Q: ", "document": "D: ", "clustering": "C: "}
    assert import_hf.merge_prompts(found, given, origin="F") == together  # an empty prompt is none
    assert import_hf.merge_prompts({}, given, origin="F") == given
    assert import_hf.merge_prompts(found, {}, origin="F") == found
    with pytest.raises(UserError, match="--query_prompt='query: ' disagrees with F, which has 'Q: '; leave it out"):
        import_hf.merge_prompts(found, {"query": "query: "}, origin="F")
    folder = write_folder(tmp_path / "hf", prompts=found)
    import_hf.main([f"--model={folder}", f"--output={tmp_path / 'd'}", "--document_prompt=D: "])
    assert load(tmp_path / "d").prompts == together


def test_a_head_comes_along(file, tmp_path, capsys):
    tensors = bert_tensors(head=True)
    folder = write_folder(tmp_path / "hf", tensors, config=CONFIG | {"architectures": ["BertForMaskedLM"]})
    import_hf.main([f"--model={folder}", f"--output={tmp_path / 'd'}", f"--prune_vocab={file}", "--keep=3000"])
    assert "mlm head    kept" in capsys.readouterr().out
    model = load(tmp_path / "d")
    old_V = old_ids(load(folder).tokenizer, file, 3000)
    bias_V = np.asarray(model.params["head"]["b_V"])
    assert bias_V.shape == (model.encoder.vocab_size,) == (3_008,)
    np.testing.assert_array_equal(bias_V[: len(old_V)], tensors["cls.predictions.bias"][old_V])


def old_ids(tokenizer, file, keep: int, prompts=()) -> np.ndarray:
    count_V = vocabulary.count(tokenizer, vocabulary.read_texts(str(file)))
    return vocabulary.prune(tokenizer, count_V, keep=keep, prompts=prompts).old_V


def test_pruned_vectors_of_texts_of_kept_pieces(folder, imported, texts, file, tmp_path, capsys):
    prompts = ["--query_prompt=query: ", "--document_prompt=passage: "]
    import_hf.main(
        [f"--model={folder}", f"--output={tmp_path / 'd'}", f"--prune_vocab={file},{file}", "--keep=2500", *prompts]
    )
    out = capsys.readouterr().out
    assert "16,002 ids to 2,502" in out
    assert "2,560 x 8 are the table of pieces" in out
    whole, pruned = load(imported), load(tmp_path / "d")
    old_V = old_ids(whole.tokenizer, file, 2500, whole.prompts.values())
    texts = texts[:400]
    ids = whole.tokenizer.encode(texts, prompt="query: ", max_length=999)[0]
    unchanged = np.array([np.isin(one, old_V).all() for one in ids])
    assert 50 < unchanged.sum() < 350
    before, after = whole.encode(texts, "query"), pruned.encode(texts, "query")
    np.testing.assert_allclose(before[unchanged], after[unchanged], atol=1e-6)  # other neighbours in a row
    assert np.abs(before[~unchanged] - after[~unchanged]).max() > 1e-2


def test_rotary_drops_the_table_and_says_what_it_costs(folder, imported, tmp_path, capsys):
    import_hf.main([f"--model={folder}", f"--output={tmp_path / 'd'}", "--position=rotary"])
    out = capsys.readouterr().out
    assert "rotary, base 10000" in out
    assert "xling-libreoffice-help-de-en nDCG@10 goes from" in out
    assert f"configs/nomic_v2/mlm.py with --init_from={tmp_path / 'd'}." in out
    model = load(tmp_path / "d")
    assert (model.encoder.position, model.encoder.num_positions, model.encoder.rotary_base) == ("rotary", 0, 10_000)
    assert import_hf.to_rotary(load(imported), base=1e5).encoder.rotary_base == 1e5  # as the public code's MLM
    assert "position_PD" not in model.params["embedding"]
    np.testing.assert_array_equal(model.params["embedding"]["word_VD"], load(imported).params["embedding"]["word_VD"])
    assert np.abs(model.encode(TEXTS) - load(imported).encode(TEXTS)).max() > 1e-2


def test_a_change_of_nothing_costs_nothing(imported):
    model = load(imported)
    c = import_hf.cost(model, model)
    assert c.ndcg[0] == c.ndcg[1] > 0
    assert c.cosine == pytest.approx(1, abs=1e-6)
    assert c.found == 1
    vectors = model.encode(list(sources.read_corpus(import_hf.TASK / "corpus.jsonl").values()), "document")
    others = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
    assert c.num_documents == len(vectors)
    assert c.cosine_of_others == pytest.approx(others.mean(), abs=1e-5)


def test_a_model_folder_needs_no_import(imported, tmp_path):
    assert "config.json" in refuse(imported, tmp_path)


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "moe_embed.import_hf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}, check=False)
    return done.returncode, done.stderr


def refuse(folder, tmp_path, *arguments: str) -> str:
    """The sentence; nothing is written."""
    output = tmp_path / "refused"
    with pytest.raises(UserError) as error:
        import_hf.main([f"--model={folder}", f"--output={output}", *arguments])
    assert not output.exists()
    return str(error.value)


def test_exit_2_with_one_sentence(tmp_path):
    tensors = bert_tensors()
    del tensors["encoder.layer.1.output.dense.bias"]
    folder = write_folder(tmp_path / "hf", tensors)
    code, said = run(f"--model={folder}", f"--output={tmp_path / 'd'}")
    assert (code, said) == (2, "error: tensor encoder.layer.1.output.dense.bias is missing.\n")
    assert not (tmp_path / "d").exists()


def test_pickled_weights(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights, which can run code" in refuse(folder, tmp_path)


@pytest.fixture(scope="module")
def rotary_folder(tmp_path_factory):
    """A NomicBert with a WordPiece tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "nomic"
    hf_tiny.write_folder(path, dataclasses.replace(hf_tiny.NOMIC, vocab_size=128), hf_tiny.MOE)
    return path


def test_learned_positions_of_a_rotary_model(rotary_folder, tmp_path):
    assert "has rotary positions and no table of learned ones" in refuse(rotary_folder, tmp_path, "--position=learned")
    assert "belongs to --position=rotary" in refuse(rotary_folder, tmp_path, "--rotary_base=1e5")
    already = refuse(rotary_folder, tmp_path, "--rotary_base=1e5", "--position=rotary")
    assert "has rotary positions already, of base 10000; leave --rotary_base out" in already
    assert "must be a positive number" in refuse(rotary_folder, tmp_path, "--rotary_base=0", "--position=rotary")


def test_a_wordpiece_vocabulary_is_not_pruned(rotary_folder, file, tmp_path):
    said = refuse(rotary_folder, tmp_path, f"--prune_vocab={file}", "--keep=40")
    assert said == f"--prune_vocab cuts SentencePiece models; {rotary_folder} has a tokenizer.json."


def test_experts_and_rotary_positions_come_as_they_are(rotary_folder, tmp_path, capsys):
    import_hf.main([f"--model={rotary_folder}", f"--output={tmp_path / 'd'}", "--position=rotary"])
    out = capsys.readouterr().out
    assert "model type  nomic_bert" in out
    assert "3 experts, 2 active, every 2 layers" in out
    assert "tokenizer   tokenizer.json" in out
    assert "cost" not in out
    np.testing.assert_allclose(load(tmp_path / "d").encode(["what"]), load(rotary_folder).encode(["what"]), atol=1e-6)


@pytest.mark.parametrize("argument", ["--keep=3000", "--prune_vocab=texts.jsonl"])
def test_half_of_a_pruning(folder, tmp_path, argument):
    assert "--prune_vocab=TEXTS and --keep=N go together" in refuse(folder, tmp_path, argument)


def test_faults_of_a_pruning(folder, file, tmp_path):
    assert "none.jsonl does not exist" in refuse(folder, tmp_path, "--prune_vocab=none.jsonl", "--keep=9000")
    assert "names no file" in refuse(folder, tmp_path, "--prune_vocab=,", "--keep=9000")
    assert "--keep=5 is too few" in refuse(folder, tmp_path, f"--prune_vocab={file}", "--keep=5")


def test_an_output_that_is_taken(folder, imported, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no earlier model folder"):
        import_hf.main([f"--model={tmp_path / 'no such model'}", f"--output={tmp_path / 'taken'}"])
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    import_hf.main([f"--model={folder}", f"--output={imported.parent / 'again'}"])
    import_hf.main([f"--model={folder}", f"--output={imported.parent / 'again'}"])  # its own, replaced
    assert load(imported.parent / "again").prompts == {}


def test_no_model(tmp_path):
    assert "config.json" in refuse(tmp_path / "none", tmp_path)


def test_a_rotary_model_may_read_more_and_a_learned_one_may_not():
    encoder = config_lib.Encoder(vocab_size=64, num_layers=1, dim=8, num_heads=2, ffn_dim=8, max_seq_length=16)
    model = Model(encoder, config_lib.Moe(num_experts=0), {}, None, {}, None, "m")
    assert import_hf.read_at_most(model, 2048).encoder.max_seq_length == 2048
    learned = dataclasses.replace(encoder, position="learned", num_positions=18, position_offset=2)
    learned = dataclasses.replace(model, encoder=learned)
    assert import_hf.read_at_most(learned, 16).encoder.max_seq_length == 16
    with pytest.raises(UserError, match="more than the 16 positions"):
        import_hf.read_at_most(learned, 17)
    with pytest.raises(UserError, match="leaves no room"):
        import_hf.read_at_most(model, 2)
