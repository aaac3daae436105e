"""What a source may be named by: patterns, TFDS's folders, the hub's names (by a stand-in), and counts that are checked."""

import json
import sys
import types

import pytest

from moe_embed import prepare
from moe_embed.config import UserError
from moe_embed.data import inputs, sources
from moe_embed.data.pairs import Pair


def test_patterns_and_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = [str(tmp_path / name) for name in ("[x].jsonl", "a.jsonl", "b.jsonl")]
    assert inputs.find(f"{tmp_path}/*.jsonl") == files
    assert inputs.find(f"{tmp_path}/b.jsonl,{tmp_path}/*.jsonl") == [files[2], *files[:2]]
    (tmp_path / "link.jsonl").symlink_to(files[2])
    assert inputs.find(f"{tmp_path}/link.jsonl,{tmp_path}/deep/../b.jsonl") == [f"{tmp_path}/link.jsonl"]  # one file
    (tmp_path / "link.jsonl").unlink()
    assert inputs.find(f"{tmp_path}/[x].jsonl") == files[:1]  # it exists as it stands
    assert inputs.find(f"{tmp_path}/**/c.jsonl") == [str(tmp_path / "deep" / "c.jsonl")]
    assert inputs.find("tfds:a:train,hf:b:train") == ["tfds:a:train", "hf:b:train"]
    for nothing in ("", f"{tmp_path}/*.csv", f"{tmp_path}/no.jsonl", "nowhere/*.jsonl"):
        with pytest.raises(UserError, match=r"does not exist|names no file"):
            inputs.find(nothing)


def test_counts_beside_a_file_are_checked(tmp_path):
    path = tmp_path / "shard-0.jsonl"
    path.write_text('{"query": "q", "document": "d"}\n' * 3)
    for counts in ({"shard-0.jsonl": 3}, {"count_per_file": {"s3://x/shard-0.jsonl": 3}}, {"other.jsonl": 9}):
        (tmp_path / "counts.json").write_text(json.dumps(counts))
        assert len(list(inputs.rows(str(path)))) == 3
    (tmp_path / "counts.json").write_text('{"shard-0.jsonl": 4}')
    with pytest.raises(UserError, match=r"has 3 rows; the counts.json beside it says 4"):
        list(inputs.rows(str(path)))
    (tmp_path / "counts.json").write_text("[]")
    with pytest.raises(UserError, match=r"counts.json is not \{file: rows\}"):
        list(inputs.rows(str(path)))


def test_a_data_set_of_the_hub(monkeypatch):
    def load_dataset(path, name=None, *, split=None, streaming=False):  # the arguments of the real one that are used
        assert (path, name, split, streaming) == ("owner/pairs", "de", "train", True)
        return iter([{"query": "q", "document": "d"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    assert list(inputs.rows("hf:owner/pairs@de:train")) == [
        ("hf:owner/pairs@de:train, row 1", {"query": "q", "document": "d"})
    ]
    with pytest.raises(UserError, match="needs a split"):
        list(inputs.rows("hf:pairs"))
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[hub\]"):
        list(inputs.rows("hf:owner/pairs@de:train"))


def test_a_data_set_of_tfds(tmp_path):
    folder = tmp_path / "prepared"
    (tmp_path / "a.csv").write_text("query,document\nq0,d0\nq1,d1\nq2,d2\n")
    prepare.main([f"--input={tmp_path}/a.csv", f"--output={folder}", "--processes=1"])
    name = f"tfds:{folder}:train"
    rows = list(inputs.rows(name))
    assert rows[0] == (
        f"{name}, row 1",
        {"query": "q0", "document": "d0", "lang": "", "id": "", "negatives": [], "scores": []},
    )
    assert len(rows) == 3
    (source,) = sources.read_sources(name)
    assert source.pairs == [Pair(f"q{i}", f"d{i}") for i in range(3)]  # an empty list is no scores
    prepare.main([f"--input={name}", f"--output={tmp_path}/again", "--processes=1"])
    (again,) = sources.read_sources(str(tmp_path / "again"))
    assert list(again.pairs) == source.pairs
    (tmp_path / "b.csv").write_text("query,document\nq0,d0\nq1,d1\nq2,e2\n")
    assert sources.read_source(str(tmp_path / "b.csv")).pairs != source.pairs
    assert inputs.digest(name) == inputs.digest(name)
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        list(inputs.rows(f"tfds:{folder}:test"))
    with pytest.raises(UserError, match="cannot be opened by TFDS"):
        list(inputs.rows("tfds:no_such_data_set_at_all:train"))
    with pytest.raises(UserError, match="needs a split"):
        list(inputs.rows("tfds:name"))


@pytest.mark.parametrize(
    "name", ["gs://b/a.jsonl?X-Goog-Signature=abc123", "s3://key:abc123@b/*.jsonl", "gs://b/*.jsonl?a=1&sig=abc123"]
)
def test_an_address_with_credentials_is_refused_without_them(name):
    with pytest.raises(UserError, match="has credentials in it") as fault:
        inputs.find(name)
    assert "abc123" not in str(fault.value)
    assert inputs.SIGNED.search(name)
    assert not inputs.SIGNED.search("gs://b/part-?.jsonl")


def test_a_scheme_nobody_knows_is_a_sentence():
    with pytest.raises(UserError, match=r"xyz://b/a\.jsonl cannot be looked up"):
        inputs.find("xyz://b/a.jsonl")
