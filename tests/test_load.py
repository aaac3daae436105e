"""encode: rows in the caller's order, the same vector in any company, and clear refusals."""

import dataclasses
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import tqdm

from moe_embed import checkpoint, sharding
from moe_embed import config as config_lib
from moe_embed import load as load_function
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import SPARE, Model, _rows, check_model_output, load, put_in_place, save, write_description
from moe_embed.model import encoder

load_module = sys.modules["moe_embed.load"]
TEXTS = [
    "Tabelle",
    "表を挿入する",
    "a much longer text about inserting rows and columns into a table of a document " * 4,
    "x y z",
]


@pytest.fixture(scope="module", params=[1, 8])
def model(request):
    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[: request.param])
    params = encoder.init(c.encoder, c.moe, key=jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    tokenizer = tokenizer_lib.read(c.data.tokenizer)
    return Model(c.encoder, c.moe, params, tokenizer, {"query": "search_query: "}, mesh, "test")


def test_the_public_name_is_the_function():
    assert load_function is load


def test_vectors_are_in_order_of_unit_norm_and_independent_of_company(model):
    together = model.encode(TEXTS * 9)
    assert together.shape == (36, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(together[i::4], np.repeat(model.encode([text]), 9, 0), atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_prompt_dim_and_length(model):
    plain, query = model.encode(TEXTS), model.encode(TEXTS, task="query")
    assert np.abs(plain - query).max() > 1e-3
    np.testing.assert_allclose(query, model.encode([f"search_query: {text}" for text in TEXTS]), atol=1e-6)
    short = model.encode(TEXTS, dim=8)
    np.testing.assert_allclose(short, plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1, keepdims=True), atol=1e-6)
    cut = model.encode(TEXTS, max_length=8)
    assert np.abs(cut[2] - plain[2]).max() > 1e-3
    np.testing.assert_allclose(cut[3], plain[3], atol=1e-6)
    long = ["word " * 400]
    np.testing.assert_allclose(model.encode(long, max_length=10_000), model.encode(long), atol=1e-6)
    assert model.options(None, None, 10_000) == ("", 32, model.encoder.max_seq_length)
    with pytest.raises(UserError, match=r"has no prompt 'query'; it has none\."):
        dataclasses.replace(model, prompts={}).options("query", None, None)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_text_is_in_one_call_and_little_is_left_over(num_devices):
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 32, 300):
        ids = [np.full(n, i + 4, np.int32) for i, n in enumerate(rng.integers(3, 100, count))]
        seen = []
        for members, rows, packed in _rows(ids, num_devices=num_devices):
            tokens_BL = rows["tokens_MBL"][0]
            num_rows, length = tokens_BL.shape
            assert (num_rows // num_devices) & (num_rows // num_devices - 1) == 0
            assert num_rows % num_devices == 0
            assert (num_rows - packed.num_rows) * length <= SPARE or num_rows == num_devices
            for i, row, start in zip(members, packed.row_N, packed.start_N, strict=True):
                np.testing.assert_array_equal(tokens_BL[row, start : start + len(ids[i])], ids[i])
            seen += list(members)
        assert sorted(seen) == list(range(count))
    alone = next(_rows([np.arange(3, 40)], num_devices=1))[1]["tokens_MBL"]
    assert alone.shape == (1, 1, 64)  # nothing else to put into a longer row


def test_a_model_folder_is_replaced_and_nothing_else(model, tmp_path):
    save(model, tmp_path / "m", made_by="a test")
    save(dataclasses.replace(model, prompts={}), tmp_path / "m", made_by="a test")
    assert load(tmp_path / "m", mesh=model.mesh).prompts == {}
    (tmp_path / "link").symlink_to(tmp_path / "m")
    save(model, tmp_path / "link", made_by="a test")
    assert load(tmp_path / "m", mesh=model.mesh).prompts == model.prompts
    (tmp_path / "m" / "finetuned").mkdir()
    (tmp_path / "m" / "finetuned" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"also holds finetuned/notes\.txt, which would be lost"):
        save(model, tmp_path / "m", made_by="a test")
    assert (tmp_path / "m" / "finetuned" / "notes.txt").read_text() == "precious"
    shutil.rmtree(tmp_path / "m" / "finetuned")
    for inside in ("checkpoints/notes.txt", "checkpoints/0/notes.txt", "checkpoints/1/digests.json"):
        (tmp_path / "m" / inside).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / inside).write_text("precious")
        with pytest.raises(UserError, match=f"also holds {inside}, which would be lost"):
            save(model, tmp_path / "m", made_by="a test")
        (tmp_path / "m" / inside).unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        save(model, tmp_path / "file" / "m", made_by="a test")


def test_a_model_that_is_read_is_not_replaced(model, tmp_path):
    save(model, tmp_path / "m", made_by="a test")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    check_model_output(tmp_path / "m", read=[str(tmp_path / "other"), str(tmp_path / "gone")])
    for output, read in (("m", "m"), ("m", "link"), ("link", "m"), ("m/../m", "m")):
        with pytest.raises(UserError, match="is the model that is read; it would be replaced, so name another folder"):
            check_model_output(tmp_path / output, read=[str(tmp_path / "other"), str(tmp_path / read)])


def test_a_folder_takes_the_place_of_another_or_changes_nothing(tmp_path, monkeypatch, capsys):
    new, place = tmp_path / "new", tmp_path / "place"

    def renew() -> None:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        for folder in (new, place):
            folder.mkdir()
            (folder / "what.txt").write_text(folder.name)

    renew()
    put_in_place(new, place)
    assert (place / "what.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]

    renew()
    put_in_place(new, place, keep=tmp_path / "place.bak")
    assert (place / "what.txt").read_text() == "new"
    assert (tmp_path / "place.bak" / "what.txt").read_text() == "place"
    shutil.rmtree(tmp_path / "place.bak")

    rename = pathlib.Path.rename
    for keep in (None, tmp_path / "place.bak"):
        for fails in (1, 2):
            renew()
            with monkeypatch.context() as patch:
                calls = iter(range(1, 9))

                def failing(path, target, fails=fails, calls=calls):
                    if next(calls) == fails:
                        raise KeyboardInterrupt
                    return rename(path, target)

                patch.setattr(pathlib.Path, "rename", failing)
                with pytest.raises(KeyboardInterrupt):
                    put_in_place(new, place, keep=keep)
            assert (place / "what.txt").read_text() == "place"
            assert (new / "what.txt").read_text() == "new"
            assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "place"]

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", lambda *_: os.rename("nowhere", "here"))
        with pytest.raises(UserError, match="place cannot be replaced: No such file or directory; name another folder"):
            put_in_place(new, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "place"]

    monkeypatch.setattr(load_module.shutil, "rmtree", lambda *_, **__: None)  # of a file that cannot be deleted
    put_in_place(new, place)
    assert (place / "what.txt").read_text() == "new"
    (old,) = (path for path in tmp_path.iterdir() if path != place)
    assert (old / "place" / "what.txt").read_text() == "place"
    assert f"could not be deleted; the rest of it is in {old}" in capsys.readouterr().out


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    check_model_output(place)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path == place)
    for name in ("place", "link"):
        with pytest.raises(UserError, match=f"{name} is a mount point, which cannot be replaced"):
            check_model_output(tmp_path / name)
    check_model_output(tmp_path / "other")


