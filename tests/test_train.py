"""The loop: a run in two halves equals a run in one, bit for bit; the workdir describes itself; faults are sentences."""

import dataclasses
import gzip
import io
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import sentencepiece

from moe_embed import checkpoint, health, metrics, program, run_data, same_run, sharding, train
from moe_embed import config as config_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load, read_description, save
from moe_embed.model import encoder as encoder_lib


@pytest.fixture(scope="module")
def config():
    c = config_lib.load("configs/demo.py:tiny", ["--config.run.save_every=4", "--config.run.steps=8"])
    return dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=16))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    train.train(config, workdir=workdir)
    return workdir


def test_the_workdir_describes_itself(whole, config):
    rows = metrics.read(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert {"accuracy", "tokens_per_second", "router_load/0/7", "useful"} <= set(rows[0])
    assert sum(rows[3][f"router_load/0/{e}"] for e in range(8)) == pytest.approx(8, rel=1e-5)
    assert checkpoint.steps(whole / "checkpoints") == [4, 8]
    events = [(row["step"], row["event"]) for row in metrics.read(whole / "events.jsonl")]
    assert events == [(0, "begin"), (4, "save"), (8, "save")]
    description = json.loads((whole / "workdir.json").read_text())
    assert config_lib.from_dict(description["config"]) == config
    assert description["prompts"]["query"] == "search_query: "
    assert set(description["versions"]) >= {"jax", "flax"}


def test_a_profile_is_of_the_steps_after_the_first_two(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    for item in train.traced(range(6), pathlib.Path("p"), count=3):
        said.append(item)
    assert said == [0, 1, "start p", 2, 3, 4, "stop", 5]
    said.clear()
    assert [said.append(item) for item in train.traced(range(4), pathlib.Path("p"), count=5)]
    assert said == [0, 1, "start p", 2, 3, "stop"]
    assert "up to the end" in capsys.readouterr().out
    said.clear()
    assert list(train.traced(range(3), pathlib.Path("p"), count=0)) == [0, 1, 2]
    assert said == []


def test_an_interrupted_run_continues_to_the_same_weights(whole, config, tmp_path, capsys):
    """Killed after step 4's checkpoint: what lies beyond it is gone, and the rerun ends bit for bit where the whole did."""
    workdir = tmp_path / "w"
    train.train(config, workdir=workdir, profile=2)  # which changes nothing
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert "traced 2 steps" in capsys.readouterr().out
    (workdir / "checkpoints" / "8" / checkpoint.MANIFEST).unlink()  # as if killed during the last save
    capsys.readouterr()
    train.train(config, workdir=workdir)
    said = capsys.readouterr().out
    assert "checkpoint 8 is passed over" in said
    assert "continuing" in said
    events = [(row["step"], row["event"]) for row in metrics.read(workdir / "events.jsonl")]
    assert events == [(0, "begin"), (4, "save"), (8, "save"), (4, "resume"), (8, "save")]
    a, b = load(whole).params, load(workdir).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    losses = [[row["loss"] for row in metrics.read(w / "metrics.jsonl")] for w in (whole, workdir)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_finished_run_says_so_and_does_nothing(whole, config, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    train.train(config, workdir=whole)
    assert "is finished: step 8 of 8" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_room_for_a_checkpoint_is_looked_for_after_the_clean_up_and_where_one_will_be_written(whole, config, tmp_path, monkeypatch, capsys):  # fmt: skip
    workdir = shutil.copytree(whole, tmp_path / "w")
    checkpoints, compiled = workdir / "checkpoints", []
    shutil.rmtree(checkpoints / "8")
    no_room, plenty = (types.SimpleNamespace(free=free) for free in (0, 2**40))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: no_room)
    train.train(config, workdir=whole)
    assert "is finished" in capsys.readouterr().out
    compile_step = train.compile_step
    monkeypatch.setattr(train, "compile_step", lambda *arguments: compiled.append(1) or compile_step(*arguments))
    with pytest.raises(config_lib.UserError, match=r"has 0\.00 GiB free, .*; make room"):
        train.train(config, workdir=workdir)
    assert not compiled
    (checkpoints / "8.saving").mkdir()  # of a save that was killed: it is what fills the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: no_room if list(checkpoints.glob("*.saving")) else plenty)
    train.train(config, workdir=workdir)
    assert checkpoint.steps(checkpoints) == [4, 8]
    assert compiled


def test_another_config_is_refused_by_field(whole, config):
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1.0))
    with pytest.raises(config_lib.UserError, match=r"optim.learning_rate=.*not 1\.0"):
        train.train(other, workdir=whole)


def test_a_run_that_another_process_writes_is_left_as_it_is(whole, config, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "w")
    shutil.rmtree(workdir / "checkpoints" / "8")  # there is something to do
    (workdir / health.SKIPPED).write_text('{"step": 6}\n')  # the other's, beyond the checkpoint
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, keep=5))  # what a rerun may say otherwise
    with same_run.alone(workdir), pytest.raises(config_lib.UserError, match="another process trains in"):
        train.train(more, workdir=workdir)
    (workdir / same_run.LOCK).unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    train.train(more, workdir=workdir)
    assert read_description(workdir).config.run.keep == 5


