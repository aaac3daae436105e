"""Which pairs are kept out, what is searched for, what follows from the number of pairs, and the sentence at the end."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import held_out, retrieval, train
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import Source
from moe_embed.load import read_description
from tests import tiny


def source(pairs, path="p.csv") -> Source:
    return Source(path, list(pairs), 0)


def single(count: int, first: int = 0) -> list[Pair]:
    return [Pair(f"query {i}", f"document {i}") for i in range(first, first + count)]


def test_a_tenth_is_out_and_nothing_is_in_both():
    pairs = single(500)
    (kept,), task = held_out.split([source(pairs)], share=0.1)
    assert len(task.queries) == 100  # a tenth would be too few to say anything
    assert len(kept.pairs) == 400
    assert len(held_out.split([source(single(2_000))], share=0.1)[1].queries) == 200
    assert len(held_out.split([source(single(100))], share=0.1)[1].queries) == 20
    assert not set(task.queries.values()) & {pair.query for pair in kept.pairs}
    assert set(task.corpus.values()) == {pair.document for pair in pairs}
    text = lambda q: (task.queries[q], [task.corpus[d] for d in task.relevance[q]])  # noqa: E731
    assert all(text(q) == (f"query {n}", [f"document {n}"]) for q in task.queries for n in [task.queries[q].split()[1]])
    places = [pairs.index(pair) for pair in kept.pairs]
    assert places == sorted(places)


def test_the_choice_is_by_text():
    pairs = single(300)
    out = lambda pairs: set(held_out.split([source(pairs)], share=0.1)[1].queries.values())  # noqa: E731
    assert out(pairs) == out(pairs[::-1])
    assert len(out(pairs) & out(pairs + single(30, first=300))) >= 55


def test_pairs_that_share_a_text_stay_together():
    rng = np.random.default_rng(0)
    pairs = [
        Pair(f"q{rng.integers(150)}", f"d{rng.integers(150)}", id=f"i{i // 2}" if i < 20 else "") for i in range(200)
    ]
    kept, task = held_out.split([source(pairs[:120]), source(pairs[120:])], share=0.1)
    kept = [pair for of in kept for pair in of.pairs]
    out = [pair for pair in pairs if pair not in kept]
    assert len(kept) + len(out) == len(pairs)
    assert out
    assert not {pair.document for pair in kept} & {pair.document for pair in out}
    assert not {pair.query for pair in kept} & {pair.query for pair in out}
    assert not {pair.id for pair in kept if pair.id} & {pair.id for pair in out if pair.id}
    judged = {(task.queries[q], task.corpus[d]) for q, of in task.relevance.items() for d in of}
    assert {d for _, d in judged} == {pair.document for pair in out}


def test_a_text_is_one_text_as_query_and_as_document():
    """Questions that are copies of questions: each is a pair's query and another pair's document."""
    pairs = [Pair(f"{i}, {j}", f"{i}, {j + 1}") for i in range(30) for j in range(3)]
    (kept,), task = held_out.split([source(pairs)], share=0.1)
    trained = {text for pair in kept.pairs for text in (pair.query, pair.document)}
    asked = {task.corpus[d] for of in task.relevance.values() for d in of} | set(task.queries.values())
    assert asked
    assert not trained & asked
    assert len(kept.pairs) % 3 == 0


def test_a_held_out_text_is_no_hard_negative():
    """As mined: each pair has the documents of five others, and one that is nobody's; the least likely to be kept out last."""
    pairs = [Pair(p.query, p.document, (*(f"document {(i + j) % 100}" for j in range(1, 6)), f"only negative {i}", "query 7"),
                  scores=(9.0, *map(float, range(1, 8)))) for i, p in enumerate(single(100))]  # fmt: skip
    said = []
    (kept,), task = held_out.split([source(pairs)], share=0.1, say=said.append)
    texts = {task.corpus[d] for of in task.relevance.values() for d in of} | set(task.queries.values())
    found = {text for pair in kept.pairs for text in pair.negatives}
    assert len(task.queries) == 20
    assert not found & texts
    dropped, before_of = 0, {pair.query: pair for pair in pairs}
    for pair in kept.pairs:
        before = before_of[pair.query]
        expected = [(text, x) for text, x in zip(before.negatives, before.scores[1:], strict=True) if text not in texts]
        assert list(zip(pair.negatives, pair.scores[1:], strict=True)) == expected
        assert (pair.query, pair.document, pair.scores[0]) == (before.query, before.document, 9.0)
        dropped += 7 - len(expected)
    assert dropped > 20
    assert said == [f"negatives   {dropped} of 560 are texts of held-out pairs: left out"]
    assert {text for pair in pairs for text in pair.negatives} - {"query 7"} <= set(task.corpus.values())
    # the perturbed sibling: negatives that no held-out query asks for stay, and nothing is said
    apart = [Pair(p.query, p.document, (f"only negative {i}",)) for i, p in enumerate(single(100))]
    (kept,), _ = held_out.split([source(apart)], share=0.1, say=said.append)
    assert len(said) == 1
    assert all(len(pair.negatives) == 1 for pair in kept.pairs)


