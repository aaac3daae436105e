"""The verb: from files to a folder that train reads, the same bytes each time, continued when stopped."""

import contextlib
import fcntl
import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from sentencepiece import sentencepiece_model_pb2

from moe_embed import prepare
from moe_embed.config import UserError
from moe_embed.data import prepared, sources, spool

SAMPLE = "moe_embed/sample/pairs"


def write(path, count: int, start: int = 0) -> None:
    rows = [
        {"query": f"q{i}", "document": f"d{i}", "lang": "de" if i % 2 else "en"} for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def run(*arguments) -> None:
    prepare.main([*map(str, arguments), "--processes=1"])


def test_the_same_bytes_each_time_and_nothing_twice(tmp_path, capsys):
    write(tmp_path / "a.jsonl", 50)
    write(tmp_path / "b.jsonl", 30, start=40)  # ten are in a too
    for name in ("one", "two"):
        run(f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/{name}", "--shard_size=30")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not (tmp_path / "one" / prepare.WORK).exists()
    pairs = [pair for source in sources.read_sources(str(tmp_path / "one")) for pair in source.pairs]
    assert sorted(pair.query for pair in pairs) == sorted(f"q{i}" for i in range(70))
    assert "copy of another 10" in capsys.readouterr().out
    run(f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/one", "--shard_size=30")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="other inputs or with other options"):
        run(f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/one", "--shard_size=40")
    write(tmp_path / "b.jsonl", 31, start=40)
    run(f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/three", "--shard_size=30")
    assert files(tmp_path / "one") != files(tmp_path / "three")


def test_changed_bytes_of_the_same_length_are_another_order(tmp_path, capsys):
    write(tmp_path / "a.jsonl", 50)
    task = tmp_path / "task"
    shutil.copytree(f"{SAMPLE}/../tasks/libreoffice-help-en", task)
    arguments = f"--input={tmp_path}/a.jsonl", f"--decontaminate={task}"
    run(*arguments, f"--output={tmp_path}/done")
    os.utime(tmp_path / "a.jsonl", (0, 0))  # a copy elsewhere has another date
    run(*arguments, f"--output={tmp_path}/done")
    assert "is finished" in capsys.readouterr().out

    def refused(path, old: bytes, new: bytes):
        before, dates = path.read_bytes(), path.stat()
        assert old in before
        path.write_bytes(before.replace(old, new))
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        for output in ("done", "begun"):
            with pytest.raises(
                UserError, match=r"from other inputs .*bytes of inputs, benchmarks and the tokenizer count"
            ):
                run(*arguments, f"--output={tmp_path}/{output}")
        path.write_bytes(before)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, f"--output={tmp_path}/begun")
    refused(tmp_path / "a.jsonl", b"q7", b"Q7")
    for name in ("corpus.jsonl", "queries.jsonl"):
        refused(task / name, b'"text": "', b'"text": ".')
    refused(next((task / "qrels").glob("*.tsv")), b"1", b"2")
    run(*arguments, f"--output={tmp_path}/begun")
    assert files(tmp_path / "begun") == files(tmp_path / "done")


def test_one_process_prepares_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", 50)
    arguments, real = (f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out"), spool.write_shard

    def meanwhile(*values):
        with pytest.raises(UserError, match=r"another process prepares .*out; wait for it"):
            run(*arguments)
        return real(*values)

    monkeypatch.setattr(spool, "write_shard", meanwhile)
    run(*arguments)
    run(*arguments)  # the lock is gone with its holder


def test_describe_verifies(tmp_path, capsys):
    write(tmp_path / "a.jsonl", 50)
    run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
    printed = capsys.readouterr().out
    prepare.main([f"--describe={tmp_path}/out"])
    assert capsys.readouterr().out in printed
    shard = tmp_path / "out" / prepared.shard_name(0, 1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="digest mismatch"):
        prepare.main([f"--describe={tmp_path}/out"])
    with pytest.raises(UserError, match="no prepared data set"):
        prepare.main([f"--describe={tmp_path}"])


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", 50)
    write(tmp_path / "b.jsonl", 30, start=100)
    arguments = f"--input={tmp_path}/*.jsonl", "--shard_size=30"
    run(*arguments, f"--output={tmp_path}/whole")
    for stop_at in ("fill", "write_shard", "write_tfds_metadata"):
        output = tmp_path / f"stopped-{stop_at}"
        real, calls = getattr(spool, stop_at), []

        def stop(*values, real=real, calls=calls):
            calls.append(values)
            if len(calls) == (1 if real.__name__ == "write_tfds_metadata" else 2):
                raise KeyboardInterrupt
            return real(*values)

        with monkeypatch.context() as patch:
            patch.setattr(spool, stop_at, stop)
            with pytest.raises(KeyboardInterrupt):
                run(*arguments, f"--output={output}")
        with pytest.raises(UserError, match="no prepared data set"):
            prepared.read_manifest(output)
        with pytest.raises(UserError, match="was begun from other inputs"):
            run(f"--input={tmp_path}/a.jsonl", f"--output={output}")
        run(*arguments, f"--output={output}")
        assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("half_deleted", [False, True])
def test_what_a_kill_leaves_beside_the_manifest_is_cleared_away(tmp_path, monkeypatch, capsys, half_deleted):
    write(tmp_path / "a.jsonl", 50)
    arguments = f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    work, made = tmp_path / "out" / prepare.WORK, files(tmp_path / "out")
    assert prepared.MANIFEST in made
    assert any(work.iterdir())
    if half_deleted:
        (work / "order.json").unlink()
    with open(work / "lock", "ab") as other:  # the call that made it, about to delete it
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process prepares"):
            run(*arguments)
    assert any(work.iterdir())
    run(*arguments)
    assert "is finished" in capsys.readouterr().out
    assert not work.exists()
    assert files(tmp_path / "out") == made


def test_the_tokenizer_is_known_by_its_bytes(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.jsonl", 50)
    (tmp_path / "elsewhere").mkdir()
    one, copy = tmp_path / "t.model", tmp_path / "elsewhere" / "t.model"
    for path in (one, copy):
        shutil.copy(prepare.SAMPLE_TOKENIZER, path)

    def stop(*_):
        raise KeyboardInterrupt

    for output in ("done", "begun"):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if output == "begun":
                patch.setattr(spool, "write_shard", stop)
            run(f"--input={tmp_path}/a.jsonl", f"--tokenizer={one}", f"--output={tmp_path}/{output}")
    proto = sentencepiece_model_pb2.ModelProto.FromString(one.read_bytes())
    proto.trainer_spec.model_prefix = "another"
    one.write_bytes(proto.SerializeToString())
    for output in ("done", "begun"):
        with pytest.raises(UserError, match="from other inputs or with other options"):
            run(f"--input={tmp_path}/a.jsonl", f"--tokenizer={one}", f"--output={tmp_path}/{output}")
        run(f"--input={tmp_path}/a.jsonl", f"--tokenizer={copy}", f"--output={tmp_path}/{output}")
    assert "done is finished" in capsys.readouterr().out
    assert files(tmp_path / "begun") == files(tmp_path / "done")


def test_killed_processes_leave_nothing_believed(tmp_path):
    command = [sys.executable, "-m", "moe_embed.prepare", f"--input={SAMPLE}/*.jsonl.gz", f"--output={tmp_path}/out"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "out" / prepare.WORK).glob("input-*")) and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    with pytest.raises(UserError, match="no prepared data set"):
        sources.read_sources(str(tmp_path / "out"))
    for _ in range(200):  # nor do its workers wait for ever
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("workers are left")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shard_size=0",), "must be 1 or more"),
        (("--max_symbols=2",), "a number from 0 to 1"),
        (("--decontaminate=nowhere",), "is not a BEIR folder"),
        (("--tokenizer=nowhere",), "does not exist"),
        (("--query=title",), "has no column 'title'"),
        (("--languages=xx",), "the rules leave nothing"),
    ],
)
def test_faults(tmp_path, arguments, words):
    write(tmp_path / "a.jsonl", 5)
    with pytest.raises(UserError, match=words):
        run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out", *arguments)
    assert not (tmp_path / "out" / prepared.MANIFEST).exists()
    if "leave nothing" not in words:  # that is known when the input has been read
        assert not (tmp_path / "out").exists()  # so that another try is not refused


def test_blanks_between_the_names_of_a_list_are_no_part_of_them(tmp_path):
    write(tmp_path / "a.jsonl", 6)
    for name, languages in (("plain", "de,en"), ("blanks", " de, en ,"), ("one", "de")):
        run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/{name}", f"--languages={languages}")
    assert files(tmp_path / "plain") == files(tmp_path / "blanks")
    assert files(tmp_path / "plain") != files(tmp_path / "one")


def test_an_output_in_a_bucket_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 6)
    with pytest.raises(UserError, match="gs:// is no folder of this machine"):
        run("--input=a.jsonl", "--output=gs://bucket/pairs")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_other_peoples_folders_are_left_alone(tmp_path):
    write(tmp_path / "a.jsonl", 5)
    with pytest.raises(UserError, match="exists and is no prepared data set"):
        run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}")


def test_a_bad_row_that_another_process_meets_is_the_same_sentence(tmp_path):
    write(tmp_path / "a.jsonl", 5)
    (tmp_path / "b.jsonl").write_text('{"query": "q"}\n')
    arguments = [f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--processes=2"]
    with pytest.raises(UserError, match=r"b\.jsonl:1 has no column 'document'") as fault:
        prepare.main(arguments)
    assert fault.value.reason == "column missing"


def test_bad_rows_are_counted_in_the_card(tmp_path, capsys):
    write(tmp_path / "a.jsonl", 98)
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"query": "\xff", "document": "d"}\n{"query": "q"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:99 is not UTF-8"):
        run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
    run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out2", "--max_bad_fraction=0.02")
    said = capsys.readouterr().out
    assert "not UTF-8 1" in said
    assert "a.jsonl:99 is not UTF-8" in said
    card = prepared.read_manifest(tmp_path / "out2")["card"]["inputs"][0]
    assert card["rows"] == card["kept"] + sum(card["left_out"].values()) == 100
    data = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match=r"cut.jsonl.gz cannot be read on after"):
        run(f"--input={tmp_path}/cut.jsonl.gz", f"--output={tmp_path}/out3")


def test_decontaminated(tmp_path, capsys):
    task = f"{SAMPLE}/../tasks/libreoffice-help-en"
    rows = [json.loads(line) for line in pathlib.Path(task, "queries.jsonl").read_text("utf-8").splitlines()]
    long = next(row["text"] for row in rows if len(row["text"].split()) >= 5)
    lines = [{"query": long, "document": "d"}, {"query": "something else", "document": "e"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out", f"--decontaminate={task}")
    assert "in a benchmark 1" in capsys.readouterr().out
    (kept,) = sources.read_sources(str(tmp_path / "out"))[0].pairs
    assert kept.query == "something else"
    lines = [{"query": "a", "document": "b", "negatives": [long, "n"], "scores": [3, 2, 1]}]
    (tmp_path / "b.jsonl").write_text(json.dumps(lines[0]) + "\n")
    run(f"--input={tmp_path}/b.jsonl", f"--output={tmp_path}/out2", f"--decontaminate={task}")
    assert "1 negatives are in a benchmark; they are left out." in capsys.readouterr().out
    (kept,) = sources.read_sources(str(tmp_path / "out2"))[0].pairs
    assert (kept.negatives, kept.scores) == (("n",), (3.0, 1.0))


def test_a_beir_folder_is_an_input(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "a document"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    run(f"--input={folder}", f"--output={tmp_path}/out")
    (pair,) = sources.read_sources(str(tmp_path / "out"))[0].pairs
    assert (pair.query, pair.document, pair.id) == ("a query", "a document", "q")


def test_the_same_data_from_another_path_is_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"query": "a", "document": "b"}\n')
    run("--input=a.jsonl", "--output=one")
    run(f"--input={tmp_path}/a.jsonl", "--output=two")
    one, two = (sources.read_sources(name)[0].digest for name in ("one", "two"))
    assert one == two


def test_a_process_that_is_killed_is_a_sentence():
    with pytest.raises(UserError, match="a process of prepare was killed, perhaps for its memory; run it again"):
        prepare._all(killed, [(0,), (1,)], processes=2, label="a test")


def killed(number: int) -> None:
    """A process of a pool, as the kernel ends one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_query_as_its_document_and_an_answer_among_the_negatives_are_counted(tmp_path, capsys):
    rows = [
        {"query": "a", "document": "a"},
        {"query": "b", "document": "c", "negatives": ["c", "d"]},
        {"query": "e", "documents": ["f", "g"], "negatives": ["g"], "scores": [3, 2, 1]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
    said = capsys.readouterr().out
    assert "query is the document 1" in said
    assert "2 negatives were answers of their own row; they are left out." in said
    (source,) = sources.read_sources(str(tmp_path / "out"))
    assert sorted((p.query, p.document, p.negatives, p.scores) for p in source.pairs) == [
        ("b", "c", ("d",), ()), ("e", "f", (), (3.0,)), ("e", "g", (), (2.0,)),
    ]  # fmt: skip
    assert "2 negatives were" in (tmp_path / "out" / "DATA.md").read_text()
