"""Consistency filtering against a loop over texts, and the faults of the public code: k, the last chunk, copies."""

import collections
import gzip
import itertools
import json
import pathlib
import types
import weakref

import numpy as np
import pytest

import moe_embed
from moe_embed import config as config_lib
from moe_embed import filter as filter_lib
from moe_embed import retrieval, sharding
from moe_embed.config import UserError
from moe_embed.data import inputs, sources
from moe_embed.data import pairs as pairs_lib
from tests.test_mine import tiny_model

SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"


def vector(text: str, dim: int = 5) -> np.ndarray:
    x_D = np.random.default_rng(list(text.encode())).normal(size=dim).astype(np.float32)
    return x_D / np.linalg.norm(x_D)


def fake(vectors=vector):
    encode = lambda texts, task, *, progress=False: np.stack([vectors(text) for text in texts])  # noqa: E731
    return types.SimpleNamespace(encode=encode, prompt=lambda name: name, mesh=None)


def by_loop(pairs, vectors=vector, *, top_k: int) -> list[bool]:
    """How many distinct documents score higher than its own, pair by pair."""
    documents = {document for _, document in pairs}
    stays = []
    for query, document in pairs:
        own = vectors(query) @ vectors(document)
        higher = [other for other in documents if vectors(query) @ vectors(other) > own + 1e-6]
        stays.append(len(higher) < top_k)
    return stays


def random_rows(seed: int, count: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"query": f"q{rng.integers(30)}", "document": f"d{rng.integers(12)}", "lang": rng.choice(["de", "en", ""])}
            for _ in range(count)]  # fmt: skip


def write(path: pathlib.Path, rows) -> pathlib.Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(
    rows, tmp_path, vectors=vector, *, top_k=2, shard=1000, **columns
) -> tuple[list[str], collections.Counter, list]:
    counts, examples = collections.Counter(), []
    rows = list(pairs_lib.read_rows(str(write(tmp_path / "a.jsonl", rows)), **columns))
    total = sum(len(row.pairs) for row in rows)
    lines = filter_lib.kept(fake(vectors), iter(rows), total, "a", counts, examples, top_k=top_k, shard=shard)
    return list(lines), counts, examples


@pytest.mark.parametrize("top_k", [1, 2, 5, 12, 30])
def test_against_the_loop(tmp_path, top_k):
    rows = random_rows(0, 80)
    pairs = [(row["query"], row["document"]) for row in rows]
    stays = by_loop(pairs, top_k=top_k)
    lines, counts, _ = run(rows, tmp_path, top_k=top_k)
    assert [json.loads(line) for line in lines] == [row for row, stay in zip(rows, stays, strict=True) if stay]
    for lang in ("de", "en", ""):
        of = [stay for row, stay in zip(rows, stays, strict=True) if row["lang"] == lang]
        assert (counts["a", lang, True], counts["a", lang, False]) == (sum(of), len(of) - sum(of))
    if top_k < 12:  # the public code reads k and takes 2
        assert sum(by_loop(pairs, top_k=top_k)) < sum(by_loop(pairs, top_k=top_k + 1))
        assert len(lines) < len(run(rows, tmp_path, top_k=top_k + 1)[0])
    else:
        assert len(lines) == 80


