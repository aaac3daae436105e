"""Hard negatives against a loop over texts, the faults of the public code, and a run that is stopped at every place."""

import functools
import gzip
import json
import math
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

import moe_embed
from moe_embed import config as config_lib
from moe_embed import load as load_function
from moe_embed import mine, retrieval, sharding, stored
from moe_embed.config import UserError
from moe_embed.data import inputs, sources
from moe_embed.data import pairs as pairs_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, prompts_of, save
from moe_embed.model import encoder

SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"
DEFAULTS = {"num_negatives": 3, "margin": 0.95, "depth": 40, "drop_incomplete": False}


@functools.cache
def vector(text: str, dim: int = 6) -> np.ndarray:
    """Of unit norm, the same for the same text; all in one half of space, so that most cosines are positive."""
    x_D = np.random.default_rng(list(text.encode())).normal(size=dim).astype(np.float32)
    x_D[0] = abs(x_D[0]) + 1
    return x_D / np.linalg.norm(x_D)


def fake(vectors=vector, *, stop_at: int = -1, mesh=None, params=0):
    """A model without a network. `asked` counts the texts by task; at the call `stop_at` it dies."""
    asked = {"query": 0, "document": 0, "calls": 0}

    def encode(texts, task=None, *, progress=False):
        if asked["calls"] == stop_at:
            raise KeyboardInterrupt
        asked["calls"] += 1
        asked[task] += len(texts)
        return np.stack([vectors(text) for text in texts])

    model = {"encode": encode, "prompt": lambda name: name, "mesh": mesh, "asked": asked, "prompts": {}}
    tokenizer = types.SimpleNamespace(model_bytes=b"t")
    model |= {"params": {"w_D": np.full(3, params)}, "tokenizer": tokenizer, "encoder": 1, "moe": 2}
    return types.SimpleNamespace(**model, digest=Model.digest.func(types.SimpleNamespace(**model)))


def by_loop(files, vectors=vector, *, corpus=(), num_negatives, margin, depth, drop_incomplete) -> list[dict]:
    """The definition, text by text. `files`: of each file its rows, {"query", "documents", "id"}."""
    rows = [row | {"file": f} for f, file in enumerate(files) for row in file]
    everything = list(dict.fromkeys([text for row in rows for text in row["documents"]] + list(corpus)))
    mined = []
    for row in rows:
        same_query = [other for other in rows if other["query"] == row["query"]]
        ids = {(other["file"], other["id"]) for other in same_query if other["id"]}
        related = same_query + [other for other in rows if (other["file"], other["id"]) in ids]
        positives = {text for other in related for text in other["documents"]}
        score = {text: float(vectors(row["query"]) @ vectors(text)) for text in everything}
        nearest = sorted(everything, key=lambda text: -score[text])[:depth]
        weakest = min(score[text] for other in same_query for text in other["documents"])
        negatives = []
        for text in nearest:
            if text in positives or text == row["query"]:
                continue
            if weakest > 0 and score[text] <= margin * weakest and len(negatives) < num_negatives:
                negatives.append(text)
        if len(negatives) == num_negatives or not drop_incomplete:
            scores = [score[text] for text in row["documents"] + negatives]
            mined.append({"query": row["query"], "negatives": negatives, "scores": scores})
    return mined


def random_rows(seed: int, count: int = 60) -> list[dict]:
    """Queries and documents that come again, ids that some queries share, rows of several documents."""
    rng = np.random.default_rng(seed)
    return [
        {
            "query": f"q{rng.integers(count // 2)}",
            "documents": [f"d{i}" for i in rng.choice(40, rng.integers(1, 3), replace=False)],
            "id": f"id{rng.integers(20)}" if rng.random() < 0.2 else "",
        }
        for _ in range(count)
    ]


def write(path: pathlib.Path, rows) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(path: pathlib.Path) -> list[dict]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def run(model, paths, output, *, corpus=None, **options) -> tuple[list[dict], dict]:
    counts = mine.mine(model, mine.collect(paths, corpus=corpus), output, **(DEFAULTS | options))
    return read(output), counts


