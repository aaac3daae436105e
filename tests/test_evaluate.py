"""Metrics of a stand-in model whose vectors are known, and what the verb says and writes."""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import evaluate, results_table, retrieval, sharding
from moe_embed.config import UserError
from moe_embed.data import tokenizer
from moe_embed.data.origin import Origin
from moe_embed.data.sources import Task
from moe_embed.load import Model
from moe_embed.model import encoder

TASKS = pathlib.Path(evaluate.__file__).parent / "sample" / "tasks"
TEXTS = ["The cell, the table and the page", "Insert a table: a table has cells", "表を挿入する", "THE page", "margins"]
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS)}
QUERIES = {"a": "the table", "b": "page page insert", "c": "表の挿入", "d": "margins of unknown"}


def task(queries=QUERIES, corpus=CORPUS, name="t", relevant="d1") -> Task:
    return Task(name, corpus, queries, {query: {relevant: 1} for query in queries})


def figures(ndcg: float, recall: float) -> dict:
    return {"ndcg@10": ndcg, "recall@10": recall, "mrr@10": 0.0}


def stand_in(prompts=("query", "document")):
    """A model that gives each text a vector of its own, and remembers what it was asked."""
    asked = []

    def encode(texts, task=None, dim=None, max_length=None, *, progress=False):
        asked.append((task, len(texts)))
        x_ND = np.stack([np.random.default_rng(len(text) * 1000 + ord(text[0])).normal(size=12) for text in texts])
        return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)

    prompt = lambda name: name if name in prompts else None  # noqa: E731
    return types.SimpleNamespace(
        encode=encode,
        prompt=prompt,
        asked=asked,
        mesh=None,
        origin="m (step 3)",
        digest="ab12",
        encoder=types.SimpleNamespace(dim=12),
    )


def test_evaluate_against_a_ranking_by_hand_with_dims():
    model, some = stand_in(), task()
    found = evaluate.evaluate(model, [some], dims=[12, 3])["t"]
    for dim, values in ((12, found), (12, found["dims"]["12"]), (3, found["dims"]["3"])):
        ranks = []
        cut_ND = model.encode(TEXTS)[:, :dim].astype(float)
        cut = dict(zip(CORPUS, cut_ND / np.linalg.norm(cut_ND, axis=1, keepdims=True), strict=True))
        for text in QUERIES.values():
            query_D = model.encode([text])[0, :dim]
            order = sorted(CORPUS, key=lambda name: -float(query_D @ cut[name]))
            ranks.append(order.index("d1") + 1)
        assert values["mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        assert values["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(rank + 1) for rank in ranks]))
    assert found["dims"]["3"] != found["dims"]["12"]
    assert "dims" not in evaluate.evaluate(model, [some])["t"]


def test_prompts_are_used_where_the_model_has_them_and_a_shared_corpus_is_encoded_once():
    other = {**CORPUS, "d5": "another"}
    tasks = [task(name="a"), task(name="b"), task(name="c", corpus=other)]
    model, bare = stand_in(), stand_in(prompts=())
    assert list(evaluate.evaluate(model, tasks)) == ["a", "b", "c"]
    evaluate.evaluate(bare, tasks[:1])
    assert sorted(model.asked) == [("document", 5), ("document", 6), *[("query", 4)] * 3]
    assert sorted(bare.asked) == [(None, 4), (None, 5)]