@pytest.mark.parametrize("shard", [1, 2, 7, 16, 79, 80, 81])
def test_every_pair_is_judged_once_in_its_shard(tmp_path, shard):
    """The public code rounds the size of the last chunk, and what is beyond it is lost."""
    rows = random_rows(1, 80)
    everything = run(rows, tmp_path, top_k=99, shard=shard)[0]
    assert [json.loads(line) for line in everything] == rows
    sizes = [len(some) for some in filter_lib.shards(pairs_lib.read_rows(str(tmp_path / "a.jsonl")), 80, shard)]
    assert sum(sizes) == 80
    assert len(sizes) == -(-80 // shard)
    assert max(sizes) <= shard
    assert max(sizes) - min(sizes) <= 1  # no small rest in which everything passes
    wanted, start = [], 0
    for size in sizes:
        some = rows[start : start + size]
        stays = by_loop([(row["query"], row["document"]) for row in some], top_k=2)
        wanted += [row for row, stay in zip(some, stays, strict=True) if stay]
        start += size
    found = [json.loads(line) for line in run(rows, tmp_path, shard=shard)[0]]
    assert found == wanted
    if shard < 79:
        assert found != [json.loads(line) for line in run(rows, tmp_path, shard=80)[0]]


@pytest.mark.parametrize("size", [1, 3, 10, 50, 500])
def test_shards_of_rows_of_several_documents_are_those_of_a_list_of_all(size):
    rng = np.random.default_rng(0)
    rows = [
        pairs_lib.Row(str(i), {}, [pairs_lib.Pair("q", "d")] * int(n)) for i, n in enumerate(rng.integers(1, 6, 16))
    ]
    first = list(itertools.accumulate((len(row.pairs) for row in rows), initial=0))
    number = [first[i] * -(-first[-1] // size) // first[-1] for i in range(16)]
    wanted = [[row for row, of in zip(rows, number, strict=True) if of == shard] for shard in dict.fromkeys(number)]
    assert list(filter_lib.shards(iter(rows), first[-1], size)) == wanted
    assert list(filter_lib.shards(iter(rows), first[-1], 25)) != wanted


def test_no_more_rows_are_in_memory_than_two_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_lib, "load", lambda path: fake())
    real, rows, most = pairs_lib.read_rows, weakref.WeakSet(), []

    class Row(pairs_lib.Row):  # of the same fields, hashed as the object that it is
        __hash__ = object.__hash__

    def watched(path, **columns):
        for row in real(path, **columns):
            rows.add(one := Row(row.line, row.columns, row.pairs))
            most.append(len(rows))
            yield one

    monkeypatch.setattr(pairs_lib, "read_rows", watched)
    write(tmp_path / "a.jsonl", random_rows(0, 80))
    arguments = ["--model=m", f"--pairs={tmp_path}/a.jsonl", f"--output={tmp_path}/o.jsonl"]
    filter_lib.main([*arguments, "--shard=10"])
    assert max(most) <= 21
    most.clear()
    filter_lib.main([*arguments, "--shard=80"])
    assert max(most) >= 80  # so it is counted


def test_copies_of_documents_take_one_place(tmp_path):
    """In the public code each copy of a document has a place of its own, so two copies of another push the right one out."""
    angle = {"q": 0.0, "right": 0.3, "wrong": 0.2, "worse": 0.25, "r": 0.2}
    vectors = lambda text: np.array([np.cos(angle[text]), np.sin(angle[text])], np.float32)  # noqa: E731
    rows = [{"query": "q", "document": "right"}, *[{"query": "r", "document": "wrong"}] * 3]
    stays = lambda rows, **k: len(run(rows, tmp_path, vectors, **k)[0])  # noqa: E731
    assert stays(rows, top_k=2) == 4
    assert stays(rows, top_k=1) == 3
    assert stays([*rows, {"query": "r", "document": "worse"}], top_k=2) == 4  # now two others are nearer than "right"
    assert stays([*rows, {"query": "q", "document": "right"}], top_k=2) == 5


def test_documents_with_one_vector_do_not_push_each_other_out(tmp_path):
    one = lambda text: vector("x" if text.startswith("d") else text)  # noqa: E731
    rows = [{"query": f"q{i}", "document": f"d{i}"} for i in range(9)]
    assert len(run(rows, tmp_path, one, top_k=2)[0]) == 9
    nearly = lambda text: one(text) * (1 + 1e-4 * int(text[1:]))  # noqa: E731
    assert len(run(rows, tmp_path, nearly, top_k=2)[0]) < 9


def test_of_several_documents_those_that_pass(tmp_path):
    rows = [
        {
            "query": f"q{i}",
            "documents": [f"d{i}", f"d{i + 1}", f"d{i + 2}"],
            "scores": [1, 2, 3, 4.5],
            "negatives": ["n"],
            "x": i,
        }
        for i in range(12)
    ]
    rows.append(
        {"query": "q90", "pos": ["d1", "d5"], "neg": ["n"], "pos_scores": [1, 2], "neg_scores": [3], "prompt": "p"}
    )
    pairs = [(row["query"], text) for row in rows for text in row.get("documents", row.get("pos"))]
    verdicts, wanted = iter(by_loop(pairs, top_k=4)), []
    for row in rows:
        name, scores = ("pos", "pos_scores") if "pos" in row else ("documents", "scores")
        keep = [next(verdicts) for _ in row[name]]
        if any(keep):
            stay = [i for i, kept in enumerate(keep) if kept]
            own = row[scores][: len(keep)]
            rest = row[scores][len(keep) :]
            wanted.append(row | {name: [row[name][i] for i in stay], scores: [own[i] for i in stay] + rest})
    found = [json.loads(line) for line in run(rows, tmp_path, top_k=4)[0]]
    assert found == wanted
    assert any(1 <= len(row["documents"]) < 3 for row in found if "documents" in row)
    assert len(found) < len(rows)
    sources.read_source(str(write(tmp_path / "again.jsonl", found)))  # the scores still fit


def test_kept_rows_are_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filter_lib, "load", lambda path: fake())
    lines = [b'{"document":"d%d",  "query": "q\\u00fc%d" , "n": 1.50}\r' % (i % 7, i) for i in range(30)]
    lines[3] = '{"query": "ü\u2028", "document": "d1"}'.encode()
    data = b"\n\n".join(lines) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    for pairs in ("a.jsonl", "a.jsonl.gz"):
        for output in ("o.jsonl", "o.jsonl.gz"):
            filter_lib.main(["--model=m", f"--pairs={tmp_path / pairs}", f"--output={tmp_path / output}"])
        kept = (tmp_path / "o.jsonl").read_bytes()
        assert gzip.decompress((tmp_path / "o.jsonl.gz").read_bytes()) == kept
        kept = kept.split(b"\n")[:-1]
        assert 0 < len(kept) < 30
        assert [line for line in lines if line in kept] == kept
    assert not list(tmp_path.glob("*.partial"))
    assert f"{len(kept) / 30:.1%}" in capsys.readouterr().out


def test_several_files_go_to_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filter_lib, "load", lambda path: fake())
    write(tmp_path / "a.jsonl", random_rows(0, 30))
    write(tmp_path / "b.jsonl.gz", random_rows(1, 30))
    (tmp_path / "c.csv").write_text('query,document\nq1,d1\nq2,"d\n2"\n')
    output = tmp_path / "kept"
    for pairs in (f"{tmp_path}/*.jsonl*,{tmp_path}/c.csv", f"{tmp_path}/?.*"):
        filter_lib.main(["--model=m", f"--pairs={pairs}", f"--output={output}"])
        assert sorted(path.name for path in output.iterdir()) == ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    assert json.loads((output / "c.jsonl").read_text().splitlines()[1]) == {"query": "q2", "document": "d\n2"}
    alone = run(random_rows(1, 30), tmp_path)[0]  # a file's pairs are judged among themselves
    assert gzip.decompress((output / "b.jsonl.gz").read_bytes()).decode().splitlines() == alone
    said = capsys.readouterr().out
    assert all(name in said for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "de", "en", "none given"))
    assert said.count("dropped: ") == 2 * filter_lib.EXAMPLES


