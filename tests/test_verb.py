"""How a verb ends: an exit code, sentences on stderr, and jax set up as the machine needs it."""

import errno
import fnmatch
import glob
import importlib
import io
import os
import subprocess
import sys

import jax
import pytest

from moe_embed import cluster, verb
from moe_embed.__main__ import VERBS
from moe_embed.config import UserError


def ends(main, *arguments, monkeypatch, copies=False) -> int | None:
    """The code a verb with this main exits with."""
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])
    with pytest.raises(SystemExit) as caught:
        verb.run(main, copies=copies)
    return caught.value.code


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_what_main_returns_is_the_exit_code(returned, code, monkeypatch, capsys):
    seen = []
    assert ends(lambda argv: seen.append(argv) or returned, "--a=1", "b", monkeypatch=monkeypatch) == code
    assert seen == [["--a=1", "b"]]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.jsonl does not exist."), 2, "error: a.jsonl does not exist.\n"),
        (UserError("one.", "two."), 2, "error: one.\nerror: two.\n"),
        (KeyboardInterrupt(), 130, "\nstopped.\n"),
        (RuntimeError("Unable to initialize backend 'tpu': none"), 2,
         "error: jax finds no device for JAX_PLATFORMS=tpu: Unable to initialize backend 'tpu': none\n"),
        (OSError(errno.ENOSPC, "No space left", "w/a"), 2,
         "error: No space left: w/a; make room, or name another place.\n"),
    ],
    ids=["a sentence", "two sentences", "ctrl-c", "no device", "a full disk"],
)  # fmt: skip
def test_a_fault_of_the_user_is_sentences_and_a_code(error, code, said, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert ends(raising(error), monkeypatch=monkeypatch) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("UserError"), TypeError()])
def test_a_fault_of_ours_keeps_its_traceback(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verb"])
    with pytest.raises(type(error)) as caught:
        verb.run(raising(error))
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_gone_is_no_fault(monkeypatch, capsys):
    """A pipe nobody reads: the first print fails, and what is still in the buffer goes nowhere at exit."""
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(os.fdopen(writing, "wb", 0), write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert ends(lambda argv: print("x"), monkeypatch=monkeypatch) == 141
        print("y", flush=True)  # BrokenPipeError again, were it still the pipe
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_is_no_fault_for_what_waits_in_the_buffer_either():
    """`| head -1` of a few lines: nothing is written before the end."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "from moe_embed import verb; verb.run(lambda argv: print('x'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True,
                          env=environment, check=False)  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("device", "platforms", "expected"),
    [
        (None, None, "cpu"),
        (None, "", "cpu"),  # set to nothing is not set
        ("/dev/vfio/vfio", None, "cpu"),  # of the kernel's module, without a device
        ("/dev/vfio/0", None, None),
        ("/dev/nvidiactl", None, None),
        ("/dev/accel0", None, None),
        ("/dev/accel0", "", None),
        (None, "cuda", None),
    ],
)
def test_jax_is_told_to_use_the_cpu_only_where_nothing_else_is(device, platforms, expected, monkeypatch):
    """Else an installed plugin is probed, with a warning; a JAX_PLATFORMS of the user's own stands."""
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter([device or ""], pattern))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert ends(lambda argv: 0, monkeypatch=monkeypatch) == 0
    assert (updates["jax_platforms"] if "jax_platforms" in updates else None) == expected
    assert updates["jax_compilation_cache_dir"] == os.path.expanduser("~/.cache/moe_embed/xla")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == updates["jax_compilation_cache_dir"]  # for child processes


HELPS = """
import importlib, sys
from moe_embed import verb
for name in sys.argv[1].split(","):
    sys.argv[1:] = ["--help"]
    try:
        verb.run(importlib.import_module(f"moe_embed.{name}").main)
    except SystemExit as end:
        assert not end.code, name
import jax
try:
    jax.devices()
except RuntimeError:
    print("and no device was asked for", flush=True)
"""


@pytest.mark.parametrize(
    ("said", "code"), [("Gloo: peer closed", 76), ("NCCL operation failed", 76), ("no such axis", 1)]
)
def test_a_broken_collective_is_to_be_started_again(said, code, monkeypatch, capsys):
    for name, value in (("several", True), ("failure", None)):
        monkeypatch.setattr(cluster, name, lambda value=value: value)
    monkeypatch.setattr(cluster, "end", lambda status, why: None)
    assert ends(raising(RuntimeError(said)), monkeypatch=monkeypatch, copies=True) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code"), [(jax.errors.JaxRuntimeError("UNAVAILABLE: Connection refused"), 76), (None, 1)]
)
def test_with_process_0_gone_the_others_are_to_be_started_again(fault, code, monkeypatch, capsys):
    """It holds the store that knows who has failed."""

    class Client:
        def key_value_dir_get(self, name):
            if fault:
                raise fault
            return []

    ended = []
    monkeypatch.setattr(cluster.distributed.global_state, "client", Client())
    monkeypatch.setattr(cluster, "end", lambda status, why: ended.append((status, why)))
    assert ends(raising(ValueError("no such key")), monkeypatch=monkeypatch, copies=True) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (code == 1)
    if code == cluster.GONE:
        why = "process 0 is gone without a word, killed or with its machine (ValueError: no such key)"
        assert (err, ended) == (f"error: {why}\n", [(code, why)])