def test_the_verb_writes_json_and_names_its_faults(tmp_path, monkeypatch, capsys):
    name, output = "libreoffice-help-de", tmp_path / "r.json"
    arguments = ["--model=m", f"--task={TASKS / name}", f"--output={output}"]
    monkeypatch.setattr(evaluate, "load", lambda path: stand_in())
    evaluate.main([*arguments, "--dims=8", "--baseline=bm25"])
    results = json.loads(output.read_text())
    assert list(results) == ["moe_embed", "bm25"]
    assert results["moe_embed"][name].keys() == {
        "ndcg@10",
        "recall@10",
        "mrr@10",
        "interval",
        "queries",
        "seconds",
        "dims",
        "model",
        "task",
        "date",
        "versions",
    }
    assert 0 <= results["moe_embed"][name]["dims"]["8"]["ndcg@10"] < results["bm25"][name]["ndcg@10"] <= 1
    out, err = capsys.readouterr()
    assert name in out
    assert "..." not in out  # what a program may read is figures alone
    found = results["moe_embed"][name]["task"]
    said = [f"encoding {found['documents']:,} documents ...", f"encoding {found['queries']:,} queries ..."]
    assert err.splitlines() == ["reading m ...", *said, "ranking by BM25 ..."]  # no bar where nobody watches
    evaluate.main(arguments)
    assert list(json.loads(output.read_text())) == [name]
    for fault, words in (("--dims=a", "--dims=a"), ("--dims=0", "--dims=0"), ("--dims=13", "13 numbers; .* have 12"),
                         ("--split=dev", "dev"), ("--output=no/r.json", "no/r"), ("--task=x", "x"), ("--task=,", "names no folder")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            evaluate.main([*arguments, fault])


def test_queries_intervals_small_vectors_and_runs(tmp_path):
    found = evaluate.evaluate(stand_in(), [task()], precisions=("int8", "binary"), runs=tmp_path)["t"]
    assert found["queries"].keys() == QUERIES.keys()
    assert np.mean(list(found["queries"].values())) == pytest.approx(found["ndcg@10"])
    assert found["interval"][0] < found["ndcg@10"] < found["interval"][1]
    assert found["precisions"]["int8"] == pytest.approx({m: found[m] for m in retrieval.METRICS}, abs=0.2)
    assert found["precisions"]["binary"] != found["precisions"]["int8"]
    lines = [line.split() for line in (tmp_path / "t.trec").read_text().splitlines()]
    assert len(lines) == len(QUERIES) * len(CORPUS)
    assert [line[3] for line in lines[:5]] == ["1", "2", "3", "4", "5"]
    assert all(float(a[4]) >= float(b[4]) for a, b in itertools.pairwise(lines[:5]))
    read = {q: {line[2]: float(line[4]) for line in lines if line[0] == q} for q in QUERIES}
    assert retrieval.measure(task(), read)["ndcg@10"] == pytest.approx(found["ndcg@10"])


@pytest.mark.parametrize("file", ["queries.jsonl", "corpus.jsonl"])
def test_ids_with_white_space_go_into_no_ranking(tmp_path, file):
    """A line of one is split at white space by whoever reads it."""
    root = small_task(tmp_path, "libreoffice-help-en", documents=30)
    with open(root / file, "a") as lines:
        lines.write('{"_id": "of two words", "text": "a text"}\n')
    if file == "queries.jsonl":  # only queries that are judged are asked
        document = json.loads((root / "corpus.jsonl").read_text("utf-8").splitlines()[0])["_id"]
        with open(root / "qrels" / "test.tsv", "a") as lines:
            lines.write(f"\nof two words\t{document}\t1\n")
    arguments = ["--model=nowhere", f"--task={root}", f"--output={tmp_path / 'r.json'}"]
    with pytest.raises(UserError, match="has the id 'of two words'; TREC's format takes none with white space"):
        evaluate.main([*arguments, f"--runs={tmp_path / 'runs'}"])
    with pytest.raises(UserError, match="holds no model"):
        evaluate.main(arguments)


def small_task(folder: pathlib.Path, name: str, *, documents: int) -> pathlib.Path:
    """The first documents of a shipped task in a folder of their own, one more that is empty, and who asks for them."""
    whole, root = evaluate.read_task(str(TASKS / name)), folder / name
    kept = dict(itertools.islice(whole.corpus.items(), documents)) | {"empty": " "}
    judged = [(q, d, grade) for q, of in whole.relevance.items() for d, grade in of.items() if d in kept]
    (root / "qrels").mkdir(parents=True)
    for file, texts in (("corpus.jsonl", kept), ("queries.jsonl", {q: whole.queries[q] for q, _, _ in judged})):
        (root / file).write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in texts.items()), "utf-8")
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
    (root / "qrels" / "test.tsv").write_text("\n".join(lines))
    return root