def test_the_summary_by_hand():
    counts = collections.Counter(
        {("a", "de", True): 3, ("a", "de", False): 1, ("b", "en", True): 4, ("b", "", False): 2}
    )
    text = filter_lib.summary(counts, [])
    cells = {line.split("  ")[0].strip(): line.split()[-3:] for line in text.splitlines() if line}
    assert cells["a"] == ["3", "4", "75.0%"]
    assert cells["b"] == ["4", "6", "66.7%"]
    assert cells["all"] == ["7", "10", "70.0%"]
    assert cells["de"] == ["3", "4", "75.0%"]
    assert cells["en"] == ["4", "4", "100.0%"]
    assert cells["none given"] == ["0", "2", "0.0%"]
    pair = pairs_lib.Pair("why " * 50, "because")
    shown = filter_lib.summary(counts, [filter_lib.Dropped(pair, 0.1234, "so", 0.5)])
    assert "dropped: why why" in shown
    assert "0.123  because" in shown
    assert "0.500  so  (found first)" in shown
    assert max(map(len, shown.splitlines())) <= 120
    japanese = pairs_lib.Pair("表を挿入するには" * 20, "because")
    assert "dropped: 表を挿入するには表を" in filter_lib.summary(counts, [filter_lib.Dropped(japanese, 0.1, "so", 0.5)])