def test_chunks_and_a_stream_are_the_same_vectors(model, monkeypatch):
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 20)]
    whole, choices_RE = model.encode_with_sums(texts, "query", 8)
    monkeypatch.setattr(sys.modules["moe_embed.load"], "CHUNK", 24 // model.mesh.size)
    in_chunks, also_choices_RE = model.encode_with_sums(texts, "query", 8)
    np.testing.assert_allclose(in_chunks, whole, atol=1e-6)
    np.testing.assert_array_equal(also_choices_RE, choices_RE)
    with tqdm.tqdm(disable=True) as bar:
        parts = list(model.encode_stream(iter(texts), "query", 8, bar=bar))
        assert [len(part) for part in parts] == [24, 24, 24, 8]
        np.testing.assert_array_equal(np.concatenate(parts), in_chunks)
        assert np.abs(next(model.encode_stream(texts[1:], "query", 8, bar=bar)) - parts[0]).max() > 1e-3
        with pytest.raises(UserError, match="text 30 is empty"):
            list(model.encode_stream([*texts[:30], ""], bar=bar))


def test_any_iterable_of_texts_will_do(model):
    np.testing.assert_array_equal(model.encode(text for text in TEXTS), model.encode(TEXTS))


def test_nothing_in_nothing_out(model):
    assert model.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": ["a", " "]}, "text 1 is empty"),
        ({"texts": "abc"}, "a list of texts"),
        ({"texts": ["a"], "task": "passage"}, "no prompt 'passage'"),
        ({"texts": ["a"], "dim": 33}, "dim=33"),
        ({"texts": ["a"], "max_length": 2}, "max_length=2"),
        ({"texts": ["\ud800"]}, "text 0"),
    ],
)
def test_refusals(model, arguments, words):
    with pytest.raises(config_lib.UserError, match=words):
        model.encode(**arguments)


def test_no_model_no_checkpoint(tmp_path):
    for name, said in (
        (str(tmp_path), "holds no model: neither a workdir"),
        (str(tmp_path / "none"), "holds no model: it does not exist.$"),
        ("intfloat/small", r"does not exist here. From the hub: hf download intfloat/small --local-dir=small$"),
    ):
        with pytest.raises(config_lib.UserError, match=said):
            load(name)
    with pytest.raises(config_lib.UserError, match="holds no model"):
        load(tmp_path)


def test_a_step_of_a_workdir_can_be_chosen(tmp_path):
    c = config_lib.load("configs/demo.py:tiny")
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    write_description(tmp_path, c, tokenizer_lib.read(c.data.tokenizer), prompts={})
    for step in (1, 2):
        state = {"step": step, "params": jax.tree.map(lambda x, step=step: x * step, params)}
        checkpoint.save(tmp_path / "checkpoints", state, facts={}, keep=9)
    found = [jax.tree.leaves(jax.tree.map(np.asarray, load(tmp_path, step=step).params)) for step in (1, 2, None)]
    assert all(map(np.array_equal, found[0], jax.tree.leaves(params)))
    assert all(map(np.array_equal, found[1], found[2]))
    assert not all(map(np.array_equal, found[0], found[1]))
    (tmp_path / "checkpoints" / "1" / checkpoint.MANIFEST).unlink()
    for step, words in ((1, "step 1 of .* does not verify: .*it is unfinished"), (3, "step 3 of")):
        with pytest.raises(UserError, match=words):
            load(tmp_path, step=step)


def test_a_mesh_that_does_not_divide_the_experts_is_a_sentence(tmp_path):
    c = config_lib.load("configs/demo.py:tiny")
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    write_description(tmp_path, c, tokenizer_lib.read(c.data.tokenizer), prompts={})
    checkpoint.save(tmp_path / "checkpoints", {"step": 1, "params": params}, facts={}, keep=9)
    mesh = sharding.make_mesh(config_lib.Mesh(data=1, expert=3), devices=jax.devices()[:3])
    with pytest.raises(config_lib.UserError, match=r"does not fit the mesh .*not divisible by 3"):
        load(tmp_path, mesh=mesh)