def test_with_a_cache_the_figures_are_the_same_to_the_last_digit(tmp_path, monkeypatch, eight_devices):
    """With real vectors, in several chunks, over eight devices; and what was cached is not made again."""
    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh())
    params = encoder.init(c.encoder, c.moe, key=jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    model = Model(c.encoder, c.moe, params, tokenizer.read(c.data.tokenizer), {"document": "d: "}, mesh, "test")
    monkeypatch.setattr(evaluate, "load", lambda path: model)
    monkeypatch.setattr(sys.modules["moe_embed.load"], "CHUNK", 4)
    names = ("xling-libreoffice-help-de-en", "xling-libreoffice-help-fr-en", "libreoffice-help-ja")
    folders = [small_task(tmp_path, name, documents=70) for name in names]  # the first two have one corpus
    arguments = [
        "--model=m",
        f"--task={','.join(map(str, folders))}",
        "--dims=8",
        "--precisions=int8",
        "--baseline=bm25",
    ]
    found = {}
    for name, cache in (
        ("plain", []),
        ("cached", [f"--cache={tmp_path / 'v'}"]),
        ("again", [f"--cache={tmp_path / 'v'}"]),
    ):
        if name == "again":
            monkeypatch.setattr(Model, "encode_stream", None)
        evaluate.main([*arguments, f"--output={tmp_path / name}.json", f"--runs={tmp_path / name}", *cache])
        runs = [path.read_text() for path in sorted((tmp_path / name).iterdir())]
        figures = json.loads((tmp_path / f"{name}.json").read_text())
        assert all(of_task.pop("seconds") > 0 for of_task in figures["moe_embed"].values())
        assert all(
            of_task.pop("date") for of in figures.values() for of_task in of.values()
        )  # all but the time is the same
        found[name] = (json.dumps(figures), runs)
    assert found["plain"] == found["cached"] == found["again"]
    assert [len(run.splitlines()) % 70 for run in found["plain"][1]] == [0, 0, 0]
    assert len(list((tmp_path / "v").iterdir())) == 2
    results = json.loads(found["plain"][0])["moe_embed"][names[2]]
    assert results["ndcg@10"] != results["dims"]["8"]["ndcg@10"] > 0


def test_an_output_names_its_model_and_is_not_lost_in_silence(tmp_path, monkeypatch, capsys):
    output = tmp_path / "r.json"
    arguments = ["--model=m", f"--task={TASKS / 'libreoffice-help-de'}", f"--output={output}"]
    monkeypatch.setattr(evaluate, "load", lambda path: stand_in())
    evaluate.main(arguments)
    assert "will be replaced" not in capsys.readouterr().out
    (found,) = json.loads(output.read_text()).values()
    assert found["model"] == {"name": "m", "loaded": "m (step 3)", "began_with": None, "digest": "ab12"}
    assert set(found["versions"]) == {"moe_embed", "jax", "numpy"}
    evaluate.main(arguments)
    assert (
        f"{output} holds an evaluation of m (step 3), parameters ab12, {found['date'][:10]}; it will be replaced."
        in (capsys.readouterr().out)
    )
    evaluate.main([f"--show={output}"])
    assert capsys.readouterr().out.endswith(f"\nof m (step 3), parameters ab12, {found['date'][:10]}\n")
    other = tmp_path / "other.json"
    other.write_text(output.read_text().replace("m (step 3)", "n (step 9)"))
    evaluate.main([f"--compare={output},{other}"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"first   {output}: m (step 3), parameters ab12, ")
    assert said[1].startswith(f"second  {other}: n (step 9), parameters ab12, ")
    other.write_text(other.read_text().replace(found["task"]["digest"], "0"))
    with pytest.raises(UserError, match="measured libreoffice-help-de on other documents"):
        evaluate.main([f"--compare={output},{other}"])
    output.write_text("notes of mine")
    monkeypatch.setattr(evaluate, "load", None)
    with pytest.raises(UserError, match=r"r\.json exists and is no output of evaluate; name another file"):
        evaluate.main(arguments)
    assert output.read_text() == "notes of mine"


def test_an_unknown_precision_is_said(tmp_path):
    with pytest.raises(UserError, match="--precisions=int4"):
        evaluate.main(
            [
                "--model=m",
                f"--task={TASKS / 'libreoffice-help-de'}",
                "--precisions=int4",
                f"--output={tmp_path / 'x.json'}",
            ]
        )


def test_the_forums_of_cqadupstack_count_as_one_task(tmp_path):
    for name in ("cqadupstack/android", "cqadupstack/english", "scifact"):
        (tmp_path / name / "qrels").mkdir(parents=True)
        (tmp_path / name / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
        (tmp_path / name / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
        (tmp_path / name / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    folders = [tmp_path / "cqadupstack" / "android", tmp_path / "cqadupstack" / "english", tmp_path / "scifact"]
    tasks = [evaluate.read_task(str(folder)) for folder in folders]
    assert [task.name for task in tasks] == ["cqadupstack/android", "cqadupstack/english", "scifact"]
    values = {task.name: figures(ndcg, 0.0) for task, ndcg in zip(tasks, (0.1, 0.3, 0.8), strict=True)}
    assert retrieval.mean_of(values, list(values), "ndcg@10") == pytest.approx(0.5)  # not 0.4
    text = results_table.table({"moe_embed": values})
    cells = {line[:20].strip(): line[20:].split()[0] for line in text.splitlines() if line[20:].split()}
    assert (cells["mean of cqadupstack"], cells["mean monolingual"]) == ("20.0", "50.0")
    evaluate.evaluate(stand_in(), tasks[:1], runs=tmp_path)
    assert (tmp_path / "cqadupstack-android.trec").is_file()


def test_named_tasks_are_found_and_keep_the_name_they_were_asked_by(monkeypatch):
    folder = TASKS / "libreoffice-help-de"
    asked = []

    def find(text, *, folder, split):
        asked.append((text, folder, split))
        return [("BEIRish/de", TASKS / "libreoffice-help-de"), ("BEIRish/en", TASKS / "libreoffice-help-en")]

    monkeypatch.setattr(evaluate.named_tasks, "find", find)
    tasks = evaluate.open_tasks(f"mteb:BEIR(ish, v2),{folder}", downloads="there")
    assert [task.name for task in tasks] == ["BEIRish/de", "BEIRish/en", "libreoffice-help-de"]
    assert asked == [("mteb:BEIR(ish, v2)", "there", None)]
    assert tasks[0].corpus == tasks[2].corpus != tasks[1].corpus
    with pytest.raises(UserError, match="two tasks of one name"):
        evaluate.open_tasks(f"{folder},{folder}")


def test_a_query_that_stands_in_the_corpus_is_not_its_own_answer(tmp_path):
    corpus, queries = {"a": "first", "b": "second", "c": "third"}, {"a": "first"}
    alone = Origin(ignore_identical_ids=True)
    plain = Task("t", corpus, queries, {"a": {"b": 1}})
    run = {"a": {"a": 1.0, "b": 0.5, "c": 0.1}}
    assert evaluate.measured(plain, run)["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert evaluate.measured(dataclasses.replace(plain, origin=alone), run)["ndcg@10"] == 1.0
    evaluate.evaluate(stand_in(), [dataclasses.replace(plain, origin=alone)], runs=tmp_path)
    assert " a " not in (tmp_path / "t.trec").read_text().replace("a Q0", "Q0")


def test_mteb_results_are_written_and_watch_refuses_what_it_does_not_do(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda path: stand_in())
    arguments = ["--model=m", f"--task={TASKS / 'libreoffice-help-de'}", f"--output={tmp_path / 'r.json'}"]
    evaluate.main([*arguments, f"--mteb_results={tmp_path / 'results'}"])
    written = json.loads((tmp_path / "results" / "libreoffice-help-de.json").read_text())
    found = json.loads((tmp_path / "r.json").read_text())["libreoffice-help-de"]
    assert written["scores"]["test"][0]["main_score"] == found["ndcg@10"]
    for flag in ("runs", "mteb_results", "cache"):
        with pytest.raises(UserError, match=rf"--{flag}=.*r\.json/x cannot be made: Not a directory"):
            evaluate.main([*arguments, f"--{flag}={tmp_path / 'r.json' / 'x'}"])
    for flag in ("--baseline=bm25", f"--runs={tmp_path}", f"--mteb_results={tmp_path}"):
        with pytest.raises(UserError, match=f"--watch measures steps, without {flag.partition('=')[0]}"):
            evaluate.main([*arguments, "--watch", flag])


@pytest.mark.parametrize("flag", ["--output", "--cache", "--runs", "--mteb_results"])
def test_what_is_written_here_is_not_written_to_a_bucket(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(evaluate, "load", lambda path: stand_in())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:" / "bucket").mkdir(parents=True)
    arguments = [
        "--model=m",
        f"--task={TASKS / 'libreoffice-help-de'}",
        "--output=r.json",
        f"{flag}=gs://bucket/x.json",
    ]
    with pytest.raises(UserError, match="gs:// is no folder of this machine"):
        evaluate.main(arguments)
    assert not any((tmp_path / "gs:" / "bucket").iterdir())


def test_watch_is_given_a_row_of_means(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(
        evaluate, "watch", lambda root, output, measure, *, tasks: rows.append((measure(stand_in()), tasks))
    )
    names = ["libreoffice-help-de", "libreoffice-help-en"]
    tasks = ",".join(str(TASKS / name) for name in names)
    evaluate.main(["--model=m", f"--task={tasks}", f"--output={tmp_path / 'r.jsonl'}", "--watch", "--dims=8"])
    ((row, found),) = rows
    assert found == names == list(row["tasks"])
    assert row["ndcg@10"] == pytest.approx(np.mean([row["tasks"][name]["ndcg@10"] for name in names]))
    assert row["seconds"] > 0
    assert "queries" not in row["tasks"][names[0]]
    assert "8" in row["tasks"][names[0]]["dims"]