def same(found: list[dict], wanted: list[dict]) -> bool:
    return len(found) == len(wanted) and all(
        f["query"] == w["query"]
        and f["negatives"] == w["negatives"]
        and np.allclose(f["scores"], w["scores"], atol=1e-6)
        for f, w in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": 0.98}, {"margin": 3.0}, {"num_negatives": 5}, {"depth": 30}, {"drop_incomplete": True}],
    ids=str,
)
def test_against_the_loop(tmp_path, options):
    files = [random_rows(0), random_rows(1, count=20)]
    paths = [write(tmp_path / "a.jsonl", files[0]), write(tmp_path / "b.jsonl.gz", files[1])]
    corpus = [f"c{i}" for i in range(15)]
    corpus_path = write(tmp_path / "corpus.jsonl", [{"_id": text, "text": text} for text in corpus])
    found, counts = run(fake(), paths, tmp_path / "out.jsonl", corpus=corpus_path, **options)
    wanted = by_loop(files, corpus=corpus, **(DEFAULTS | options))
    assert same(found, wanted)
    assert counts["written"] == len(wanted)
    assert counts["incomplete"] == 80 - sum(len(row["negatives"]) == (DEFAULTS | options)["num_negatives"]
                                            for row in by_loop(files, corpus=corpus, **(DEFAULTS | options)))  # fmt: skip
    for change in ({"margin": 0.9}, {"depth": 20}, {"num_negatives": 2}):
        assert not same(found, by_loop(files, corpus=corpus, **(DEFAULTS | options | change)))
    assert not same(found, by_loop(files, **(DEFAULTS | options)))  # without the corpus
    assert not (tmp_path / "out.jsonl.work").exists()


def test_several_positives_do_not_shift_the_thresholds_of_later_queries(tmp_path):
    """The public code advances its place among the positives by the number of the query before: thresholds go astray."""
    rows = [
        {"query": f"q{i}", "documents": [f"d{3 * i + j}" for j in range(3 if i % 2 else 1)], "id": ""}
        for i in range(12)
    ]
    options = DEFAULTS | {"depth": 30}

    def astray(rows):
        flat = [float(vector(row["query"]) @ vector(text)) for row in rows for text in row["documents"]]
        start, weakest = 0, []
        for i, row in enumerate(rows):
            weakest.append(min(flat[start : start + len(row["documents"])]))
            start += len(rows[i - 1]["documents"])
        return weakest

    right = [min(float(vector(row["query"]) @ vector(text)) for text in row["documents"]) for row in rows]
    assert not np.allclose(right, astray(rows))
    found, _ = run(fake(), [write(tmp_path / "a.jsonl", rows)], tmp_path / "out.jsonl", **options)
    assert same(found, by_loop([rows], **options))
    for row, own, weakest in zip(found, rows, right, strict=True):
        assert all(score <= 0.95 * weakest + 1e-6 for score in row["scores"][len(own["documents"]) :])
    assert any(score > 0.95 * weakest for row, own, weakest in zip(found, rows, astray(rows), strict=True)
               for score in row["scores"][len(own["documents"]) :])  # fmt: skip


def plane(**degrees):
    """Texts at given angles."""
    angle = {name.replace("_", " "): math.radians(value) for name, value in degrees.items()}
    return lambda text: np.array([math.cos(angle[text]), math.sin(angle[text])], np.float32)


def negatives_of(rows, vectors, tmp_path, files=None, **options):
    paths = [write(tmp_path / f"{i}.jsonl", file) for i, file in enumerate(files or [rows])]
    found, counts = run(fake(vectors), paths, tmp_path / "out.jsonl", **({"num_negatives": 9} | options))
    return [row["negatives"] for row in found], counts


def test_known_positives_are_those_of_the_query_its_text_and_its_ids(tmp_path):
    vectors = plane(q=0, r=1, a=20, b=21, c=22, d=30, e=31)
    pair = lambda query, document, name="": {"query": query, "document": document, "id": name}  # noqa: E731
    alone = [pair("q", "a"), pair("r", "b"), pair("r", "c"), pair("r", "d"), pair("r", "e")]
    assert negatives_of(alone, vectors, tmp_path)[0][0] == ["d", "e"]  # b and c score too high
    assert negatives_of([*alone, pair("q", "d")], vectors, tmp_path)[0][0] == []  # e scores more than 0.95 cos 30
    shared = [pair("q", "a", "1"), *alone[1:3], pair("r", "d", "1"), alone[4]]
    by_id = negatives_of(shared, vectors, tmp_path, margin=1.5)[0]
    assert by_id[0] == ["b", "c", "e"]  # d is another query's, of the same id
    assert by_id[1] == []  # r has the id, so q's document too: nothing is left
    apart, _ = negatives_of(None, vectors, tmp_path, files=[shared[:3], shared[3:]], margin=1.5)
    assert apart[0] == ["b", "c", "d", "e"]  # an id is the file's own