def test_help_asks_for_no_device():
    """With a platform that does not exist, any question about devices fails, as the last one does."""
    done = subprocess.run([sys.executable, "-c", HELPS, ",".join(VERBS)], capture_output=True, text=True, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "none_such"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: python -m moe_embed.") == len(VERBS)
    assert done.stdout.endswith("and no device was asked for\n")


@pytest.mark.parametrize(("platforms", "silent"), [(None, True), ("", True), ("tpu,cpu", False)])
def test_libtpu_is_silent_where_there_is_no_tpu_unless_one_is_asked_for(platforms, silent):
    """An installed libtpu that is looked at writes to stderr; asked for by name it is to say what is wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {} if platforms is None else {"JAX_PLATFORMS": platforms}
    code = "import jax; from moe_embed import evaluate, verb; verb.run(lambda argv: print(jax.devices()[0].platform))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if silent:
        assert done.returncode == 0
        assert "host bounds" not in done.stderr
        assert "TPU" not in done.stderr
    else:
        assert "jax finds no device for JAX_PLATFORMS=tpu,cpu" in done.stderr


def test_the_users_own_cache_stands(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert ends(lambda argv: 0, monkeypatch=monkeypatch) == 0
    assert updates["jax_compilation_cache_dir"] == "/elsewhere"


def parser() -> verb.Parser:
    made = verb.Parser("train", "What it does.", overrides=True)
    made.add_argument("--init_from")
    made.add_argument("--config", required=True)
    made.add_argument("--steps", type=int)
    return made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--init_form=m"], r"--init_form is no flag of python -m moe_embed\.train; did you mean --init_from\?"),
        (["--confg=a.py"], "--confg is no flag of .* did you mean --config"),  # and not that --config is missing
        (["--config=a.py", "--zzz"], "--zzz is no flag of .*; known: .*--init_from"),
        (["--config.data.rows=1"], r"the following arguments are required: --config; .*train --help shows all flags\."),
        (["--config=a.py", "--steps=x"], "argument --steps: invalid int value: 'x'; "),
    ],
)
def test_a_fault_in_the_flags_is_one_sentence(arguments, said):
    with pytest.raises(UserError, match=f"^{said}") as caught:
        parser().parse_known_args(arguments)
    assert "\n" not in str(caught.value)


def test_flags_that_are_right_are_taken():
    found, overrides = parser().parse_known_args(["--config=a.py", "--init_from", "m", "--config.data.rows=1"])
    assert (found.config, found.init_from, found.steps, overrides) == ("a.py", "m", None, ["--config.data.rows=1"])
    without = verb.Parser("embed", "What it does.")
    without.add_argument("--config")
    assert without.parse_args(["--conf=b.py"]).config == "b.py"
    with pytest.raises(UserError, match=r"--config\.data\.rows is no flag of .*; did you mean --config\?"):
        without.parse_args(["--config.data.rows=1"])


def test_every_verb_has_such_flags():
    for name in VERBS:
        with pytest.raises(
            UserError, match=rf"^--hlep is no flag of python -m moe_embed\.{name}; did you mean --help\?"
        ):
            importlib.import_module(f"moe_embed.{name}").main(["--hlep"])


def test_an_output_is_checked_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "old.jsonl").write_text("kept")
    monkeypatch.chdir(tmp_path)
    for path in ("new.jsonl", "old.jsonl"):
        verb.check_output(tmp_path / path, "--output")
        verb.check_output((tmp_path / path).relative_to(tmp_path), "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]  # nothing is made, nothing is lost
    with pytest.raises(
        UserError, match=r"--output=.*a/b\.jsonl cannot be written: there is no folder .*/a; name a file"
    ):
        verb.check_output(tmp_path / "a" / "b.jsonl", "--output")
    with pytest.raises(UserError, match=r"--to=.* is a folder; name a file"):
        verb.check_output(tmp_path, "--to")
    with pytest.raises(UserError, match="there is no folder"):
        verb.check_output(tmp_path / "old.jsonl" / "b.jsonl", "--output")


def test_an_address_is_no_place_for_what_is_written_here(tmp_path):
    for text in ("gs://bucket/secret", "s3://bucket/secret", "gs://me:secret@bucket"):
        with pytest.raises(UserError, match=f"{text[:2]}:// is no folder of this machine; .*copy it there afterwards"):
            verb.local_path(text)
        with pytest.raises(UserError) as fault:
            verb.local_path(text)
        assert "secret" not in str(fault.value)
    assert verb.local_path(f"{tmp_path}/gs:/a") == tmp_path / "gs:" / "a"