def test_a_run_goes_on_for_longer_where_its_schedule_does_not_depend_on_its_length(whole, config, tmp_path):
    steps = lambda c, n: dataclasses.replace(c, run=dataclasses.replace(c.run, steps=n))  # noqa: E731
    constant = dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule="constant"))
    for n in (2, 4):
        train.train(steps(constant, n), workdir=tmp_path / "longer")
    train.train(steps(constant, 4), workdir=tmp_path / "at once")
    longer, at_once = (jax.device_get(load(tmp_path / name).params) for name in ("longer", "at once"))
    jax.tree.map(np.testing.assert_array_equal, longer, at_once)
    with pytest.raises(config_lib.UserError, match=r"config.run.steps=8, not 12"):  # a cosine ends where it was told to
        train.train(steps(config, 12), workdir=whole)


def other_tokenizer(folder) -> pathlib.Path:
    text = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a language"] * 9), model_writer=text, vocab_size=18, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(text.getvalue())
    return folder / "tokenizer.model"


def test_changed_data_and_another_tokenizer_are_refused_and_change_nothing(whole, config, tmp_path):
    """Checked before anything is written: a finished run keeps the tokenizer it was trained with."""
    pairs = tmp_path / "titles.jsonl.gz"
    pairs.write_bytes(gzip.compress(b'{"query": "a b", "document": "c d"}\n' * 64))
    changed = dataclasses.replace(config.data, sources=(*config.data.sources[:-1], str(pairs)))
    with pytest.raises(config_lib.UserError, match="files: "):
        train.train(dataclasses.replace(config, data=changed), workdir=whole)
    tokenizer = other_tokenizer(tmp_path)
    before = (whole / "tokenizer.model").read_bytes()
    changed = dataclasses.replace(config.data, tokenizer=str(tokenizer))
    with pytest.raises(config_lib.UserError, match="tokenizer was"):
        train.train(dataclasses.replace(config, data=changed), workdir=whole)
    assert (whole / "tokenizer.model").read_bytes() == before


def test_the_same_files_elsewhere_are_the_same_data(whole, config, tmp_path, capsys):
    for path in (*config.data.sources, config.data.tokenizer):
        shutil.copy(path, tmp_path)
    moved = [str(tmp_path / pathlib.Path(path).name) for path in (*config.data.sources, config.data.tokenizer)]
    data = dataclasses.replace(config.data, sources=tuple(moved[:-1]), tokenizer=moved[-1])
    train.train(dataclasses.replace(config, data=data), workdir=whole)
    assert "is finished" in capsys.readouterr().out


