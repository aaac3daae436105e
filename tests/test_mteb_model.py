"""mteb_model: prompts by mteb's names, true figures, and mteb's own nDCG@10 on a local task beside moe_embed.evaluate's."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest

import moe_embed
from moe_embed import config as config_lib
from moe_embed import mteb_model as mteb_model_function
from moe_embed import sharding
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.sources import read_task
from moe_embed.evaluate import evaluate
from moe_embed.load import Model
from moe_embed.model import encoder
from moe_embed.mteb_model import MtebModel, figures, mteb_model, of_model, prompt_name

TASK = pathlib.Path(moe_embed.__file__).parent / "sample" / "tasks" / "libreoffice-help-en"
PROMPTS = {"query": "search_query: ", "document": "search_document: "}


@pytest.fixture(scope="module")
def model():
    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    return Model(c.encoder, c.moe, params, tokenizer_lib.read(c.data.tokenizer), dict(PROMPTS), mesh, "test")


def metadata(name="NFCorpus", kind="Retrieval"):
    return types.SimpleNamespace(name=name, type=kind)


def side(value):
    return None if value is None else types.SimpleNamespace(value=value)


def test_the_public_name_is_the_function():
    assert moe_embed.mteb_model is mteb_model is mteb_model_function


@pytest.mark.parametrize(
    ("names", "task", "prompt_type", "expected"),
    [
        ("query document", metadata(), "query", "query"),
        ("query document", metadata(), "document", "document"),
        ("query passage", metadata(), "document", "passage"),
        ("passage document", metadata(), "document", "document"),
        ("query", metadata(), "document", None),
        ("query document", metadata("STS17", "STS"), None, None),
        ("query Classification", metadata("Banking77", "Classification"), None, "Classification"),
        ("query classification", metadata("Banking77", "Classification"), None, "classification"),
        ("classification Classification", metadata("Banking77", "Classification"), None, "Classification"),
        ("pair_classification", metadata("X", "PairClassification"), None, "pair_classification"),
        ("Classification", metadata("X", "PairClassification"), None, None),
        ("query Clustering clustering-document", metadata("X", "Clustering"), "document", "clustering-document"),
        ("query Retrieval", metadata(), "query", "Retrieval"),
        ("query NFCorpus NFCorpus-query", metadata(), "query", "NFCorpus-query"),
        ("query NFCorpus NFCorpus-query", metadata(), "document", "NFCorpus"),
        ("", metadata(), "query", None),
    ],
)
def test_a_prompt_goes_by_the_models_own_name_for_it(names, task, prompt_type, expected):
    assert prompt_name(dict.fromkeys(names.split(), "p"), task, side(prompt_type)) == expected


def test_figures_by_hand(model):
    e, m = model.encoder, model.moe
    table = e.vocab_size * e.dim
    layer = 4 * e.dim * e.dim + 4 * e.dim + 4 * e.dim  # attention with biases, two norms
    dense = 2 * e.dim * e.ffn_dim + e.ffn_dim + e.dim
    mixture = lambda experts: m.num_experts * e.dim + experts * 2 * e.dim * e.ffn_dim + e.dim  # noqa: E731
    mixtures = e.num_layers // m.every
    rest = e.dim + 2 * e.dim + e.num_layers * layer + (e.num_layers - mixtures) * dense  # type, first norm
    found = figures(model)
    assert found["n_parameters"] == table + rest + mixtures * mixture(m.num_experts)
    assert found["n_embedding_parameters"] == table
    assert found["n_active_parameters_override"] == rest + mixtures * mixture(m.top_k)
    assert found["memory_usage_mb"] == found["n_parameters"] * 4 / 2**20
    with_head = dataclasses.replace(model, params=model.params | {"head": {"w_DV": np.zeros((2, 3), np.float32)}})
    assert figures(with_head) == found


def test_the_revision_changes_with_what_a_vector_depends_on(model):
    assert model.digest == dataclasses.replace(model, origin="elsewhere").digest
    changed = jax.tree.map(lambda x: x.copy(), model.params)
    jax.tree.leaves(changed)[0].flat[0] += 1e-3
    others = [
        dataclasses.replace(model, params=changed),
        dataclasses.replace(model, prompts={"query": "query: "}),
        dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, dtype="bfloat16")),
    ]
    assert len({model.digest, *(other.digest for other in others)}) == 4


def test_encode_takes_batches_and_gives_rows_in_their_order(model):
    wrapped = MtebModel(model, 8, 16, None)
    texts = ["print a page", "", "表を挿入する", "margins " * 50, " "]
    batches = [{"text": texts[:2], "id": ["a", "b"]}, {"text": texts[2:]}]
    found = wrapped.encode(batches, task_metadata=metadata(), prompt_type=side("query"), batch_size=2)
    full = [0, 2, 3]
    expected = model.encode([texts[i] for i in full], "query", 8, 16)
    np.testing.assert_array_equal(found[full], expected)
    assert np.abs(found[full] - model.encode([texts[i] for i in full], None, 8, 16)).max() > 1e-3  # the prompt matters
    assert not found[[1, 4]].any()
    assert found.dtype == np.float32
    with pytest.raises(UserError, match=r"precision=int8.*--precisions"):
        wrapped.encode(batches, task_metadata=metadata(), precision="int8")
    with pytest.raises(UserError, match="encode_kwargs has turbo"):
        wrapped.encode(batches, task_metadata=metadata(), turbo=True)


def test_without_mteb_it_is_a_sentence(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \"\.\[mteb\]\""):
        of_model(model, name="a/b")


def local_task(task):
    """A BEIR folder as mteb's own kind of retrieval task, without a network."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LibreOfficeHelpEn", type="Retrieval", category="t2t", modalities=["text"], main_score="ndcg_at_10",
            description="headings of LibreOffice's help and their sections", reference=None, bibtex_citation=None,
            dataset={"path": "none", "revision": "shipped"}, eval_splits=["test"], eval_langs=["eng-Latn"],
        )  # fmt: skip

        def load_data(self, num_proc=None, **kwargs):
            rows = lambda texts: datasets.Dataset.from_list([{"id": i, "text": t} for i, t in texts.items()])  # noqa: E731
            data = {"queries": rows(task.queries), "corpus": rows(task.corpus), "relevant_docs": task.relevance}
            self.dataset, self.data_loaded = {"default": {"test": data | {"top_ranked": None}}}, True

    return Local()