def test_eight_devices_judge_as_one(tmp_path, monkeypatch, eight_devices):
    monkeypatch.setattr(retrieval, "BLOCK", 3)
    pairs = [pairs_lib.Pair(row["query"], row["document"]) for row in random_rows(3, 50)]
    model = fake()
    one, _ = filter_lib.judge(model, pairs, top_k=2)
    model.mesh = sharding.make_mesh(config_lib.Mesh())
    eight, _ = filter_lib.judge(model, pairs, top_k=2)
    assert one.tolist() == eight.tolist() == by_loop([(pair.query, pair.document) for pair in pairs], top_k=2)
    assert one.tolist() != filter_lib.judge(model, pairs, top_k=3)[0].tolist()


def test_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_lib, "load", lambda path: fake(lambda text: np.full(3, np.nan)))
    good = write(tmp_path / "a.jsonl", random_rows(0, 5))
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "a.jsonl", random_rows(0, 5))
    write(tmp_path / "bad.jsonl", [{"query": "q"}])
    good = [f"--pairs={good}", "--output=" + str(tmp_path / "o.jsonl")]
    faults = {
        (good[0], f"--output={tmp_path}/no/o.jsonl"): "there is no folder",
        (good[0], f"--output={tmp_path}/b"): "is a folder",
        (good[0], f"--output={tmp_path}/o.csv"): r"is no \.jsonl",
        (good[0], f"--output={tmp_path}/a.jsonl"): "would write over",
        (f"--pairs={tmp_path}/a.*", f"--output={tmp_path}"): "would write over",
        (f"--pairs={tmp_path}/a.*", f"--output={tmp_path}/a.jsonl"): "is a file",
        (f"--pairs={tmp_path}/a.jsonl,{tmp_path}/b/a.jsonl", f"--output={tmp_path}/c"): "two files that would be one",
        (f"--pairs={tmp_path}/none*", good[1]): r"none\* does not exist",
        (
            f"--pairs={tmp_path}/a.*,{tmp_path}/bad.jsonl",
            f"--output={tmp_path}/c",
        ): r"bad\.jsonl:1 has no column 'document'",
        (f"--pairs={tmp_path}/a.*", "--output=gs://bucket/kept"): "gs:// is no folder of this machine",
        (*good, "--top_k=0"): "--top_k=0",
        (*good, "--shard=0"): "--shard=0",
        (*good, "--query=title"): "has no column 'title'",
        tuple(good): "not finite",
    }
    for arguments, words in faults.items():
        with pytest.raises(UserError, match=words):
            filter_lib.main(["--model=m", *arguments])
    assert not (tmp_path / "o.jsonl").exists()


