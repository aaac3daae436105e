"""Names to BEIR folders: beside a stand-in of mteb, and through mteb itself with a stand-in of its hub."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import evaluate, named_tasks, sharding
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.origin import Origin
from moe_embed.load import Model
from moe_embed.model import encoder
from moe_embed.mteb_model import of_model

CORPUS = [
    {"id": "d1", "title": "Tables", "text": "insert a row"},
    {"id": "d2", "title": "", "text": "print a page"},
    {"id": "d3", "title": None, "text": "表を挿入する\nzweite Zeile"},
]
QUERIES = [{"id": "q1", "text": "rows"}, {"id": "q2", "text": "printing"}, {"id": "q3", "text": "judged by nobody"}]
RELEVANCE = {"q1": {"d1": 2, "gone": 1}, "q2": {"d2": 1, "d3": 0}, "away": {"d1": 1}}


class StandIn:
    """As much of an mteb task as is used, in mteb's names."""

    is_aggregate = False
    skip_first_result = False
    ignore_identical_ids = False

    def __init__(
        self, name, *, kind="Retrieval", metric="ndcg_at_10", subsets=("default",), splits=("test",), fails=None
    ):
        languages = {subset: ["deu-Latn"] for subset in subsets}
        self.metadata = types.SimpleNamespace(
            name=name, type=kind, main_score=metric, modalities=["text"], eval_splits=list(splits), revision="abc",
            hf_subsets_to_langscripts=languages,
        )  # fmt: skip
        self.hf_subsets, self.eval_splits, self.fails, self.loaded = list(subsets), list(splits), fails, 0

    def load_data(self):
        self.loaded += 1
        if self.fails:
            raise self.fails
        data = {"corpus": CORPUS, "queries": QUERIES, "relevant_docs": RELEVANCE, "top_ranked": None}
        self.dataset = {subset: dict.fromkeys(self.eval_splits, data) for subset in self.hf_subsets}

    def convert_v1_dataset_format_to_v2(self, num_proc):
        assert num_proc is None


@pytest.fixture
def mteb(monkeypatch):
    """An `mteb` whose tasks and benchmarks a test writes into two dictionaries."""
    module = types.ModuleType("mteb")
    module.tasks, module.benchmarks, module.asked = {}, {}, []

    def get_task(name, hf_subsets=None, eval_splits=None):
        module.asked.append((name, hf_subsets, eval_splits))
        if name not in module.tasks:
            raise KeyError(f"'{name}' not found. Did you mean: 'SciFact'?")
        return module.tasks[name]

    def get_benchmark(name):
        if name not in module.benchmarks:
            raise KeyError(f"'{name}' not found and no similar keys were found.")
        return types.SimpleNamespace(tasks=module.benchmarks[name])

    module.get_task, module.get_benchmark = get_task, get_benchmark
    monkeypatch.setitem(sys.modules, "mteb", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.26.24")
    return module


def add(mteb, name, **facts):
    mteb.tasks[name] = StandIn(name, **facts)
    return mteb.tasks[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b", ["a", "b"]),
        (" a, ,b ", ["a", "b"]),
        ("mteb:MTEB(eng, v2),x", ["mteb:MTEB(eng, v2)", "x"]),
        ("x,mteb:MTEB(eng, v2)", ["x", "mteb:MTEB(eng, v2)"]),
        ("odd(name,x", ["odd(name", "x"]),
        ("", []),
    ],
)
def test_parts(text, expected):
    assert named_tasks.parts(text) == expected


def test_a_task_is_fetched_once_and_read_as_a_folder(mteb, tmp_path):
    task, said = add(mteb, "SciFact"), []
    ((name, folder),) = named_tasks.find("mteb:SciFact", folder=tmp_path, say=said.append)
    assert (name, folder) == ("SciFact", tmp_path / "SciFact" / "default" / "test")
    assert mteb.asked[-1] == ("SciFact", ["default"], ["test"])
    assert len(said) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["test"]
    read = sources.read_task(str(folder))
    assert read.corpus == {"d1": "Tables insert a row", "d2": "print a page", "d3": "表を挿入する\nzweite Zeile"}
    assert read.queries == {"q1": "rows", "q2": "printing"}
    assert read.relevance == {"q1": {"d1": 2, "gone": 1}, "q2": {"d2": 1, "d3": 0}}
    assert read.origin == Origin("SciFact", "default", "test", ("deu-Latn",), "abc", "2.26.24")
    assert named_tasks.find("mteb:SciFact", folder=tmp_path, say=said.append) == [(name, folder)]
    assert (task.loaded, len(said)) == (1, 1)