def by_mteb(wrapped, task) -> float:
    import mteb

    found = mteb.evaluate(wrapped, local_task(task), cache=None, co2_tracker=False, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]["ndcg_at_10"]


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # other people's software
def test_mteb_measures_what_evaluate_measures(model):
    from mteb.models import EncoderProtocol

    task = read_task(TASK)
    wrapped = of_model(model, name="test/tiny")
    assert isinstance(wrapped, EncoderProtocol)
    expected = evaluate(model, [task])[task.name]["ndcg@10"]
    assert by_mteb(wrapped, task) == pytest.approx(expected, abs=1e-3)
    swapped = dict(zip(PROMPTS, reversed(PROMPTS.values()), strict=True))
    broken = dataclasses.replace(model, prompts=swapped)
    assert abs(by_mteb(of_model(broken, name="test/swapped"), task) - expected) > 2e-3


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")
def test_the_meta_has_true_figures_and_the_cut(model):
    meta = of_model(model, name="test/tiny").mteb_model_meta
    assert (meta.embed_dim, meta.max_tokens) == (model.encoder.dim, model.encoder.max_seq_length)
    assert (meta.framework, meta.use_instructions, meta.experiment_kwargs) == (["JAX"], True, None)
    assert meta.n_active_parameters == figures(model)["n_active_parameters_override"]
    dense = dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=0))
    dense = dataclasses.replace(
        dense, params=jax.tree.map(np.asarray, encoder.init(dense.encoder, dense.moe, key=jax.random.key(0)))
    )
    meta_of_dense = of_model(dense, name="test/dense").mteb_model_meta
    assert (
        meta_of_dense.n_active_parameters == figures(dense)["n_parameters"] - figures(dense)["n_embedding_parameters"]
    )
    short = of_model(model, name="test/tiny", embed_dim=8, max_length=16)
    assert short.mteb_model_meta.experiment_kwargs == {"embed_dim": 8, "max_length": 16}
    assert short.encode([{"text": ["x"]}], task_metadata=metadata()).shape == (1, 8)
    assert short.mteb_model_meta.embed_dim == 8
    for wrong, words in (
        ({"embed_dim": 33}, "embed_dim=33"),
        ({"max_length": 2}, "max_length=2"),
        ({"name": "x"}, "name='x'"),
    ):
        with pytest.raises(UserError, match=words):
            of_model(model, **{"name": "test/tiny"} | wrong)


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")
def test_similarity_is_the_cosine():
    x_ND, y_CD = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    expected = unit(x_ND) @ unit(y_CD).T
    wrapped = MtebModel(None, 5, 8, None)
    np.testing.assert_allclose(wrapped.similarity(x_ND, y_CD), expected, atol=1e-6)
    np.testing.assert_allclose(wrapped.similarity_pairwise(x_ND, y_CD), np.diag(expected), atol=1e-6)
    assert np.abs(expected - x_ND @ y_CD.T).max() > 0.1