def test_a_copy_of_the_positive_and_the_query_itself_are_no_negatives(tmp_path):
    vectors = plane(q=0, a=10, b=40)
    rows = [{"query": "q", "document": "a"}, {"query": "a", "document": "q"}, {"query": "b", "document": "b"}]
    assert negatives_of(rows, vectors, tmp_path, margin=2.0)[0] == [["b"], ["b"], ["a", "q"]]
    rows[2] = {"query": "b", "document": "a"}
    assert negatives_of(rows, vectors, tmp_path, margin=2.0)[0] == [[], [], ["q"]]


@pytest.mark.parametrize(("angle", "negatives"), [(89, ["c"]), (90.1, []), (120, [])])
def test_a_positive_at_or_below_zero_gives_no_negatives(tmp_path, angle, negatives):
    vectors = plane(q=0, a=angle, b=10, c=179)
    rows = [{"query": "q", "document": "a"}, {"query": "b", "document": "b"}, {"query": "b", "document": "c"}]
    found, counts = negatives_of(rows, vectors, tmp_path)
    assert found[0] == negatives
    assert counts["not_positive"] == 2 + (angle > 90)  # cos(b, c) is below zero, so both rows of b are such
    assert mine.limit_of(0.0, 0.95) == -math.inf
    assert mine.limit_of(0.5, 0.9) == 0.45


def test_what_is_counted_by_hand(tmp_path):
    vectors = plane(q=0, a=0, b=10, c=20, d=60, r=60)
    rows = [{"query": "q", "document": "a"}, {"query": "r", "document": "d"}]
    more = write(tmp_path / "c.jsonl", [{"_id": text, "text": text} for text in "bc"])
    found, counts = run(
        fake(vectors), [write(tmp_path / "a.jsonl", rows)], tmp_path / "o.jsonl", corpus=more, num_negatives=2
    )
    assert [row["negatives"] for row in found] == [["c", "d"], ["c", "b"]]
    cosine = lambda degrees: math.cos(math.radians(degrees))  # noqa: E731
    assert counts.pop("positive") == pytest.approx(2)
    assert counts.pop("hard") == pytest.approx(cosine(20) + cosine(40))
    assert counts == {"queries": 2, "documents": 4, "rows": 2, "pairs": 2, "hard_rows": 2, "candidates": 6, "dropped": 1,
                      "incomplete": 0, "without": 0, "not_positive": 0, "known": 0, "written": 2}  # fmt: skip
    text = mine.summary(counts | {"positive": 2.0, "hard": 1.7}, tmp_path, num_negatives=2, drop_incomplete=False)
    assert "1.000 of a pair, 0.850 of a row's hardest negative" in text
    assert "16.7% of 6 candidates" in text
    assert "known positives among the negatives: 0" in text


def test_a_known_positive_among_the_negatives_is_seen(tmp_path, monkeypatch):
    rows = random_rows(2)
    choose = mine.choose
    monkeypatch.setattr(mine, "choose", lambda *a, excluded, **k: choose(*a, excluded={-1}, **k))
    with pytest.raises(AssertionError, match=r"[1-9]\d* known positives among the negatives"):
        run(fake(), [write(tmp_path / "a.jsonl", rows)], tmp_path / "out.jsonl", margin=2.0)
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_stay_and_old_negatives_and_scores_are_replaced(tmp_path):
    others = {"lang": "de", "source": "s", "id": "7", "extra": [1, {"x": None}], "half": "\ud800"}
    ours = {"query": "q", "document": "a", "negatives": ["old"], "scores": [0.5, 0.25], **others}
    several = {"query": "r", "documents": ["b", "c"], "note": "ü\u2028"}
    bge = {"query": "s", "prompt": "p", "pos": ["d", "e"], "neg": ["old"], "pos_scores": [1, 2], "neg_scores": [3]}
    bge["scores"] = [4, 5, 6]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in (ours, several, bge)))
    for output in (tmp_path / "o.jsonl", tmp_path / "o.jsonl.gz"):
        found, _ = run(fake(), [str(path)], output, margin=100.0, num_negatives=2)
        assert [list(row) for row in found] == [
            list(ours),
            ["query", "documents", "note", "negatives", "scores"],
            ["query", "prompt", "pos", "neg", "pos_scores", "neg_scores"],
        ]
        for row, old in zip(found, (ours, several, bge), strict=True):
            mined = {"negatives", "scores", "neg", "pos_scores", "neg_scores"}
            assert {k: v for k, v in row.items() if k not in mined} == {k: v for k, v in old.items() if k not in mined}
        pairs = sources.read_source(str(output)).pairs  # the contract of Pair.scores
        assert [pair.document for pair in pairs] == list("abcde")
        for pair in pairs:
            cosines = [float(vector(pair.query) @ vector(text)) for text in (pair.document, *pair.negatives)]
            assert len(pair.negatives) == 2
            assert "old" not in pair.negatives
            assert pair.scores == pytest.approx(cosines, abs=1e-6)
    packed = (tmp_path / "o.jsonl.gz").read_bytes()
    assert (tmp_path / "o.jsonl").read_bytes() == gzip.decompress(packed)
    assert packed[3:8] == bytes(5)  # no name and no date in its header: the same rows are the same bytes tomorrow