def test_a_group_that_is_most_of_the_data_is_no_sample():
    pairs = [Pair(f"query {i}", "the same") for i in range(90)] + single(10, first=100)
    (kept,), task = held_out.split([source(pairs)], share=0.1)
    assert 1 <= len(task.queries) <= 20
    assert len(kept.pairs) >= 80


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([source(single(1))], r"^p\.csv has a single pair: none can be kept out"),
        ([source([Pair("a", "b")] * 50)], "50 pairs that all share"),
        ([source([Pair(f"q{i}", "b") for i in range(50)])], "50 pairs that all share"),
        ([source(single(1)), source(single(1, first=5), "two.csv")], "all of its pairs"),
    ],
)
def test_what_cannot_be_split_is_said(given, words):
    with pytest.raises(UserError, match=words):
        held_out.split(given, share=0.5)


def test_a_large_corpus_is_cut(monkeypatch):
    monkeypatch.setattr(held_out, "MOST_DOCUMENTS", 60)
    monkeypatch.setattr(held_out, "MOST_QUERIES", 20)
    monkeypatch.setattr(held_out, "FEW_QUERIES", 20)
    _, task = held_out.split([source(single(500))], share=0.1)
    assert (len(task.queries), len(task.corpus)) == (20, 60)
    assert all(d in task.corpus for of in task.relevance.values() for d in of)


