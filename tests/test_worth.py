"""What is refused, how equal time is reckoned, what the table says; then the whole way, stopped in the middle and gone on with."""

import importlib
import json
import pathlib
import types

import numpy as np
import pytest

from moe_embed import bucket, held_out, hf_layout, worth
from moe_embed import config as config_lib
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.load import read_description, save, write_description
from tests import hf_tiny, test_upcycle, tiny

TOKENIZER = types.SimpleNamespace(file_name="tokenizer.model", model_bytes=b"")


def config(**data):
    return tiny.config(data={"held_out": 0.1} | data)


def finished(root, c, *, seconds, after, before=0.25):
    """A workdir as train leaves it: {query: nDCG@10} after, one figure before, seconds of each step."""
    root.mkdir(parents=True)
    write_description(root, c, TOKENIZER, prompts={})
    rows = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(seconds)]
    (root / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    measured(root, held_out.Measured(dict.fromkeys(after, before), after, steps=len(seconds), verdict="said."))


def measured(root, figures):
    (root / held_out.FILE).write_text(json.dumps(figures._asdict()))


def both(workdir, *, dense_seconds=(1.0,) * 8, gain=0.1):
    """Both runs, the mixture's 4 steps of 2 s, better by `gain` at each query."""
    figures = {f"q{i}": x for i, x in enumerate(np.random.default_rng(0).random(100) / 2)}
    finished(workdir / "dense", tiny.config(moe={"num_experts": 0}), seconds=dense_seconds, after=figures)
    better = {query: x + gain for query, x in figures.items()}
    finished(workdir / "mixture", tiny.config(), seconds=[2.0] * 4, after=better)
    return figures


def test_the_table_and_the_verdict(tmp_path):
    figures = both(tmp_path)
    table, c = worth.conclude(tmp_path), tiny.config()
    total, active = (f"{n:,}" for n in hf_layout.num_parameters(c.encoder, c.moe))
    mixture, dense = ([*line.split()] for line in table.splitlines()[1:3])
    mean = 100 * np.mean(list(figures.values()))
    assert mixture == ["mixture", "4", "8", total, active, "25.0", f"{mean + 10:.1f}"]
    assert dense[:3] + dense[5:] == ["dense", "8", "8", "25.0", f"{mean:.1f}"]
    assert dense[3] == dense[4] != total
    assert table.splitlines()[-1].startswith(
        "the mixture is better than the dense model given the same time by 10.0 points of nDCG@10 (95 % interval"
    )
    assert "speed changed" not in table
    for name in worth.PARTS:  # the sibling: no gain at any query, no difference
        measured(tmp_path / name, held_out.Measured(figures, figures, steps=4, verdict="said."))
    assert "no difference is shown between the mixture and the dense" in worth.conclude(tmp_path)


@pytest.mark.parametrize(("dense", "said"), [([1.03] * 8, ""), ([1.25] * 8, "25% longer"), ([0.75] * 8, "25% less")])
def test_times_that_are_not_equal_are_said(tmp_path, dense, said):
    both(tmp_path, dense_seconds=dense)
    table = worth.conclude(tmp_path)
    assert said in table
    assert ("speed changed" in table) == bool(said)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    figures = both(tmp_path)
    measured(tmp_path / "dense", held_out.Measured(figures, {"other": 1.0}, steps=8, verdict="said."))
    with pytest.raises(UserError, match="kept other queries out"):
        worth.conclude(tmp_path)
    file = tmp_path / "dense" / held_out.FILE
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(UserError, match="does not say what the held-out queries scored"):
            worth.conclude(tmp_path)
    for end in (lambda: file.write_text(json.dumps({"before": figures})), file.unlink):
        end()
        with pytest.raises(UserError, match="has not measured its held-out queries to the end"):
            worth.conclude(tmp_path)


def test_the_ratio_is_of_steps_on_the_same_batch():
    assert worth.ratio_of({"mixture": [3.0, 40.0, 6.0], "dense": [2.0, 10.0, 4.0]}) == 1.5  # not 6 / 4, nor 49 / 16
    assert worth.ratio_of({"mixture": [3.0, 40.0, 6.0], "dense": [2.0, 10.0, 2.0]}) == 3.0
    with pytest.raises(ValueError, match="zip"):
        worth.ratio_of({"mixture": [3.0], "dense": [2.0, 10.0]})


def test_probes_take_turns_and_their_first_step_does_not_count(tmp_path, monkeypatch):
    called = []

    def part(name, *arguments):
        scratch = tmp_path / "probe"
        assert not scratch.exists()
        assert {"--a=1", "--config.data.held_out=0", f"--workdir={scratch}", "--config.run.steps=3"} <= set(arguments)
        called.append(next(a for a in arguments if a.startswith("--init_from=")).partition("=")[2])
        scratch.mkdir()
        rows = [{"step": i, "seconds": s} for i, s in enumerate((100.0, len(called), 10.0 * len(called)))]
        (scratch / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(worth, "part", part)
    monkeypatch.setattr(worth, "PROBE", 3)
    worth.begin(tmp_path / ".", config(), "base")
    for _ in range(2):  # the second time all is known
        worth.probe(tmp_path, ["--a=1"], {"mixture": "start", "dense": "base"})
        assert called == ["start", "base", "base", "start"]
    found = worth.read(tmp_path)["seconds"]
    assert found == {"mixture": [1.0, 10.0, 4.0, 40.0], "dense": [2.0, 20.0, 3.0, 30.0]}
    assert worth.ratio_of(found) == pytest.approx((0.5 + 4 / 3) / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [worth.FILE]


def test_a_bucket_is_refused():
    with pytest.raises(UserError, match="a --workdir that is one"):
        worth.main(["--config=c.py", "--init_from=m", "--workdir=gs://bucket/w"])


def test_what_is_no_question_is_refused(tmp_path):
    hf_tiny.write_folder(tmp_path / "dense", *hf_tiny.ALL["bert"])
    hf_tiny.write_folder(tmp_path / "experts", *hf_tiny.ALL["nomic"])
    finished(tmp_path / "trained", tiny.config(), seconds=[1.0], after={"q0": 1.0})
    worth.check(config(), str(tmp_path / "dense"))
    for name, num in (("experts", 3), ("trained", 8)):
        with pytest.raises(UserError, match=rf"{name} is a mixture of {num} experts already; give the dense model"):
            worth.check(config(), str(tmp_path / name))
    with pytest.raises(UserError, match="no model"):
        worth.check(config(), str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="held_out=0 keeps nothing out"):
        worth.check(tiny.config(), str(tmp_path / "dense"))
    with pytest.raises(UserError, match="num_experts=0 leaves no mixture"):
        worth.check(tiny.config(data={"held_out": 0.1}, moe={"num_experts": 0}), str(tmp_path / "dense"))


@pytest.mark.gcs
def test_a_model_in_a_bucket_is_looked_for_there(monkeypatch):
    asked, experts = [], [0, 8]
    monkeypatch.setattr(bucket, "_store", lambda: None)
    monkeypatch.setattr(bucket, "is_file", lambda path: asked.append(str(path)) or True)
    monkeypatch.setattr(
        worth, "read_description", lambda root: types.SimpleNamespace(moe=config_lib.Moe(num_experts=experts.pop(0)))
    )
    worth.check(config(), "gs://runs/w")
    with pytest.raises(UserError, match="gs://runs/w is a mixture of 8 experts already"):
        worth.check(config(), "gs://runs/w")
    assert asked == ["gs://runs/w/workdir.json"] * 2


def test_a_workdir_is_begun_once(tmp_path):
    c, w = config(), tmp_path / "w"
    worth.begin(w, c, "base")
    worth.write(w, worth.read(w) | {"seconds": {"mixture": [2.0], "dense": [1.0]}})
    worth.begin(w, c, "base")
    assert worth.read(w)["seconds"] == {"mixture": [2.0], "dense": [1.0]}  # kept
    with pytest.raises(UserError, match=r"begun with another config.data.rows; say it as before"):
        worth.begin(w, config(rows=4), "base")
    with pytest.raises(UserError, match=r"begun with another --init_from"):
        worth.begin(w, c, "other")
    (w / worth.FILE).write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        worth.begin(w, c, "base")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        worth.begin(tmp_path / "mine", c, "base")
    with pytest.raises(UserError, match="cannot be written"):
        worth.begin(tmp_path / "mine" / "thesis.txt", c, "base")


def test_the_devices_of_the_mesh_are_counted(monkeypatch):
    assert worth.num_devices(tiny.config(mesh={"data": 4, "expert": 2})) == 8
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    c = tiny.config(mesh={"data": -1, "expert": 1})
    assert worth.num_devices(c) == 3
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match="the devices cannot be counted: error: jax finds no device"):
        worth.num_devices(c)


def test_few_queries_give_no_verdict(tmp_path):
    both(tmp_path)
    for name in worth.PARTS:
        found = held_out.read(tmp_path / name)
        few = {when: dict(list(of.items())[:5]) for when, of in found._asdict().items() if isinstance(of, dict)}
        measured(tmp_path / name, found._replace(**few))
    assert "too little to judge by (measured on 5 queries): the mixture" in worth.conclude(tmp_path)


def test_a_part_that_fails_is_a_sentence(tmp_path, capfd):
    with pytest.raises(UserError, match="ended with exit code 2, its reason is above: upcycle --model="):
        worth.part("upcycle", f"--model={tmp_path / 'none'}", f"--output={tmp_path / 'out'}")
    assert "holds no model" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def write_pairs(path) -> str:
    shipped = sources.read_source("moe_embed/sample/pairs/monolingual.jsonl.gz").pairs
    rows = [{"query": p.query, "document": p.document} for p in shipped if p.lang == "de"][:120]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--config.data.sources={path}"


def test_what_the_parts_are_told_and_where_it_goes_on(tmp_path, monkeypatch, capsys):
    """Parts that write what the real ones would: 120 pairs leave 96, 8 a step, 36 steps of the mixture and 54 dense."""
    base, w, calls, stopped = tmp_path / "base", tmp_path / "w", [], []
    hf_tiny.write_folder(base, *hf_tiny.ALL["bert"])

    def part(name, *arguments):
        root = pathlib.Path(next(a for a in arguments if a.startswith(("--workdir", "--output"))).partition("=")[2])
        start = next(a for a in arguments if a.startswith(("--init_from", "--model"))).partition("=")[2]
        calls.append((name, root.name, pathlib.Path(start).name))
        if name == "upcycle":
            assert set(arguments[2:]) == {"--num_experts=4", "--top_k=2", "--every=2"}
            root.mkdir()
            (root / "workdir.json").touch()
            return
        if root.name == "dense" and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        c = config_lib.load("configs/finetune_pairs.py", [a for a in arguments if a.startswith("--config.")])
        assert (c.moe.num_experts, c.optim.learning_rate, c.data.batch_size) == (8, 1e-4, 8)  # moe: the model's to say
        assert c.data.held_out == (0 if root.name == "probe" else 0.1)
        seconds = 3.0 if pathlib.Path(start).name == "start" else 2.0
        if not root.exists():
            finished(root, c, seconds=[seconds] * c.run.steps, after={f"q{i}": i / 24 for i in range(24)})

    monkeypatch.setattr(worth, "part", part)
    arguments = ["--config=configs/finetune_pairs.py", write_pairs(tmp_path / "pairs.jsonl"), "--config.moe.num_experts=4",
                 "--config.optim.learning_rate=1e-4", f"--init_from={base}", f"--workdir={w}"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        worth.main(arguments)
    turns = [("train", "probe", start) for start in ("start", "base", "base", "start")]
    runs = [("train", "mixture", "start"), ("train", "dense", "base")]
    assert calls == [("upcycle", "start", "base"), *turns, *runs]
    calls.clear()
    worth.main(arguments)
    assert calls == runs
    assert "1.50 times as long: 36 steps, and 54 dense" in (said := capsys.readouterr().out)
    assert "no difference is shown" in said.splitlines()[-1]
    mixture, dense = (read_description(w / name).config for name in worth.PARTS)
    assert (mixture.run.steps, mixture.optim.warmup_steps) == (36, 3)  # held_out.fit's, as train's would be
    assert (dense.run.steps, dense.optim.warmup_steps) == (54, 4)
    assert "speed changed" not in said


@pytest.mark.slow
def test_the_whole_way_with_a_stop_in_the_middle(tmp_path, monkeypatch, capsys):
    base, w, calls, stop = tmp_path / "base", tmp_path / "w", [], [f"--workdir={tmp_path / 'w' / 'dense'}"]
    save(test_upcycle.dense(), base, made_by="a test")

    def part(name, *arguments):  # in this process: no start of seven
        calls.append((name, arguments))
        if stop and stop[0] in arguments:
            raise KeyboardInterrupt
        importlib.import_module(f"moe_embed.{name}").main(list(arguments))

    monkeypatch.setattr(worth, "part", part)
    monkeypatch.setattr(worth, "PROBE", 2)
    monkeypatch.setattr(worth, "TURNS", 1)
    monkeypatch.setattr(worth, "ratio_of", lambda seconds: 1.5 if len(seconds["dense"]) == 1 else 0)
    arguments = ["--config=configs/finetune_pairs.py", write_pairs(tmp_path / "pairs.jsonl"),
                 "--config.run.steps=4", "--config.optim.warmup_steps=2", "--config.data.rows=8", "--config.moe.num_experts=4",
                 "--config.data.query_length=16", "--config.data.document_length=32", f"--init_from={base}", f"--workdir={w}"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        worth.main(arguments)
    assert [name for name, _ in calls] == ["upcycle", *["train"] * 4]
    assert "--num_experts=4" in calls[0][1]
    from_ = lambda of: next(a for a in of if a.startswith("--init_from=")).rpartition("/")[2]  # noqa: E731
    assert [from_(of) for _, of in calls[1:]] == ["start", "base", "start", "base"]
    assert not (w / "probe").exists()

    calls.clear()
    stop.clear()
    capsys.readouterr()
    worth.main(arguments)
    said = capsys.readouterr().out
    assert [name for name, _ in calls] == ["train", "train"]
    assert "w/mixture is finished: step 4 of 4" in said
    last = said.splitlines()[-1]
    assert "the mixture" in last
    assert "queries)" in last
    mixture, dense = (read_description(w / name).config for name in worth.PARTS)
    assert (mixture.run.steps, mixture.optim.warmup_steps, mixture.moe.num_experts) == (4, 2, 4)
    assert (dense.run.steps, dense.optim.warmup_steps, dense.moe.num_experts) == (6, 3, 0)
    assert mixture.data.batch_size == dense.data.batch_size == 8
    before = [held_out.read(w / name).before for name in worth.PARTS]
    assert before[0].keys() == before[1].keys()
    gap = [abs(before[0][query] - before[1][query]) for query in before[0]]
    assert np.mean(gap) < 0.02  # upcycling keeps the function

    calls.clear()
    worth.main(arguments)  # a third time: the same answer
    assert capsys.readouterr().out.splitlines()[-1] == last
