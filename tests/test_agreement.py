"""What is said when processes do not agree, from rows written by hand; and that this process's own row is right."""

import copy
import pathlib
import platform

import jax
import pytest

import moe_embed
from moe_embed import agreement
from moe_embed import config as config_lib
from tests import tiny


def row(host: str, **changes) -> dict:
    """A row of a process as check() gathers them."""
    same = {
        "config": {"config.optim.learning_rate": 0.004, "config.run.seed": 0, "--init_from": None},
        "code": {"train.py": "aa", "optim.py": "bb"},
        "version": {"python": "3.11.9", "jax": "0.10.2", "libtpu": "absent"},
        "setting": {"XLA_FLAGS": ""},
    }
    devices = {"platform": "gpu", "kind": "H100", "local": 8, "accelerators": {"NVIDIA GPU": 8}, "chosen": False,
               "hidden": False}  # fmt: skip
    return copy.deepcopy({"host": host, "same": same, **devices, **changes})


def test_processes_that_agree_are_not_complained_of():
    rows = [row("a"), row("b"), row("c")]
    assert agreement.differences(rows) == agreement.uneven(rows) == agreement.unused(rows) == []


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("config", {"config.optim.learning_rate": 1.0},
         "process 1 on b differs from process 0 on a in config.optim.learning_rate (1.0, not 0.004): give every process"),
        ("code", {"train.py": "cc"}, "process 1 on b differs from process 0 on a in moe_embed/train.py: bring the same"),
        ("code", {"new.py": "cc"}, "in moe_embed/new.py"),
        ("version", {"jax": "0.12.0"}, "in jax (0.12.0, not 0.10.2): install the same versions"),
        ("version", {"libtpu": "0.0.42"}, "in libtpu (0.0.42, not absent)"),
        ("setting", {"XLA_FLAGS": "--xla_a"}, "in XLA_FLAGS (--xla_a, not )"),
    ],
)  # fmt: skip
def test_a_difference_names_the_process_the_key_and_both_values(kind, change, words):
    rows = [row("a"), row("b"), row("c")]
    rows[1]["same"][kind] |= change
    (sentence,) = agreement.differences(rows)
    assert words in sentence


def test_a_key_that_one_lacks_many_keys_and_many_processes_stay_one_sentence():
    rows = [row("a"), row("b"), row("c")]
    for other in rows[1:]:
        other["same"]["version"] = {name: "1" for name in ("python", "jax", "flax", "numpy")}
    (sentence,) = agreement.differences(rows)
    assert "process 1 on b (so do 1 more)" in sentence
    assert "and 1 more" in sentence  # of four names that differ, three are said
    rows[0]["same"]["fingerprint"] = {"seed": 0}
    for other in rows[1:]:
        other["same"]["fingerprint"] = {}
    assert "seed (absent, not 0): bring the same files" in agreement.differences(rows)[1]


def test_as_many_devices_of_one_kind_on_every_process():
    (sentence,) = agreement.uneven([row("a"), row("b", local=4)])
    assert "process 1 on b has 4 x H100, process 0 on a 8 x H100" in sentence
    (sentence,) = agreement.uneven([row("a"), row("b", kind="A100")])
    assert "8 x A100" in sentence


def test_accelerators_that_nobody_computes_on():
    (sentence,) = agreement.unused([row("a"), row("b", platform="cpu", local=1)])
    assert sentence.startswith("b has 8 x NVIDIA GPU, and jax computes on the CPU")
    assert agreement.unused([row("b", platform="cpu", local=1, chosen=True)]) == []  # JAX_PLATFORMS=cpu says so
    two = [row("a", local=1), row("a", local=1)]
    assert "a has 8 x NVIDIA GPU, and its 2 process(es) use 2 of them" in agreement.unused(two)[0]
    assert agreement.unused([row("a", local=1, hidden=True), row("a", local=1, hidden=True)]) == []
    assert agreement.unused([row("a", local=4), row("a", local=4)]) == []  # together they use all


def test_the_table_has_a_line_a_process():
    lines = agreement.table([row("a"), row("host-b", local=4)]).splitlines()
    assert [line.split() for line in lines] == [
        ["process", "host", "local", "devices", "global", "devices", "kind"],
        ["0", "a", "8", "12", "H100"],
        ["1", "host-b", "4", "12", "H100"],
    ]


def test_a_folder_that_is_not_shared_is_named():
    rows = [{"host": "a", "seen": True}, {"host": "b", "seen": False}]
    (sentence,) = agreement.unshared(rows, pathlib.Path("w/workdir.json"))
    assert "process 1 on b does not see w/workdir.json, which process 0 on a wrote" in sentence
    assert agreement.unshared(rows[:1], pathlib.Path("w")) == []


def test_this_process(monkeypatch, capsys):
    found = agreement.devices({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"})
    assert (found.platform, found.local, found.chosen, found.hidden) == ("cpu", jax.local_device_count(), True, True)
    found = agreement.devices({})
    assert (found.chosen, found.hidden) == (False, False)
    monkeypatch.setattr(
        agreement, "devices", lambda environ: agreement.Devices("cpu", "cpu", 1, {"TPU": 4}, False, False)
    )
    agreement.check(tiny.config(), others={})  # alone it is a note, no fault
    assert "has 4 x TPU, and jax computes on the CPU" in capsys.readouterr().out


def test_what_is_compared(monkeypatch):
    """The config without the paths whose content is compared, each file, the versions, and flags but those of dumps."""
    seen = []
    monkeypatch.setattr(agreement.cluster, "gather", lambda row: seen.append(row) or [row])
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/p0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    agreement.check(tiny.config(), others={"--init_from": "m"})
    same = seen[0]["same"]
    assert same["config"]["config.run.seed"] == 0
    assert same["config"]["--init_from"] == "m"
    assert "config.data.sources" not in same["config"]
    assert same["version"]["python"] == platform.python_version()
    assert same["version"]["jax"] == jax.__version__
    assert same["setting"]["XLA_FLAGS"] == "--xla_a=1"
    assert {"train.py", "model/moe.py"} <= set(same["code"])
    agreement.check_data(tiny.config(), {"seed": 3})
    assert seen[1]["same"]["fingerprint"] == {"seed": 3}


def test_the_digest_of_the_code_changes_with_the_code(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    before = agreement.code(tmp_path)
    assert list(before) == ["a/x.py"]
    (tmp_path / "a" / "x.py").write_text("2")
    assert agreement.code(tmp_path) != before
    assert agreement.code(pathlib.Path(moe_embed.__file__).parent) == agreement.code(
        pathlib.Path(moe_embed.__file__).parent
    )


def test_a_fault_is_an_error_on_every_process(monkeypatch):
    other = row("b")
    monkeypatch.setattr(agreement.cluster, "gather", lambda mine: [mine, other])
    with pytest.raises(config_lib.UserError, match="process 1 on b differs"):
        agreement.check(tiny.config(), others={})