@pytest.mark.parametrize(
    ("num_pairs", "batch", "steps"), [(9, 2, 14), (200, 16, 38), (2_000, 128, 47), (100_000, 256, 1_172)]
)
def test_the_data_decides_what_is_left_open(num_pairs, batch, steps):
    c = tiny.config(data={"held_out": 0.1, "batch_size": 0}, run={"steps": 0}, optim={"warmup_steps": 0})
    found = held_out.fit(c, num_pairs=num_pairs)
    assert (found.data.batch_size, found.run.steps, found.optim.warmup_steps) == (batch, steps, steps // 10)
    set_ = tiny.config(data={"held_out": 0.1, "batch_size": 8}, run={"steps": 5}, optim={"warmup_steps": 3})
    assert held_out.fit(set_, num_pairs=num_pairs) == set_


def test_before_and_after_become_a_sentence(tmp_path):
    before = {f"q{i}": x for i, x in enumerate(np.random.default_rng(0).random(100))}
    held_out.remember(tmp_path, before)
    length = {"steps": 24, "warmup_steps": 2}
    said = held_out.conclude(tmp_path, {q: x + 0.1 for q, x in before.items()}, **length)
    assert said.startswith(
        "the trained model is better than what it began with by 10.0 points of nDCG@10 (95 % interval"
    )
    written = json.loads((tmp_path / held_out.FILE).read_text())
    assert (written["before"], written["verdict"]) == (before, said)
    assert "No query scores otherwise" not in said
    same = held_out.conclude(tmp_path, dict(reversed(before.items())), **length)
    assert "no difference is shown" in same
    assert same.endswith(
        "No query scores otherwise than before: a larger config.optim.learning_rate or more steps would change more."
    )
    assert held_out.concluded(tmp_path, steps=24) == same
    assert held_out.concluded(tmp_path, steps=48) == held_out.concluded(tmp_path / "elsewhere", steps=24) == ""
    (tmp_path / held_out.FILE).unlink()
    with pytest.raises(UserError, match="is gone, and with it what the held-out queries scored before training"):
        held_out.conclude(tmp_path, before, **length)


@pytest.mark.parametrize(
    ("steps", "warmup_steps", "queries", "doubt"),
    [
        (1, 0, 100, "trained for 1 step"),
        (7, 0, 100, "trained for 7 steps"),
        (24, 24, 100, "trained for 24 steps, all of them warm-up"),
        (24, 2, 19, "measured on 19 queries"),
        (1, 1, 1, "trained for 1 step, all of them warm-up and measured on 1 query"),
        (8, 2, 20, ""),
    ],
)
def test_little_is_called_little(steps, warmup_steps, queries, doubt, tmp_path):
    """A difference of 10 points for every query: the interval alone would call it sure."""
    before = {f"q{i}": 0.5 for i in range(queries)}
    held_out.remember(tmp_path, before)
    said = held_out.conclude(tmp_path, {q: 0.6 for q in before}, steps=steps, warmup_steps=warmup_steps)
    assert ("is better than" in said) == (not doubt)
    start = (
        f"too little to judge by ({doubt}): the trained model beside what it began with, +10.0 points of nDCG@10 (95 %"
    )
    assert said.startswith(start) == bool(doubt)
    assert json.loads((tmp_path / held_out.FILE).read_text())["verdict"] == said


def test_the_whole_way_from_a_file_of_pairs(tmp_path, capsys):
    """configs/finetune_pairs.py on the shipped German pairs, from a model folder of the tiny demo."""
    base = tmp_path / "base"
    train.train(
        config_lib.load("configs/demo.py:tiny", ["--config.run.steps=1", "--config.data.batch_size=8"]), workdir=base
    )
    shipped = sources.read_source("moe_embed/sample/pairs/monolingual.jsonl.gz").pairs
    with open(tmp_path / "pairs.tsv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["title", "body"])
        rows.writerows([pair.query, pair.document] for pair in shipped if pair.lang == "de")
    arguments = ["--config=configs/finetune_pairs.py", f"--config.data.sources={tmp_path / 'pairs.tsv'}", "--config.run.steps=2",
                 "--config.data.query=title", "--config.data.document=body", f"--init_from={base}", "--config.data.rows=2"]  # fmt: skip
    train.main([*arguments, f"--workdir={tmp_path / 'w'}"])
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "w" / held_out.FILE).read_text())
    assert written["before"].keys() == written["after"].keys()
    assert f"held out    {len(written['before'])} queries" in said
    assert written["verdict"] in said
    assert "held out: nDCG@10" in said
    assert said.count("held out: encoding") == 2  # before and after: each may take minutes
    assert written["before"] != written["after"]
    config = read_description(tmp_path / "w").config
    assert config.data.batch_size >= 8
    train.main([*arguments, f"--workdir={tmp_path / 'w'}"])  # again: nothing to do, nothing lost
    assert json.loads((tmp_path / "w" / held_out.FILE).read_text()) == written
    again = capsys.readouterr().out
    assert "is finished" in again
    assert written["verdict"] in again
    (tmp_path / "w" / held_out.FILE).write_text(json.dumps({"before": written["before"]}))  # killed after the last save
    train.main([*arguments, f"--workdir={tmp_path / 'w'}"])
    assert "still to be measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "w" / held_out.FILE).read_text()) == written


