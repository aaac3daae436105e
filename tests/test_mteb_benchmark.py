"""Benchmarks by mteb: the means by hand and beside mteb's own table, and what is said where one cannot be run."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import mteb_benchmark
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, save
from moe_embed.model import encoder
from moe_embed.mteb_model import MtebModel
from tests.test_mteb_model import TASK, local_task


def test_means_by_hand():
    scores = {"a": 0.2, "b": 0.4, "c": 0.9}
    found = mteb_benchmark.means(scores, {"a": "Retrieval", "b": "Retrieval", "c": "STS"})
    assert found == {
        "mean": pytest.approx(0.5),
        "mean_of_types": pytest.approx(0.6),
        "types": {"Retrieval": pytest.approx(0.3), "STS": 0.9},
    }


def test_what_cannot_be_run_is_a_sentence(monkeypatch, tmp_path):
    arguments = ["--model=m", "--benchmark=BEIRs", f"--output={tmp_path / 'r.json'}", f"--results={tmp_path}"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[mteb\]\""):
        mteb_benchmark.main(arguments)
    module = types.ModuleType("mteb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    monkeypatch.setitem(sys.modules, "mteb", module)

    def unknown(name):
        raise KeyError(f"'{name}' not found. Did you mean: BEIR?")

    module.get_benchmark = unknown
    with pytest.raises(UserError, match=r"--benchmark=BEIRs: 'BEIRs' not found\. Did you mean: BEIR"):
        mteb_benchmark.main(arguments)
    task = types.SimpleNamespace(metadata=types.SimpleNamespace(name="SciFact", type="Retrieval"))

    def offline(*arguments, **keywords):
        raise ConnectionError("no route to host\nand more")

    module.get_benchmark = lambda name: types.SimpleNamespace(tasks=[task])
    module.ResultCache, module.evaluate = lambda cache_path: None, offline
    monkeypatch.setattr(mteb_benchmark, "mteb_model", lambda path: None)
    with pytest.raises(UserError, match=r"SciFact cannot be fetched: no route to host$"):
        mteb_benchmark.main(arguments)
    of_the_sender = type("HTTPError", (Exception,), {})  # of the package that huggingface_hub sends by
    monkeypatch.setattr("huggingface_hub.errors.HfHubHTTPError", type("HfHubHTTPError", (of_the_sender, OSError), {}))
    for fault, words in ((of_the_sender("no network"), "no network"), (TimeoutError(), "TimeoutError")):
        module.evaluate = lambda *_, fault=fault, **__: (_ for _ in ()).throw(fault)
        with pytest.raises(UserError, match=f"SciFact cannot be fetched: {words}$"):
            mteb_benchmark.main(arguments)
    with pytest.raises(UserError, match="--output"):
        mteb_benchmark.main([*arguments, "--output=no/r.json"])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # other people's software
def test_mteb_runs_it_once_and_has_the_same_means(monkeypatch, tmp_path, capsys):
    import mteb

    c = config_lib.load("configs/demo.py:tiny")
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    model = Model(c.encoder, c.moe, params, tokenizer_lib.read(c.data.tokenizer), {}, None, "test")
    save(model, tmp_path / "model", made_by="a test")
    whole, evaluated = sources.read_task(str(TASK)), []
    queries = dict(list(whole.queries.items())[:20])
    relevance = {query: whole.relevance[query] for query in queries}
    judged = {document for of in relevance.values() for document in of}
    corpus = {name: text for i, (name, text) in enumerate(whole.corpus.items()) if name in judged or i < 60}
    first = local_task(dataclasses.replace(whole, corpus=corpus, queries=queries, relevance=relevance))
    changes = {"name": "Other", "main_score": "recall_at_10", "type": "Reranking"}
    other = type("Other", (type(first),), {"metadata": first.metadata.model_copy(update=changes)})()
    tasks = [first, other]
    benchmark = mteb.Benchmark(name="Two", tasks=tasks)
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: benchmark)
    evaluate = mteb.evaluate
    monkeypatch.setattr(mteb, "evaluate", lambda *a, **k: evaluated.append(evaluate(*a, **k)) or evaluated[-1])
    arguments = [
        f"--model={tmp_path / 'model'}",
        "--benchmark=Two",
        f"--output={tmp_path / 'r.json'}",
        f"--results={tmp_path}",
    ]
    mteb_benchmark.main(arguments)
    found = json.loads((tmp_path / "r.json").read_text())
    theirs = [done.task_results[0].scores["test"][0] for done in evaluated]
    assert found["tasks"] == {
        "LibreOfficeHelpEn": pytest.approx(theirs[0]["ndcg_at_10"], abs=1e-5),
        "Other": pytest.approx(theirs[1]["recall_at_10"], abs=1e-5),
    }
    assert found["types"] == {
        "Retrieval": found["tasks"]["LibreOfficeHelpEn"],
        "Reranking": found["tasks"]["Other"],
    }
    assert found["tasks"]["Other"] != found["tasks"]["LibreOfficeHelpEn"]
    assert found["mean"] == pytest.approx(np.mean(list(found["tasks"].values())))
    assert f"mean of tasks                {100 * found['mean']:6.2f}" in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.rglob("LibreOfficeHelpEn.json"))] == ["LibreOfficeHelpEn.json"]
    monkeypatch.setattr(MtebModel, "encode", None)  # nothing is encoded a second time
    mteb_benchmark.main(arguments)
    assert json.loads((tmp_path / "r.json").read_text())["tasks"] == pytest.approx(found["tasks"], abs=1e-5)