def test_a_task_that_two_fetch_at_once_is_there_once(mteb, tmp_path, monkeypatch):
    add(mteb, "SciFact")
    place, write = tmp_path / "SciFact" / "default" / "test", named_tasks.write

    def slower(folder, *rows, **facts):
        monkeypatch.setattr(named_tasks, "write", write)
        named_tasks._fetch("SciFact", "default", "test", place)  # the other one
        write(folder, *rows, **facts)

    monkeypatch.setattr(named_tasks, "write", slower)
    assert named_tasks.find("mteb:SciFact", folder=tmp_path, say=lambda sentence: None) == [("SciFact", place)]
    assert [path.name for path in place.parent.iterdir()] == ["test"]
    assert sources.read_task(str(place)).queries

    def in_the_way(folder, *rows, **facts):
        write(folder, *rows, **facts)
        (tmp_path / "other").write_text("a file")

    monkeypatch.setattr(named_tasks, "write", in_the_way)
    with pytest.raises(OSError, match="other"):
        named_tasks._fetch("SciFact", "default", "test", tmp_path / "other")


def test_languages_parts_and_benchmarks_go_by_mtebs_own_lists(mteb, tmp_path):
    add(mteb, "MIRACLRetrieval", subsets=("de", "yo"), splits=("dev",))
    forum, quiet = add(mteb, "Gis"), lambda sentence: None
    mteb.tasks["Forums"] = types.SimpleNamespace(
        metadata=types.SimpleNamespace(name="Forums"), is_aggregate=True, tasks=[forum, add(mteb, "Tex")]
    )
    names = lambda text: [name for name, _ in named_tasks.find(text, folder=tmp_path, say=quiet)]  # noqa: E731
    assert names("mteb:MIRACLRetrieval") == ["MIRACLRetrieval/de", "MIRACLRetrieval/yo"]
    assert names("mteb:MIRACLRetrieval/yo") == ["MIRACLRetrieval/yo"]
    assert names("mteb:Forums") == ["Forums/Gis", "Forums/Tex"]
    sts, said = add(mteb, "STS17", kind="STS"), []
    mteb.benchmarks["Some(eng, v2)"] = [mteb.tasks["Forums"], mteb.tasks["MIRACLRetrieval"], sts]
    found = named_tasks.find("mteb:Some(eng, v2)", folder=tmp_path, say=said.append)
    assert [name for name, _ in found] == ["Forums/Gis", "Forums/Tex", "MIRACLRetrieval/de", "MIRACLRetrieval/yo"]
    assert said == ["mteb:Some(eng, v2): 2 tasks of retrieval; 1 of another kind are left out."]
    assert sts.loaded == 0
    assert forum.loaded == 1  # "Forums/Gis" and "Gis" are one folder
    assert [path.name for path in tmp_path.iterdir() if path.name == "Gis"]
    assert sources.read_task(str(dict(found)["MIRACLRetrieval/yo"])).origin.split == "dev"


@pytest.mark.parametrize(
    ("text", "split", "words"),
    [
        ("mteb:Nothing", None, "no task and no benchmark mteb:Nothing.*Did you mean: 'SciFact'"),
        ("mteb:Langs/fr", None, "Langs has the parts de, en"),
        ("mteb:Langs", "dev", "--split=dev: Langs has test"),
        ("mteb:Splits", None, "Splits has the splits dev, test; choose one by --split"),
        ("mteb:STS17", None, "is STS of text, not retrieval of texts"),
        ("mteb:Maps", None, "is measured by map, not by nDCG@10"),
        ("mteb:Kinds", None, "has no task of text retrieval"),
        ("mteb:Away", None, r"mteb:Away \(default, test\) cannot be fetched: no route to host$"),
        ("mteb:Silent", None, "cannot be fetched: TimeoutError$"),
    ],
)
def test_what_cannot_be_had_is_a_sentence(mteb, tmp_path, text, split, words):
    add(mteb, "Langs", subsets=("de", "en"))
    add(mteb, "Splits", splits=("dev", "test"))
    mteb.benchmarks["Kinds"] = [add(mteb, "STS17", kind="STS")]
    add(mteb, "Maps", metric="map")
    add(mteb, "Away", fails=ConnectionError("no route to host\nand a stack of reasons"))
    add(mteb, "Silent", fails=TimeoutError())
    with pytest.raises(UserError, match=words):
        named_tasks.find(text, folder=tmp_path, split=split, say=lambda sentence: None)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_split_can_be_chosen(mteb, tmp_path):
    add(mteb, "Splits", splits=("dev", "test"))
    ((_, folder),) = named_tasks.find("mteb:Splits", folder=tmp_path, split="dev", say=lambda sentence: None)
    assert sources.read_task(str(folder)).origin.split == "dev"
    assert mteb.asked[-1] == ("Splits", ["default"], ["dev"])