def test_csv_and_columns_by_other_names(tmp_path):
    (tmp_path / "a.csv").write_text('title,body,lang\nq,a,de\nr,"b, b",\ns,c,en\nt,d\n')
    texts = mine.collect([str(tmp_path / "a.csv")], query="title", document="body")
    mine.mine(fake(), texts, tmp_path / "o.jsonl", num_negatives=1, margin=3.0)
    found = read(tmp_path / "o.jsonl")
    assert [list(row) for row in found] == [["title", "body", "lang", "negatives", "scores"]] * 3 + [
        ["title", "body", "negatives", "scores"]
    ]
    assert [row["body"] for row in found] == ["a", "b, b", "c", "d"]
    assert all(row["negatives"][0] in {"a", "b, b", "c", "d"} - {row["body"]} for row in found)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mine, "CHUNK", 8)
    monkeypatch.setattr(retrieval, "QUERIES", 7)
    monkeypatch.setattr(retrieval, "BLOCK", 9)


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / "a.jsonl", random_rows(0)), write(tmp_path / "b.jsonl", random_rows(1))]


def stopping_search(monkeypatch, after: int):
    search = retrieval.search

    def stopped(*arguments, **keywords):
        for i, part in enumerate(search(*arguments, **keywords)):
            if i == after:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(retrieval, "search", stopped)


