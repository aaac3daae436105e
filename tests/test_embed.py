"""The verb: lines in, rows out, and a search that finds what it should."""

import dataclasses
import gzip
import io
import json
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import embed, train
from moe_embed.config import UserError
from moe_embed.load import Model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    train.train(
        config_lib.load("configs/demo.py:tiny", ["--config.run.steps=1", "--config.data.batch_size=8"]), workdir=path
    )
    return path


def test_row_i_is_line_i(workdir, tmp_path, capsys):
    texts = ["eins", "二", "три"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    embed.main(
        [
            f"--model={workdir}",
            f"--input={tmp_path / 't.jsonl'}",
            f"--output={tmp_path / 'e.npy'}",
            "--task=query",
            "--dim=8",
        ]
    )
    vectors = np.load(tmp_path / "e.npy")
    assert vectors.shape == (3, 8)
    np.testing.assert_allclose(vectors[2], embed.load(workdir).encode(["три"], "query", 8)[0], atol=1e-6)
    assert "3 vectors of 8 numbers" in capsys.readouterr().out


def write(path, texts) -> str:
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_packed_file_and_standard_input_are_the_same_texts(workdir, tmp_path, monkeypatch, dtype):
    texts = ["eins", "二", "три"]
    paths = [write(tmp_path / name, texts) for name in ("t.jsonl", "t.jsonl.gz")]
    for source, name in ((paths[0], "a.npy"), (paths[1], "b.npy"), ("-", "c.npy")):
        with open(paths[0], "rb") as stream:
            monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=stream, isatty=lambda: False))
            embed.main([f"--model={workdir}", f"--input={source}", f"--output={tmp_path / name}", f"--dtype={dtype}"])
    found = [(tmp_path / name).read_bytes() for name in ("a.npy", "b.npy", "c.npy")]
    assert found[0] == found[1] == found[2]
    assert np.load(tmp_path / "a.npy").dtype == dtype
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), embed.load(workdir).encode(texts).astype(dtype))


def test_a_bad_line_is_named_before_anything_is_encoded(workdir, tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", ["eins", "zwei", " "])
    monkeypatch.setattr(Model, "encode_stream", None)
    arguments = [f"--model={workdir}", f"--input={path}", f"--output={tmp_path / 'e.npy'}"]
    with pytest.raises(UserError, match=r"t\.jsonl:3 has no text"):
        embed.main(arguments)
    with pytest.raises(UserError, match="no prompt 'passage'"):
        embed.main([*arguments, "--task=passage"])
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_the_input_is_not_overwritten(tmp_path):
    path = write(tmp_path / "t.jsonl", ["eins"])
    before = (tmp_path / "t.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(path)
    for name in ("t.jsonl", "link", "../" + tmp_path.name + "/t.jsonl"):
        with pytest.raises(UserError, match="is the --input, which would be lost; name another file"):
            embed.main(["--model=nowhere", f"--input={path}", f"--output={tmp_path / name}"])
    for source, name in ((path, "e.npy"), ("-", "t.jsonl"), ("gone.jsonl", "t.jsonl")):
        with pytest.raises(UserError, match="nowhere holds no model"):
            embed.main(["--model=nowhere", f"--input={source}", f"--output={tmp_path / name}"])
    assert (tmp_path / "t.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="gs:// is no folder of this machine"):
        embed.main(["--model=nowhere", f"--input={path}", "--output=gs://b/e.npy"])


def test_a_killed_run_goes_on_to_the_same_bytes(workdir, tmp_path):
    path, output = write(tmp_path / "t.jsonl", [f"Zeile {i}" for i in range(400)]), tmp_path / "e.npy"
    record = tmp_path / "e.npy.progress.json"
    code = (
        "import sys; from moe_embed import embed, verb; sys.modules['moe_embed.load'].CHUNK = 4; verb.run(embed.main)"
    )
    command = [sys.executable, "-c", code, f"--model={workdir}", f"--input={path}", f"--output={output}"]
    running = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while not (record.is_file() and json.loads(record.read_text())["rows"]):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        running.kill()
    assert running.wait() == -signal.SIGKILL
    rows = json.loads(record.read_text())["rows"]
    assert 0 < rows < 400
    assert not output.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{rows:,} of 400 rows are there" in done.stdout
    again = tmp_path / "again.npy"
    subprocess.run([*command[:-1], f"--output={again}"], capture_output=True, check=True)
    assert output.read_bytes() == again.read_bytes()
    assert np.load(output).shape == (400, 32)
    assert not np.array_equal(np.load(output)[:-4], np.load(output)[4:])


def test_search_finds_the_same_text(workdir, capsys):
    model = embed.load(workdir, mesh=embed.load(workdir).mesh)
    model = dataclasses.replace(model, prompts={})
    embed.search(model, ["rows and columns", "the weather", "表を挿入"], ["表を挿入"], top_k=1)
    assert "1.000 表を挿入" in capsys.readouterr().out


def test_a_text_without_spaces_is_cut_and_not_dropped(workdir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "ページの余白を変更するには書式メニューを開きます。" * 4
    embed.search(embed.load(workdir), [text], ["余白"], top_k=1)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert text[:20] in shown
    assert (len(shown), shown[-1]) == (40, "…")


def test_queries_that_are_no_utf_8_are_a_sentence(monkeypatch):
    for data, found in ((b"a\nb\n\n", ["a", "b"]), (b"\xff\n", None)):
        with io.TextIOWrapper(io.BytesIO(data), "utf-8") as stream:
            monkeypatch.setattr("sys.stdin", stream)
            if found:
                assert list(embed._typed()) == found
            else:
                with pytest.raises(UserError, match="standard input is not UTF-8"):
                    list(embed._typed())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--output"),
        (("--output=e.npy",), "--input"),
        (("--search=none.jsonl",), "none.jsonl does not exist"),
        (("--search=none.jsonl", "--task=query"), "--task and --dtype are for --output"),
        (("--search=none.jsonl", "--dtype=float32"), "--task and --dtype are for --output"),
    ],
)
def test_faults_exit_2(arguments, words, tmp_path):
    done = subprocess.run([sys.executable, "-m", "moe_embed.embed", f"--model={tmp_path}", *arguments],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