def test_the_verb_on_the_sample(tmp_path, capsys):
    with gzip.open(SAMPLE / "pairs" / "titles.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(120), strict=False)]
    folder, pairs, output = tiny_model(tmp_path / "m"), write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl.gz"
    filter_lib.main([f"--model={folder}", f"--pairs={pairs}", f"--output={output}", "--top_k=5"])
    model, vectors = filter_lib.load(folder), {}
    for task in ("query", "document"):
        texts = list({row[task] for row in rows})
        vectors |= zip(texts, model.encode(texts, task), strict=True)
    wanted = by_loop([(row["query"], row["document"]) for row in rows], vectors.__getitem__, top_k=5)
    kept = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    assert kept == [row for row, stays in zip(rows, wanted, strict=True) if stays]
    assert 0 < len(kept) < 120
    assert f"{len(kept)}         120  {len(kept) / 120:6.1%}" in capsys.readouterr().out


def test_rows_are_read_as_a_source_is(tmp_path):
    """pairs_lib.read_rows: the same pairs and the same faults as read_source, with the lines beside them."""
    path = str(SAMPLE / "pairs" / "monolingual.jsonl.gz")
    rows = list(pairs_lib.read_rows(path))
    assert [pair for row in rows for pair in row.pairs] == sources.read_source(path).pairs
    assert [json.loads(row.line) for row in rows] == [row.columns for row in rows]
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no pairs"):
        list(pairs_lib.read_rows(str(tmp_path / "e.jsonl")))


def test_patterns_of_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl"):
        (tmp_path / name).touch()
    root = str(tmp_path)
    assert inputs.find(f"{root}/b.jsonl,{root}/*.jsonl") == [f"{root}/{n}.jsonl" for n in ("b", "[x]", "a")]
    assert inputs.find(f"{root}/[x].jsonl") == [f"{root}/[x].jsonl"]
    for nothing in ("", ","):
        with pytest.raises(UserError, match="names no file"):
            inputs.find(nothing)


def test_outputs_of_several_files_are_named_as_what_they_hold(tmp_path):
    for name in ("x.parquet", "y.tsv", "z.jsonl.zst", "v.csv.gz", "w.jsonl"):
        (tmp_path / name).write_bytes(b"")
    outputs = filter_lib.plan(str(tmp_path / "*"), tmp_path / "out")
    assert {path.name for path in outputs.values()} == {"x.jsonl", "y.jsonl", "z.jsonl.gz", "v.jsonl.gz", "w.jsonl"}


def test_an_input_is_known_as_inputs_knows_it(tmp_path, monkeypatch):
    """os.path.samefile fails for names that are no paths, and takes s3://b/a.jsonl for a folder named s3:."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "b").mkdir(parents=True)
    for name in ("o.jsonl", "s3:/b/a.jsonl"):
        write(tmp_path / name, random_rows(0, 3))
    (tmp_path / "link.jsonl").symlink_to("o.jsonl")
    for pairs, output in (("link.jsonl", "o.jsonl"), ("o.jsonl", "link.jsonl"), ("s3:/b/*.jsonl", "s3:/b")):
        with pytest.raises(UserError, match="would write over"):
            filter_lib.plan(pairs, pathlib.Path(output))
    monkeypatch.setattr(inputs, "find", lambda text: [text])  # no network here
    for pairs, output in (
        ("s3://b/a.jsonl", "s3:/b/a.jsonl"),
        ("gs://b/o.jsonl", "o.jsonl"),
        ("hf:b/o.jsonl", "o.jsonl"),
    ):
        assert filter_lib.plan(pairs, pathlib.Path(output)) == {pairs: pathlib.Path(output)}  # one goes to a file
    monkeypatch.setattr(inputs, "find", lambda text: ["s3://b/a.jsonl", "gs://b/o.jsonl", "hf:b/p.jsonl"])
    write(tmp_path / "a.jsonl", random_rows(0, 3))
    outputs = filter_lib.plan("s3://b/a.jsonl,gs://b/o.jsonl,hf:b/p.jsonl", tmp_path)
    assert list(outputs.values()) == [tmp_path / name for name in ("a.jsonl", "o.jsonl", "p.jsonl")]
    monkeypatch.setattr(inputs, "find", lambda text: ["o.jsonl", "tfds:a:train"])
    with pytest.raises(UserError, match="tfds:a:train is no file of rows we read"):
        filter_lib.plan("o.jsonl,tfds:a:train", tmp_path / "kept")