def test_a_run_stopped_while_encoding_goes_on_to_the_same_bytes(tmp_path, small, files):
    whole = fake()
    run(whole, files, tmp_path / "whole.jsonl")
    calls = whole.asked["calls"]
    assert calls > 6
    for stop_at in range(calls):
        output = tmp_path / f"{stop_at}.jsonl"
        stopped, rest = fake(stop_at=stop_at), fake()
        with pytest.raises(KeyboardInterrupt):
            run(stopped, files, output)
        assert not output.exists()
        run(rest, files, output)
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert stopped.asked["calls"] + rest.asked["calls"] == calls  # nothing is encoded twice
        assert not (tmp_path / f"{stop_at}.jsonl.work").exists()
    run(fake(), files[::-1], tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_stopped_while_searching_or_writing_goes_on_to_the_same_bytes(tmp_path, small, files, capsys):
    run(fake(), files, tmp_path / "whole.jsonl")
    output = tmp_path / "o.jsonl"
    for after in (0, 1, 2):  # one block, then one more, then two more
        with pytest.MonkeyPatch.context() as patch:
            stopping_search(patch, after)
            with pytest.raises(KeyboardInterrupt):
                run(fake(stop_at=0 if after else -1), files, output)
    queries = len(mine.collect(files).queries)
    assert f"7 of {queries} scores_40 are there" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        lines = iter(range(5))

        def stop(*arguments, **keywords):
            if next(lines) == 4:
                raise KeyboardInterrupt
            return "{}"

        patch.setattr(pairs_lib, "with_negatives", stop)
        with pytest.raises(KeyboardInterrupt):
            run(fake(stop_at=0), files, output)
    assert f"21 of {queries} scores_40 are there" in capsys.readouterr().out
    assert not output.exists()
    with pytest.MonkeyPatch.context() as patch:
        stopping_search(patch, 0)  # everything has been found
        run(fake(stop_at=0), files, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_options_use_what_is_there(tmp_path, small, files):
    for options in ({"margin": 0.8}, {"num_negatives": 1}, {"depth": 5}, {"drop_incomplete": True}):
        output = tmp_path / "o.jsonl"
        with pytest.MonkeyPatch.context() as patch:
            stopping_search(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                run(fake(), files, output)
        run(fake(stop_at=0), files, output, **options)
        run(fake(), files, tmp_path / "whole.jsonl", **options)
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_work_of_another_run_is_refused(tmp_path, small, files):
    output = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(fake(stop_at=3), files, output)
    with pytest.raises(UserError, match="another model; delete it"):
        run(fake(params=1), files, output)
    with pytest.raises(UserError, match="another pairs and corpus; delete it"):
        run(fake(), files[:1], output)
    with pytest.raises(UserError, match="another pairs and corpus and another dtype; delete it"):
        run(fake(), files[::-1], output, dtype="float16")
    with open(output.with_name("o.jsonl.work") / "documents.npy", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"documents\.npy cannot be read .*; delete .*o\.jsonl\.work to start over"):
        run(fake(), files, output)
    (tmp_path / "p.jsonl.work").mkdir()
    (tmp_path / "p.jsonl.work" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"p\.jsonl\.work holds something else"):
        run(fake(), files, tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl.work" / "thesis.txt").is_file()
    (output.with_name("o.jsonl.work") / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress\.json cannot be read"):
        run(fake(), files, output)


def test_two_at_once_on_one_output(tmp_path, small, files):
    """The second is told, and the first goes on to the bytes of one alone; a lock that a dead process left holds nobody up."""
    run(fake(), files, tmp_path / "whole.jsonl")
    output, told = tmp_path / "o.jsonl", []

    def meanwhile(text):
        if not told:
            told.append("")
            with pytest.raises(
                UserError, match=r"another process mines .*o\.jsonl; wait for it, or name another"
            ) as error:
                run(fake(), files, output)
            told.append(str(error.value))
            run(fake(), files, tmp_path / "beside.jsonl")  # another output has work of its own
        return vector(text)

    run(fake(meanwhile), files, output)
    assert told[1:]
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert output.read_bytes() == (tmp_path / "beside.jsonl").read_bytes() == whole
    assert not list(tmp_path.glob("*.work"))
    with pytest.raises(KeyboardInterrupt):
        run(fake(stop_at=2), files, output)
    assert (tmp_path / "o.jsonl.work" / "lock").is_file()
    run(fake(), files, output)
    assert output.read_bytes() == whole
    run(fake(), files, output, num_negatives=1)
    assert output.read_bytes() != whole


def test_a_run_killed_while_it_deletes_its_work_starts_over_to_the_same_bytes(tmp_path, small, files, monkeypatch):
    run(fake(), files, tmp_path / "whole.jsonl")
    whole, unlink = (tmp_path / "whole.jsonl").read_bytes(), pathlib.Path.unlink
    for kept in range(6):  # four arrays, progress.json and the lock

        def killed(path, left=[None] * kept, **options):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            unlink(path, **options)

        output = tmp_path / f"{kept}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                run(fake(), files, output)
        assert (tmp_path / f"{kept}.jsonl.work").is_dir()
        run(fake(), files, output)
        assert output.read_bytes() == whole
        assert not (tmp_path / f"{kept}.jsonl.work").exists()
        run(fake(), files, output, num_negatives=1)
        assert output.read_bytes() != whole


def test_who_begins_while_the_work_is_deleted_keeps_the_folder(tmp_path, small, files, monkeypatch):
    output, work, unlink, begun = tmp_path / "o.jsonl", tmp_path / "o.jsonl.work", pathlib.Path.unlink, []

    def watched(path, **options):
        unlink(path, **options)
        if path == work / "lock":
            begun.append(stored.open_alone(path))  # the other process, at its worst time

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", watched)
        run(fake(), files, output)
    begun[0].close()
    assert [path.name for path in work.iterdir()] == ["lock"]
    first = output.read_bytes()
    run(fake(), files, output)
    assert output.read_bytes() == first
    run(fake(), files, output, num_negatives=1)
    assert output.read_bytes() != first


def changing(path: str, data: bytes):
    """Vectors of a model that, at the first text, puts other bytes in a file."""
    return lambda text: (pathlib.Path(path).write_bytes(data), vector(text))[1]


def test_files_that_change_meanwhile_are_said_and_nothing_is_written(tmp_path, small):
    rows, output = random_rows(0), tmp_path / "o.jsonl"
    path, corpus = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    documents = [{"_id": f"c{i}", "text": f"c{i}"} for i in range(9)]
    several = {"query": "q0", "documents": ["d38", "d39", "new"], "id": ""}
    changes = {
        "a row less": rows[:-1],
        "a row more": [*rows, rows[0]],
        "no row": [],
        "another order": rows[::-1],
        "another text": [rows[0] | {"query": "new"}, *rows[1:]],
        "more documents": [several, *rows[1:]],
        "another column": [rows[0] | {"lang": "de"}, *rows[1:]],
        "no pair": [*rows[:3], {"query": ""}, *rows[3:]],
    }
    output.write_text("of yesterday")
    for name, changed in changes.items():
        write(path, rows)
        write(corpus, documents)
        write(tmp_path / "new.jsonl", changed)
        model = fake(changing(path, (tmp_path / "new.jsonl").read_bytes()))
        with pytest.raises(UserError, match=r"a\.jsonl changed while it was mined"):
            run(model, [str(path)], output, corpus=str(corpus))
        assert output.read_text() == "of yesterday", name
        shutil.rmtree(tmp_path / "o.jsonl.work")
    write(path, rows)
    with pytest.raises(UserError, match=r"c\.jsonl changed while it was mined"):
        run(fake(changing(corpus, b"")), [str(path)], output, corpus=str(corpus))
    assert output.read_text() == "of yesterday"
    corpus.unlink()
    with pytest.raises(UserError, match=r"c\.jsonl does not exist"):
        run(fake(), [str(path)], output, corpus=str(corpus))
    write(corpus, documents)
    with pytest.raises(UserError, match=r"a\.jsonl does not exist"):
        run(fake(lambda text: (path.unlink(missing_ok=True), vector(text))[1]), [str(path)], tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()
    write(path, rows)
    shutil.rmtree(tmp_path / "o.jsonl.work")
    found, _ = run(fake(changing(path, path.read_bytes())), [str(path)], output, corpus=str(corpus))  # the same bytes
    assert len(found) == len(rows)


def test_a_file_that_changes_while_it_is_read_is_no_collection(tmp_path, files, monkeypatch):
    """Else its vectors would lie in OUTPUT.work under the digest of other texts."""
    read_rows = pairs_lib.read_rows

    def changed(data):
        def read(path, **columns):
            pathlib.Path(path).write_bytes(data)
            return read_rows(path, **columns)

        return read

    same = pathlib.Path(files[0]).read_bytes()
    monkeypatch.setattr(pairs_lib, "read_rows", changed(same))
    assert len(mine.collect(files[:1]).rows) == 60
    monkeypatch.setattr(pairs_lib, "read_rows", changed(same[: same.index(b"\n") + 1]))
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was mined"):
        mine.collect(files[:1])


def test_an_input_is_known_as_inputs_knows_it(tmp_path, monkeypatch):
    """os.path.samefile fails for names that are no paths, and takes s3://b/a.jsonl for a folder named s3:."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "b").mkdir(parents=True)
    pair = [{"query": "q", "document": "d", "_id": "c", "text": "t"}]
    for name in ("o.jsonl", "s3:/b/a.jsonl", "c.jsonl"):
        write(tmp_path / name, pair)
    (tmp_path / "link.jsonl").symlink_to("o.jsonl")
    with pytest.raises(UserError, match="hf:a/b:train is no file of rows we read"):
        mine.main(["--model=m", "--pairs=hf:a/b:train", "--output=o.jsonl"])

    class Reached(Exception):
        pass

    def reached(*_, **__):
        raise Reached

    monkeypatch.setattr(mine, "collect", reached)
    for pairs, output in (("link.jsonl", "o.jsonl"), ("o.jsonl", "link.jsonl"), ("./s3:/b/a.jsonl", "s3:/b/a.jsonl")):
        with pytest.raises(UserError, match=r"is one of --pairs"):
            mine.main(["--model=m", f"--pairs={pairs}", f"--output={output}"])
    with pytest.raises(UserError, match=r"is one of --pairs or --corpus"):
        mine.main(["--model=m", "--pairs=o.jsonl", "--corpus=./c.jsonl", "--output=c.jsonl"])
    monkeypatch.setattr(inputs, "find", lambda text: [text])  # no network here
    for pairs in ("s3://b/a.jsonl", "gs://b/o.jsonl", "tfds:a:train"):
        for output in ("o.jsonl", "s3:/b/a.jsonl"):
            with pytest.raises(Reached):
                mine.main(["--model=m", f"--pairs={pairs}", f"--output={output}"])


def test_a_full_disk_is_said_before_it_is_full(tmp_path, files, monkeypatch):
    monkeypatch.setattr(mine.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"documents\.npy needs 0\.0 GB"):
        run(fake(), files, tmp_path / "o.jsonl")


def test_half_precision_on_disk_and_vectors_that_are_not_finite(tmp_path, files):
    found, _ = run(fake(), files, tmp_path / "o.jsonl", dtype="float16")
    whole, _ = run(fake(), files, tmp_path / "w.jsonl")
    difference = [abs(f["scores"][0] - w["scores"][0]) for f, w in zip(found, whole, strict=True)]
    assert 0 < max(difference) < 2e-3
    with pytest.raises(UserError, match="a document vector that is not finite"):
        run(fake(lambda text: np.full(3, np.nan)), files, tmp_path / "n.jsonl")


def test_eight_devices_write_the_bytes_of_one(tmp_path, small, files, eight_devices):
    run(fake(), files, tmp_path / "one.jsonl")
    run(fake(mesh=sharding.make_mesh(config_lib.Mesh())), files, tmp_path / "eight.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "eight.jsonl").read_bytes()


def tiny_model(folder: pathlib.Path) -> pathlib.Path:
    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh())
    params = encoder.init(c.encoder, c.moe, key=jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    tokenizer = tokenizer_lib.read(c.data.tokenizer)
    save(Model(c.encoder, c.moe, params, tokenizer, prompts_of(c), mesh, "test"), folder, made_by="a test")
    return folder


def test_the_verb_on_the_sample(tmp_path, capsys):
    with gzip.open(SAMPLE / "pairs" / "monolingual.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(150), strict=False)]
    folder, pairs, output = tiny_model(tmp_path / "m"), write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl"
    arguments = [f"--model={folder}", f"--output={output}", "--num_negatives=4", "--margin=1.6"]
    mine.main([*arguments, f"--pairs={pairs}"])
    model, found = load_function(folder), read(output)
    vectors = {}
    for task, column in (("query", "query"), ("document", "document")):
        texts = list({row[column] for row in rows})
        vectors |= zip(texts, model.encode(texts, task), strict=True)
    wanted = by_loop([[row | {"documents": [row["document"]]} for row in rows]], vectors.__getitem__,
                     num_negatives=4, margin=1.6, depth=100, drop_incomplete=False)  # fmt: skip
    assert len(found) == 150
    differ = sum(f["negatives"] != w["negatives"] for f, w in zip(found, wanted, strict=True))
    assert differ <= 3  # where two cosines are equal to the last bits, another company may turn them round
    assert sum(len(row["negatives"]) for row in found) > 300
    assert [{k: row[k] for k in old} for row, old in zip(found, rows, strict=True)] == rows
    said = capsys.readouterr().out
    assert "150 of 150 rows" in said
    assert "known positives among the negatives: 0" in said
    faults = {
        f"--pairs={pairs},none.jsonl": r"none\.jsonl does not exist",
        f"--pairs={output}": r"is one of --pairs",
        "--corpus=none.jsonl": r"none\.jsonl does not exist",
        "--margin=0": "--margin=0",
        "--margin=nan": "--margin=nan",
        "--depth=3": "--num_negatives=4 is not between 1 and --depth=3",
        "--output=no/o.jsonl": "no/o.jsonl",
        f"--output={tmp_path / 'o.csv'}": r"is no \.jsonl",
        "--document=body": "has no column 'body'",
    }
    for fault, words in faults.items():
        with pytest.raises(UserError, match=words):
            mine.main([*arguments, f"--pairs={pairs}", fault])
    with pytest.raises(UserError, match="no row has 4 negatives"):
        mine.main([*arguments, f"--pairs={pairs}", "--drop_incomplete", "--margin=0.001", "--depth=4"])
