"""What the report asks the model: of a small one with random weights, and where there is no model or no data."""

import dataclasses
import pathlib
import re
import shutil

import numpy as np
import pytest

from moe_embed import expert_maps, geometry, model_sections, report_sections, run_texts
from tests import written_runs
from tests.test_charts import attributes
from tests.test_page import Read, read_link


def ask(workdir: pathlib.Path, **options):
    written_runs.write(workdir, **options)
    (run,) = report_sections.read_runs([workdir])
    return model_sections.ask(run)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return ask(tmp_path_factory.mktemp("report") / "run", steps=3)


def links(made):
    return [read_link(a["href"]) for a in attributes(made, "a")]


def test_maps_of_languages_and_sources(asked):
    made = links(model_sections.maps([asked]))
    assert [table[0][1:] for table in made] == [["de", "en", "ru"]] * 2 + [["one", "two"]] * 2
    share_NRE = expert_maps.shares(asked.model, asked.texts.languages)
    ratio_NE, _ = expert_maps.against_mean(share_NRE[:, 1])
    np.testing.assert_allclose([[float(x) for x in row[1:]] for row in made[1][1:]], ratio_NE.T, rtol=1e-4, atol=1e-5)
    assert made[0] != made[1]


def test_how_vectors_lie(asked):
    made = model_sections.shape_of_vectors([asked])
    pairs = asked.texts.pairs["two"]
    query_ND = asked.model.encode([pair.query for pair in pairs], "query")
    document_ND = asked.model.encode([pair.document for pair in pairs], "document")
    cells = made[made.index('class="word">two</td>') :].split("</td>")[1:6]
    found = [float(cell.partition(">")[2]) for cell in cells]
    alone_ND = np.unique(document_ND, axis=0)
    expected = [
        40,
        geometry.alignment(query_ND, document_ND),
        geometry.uniformity(alone_ND),
        geometry.effective_rank(alone_ND),
        16,
    ]
    assert found == pytest.approx(expected, rel=1e-3)
    cosines, spectrum = links(made)
    assert sum(float(row[1]) for row in cosines[1:]) == pytest.approx(1, abs=1e-4)
    assert len(spectrum) == 17


def test_one_pair_has_no_others(asked):
    vector_ND = np.eye(1, 4)
    assert [line.name for line in model_sections._histograms(asked.run, vector_ND, vector_ND)] == ["run: pairs"]
    two_ND = np.eye(2, 4)
    names = [line.name for line in model_sections._histograms(asked.run, two_ND, two_ND)]
    assert names == ["run: pairs", "run: others"]


def test_a_matrix_of_translations(asked):
    made = model_sections.translations([asked])
    (table,) = links(made)
    pairs = asked.texts.translations
    assert len(table) - 1 == len(pairs) == len(table[0]) - 1 == 30
    first = asked.model.encode([pairs[0].query], "query") @ asked.model.encode([pairs[4].document], "document").T
    assert float(table[1][5]) == pytest.approx(first.item(), abs=1e-4)
    assert table[1][1] != table[1][2]
    mean = np.mean([[float(x) for x in row[1:]] for row in table[1:]])
    assert f"; the middle is the mean of all, {mean:.2f}</text>" in made


def test_a_sample_of_the_training_pairs_says_so(asked):
    made = model_sections.shape_of_vectors([asked]) + model_sections.translations([asked])
    assert "These figures are of a sample of the training pairs;" in made
    assert re.search("the own translation is the nearest for [0-9]+% of 30 of the training pairs<", made)
    data = dataclasses.replace(asked.run.config.data, held_out=0.1)
    some_out = dataclasses.replace(asked.run, name="b", config=dataclasses.replace(asked.run.config, data=data))
    assert model_sections.sampled([some_out]) == "the training pairs and the held-out ones"
    assert (
        model_sections.sampled([asked.run, some_out])
        == "the training pairs (run), the training pairs and the held-out ones (b)"
    )


def test_no_picture_where_there_is_nothing(tmp_path):
    dense = ask(tmp_path / "dense", experts=0, objective="mlm", steps=3)
    assert model_sections.maps([dense]).count("dense is dense: it has no experts.") == 1
    assert "there is no alignment" in model_sections.shape_of_vectors([dense])
    built_in = model_sections.translations([dense])
    assert "these sentences come with this program" in built_in
    assert "training pairs" not in built_in
    assert len(links(built_in)[0]) - 1 == len(run_texts.PARALLEL)
    (tmp_path / "dense/one.jsonl").unlink()
    shutil.rmtree(tmp_path / "dense/checkpoints")
    gone = model_sections.ask(dense.run)
    for section in (model_sections.maps, model_sections.shape_of_vectors, model_sections.translations):
        made = section([gone])
        assert "The model of dense cannot be opened" in made
        assert not [tag for tag, _, _ in Read(made).elements if tag == "svg"]
    half = model_sections.Asked(gone.run, model=dense.model, no_texts=gone.no_texts)
    assert "The data of dense cannot be read" in model_sections.shape_of_vectors([half])
    assert "svg" in model_sections.translations([half])