def test_ids_are_a_files_own_and_a_text_is_one_query():
    """By hand. Id 1 of two files is two queries; one text with two ids is one, and finds the documents of both."""
    one = source([Pair("alpha", "A doc", id="1"), Pair("alpha", "other doc", id="2")], "a.jsonl")
    two = source([Pair("beta", "B doc", id="1")], "b.jsonl")
    pairs, is_out = [*one.pairs, *two.pairs], [True] * 3
    task = held_out._task(
        pairs, held_out._groups([("alpha", (0, "1")), ("alpha", (0, "2")), ("beta", (1, "1"))]), is_out
    )
    assert sorted(task.queries.values()) == ["alpha", "beta"]
    found = {task.queries[q]: {task.corpus[d] for d in of} for q, of in task.relevance.items()}
    assert found == {"alpha": {"A doc", "other doc"}, "beta": {"B doc"}}
    many = [source([Pair(f"{name} {i}", f"{name} document {i}", id=str(i)) for i in range(200)], name) for name in "ab"]
    _, task = held_out.split(many, share=0.1)
    assert all(len(of) == 1 for of in task.relevance.values())
    assert {text[0] for text in task.queries.values()} == {"a", "b"}


def test_a_query_has_its_name_by_its_text():
    names = [held_out.split([source(single(n))], share=0.1)[1].queries for n in (500, 501)]
    both = names[0].keys() & names[1].keys()
    assert len(both) > 80
    assert all(names[0][name] == names[1][name] for name in both)


def test_a_verdict_is_of_its_step_and_of_its_queries(tmp_path):
    before = {f"q{i}": 0.5 for i in range(100)}
    held_out.remember(tmp_path, before)
    assert held_out.concluded(tmp_path, steps=24) == ""
    said = held_out.conclude(tmp_path, before, steps=24, warmup_steps=2)
    assert held_out.read(tmp_path) == (before, before, 24, said)
    said = held_out.conclude(tmp_path, {**before, "another": 0.5}, steps=24, warmup_steps=2)
    assert said.startswith("no verdict: the data has changed")


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_devices_divide_the_batch_that_the_data_decides(devices):
    c = tiny.config(data={"held_out": 0.1, "batch_size": 0}, run={"steps": 0})
    found = held_out.fit(c, num_pairs=20, num_shards=devices)
    assert found.data.batch_size == {1: 2, 3: 3, 8: 8}[devices]
    assert found.run.steps == -(-60 // found.data.batch_size)


def test_a_run_that_continues_has_what_the_data_decided_when_it_began():
    c = tiny.config(data={"held_out": 0.1, "batch_size": 0}, run={"steps": 0}, optim={"warmup_steps": 0})
    began = held_out.fit(c, num_pairs=1_000)
    assert held_out.as_begun(c, began) == began != held_out.fit(c, num_pairs=9_000)
    set_ = tiny.config(data={"batch_size": 8}, run={"steps": 5})
    assert held_out.as_begun(set_, began) == set_
    own = tiny.config(data={"batch_size": 0}, run={"steps": 0}, optim={"warmup_steps": 50})
    assert held_out.fit(own, num_pairs=1_000).optim.warmup_steps == 50  # the user's own word
    assert held_out.as_begun(own, began).optim.warmup_steps == 50


def test_a_query_does_not_find_itself_where_pairs_go_both_ways():
    pairs = [pair for i in range(100) for pair in (Pair(f"a {i}", f"b {i}"), Pair(f"b {i}", f"a {i}"))]
    _, task = held_out.split([source(pairs)], share=0.1)
    texts = {text: name for name, text in task.corpus.items()}
    for name, query in task.queries.items():
        assert texts[query] == name  # which does not count: retrieval.counted
        other = ("b" if query[0] == "a" else "a") + query[1:]
        assert task.relevance[name] == {texts[other]: 1}
    run = {name: {texts[q]: 1.0, next(iter(task.relevance[name])): 0.5} for name, q in task.queries.items()}
    assert retrieval.measure(task, run)["ndcg@10"] == 1.0
    plain = dataclasses.replace(task, origin=dataclasses.replace(task.origin, ignore_identical_ids=False))
    assert retrieval.measure(plain, run)["ndcg@10"] < 0.7
    _, task = held_out.split([source([Pair(f"same {i}", f"same {i}") for i in range(100)])], share=0.1)
    assert all(name not in task.relevance[name] for name in task.queries)  # its own document is all that it asks for