@pytest.mark.parametrize("row", [{"id": "a\tb", "text": "x"}, {"id": "a", "text": [1]}, {"id": 3, "text": "x"}])
def test_rows_that_are_no_texts_leave_no_folder(mteb, tmp_path, monkeypatch, row):
    task = add(mteb, "Odd")
    monkeypatch.setitem(globals(), "CORPUS", [*CORPUS, row])
    with pytest.raises(UserError, match="Odd has the row"):
        named_tasks.find("mteb:Odd", folder=tmp_path, say=lambda sentence: None)
    assert list((tmp_path / "Odd" / "default").iterdir()) == []
    assert task.loaded == 1


def test_an_instruction_goes_behind_its_query(tmp_path):
    queries = [
        {"id": "q", "text": "rows", "instruction": "of tables"},
        {"id": "p", "text": "rows", "instruction": None},
    ]
    named_tasks.write(tmp_path, CORPUS, queries, {"q": {"d1": 1}, "p": {"d1": 1}}, origin=Origin("t"))
    assert sources.read_task(str(tmp_path)).queries == {"q": "rows of tables", "p": "rows"}


def test_without_mteb_it_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mteb:SciFact is found through mteb.*pip install -e \"\.\[mteb\]\""):
        named_tasks.find("mteb:SciFact", folder=tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """The class by which mteb reads its hub, in whose place one part of it all stands; what it was asked for."""
    import datasets

    asked = []

    class Loader:
        def __init__(self, hf_repo, revision, trust_remote_code=False, split="test", config=None):
            asked.append((hf_repo, revision, split, config))

        def load(self, num_proc=None):
            texts = ["print a page", "insert a row", "margins of a page", "表を挿入する", "the table of contents"]
            rows = [{"id": f"t{i}", "title": "", "text": text} for i, text in enumerate(texts)]
            queries = [{"id": f"t{i}", "text": texts[i]} for i in (0, 2, 4)]  # as in ArguAna: they stand in the corpus
            relevance = {"t0": {"t2": 1}, "t2": {"t0": 1, "t4": 1}, "t4": {"t1": 1}}
            make = datasets.Dataset.from_list
            return {"corpus": make(rows), "queries": make(queries), "relevant_docs": relevance, "top_ranked": None}

    monkeypatch.setattr("mteb.abstasks.retrieval.RetrievalDatasetLoader", Loader)
    return asked


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # other people's software
def test_mtebs_own_names_and_lists(hub, tmp_path):
    def names(text):
        return [name for name, _ in named_tasks.find(text, folder=tmp_path, say=lambda sentence: None)]

    assert names("mteb:SciFact") == ["SciFact"]
    assert [asked[0] for asked in hub] == ["mteb/scifact"]
    assert len(names("mteb:NanoBEIR")) == 13
    assert len(names("mteb:MIRACLRetrieval")) == 18
    assert names("mteb:MIRACLRetrieval/de") == ["MIRACLRetrieval/de"]
    assert len(names("mteb:CQADupstackRetrieval")) == 12
    beir = names("mteb:BEIR")
    assert len(beir) == 14 + 12
    assert len({name.partition("/")[0] for name in beir}) == 15
    assert (tmp_path / "MSMARCO" / "default" / "dev" / "qrels" / "dev.tsv").is_file()
    assert len(names("mteb:MTEB(eng, v2)")) == 10
    for wrong, words in (("mteb:SciFacts", "SciFact"), ("mteb:MIRACLRetrieval/xx", "has the parts ar, bn"),
                         ("mteb:STS17", "is STS"), ("mteb:NanoBEIRs", "NanoBEIR")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            names(wrong)
    origin = sources.read_task(str(tmp_path / "MIRACLRetrieval" / "de" / "dev")).origin
    assert origin.languages == ("deu-Latn",)
    assert not origin.ignore_identical_ids
    assert json.loads((tmp_path / "ArguAna" / "default" / "test" / "task.json").read_text())["ignore_identical_ids"]


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")
def test_mteb_measures_a_named_task_as_we_do(hub, tmp_path):
    import mteb

    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    model = Model(c.encoder, c.moe, params, tokenizer_lib.read(c.data.tokenizer), {}, mesh, "test")
    (task,) = evaluate.open_tasks("mteb:ArguAna", downloads=str(tmp_path))
    ours = evaluate.evaluate(model, [task])["ArguAna"]
    result = mteb.evaluate(
        of_model(model, name="test/tiny"),
        mteb.get_task("ArguAna"),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    theirs = result.task_results[0].scores["test"][0]
    for metric, name in (("ndcg@10", "ndcg_at_10"), ("recall@10", "recall_at_10"), ("mrr@10", "mrr_at_10")):
        assert ours[metric] == pytest.approx(theirs[name], abs=1e-4)
    itself = dataclasses.replace(task, origin=dataclasses.replace(task.origin, ignore_identical_ids=False))
    assert abs(evaluate.evaluate(model, [itself])["ArguAna"]["ndcg@10"] - theirs["ndcg_at_10"]) > 0.1
