"""The file is what np.save writes of encode, whatever stopped its writer, and only what it was begun as goes on."""

import dataclasses
import fcntl
import io
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import sharding, vector_file
from moe_embed.config import UserError
from moe_embed.data import corpus
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder

LOAD = sys.modules["moe_embed.load"]  # `moe_embed.load` is the function
TEXTS = [f"{'Zeile und Spalte ' * (i % 7)}{i}" for i in range(23)]


def mesh_of(count: int):
    return sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def model() -> Model:
    c = config_lib.load("configs/demo.py:tiny")
    params = encoder.init(c.encoder, c.moe, key=jax.random.key(0))
    mesh = mesh_of(1)
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    return Model(c.encoder, c.moe, params, tokenizer_lib.read(c.data.tokenizer), {"query": "search_query: "}, mesh, "m")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(LOAD, "CHUNK", 5)


def texts_of(some=TEXTS) -> vector_file.Texts:
    return vector_file.Texts(lambda: iter(some), *corpus.survey(some))


def saved(x_ND: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x_ND)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, "float32"), ({"task": "query", "dim": 8}, "float32"), ({"task": "query"}, "float16")],
)
def test_the_file_is_what_np_save_writes_of_encode(model, tmp_path, options, dtype):
    path = tmp_path / "e.bin"  # whatever its name
    vector_file.write(model, path, texts_of(), **options, dtype=dtype)
    assert path.read_bytes() == saved(model.encode(TEXTS, **options).astype(dtype))
    assert path.read_bytes() != saved(model.encode([*TEXTS[:-1], "another"], **options).astype(dtype))
    assert [p.name for p in tmp_path.iterdir()] == ["e.bin"]


def test_no_texts_and_a_whole_number_of_chunks(model, tmp_path):
    for some in ([], TEXTS[:10]):
        vector_file.write(model, tmp_path / "e.npy", texts_of(some))
        assert (tmp_path / "e.npy").read_bytes() == saved(model.encode(some))


def test_eight_devices_write_the_same_vectors(model, eight_devices, tmp_path):
    mesh = mesh_of(8)
    params = jax.device_put(model.params, sharding.shardings(model.params, column="parameter", mesh=mesh))
    wide = dataclasses.replace(model, params=params, mesh=mesh)
    for one, name in ((model, "one.npy"), (wide, "eight.npy")):
        vector_file.write(one, tmp_path / name, texts_of())
    np.testing.assert_allclose(np.load(tmp_path / "eight.npy"), np.load(tmp_path / "one.npy"), atol=1e-6)
    assert wide.digest == model.digest


class Stopped(Exception):
    """What ends a run in these tests."""


@pytest.mark.parametrize("after", range(0, 23, 3))
def test_stopped_anywhere_and_run_again_is_the_same_file(model, tmp_path, after):
    path, asked = tmp_path / "e.npy", []

    def until():
        yield from TEXTS[:after]
        raise Stopped

    with pytest.raises(Stopped):
        vector_file.write(model, path, texts_of()._replace(read=until))
    assert not path.exists()
    assert json.loads((tmp_path / "e.npy.progress.json").read_text())["rows"] == after - after % 5
    with open(tmp_path / "e.npy.partial", "ab") as file:
        file.write(b"half a row that was not counted")

    class Counting(type(model.tokenizer)):
        def __init__(self):
            vars(self).update(vars(model.tokenizer))

        def encode(self, some, **options):
            asked.extend(some)
            return super().encode(some, **options)

    vector_file.write(dataclasses.replace(model, tokenizer=Counting()), path, texts_of())
    assert asked == TEXTS[after - after % 5 :]  # what is there is not made again
    assert path.read_bytes() == saved(model.encode(TEXTS))
    assert [p.name for p in tmp_path.iterdir()] == ["e.npy"]


@pytest.mark.parametrize("place", range(12))
def test_stopped_between_any_two_moves_on_the_disk(model, tmp_path, monkeypatch, place):
    """12: the record's beginning, five chunks and what is said of them, and the whole file before it is renamed."""
    path, calls, fsync = tmp_path / "e.npy", itertools.count(), vector_file.os.fsync

    def stops(number):
        if next(calls) == place:
            raise Stopped
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(vector_file.os, "fsync", stops)
        with pytest.raises(Stopped):
            vector_file.write(model, path, texts_of())
    assert not path.exists()
    vector_file.write(model, path, texts_of())
    assert path.read_bytes() == saved(model.encode(TEXTS))


def begin(model, path, count=10, **options) -> None:
    def some():
        yield from TEXTS[:count]
        raise Stopped

    with pytest.raises(Stopped):
        vector_file.write(model, path, texts_of()._replace(read=some), **options)


def test_what_was_begun_otherwise_is_refused(model, tmp_path):
    path = tmp_path / "e.npy"
    begin(model, path, task="query")
    params = jax.tree.map(lambda x: x * 1.001, model.params)
    others = {
        "another model": (dataclasses.replace(model, params=params), texts_of(), {}),
        "another texts": (model, texts_of([*TEXTS[:-1], "other"]), {}),
        "another task": (model, texts_of(), {"task": None}),
        "another dim and another dtype": (model, texts_of(), {"dim": 8, "dtype": "float16"}),
    }
    for words, (other, texts, options) in others.items():
        with pytest.raises(UserError, match=f"begun with {words}; delete .*progress.json to start over"):
            vector_file.write(other, path, texts, **{"task": "query"} | options)
    vector_file.write(model, path, texts_of(), task="query")
    assert path.read_bytes() == saved(model.encode(TEXTS, "query"))


