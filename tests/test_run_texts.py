"""The sample of a run's data: languages, sources, pairs, translations."""

import json
import types

import numpy as np
import pytest

from moe_embed import run_texts
from moe_embed.config import UserError


def config_of(*paths, objective="contrastive"):
    data = {"sources": tuple(map(str, paths)), "query": "q", "document": "d", "max_bad_fraction": 0.0}
    return types.SimpleNamespace(data=types.SimpleNamespace(**data), loss=types.SimpleNamespace(objective=objective))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_languages_and_translations(tmp_path, monkeypatch):
    monkeypatch.setattr(run_texts, "TEXTS", 2)
    rows = [("ru", "r"), ("de", "a"), ("de-en", "x"), ("de", "b"), ("", "y"), ("de", "c")]
    lines(tmp_path / "p.jsonl", [{"q": "q", "d": text, "lang": lang} for lang, text in rows])
    sample = run_texts.read(config_of(tmp_path / "p.jsonl"))
    assert list(sample.languages.items()) == [("de", ["a", "c"]), ("ru", ["r"])]  # the first and the last of three
    assert [pair.document for pair in sample.translations] == ["x"]
    assert [pair.document for pair in sample.pairs["p"]] == [text for _, text in rows]
    assert sample.sources == {"p": ["r", "c"]}


@pytest.mark.parametrize(
    ("lang", "crosses"),
    [("de-en", True), ("deu-eng", True), ("pt-BR", False), ("zh-Hant", False), ("es-419", False), ("de-", False)],
)
def test_a_region_or_a_script_is_no_second_language(tmp_path, lang, crosses):
    lines(tmp_path / "p.jsonl", [{"q": "q", "d": "a", "lang": lang}])
    sample = run_texts.read(config_of(tmp_path / "p.jsonl"))
    assert list(sample.languages) == ([] if crosses else [lang])
    assert [pair.document for pair in sample.translations] == (["a"] if crosses else [])
    texts = run_texts.read(config_of(tmp_path / "p.jsonl", objective="mlm"))
    assert texts.languages == ({} if crosses else {lang: ["a"]})


def test_texts_of_a_source_that_is_sorted_by_language_are_of_all_its_languages(tmp_path):
    rows = [{"q": "q", "d": f"{lang} {i}", "lang": lang} for lang in ("de", "en", "ru") for i in range(400)]
    lines(tmp_path / "p.jsonl", rows)
    (texts,) = run_texts.read(config_of(tmp_path / "p.jsonl")).sources.values()
    assert len(texts) == run_texts.TEXTS
    for lang in ("de", "en", "ru"):
        assert sum(text.startswith(lang) for text in texts) == pytest.approx(run_texts.TEXTS / 3, abs=2)


def test_the_sources_of_a_folder_share_the_pairs(tmp_path, monkeypatch):
    """A path may hold several: `prepare` makes a folder of them."""
    monkeypatch.setattr(run_texts, "PAIRS", 12)
    parts = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for part in parts:
        lines(part, [{"q": "q", "d": f"{part.stem} {i}"} for i in range(20)])
    one = run_texts.sources.read_source
    several = lambda path, **options: [one(str(part), **options) for part in parts]  # noqa: E731
    monkeypatch.setattr(run_texts.sources, "read_sources", several)
    sample = run_texts.read(config_of(tmp_path / "a.jsonl"))
    assert [len(some) for some in sample.pairs.values()] == [4, 4, 4]


def test_texts_of_masked_language_modelling(tmp_path):
    lines(tmp_path / "p.jsonl", [{"d": "a", "lang": "de"}, {"d": "b", "lang": ""}])
    sample = run_texts.read(config_of(tmp_path / "p.jsonl", objective="mlm"))
    assert (sample.languages, sample.sources) == ({"de": ["a"]}, {"p": ["a", "b"]})
    assert (sample.pairs, sample.translations) == ({}, [])


def test_translations_come_from_the_source_that_is_most_alike_each_document_once(tmp_path):
    lines(tmp_path / "long.jsonl", [{"q": f"frage {i}", "d": f"answer {i} " * 20, "lang": "de-en"} for i in range(9)])
    short = [
        {"q": f"{lang} Titel {i}", "d": f"a title {i}", "lang": f"{lang}-en"}
        for i in range(40)
        for lang in ("de", "fr")
    ]
    lines(tmp_path / "short.jsonl", short)
    found = run_texts.read(config_of(tmp_path / "long.jsonl", tmp_path / "short.jsonl")).translations
    assert len(found) == run_texts.TRANSLATIONS == len({pair.document for pair in found})
    assert {pair.lang for pair in found} == {"de-en", "fr-en"}
    assert all(pair.query.endswith(pair.document.removeprefix("a title")) for pair in found)


def test_the_built_in_sentences_are_translations_of_each_other():
    assert (
        len({row[1] for row in run_texts.PARALLEL})
        == len({row[2] for row in run_texts.PARALLEL})
        == len(run_texts.PARALLEL)
    )


def test_spread_and_short_names():
    np.testing.assert_array_equal(run_texts.spread(100, 3), [0, 49, 99])
    assert list(run_texts.spread(0, 3)) == []
    assert run_texts.short_names(["a/x.jsonl.gz", "b/y.csv"]) == {"a/x.jsonl.gz": "x", "b/y.csv": "y"}
    assert run_texts.short_names(["a/x.csv", "b/x.csv"]) == {"a/x.csv": "a/x.csv", "b/x.csv": "b/x.csv"}


def test_data_that_is_gone(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_texts.read(config_of(tmp_path / "gone.jsonl"))
