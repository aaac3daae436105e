"""A run at a glance: sparklines and the picture of the experts, by hand and for a real tiny model."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import report, sharding
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib

SAMPLE = pathlib.Path(report.__file__).parent / "sample"


def test_sparkline_by_hand():
    assert report.sparkline(np.arange(8.0)) == "▁▂▃▄▅▆▇█"
    assert report.sparkline(np.arange(8.0)[::-1]) == "█▇▆▅▄▃▂▁"
    assert report.sparkline(np.array([3.0, 3.0])) == "▁▁"
    assert report.sparkline(np.array([5.0])) == "▁"
    halves = report.sparkline(np.repeat([0.0, 1.0], 300))
    assert halves == "▁" * 30 + "█" * 30
    assert len(report.sparkline(np.arange(61.0))) == report.WIDTH == 60


def test_training(tmp_path):
    assert report.training(tmp_path) == f"{tmp_path} has no metrics yet."
    rows = [{"step": i, "loss": 4.0 - i, "accuracy": i / 4, "tokens_per_second": 1000.0} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report.training(tmp_path).splitlines()
    assert lines[0] == "4 steps"
    assert [line.split()[0] for line in lines[1:]] == ["loss", "accuracy", "tokens_per_second"]
    assert lines[1].endswith("█▅▃▁ 4.000 -> 1.000")
    (tmp_path / "evaluations.jsonl").write_text('{"step": 2, "ndcg": 0.25}\n{"step": 4, "ndcg": 0.5}\n')
    assert report.training(tmp_path).splitlines()[4].endswith("▁█ 0.250 -> 0.500")


def test_experts_by_hand():
    chosen = {"de": np.array([[3.0, 1.0]]), "ja": np.array([[2.0, 6.0]])}  # shares 3/4, 1/4 and 1/4, 3/4
    model = types.SimpleNamespace(
        prompt=lambda name: None, encode_with_sums=lambda texts, task: (None, chosen[texts[0]])
    )
    lines = report.experts(model, {"de": ["de"], "ja": ["ja"]}).splitlines()
    assert lines[1].startswith("mixture layer 1:")
    assert "normalised mutual information 0.19" in lines[1]  # 3/4 log2(3/2) + 1/4 log2(1/2) = 0.189, over one bit
    assert lines[2].split() == ["de", "ja", "share", "of", "all"]
    assert lines[3].split() == ["e0", "▓", "50.0%"]  # log2(3/2) = 0.58; log2(1/2) = -1 stays blank
    assert lines[4].split() == ["e1", "▓", "50.0%"]
    assert lines[3].index("▓") < lines[4].index("▓")
    chosen["ja"] = chosen["de"]
    assert "information 0.00" in report.experts(model, {"de": ["de"], "ja": ["ja"]})


def test_experts_of_a_tiny_model():
    tokenizer, moe = tokenizer_lib.read(SAMPLE / "tokenizer.model"), config_lib.Moe(num_experts=4, top_k=2)
    encoder = config_lib.Encoder(vocab_size=16_064, num_layers=4, dim=8, num_heads=2, ffn_dim=16, max_seq_length=32)
    shapes = jax.eval_shape(lambda: encoder_lib.init(encoder, moe, key=jax.random.key(0)))  # slow to compile
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    model = Model(encoder, moe, params, tokenizer, {"document": "search_document: "}, mesh, "a test")
    texts = {"de": ["Seitenränder ändern", "Tabelle einfügen"], "ja": ["表を挿入する", "余白"], "ru": ["поля страницы"]}
    picture = report.experts(model, texts)
    lines = picture.splitlines()
    assert [line[:15] for line in lines if "mixture" in line] == ["mixture layer 1", "mixture layer 2"]
    assert max(map(len, lines)) <= 100
    shares = [float(line.split()[-1].rstrip("%")) for line in lines if line.startswith("  e")]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(200, abs=0.5)
    other = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    assert report.experts(Model(encoder, moe, other, tokenizer, model.prompts, mesh, "a test"), texts) != picture


def test_texts_by_language(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TEXTS", 2)
    rows = [("ru", "r"), ("de", "a"), ("de-en", "x"), ("de", "b"), ("", "y"), ("de", "c")]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"q": "q", "d": text, "lang": lang}) + "\n" for lang, text in rows))
    loss, data = (
        types.SimpleNamespace(objective="contrastive"),
        {"sources": (str(path),), "query": "q", "document": "d", "max_bad_fraction": 0.0},
    )
    config = types.SimpleNamespace(data=types.SimpleNamespace(**data), loss=loss)
    texts = report.texts_by_language(config)
    assert list(texts.items()) == [("de", ["a", "b"]), ("ru", ["r"])]
    path.write_text('{"text": "a", "lang": "de"}\n')  # what masked language modelling reads
    loss.objective = "mlm"
    assert report.texts_by_language(config) == {"de": ["a"]}


def test_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"is no workdir: it has no workdir\.json"):
        report.main([f"--workdir={tmp_path}"])


def test_several_runs_become_a_table_by_group(tmp_path):
    for name, ndcg in (("a-seed0", 0.5), ("a-seed1", 0.52), ("b-seed0", 0.4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.jsonl").write_text(
            f'{{"step": 0, "ndcg": 0.1}}\n{{"step": 9, "ndcg": {ndcg}}}\n'
        )
    lines = report.comparison([tmp_path / name for name in ("a-seed0", "a-seed1", "b-seed0")]).splitlines()
    assert lines[1].split() == ["a", "51.0", "1.41", "50.0,", "52.0"]
    assert lines[2].split() == ["b", "40.0", "-", "40.0"]
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="has no evaluations"):
        report.comparison([tmp_path / "c", tmp_path / "a-seed0"])
