"""Which pairs are kept out, what is searched for, what follows from the number of pairs, and the sentence at the end."""

import csv
import json

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import held_out, train
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import Source
from moe_embed.load import read_description
from tests import tiny


def source(pairs, path="p.csv") -> Source:
    return Source(path, list(pairs), 0)


def single(count: int, first: int = 0) -> list[Pair]:
    return [Pair(f"query {i}", f"document {i}", row=i) for i in range(first, first + count)]


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
    assert [pair.row for pair in kept.pairs] == sorted(pair.row for pair in kept.pairs)


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
                  scores=(9.0, *map(float, range(1, 8))), row=i) for i, p in enumerate(single(100))]  # fmt: skip
    said = []
    (kept,), task = held_out.split([source(pairs)], share=0.1, say=said.append)
    texts = {task.corpus[d] for of in task.relevance.values() for d in of} | set(task.queries.values())
    found = {text for pair in kept.pairs for text in pair.negatives}
    assert len(task.queries) == 20
    assert not found & texts
    dropped = 0
    for pair in kept.pairs:
        before = pairs[pair.row]
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
        ([source(single(1))], "1 pairs that all share"),
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
    _, task = held_out.split([source(single(500))], share=0.1)
    assert (len(task.queries), len(task.corpus)) == (20, 60)
    assert all(d in task.corpus for of in task.relevance.values() for d in of)


@pytest.mark.parametrize(
    ("num_pairs", "batch", "steps"), [(9, 2, 14), (200, 16, 38), (2_000, 128, 47), (100_000, 256, 1_172)]
)
def test_the_data_decides_what_is_left_open(num_pairs, batch, steps):
    c = tiny.config(data={"held_out": 0.1, "batch_size": 0}, run={"steps": 0})
    found = held_out.fit(c, num_pairs=num_pairs)
    assert (found.data.batch_size, found.run.steps, found.optim.warmup_steps) == (batch, steps, steps // 10)
    set_ = tiny.config(data={"held_out": 0.1, "batch_size": 8}, run={"steps": 5}, optim={"warmup_steps": 3})
    assert held_out.fit(set_, num_pairs=num_pairs) == set_


def test_before_and_after_become_a_sentence(tmp_path):
    before = {f"q{i}": x for i, x in enumerate(np.random.default_rng(0).random(100))}
    held_out.remember(tmp_path, before)
    said = held_out.conclude(tmp_path, {q: x + 0.1 for q, x in before.items()})
    assert said.startswith(
        "the trained model is better than what it began with by 10.0 points of nDCG@10 (95 % interval"
    )
    written = json.loads((tmp_path / held_out.FILE).read_text())
    assert (written["before"], written["verdict"]) == (before, said)
    assert "no difference is shown" in held_out.conclude(tmp_path, dict(reversed(before.items())))
    (tmp_path / held_out.FILE).unlink()
    with pytest.raises(UserError, match="before training"):
        held_out.conclude(tmp_path, before)


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
    assert written["before"] != written["after"]
    config = read_description(tmp_path / "w").config
    assert config.data.batch_size >= 8
    train.main([*arguments, f"--workdir={tmp_path / 'w'}"])  # again: nothing to do, nothing lost
    assert json.loads((tmp_path / "w" / held_out.FILE).read_text()) == written