def test_what_was_begun_otherwise_and_has_no_row_is_in_nobodys_way(model, tmp_path):
    begin(model, tmp_path / "e.npy", count=4, task="query")
    vector_file.write(model, tmp_path / "e.npy", texts_of())
    assert (tmp_path / "e.npy").read_bytes() == saved(model.encode(TEXTS))


def test_what_is_broken_is_said(model, tmp_path, capsys):
    path = tmp_path / "e.npy"
    partial, record = tmp_path / "e.npy.partial", tmp_path / "e.npy.progress.json"
    begin(model, path)
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"partial is shorter than .*progress\.json says; delete both"):
        vector_file.write(model, path, texts_of())
    partial.write_bytes(whole)
    record.write_text("{}")
    with pytest.raises(UserError, match=r"progress\.json cannot be read"):
        vector_file.write(model, path, texts_of())
    record.unlink()
    begin(model, path)
    partial.unlink()
    vector_file.write(model, path, texts_of())
    assert "is gone; starting over" in capsys.readouterr().out
    assert path.read_bytes() == saved(model.encode(TEXTS))


def test_texts_that_change_while_they_are_read(model, tmp_path):
    for some in (TEXTS[:-1], [*TEXTS, "one more"]):
        with pytest.raises(UserError, match=f"changed while they were read: 23 before, now {len(some)}"):
            vector_file.write(model, tmp_path / "e.npy", texts_of()._replace(read=lambda some=some: iter(some)))
        assert not list(tmp_path.iterdir())  # rows of other texts are no beginning


@pytest.mark.parametrize("place", [0, 4, 11, 22])
def test_as_many_other_texts_are_no_less_a_change(model, tmp_path, place):
    path, other = tmp_path / "e.npy", [*TEXTS[:place], "other", *TEXTS[place + 1 :]]
    path.write_bytes(b"of yesterday")
    begin(model, path)  # a part is there: what was encoded before is read again as well
    with pytest.raises(UserError, match=r"e\.npy changed while they were read; run it again"):
        vector_file.write(model, path, texts_of()._replace(read=lambda: iter(other)))
    with pytest.raises(UserError, match="changed while they were read"):
        vector_file.write(model, path, texts_of()._replace(read=lambda: iter(TEXTS[::-1])))
    assert path.read_bytes() == b"of yesterday"
    assert [p.name for p in tmp_path.iterdir()] == ["e.npy"]
    vector_file.write(model, path, texts_of())
    assert path.read_bytes() == saved(model.encode(TEXTS))
    assert path.read_bytes() != saved(model.encode(other))


def test_a_fault_of_reading_is_not_called_one_of_writing(model, tmp_path, monkeypatch):
    def read():
        yield TEXTS[0]
        raise OSError(5, "Input/output error", "texts.jsonl")

    with pytest.raises(OSError, match=r"texts\.jsonl"):
        vector_file.write(model, tmp_path / "e.npy", texts_of()._replace(read=read))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vector_file.os, "fsync", full)
    with (
        open(tmp_path / "e.npy.partial", "ab") as file,
        pytest.raises(UserError, match=r"e\.npy\.partial cannot be written: No space left"),
    ):
        vector_file._append(file, b"x")


def test_two_writers_and_no_room(model, tmp_path, monkeypatch):
    with open(tmp_path / "e.npy.partial", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process writes .*partial"):
            vector_file.write(model, tmp_path / "e.npy", texts_of())
    with pytest.raises(UserError, match=r"no/e\.npy\.partial cannot be written: No such file"):
        vector_file.write(model, tmp_path / "no" / "e.npy", texts_of())
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(vector_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.0 GB more"):
        vector_file.write(model, tmp_path / "e.npy", texts_of())


def test_only_one_chunk_is_read_ahead(model, tmp_path, monkeypatch):
    """The claim of bounded memory: when a chunk's rows are counted, no more than its texts have been asked for."""
    asked, ahead = [], []

    def counted():
        for text in TEXTS:
            asked.append(text)
            yield text

    write = vector_file.stored.write_json
    monkeypatch.setattr(
        vector_file.stored,
        "write_json",
        lambda path, value: (ahead.append(len(asked) - value["rows"]), write(path, value)),
    )
    vector_file.write(model, tmp_path / "e.npy", texts_of()._replace(read=counted))
    assert ahead == [0] * 6
    monkeypatch.setattr(LOAD, "CHUNK", 23)
    asked.clear()
    vector_file.write(model, tmp_path / "e.npy", texts_of()._replace(read=counted))
    assert len(ahead) == 6 + 2


def test_cached_vectors_are_made_once_for_texts_model_and_task(model, tmp_path):
    x_ND = vector_file.cached(model, tmp_path, texts_of(), task="query")
    assert isinstance(x_ND, np.memmap)
    np.testing.assert_array_equal(x_ND, model.encode(TEXTS, "query"))

    def nobody_reads():
        raise AssertionError

    again = vector_file.cached(model, tmp_path, texts_of()._replace(read=nobody_reads), task="query")
    np.testing.assert_array_equal(again, x_ND)
    vector_file.cached(model, tmp_path, texts_of(), task=None)
    vector_file.cached(model, tmp_path, texts_of(TEXTS[1:]), task="query")
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 1.001, model.params))
    vector_file.cached(other, tmp_path, texts_of(), task="query")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 4
    faults = {b"no array": "cannot be read .*; delete it", saved(x_ND[:2]): r"float32 \[2, 32\], not what was written"}
    for content, words in faults.items():
        for path in paths:
            path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            vector_file.cached(model, tmp_path, texts_of(), task="query")