def test_a_run_continues_on_another_mesh_and_is_evaluated(config, tmp_path):
    """Four steps with the batch over eight devices, four with the experts; a dev task is measured on the way."""
    task = tmp_path / "task"
    (task / "qrels").mkdir(parents=True)
    (task / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "d{i}", "text": "{w}"}}\n' for i, w in enumerate(("rows", "cells")))
    )
    (task / "queries.jsonl").write_text('{"_id": "q0", "text": "cells"}\n')
    (task / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    data, run = dataclasses.replace(config.data, dev=(str(task),)), dataclasses.replace(config.run, eval_every=4)
    config = dataclasses.replace(config, data=data, run=run)
    train.train(config, workdir=tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "8")
    mesh = config_lib.Mesh(data=1, expert=8)
    train.train(dataclasses.replace(config, mesh=mesh), workdir=tmp_path / "w")
    figures = metrics.read(tmp_path / "w" / "evaluations.jsonl")
    assert [row["step"] for row in figures] == [0, 4, 8]
    assert all(row["ndcg"] == row["ndcg/task"] > 0.6 for row in figures)  # first or second of two


def model_folder(config, path, *, prompts, seed=1, with_head=False):
    """A model folder of another shape than the config's: dim 48, four experts, its own prompts."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    encoder = dataclasses.replace(config.encoder, dim=48, max_seq_length=100)
    moe = dataclasses.replace(config.moe, num_experts=4)
    params = encoder_lib.init(encoder, moe, key=jax.random.key(seed), with_head=with_head)
    tokenizer = tokenizer_lib.read(config.data.tokenizer)
    save(Model(encoder, moe, params, tokenizer, prompts, mesh, "test"), path, made_by="a test")
    return jax.device_get(params)


def test_a_run_starts_from_a_model_and_keeps_its_shape_prompts_and_parameters(config, tmp_path, capsys):
    prompts = {"query": "query: ", "document": "passage: ", "clustering": "cluster: "}
    params = model_folder(config, tmp_path / "m", prompts=prompts, with_head=True)
    tiny = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.0, weight_decay=0.0))
    train.train(tiny, workdir=tmp_path / "w", init_from=str(tmp_path / "m"))
    found = load(tmp_path / "w")
    assert (found.encoder.dim, found.encoder.max_seq_length, found.moe.num_experts) == (48, 100, 4)
    assert found.prompts == prompts
    assert read_description(tmp_path / "w").config.data.query_prompt == "query: "
    del params["head"]  # contrastive training has no use for it
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), params)
    said = capsys.readouterr().out
    assert "mlm head    left out" in said
    assert "dim 48 (config: 32)" in said
    assert "num_experts 4 (config: 8)" in said
    shutil.rmtree(tmp_path / "m")  # continuing needs it no more
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "8")
    with pytest.raises(config_lib.UserError, match=r"began with --init_from=.*m, not --init_from=.*other"):
        train.train(tiny, workdir=tmp_path / "w", init_from=str(tmp_path / "other"))
    train.train(tiny, workdir=tmp_path / "w")  # what it began with is written down
    assert "continuing" in capsys.readouterr().out
    assert load(tmp_path / "w").prompts == prompts
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    with pytest.raises(config_lib.UserError, match=r"was to begin with --init_from="):
        train.train(tiny, workdir=tmp_path / "w")


def test_what_is_set_explicitly_must_agree_with_the_model(config, tmp_path):
    model_folder(config, tmp_path / "m", prompts={})
    asked = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, dim=64))
    settings = {"workdir": tmp_path / "w", "init_from": str(tmp_path / "m")}
    with pytest.raises(config_lib.UserError, match=r"encoder\.dim=64 disagrees with .* which has 48"):
        train.train(asked, explicit={"encoder.dim", "optim.learning_rate"}, **settings)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(other_tokenizer(tmp_path))))
    with pytest.raises(config_lib.UserError, match=r"tokenizer=.* is not the tokenizer of"):
        train.train(other, explicit={"data.tokenizer"}, **settings)
    assert not (tmp_path / "w").exists()
    with pytest.raises(config_lib.UserError, match="is a model folder, not a run"):
        train.train(config, workdir=tmp_path / "m")


def test_masked_language_modelling_is_the_same_loop(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": "the page style of the document " * (1 + i % 5)}) + "\n" for i in range(64))
    )
    c = config_lib.load("configs/nomic_v2/mlm.py:tiny", [
        f"--config.data.sources={texts}", "--config.data.row_length=32", "--config.data.rows=1", "--config.run.steps=4",
        "--config.data.batch_size=8", "--config.data.document_length=32", "--config.encoder.dim=32",
        "--config.optim.warmup_steps=0"])  # fmt: skip
    train.train(c, workdir=tmp_path / "w")
    rows = metrics.read(tmp_path / "w" / "metrics.jsonl")
    assert rows[-1]["mlm_loss"] < rows[0]["mlm_loss"]
    assert rows[0]["unigram_entropy"] < np.log(16)
    assert "unigram entropy" in capsys.readouterr().out
    assert set(load(tmp_path / "w").params["head"]) == {"w_DU", "b_U", "scale_U", "bias_U", "b_V"}
    assert load(tmp_path / "w").encode(["page style"]).shape == (1, 32)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_old_config_does_not_bind(config, tmp_path):
    wild = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e30, warmup_steps=0))
    with pytest.raises(config_lib.UserError, match=r"loss of step .* is nan"):
        train.train(wild, workdir=tmp_path / "w")
    assert not checkpoint.steps(tmp_path / "w" / "checkpoints")
    short = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=1))
    train.train(short, workdir=tmp_path / "w")
    assert checkpoint.steps(tmp_path / "w" / "checkpoints") == [1]


def test_every_missing_file_is_named(config):
    data = dataclasses.replace(
        config.data, sources=("a.jsonl", "b.jsonl"), tokenizer="t.model", dev=("task",), weights=()
    )
    with pytest.raises(config_lib.UserError) as error:
        run_data.open_data(dataclasses.replace(config, data=data), num_shards=1)
    assert all(name in str(error.value) for name in ("a.jsonl", "b.jsonl", "t.model", "task"))


def test_a_bad_file_is_said_before_weights_are_read(config, tmp_path, monkeypatch):
    (tmp_path / "pairs.csv").write_text("question,document\na,b\n")

    def load(*arguments, **options):
        raise FileNotFoundError("the model is read")

    monkeypatch.setattr(train, "load", load)
    data = dataclasses.replace(config.data, sources=(str(tmp_path / "pairs.csv"),), weights=(), tokenizer="")
    bad = dataclasses.replace(config, data=data)
    with pytest.raises(config_lib.UserError, match=r"pairs\.csv"):
        train.train(bad, workdir=tmp_path / "w", init_from="a model")
    (tmp_path / "pairs.csv").write_text("query,document\na,b\n")
    with pytest.raises(FileNotFoundError, match="the model is read"):  # with good pairs it is next
        train.train(bad, workdir=tmp_path / "w", init_from="a model")


def test_parameters_are_counted_as_a_token_meets_them(config):
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    total, active = program.count_parameters(program.build(config, mesh).abstract_state["params"], config)
    expert = 2 * config.encoder.dim * config.encoder.ffn_dim
    assert total - active == 6 * expert


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.optim.learning_rat=1",), "did you mean learning_rate"),
        (("--config.data.batch_size=7", "--config.mesh.data=2"), "mesh"),
        (("--config.data.sources=nothing.jsonl",), "nothing.jsonl does not exist"),
        (("--workdir=pyproject.toml",), "cannot be written"),
    ],
)
def test_faults_are_one_sentence_and_exit_2(arguments, words, tmp_path):
    command = [
        sys.executable,
        "-m",
        "moe_embed.train",
        "--config=configs/demo.py:tiny",
        f"--workdir={tmp_path / 'w'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()
