"""A prepared data set read by place: the same pairs, by TFDS too, and every damage named."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_embed import prepare
from moe_embed.config import UserError
from moe_embed.data import prepared, sources
from moe_embed.data.pairs import Pair

FULL = Pair("q ü", "d 表", ("n", "m"), "de", "7", (0.5, 1.0, 2.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two inputs of 60 and 40 pairs in three languages, four shards."""
    root = tmp_path_factory.mktemp("prepared")
    for name, count in (("a", 60), ("b", 40)):
        rows = [{"query": f"{name} q{i}", "document": f"{name} d{i}", "lang": ("de", "en", "ja")[i % 3], "id": f"{i}"} for i in range(count)]  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main([f"--input={root}/*.jsonl", f"--output={root}/out", "--shard_size=25", "--processes=1"])
    return root / "out"


@pytest.fixture
def copy(made, tmp_path):
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_pair_comes_back():
    assert prepared.from_bytes(prepared.to_bytes(FULL)) == FULL
    assert prepared.to_bytes(FULL) == prepared.to_bytes(dataclasses.replace(FULL))
    assert prepared.from_bytes(prepared.to_bytes(Pair("q", "d"))) == Pair("q", "d") != FULL


def test_sources_are_the_inputs_language_by_language(made):
    a, b = sources.read_sources(str(made))
    assert [source.path.rsplit("/", 1)[-1] for source in (a, b)] == ["a.jsonl", "b.jsonl"]
    assert (len(a), len(b)) == (60, 40)
    for source in (a, b):
        pairs = list(source.pairs)
        assert [pair.lang for pair in pairs] == sorted(pair.lang for pair in pairs)
        for lang, places in source.by_language().items():
            assert {pair.lang for pair in source.take(places[np.arange(len(places))])} == {lang}
        order = np.random.default_rng(0).permutation(len(source))
        assert source.take(order) == [pairs[i] for i in order]
        assert source.pairs[3] == pairs[3]
    assert {pair.query for pair in a.pairs} == {f"a q{i}" for i in range(60)}
    assert {pair.query for pair in b.pairs} == {f"b q{i}" for i in range(40)}
    with pytest.raises(IndexError):
        a.pairs[60]


def test_tfds_reads_it(made):
    data = tfds.builder_from_directory(made).as_data_source("train")
    ours = [pair for source in sources.read_sources(str(made)) for pair in source.pairs]
    assert len(data) == 100
    assert [row["query"].decode() for row in data] == [pair.query for pair in ours]


def test_few_shards_are_open_at_once(made, monkeypatch):
    monkeypatch.setattr(prepared, "OPEN", 2)
    source = sources.read_sources(str(made))[0]
    assert len(source.take(np.arange(60))) == 60
    assert len(source.pairs.shards.readers) == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda shard, manifest: shard.write_bytes(b""), "has 0 bytes"),
        (lambda shard, manifest: shard.unlink(), "is missing"),
        (lambda shard, manifest: manifest.write_text(manifest.read_text().replace("de", "dd", 1)), "digest mismatch"),
        (lambda shard, manifest: manifest.write_text("{"), "cannot be read"),
    ],
)
def test_damage_is_named_before_anything_is_read(copy, damage, words):
    damage(copy / prepared.shard_name(1, 4), copy / "manifest.json")
    with pytest.raises(UserError, match=words):
        sources.read_sources(str(copy))


def test_damage_inside_a_shard_is_named(copy):
    shard = copy / prepared.shard_name(1, 4)
    data = bytearray(shard.read_bytes())
    manifest = prepared.read_manifest(copy)
    prepared.verify(copy, manifest)
    for place in range(200, len(data), len(data) // 40):
        data[place] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match="digest mismatch"):
        prepared.verify(copy, manifest)
    with pytest.raises(UserError, match=r"is damaged|holds"):
        list(sources.read_sources(str(copy))[0].pairs)
    os.truncate(shard, 0)
    with open(shard, "wb") as file:
        file.write(bytes(len(data)))  # the size is right, and nothing is in it
    with pytest.raises(UserError, match=r"is damaged|holds 0 records"):
        list(sources.read_sources(str(copy))[0].pairs)


def test_another_models_vectors_are_refused(made):
    with pytest.raises(UserError, match="plain files only"):
        sources.read_sources(str(made), teacher="big")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["sources"].append({"name": "none", "languages": []}),
        lambda manifest: manifest["sources"][0]["languages"].append([manifest["sources"][0]["languages"][0][0], 0]),
        lambda manifest: manifest.pop("order"),
    ],
)
def test_a_manifest_that_prepare_would_not_write(copy, change):
    manifest = prepared.read_manifest(copy)
    prepared.write_manifest(copy, manifest)
    prepared.read_manifest(copy)
    change(manifest)
    prepared.write_manifest(copy, manifest)
    with pytest.raises(UserError, match="no manifest that prepare wrote"):
        prepared.read_manifest(copy)
