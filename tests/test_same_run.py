"""What a run may not say otherwise (the whole loop: test_train.py)."""

import dataclasses
import re

import pytest

from moe_embed import same_run, train
from moe_embed.config import UserError
from moe_embed.load import Description
from tests import tiny


def test_a_change_is_refused_by_name_and_what_may_change_is_not(tmp_path):
    before = tiny.config()
    same_run.refuse_changes(before, tiny.config(mesh={"data": 2}, run={"keep": 5}, loss={"form": "ring"}), tmp_path)
    with pytest.raises(UserError) as refused:
        same_run.refuse_changes(before, tiny.config(optim={"beta1": 0.5}, loss={"temperature": 1.0}), tmp_path)
    assert ["beta1" in refused.value.args[1], "temperature=" in refused.value.args[0]] == [True, True]


def test_data_is_compared_by_content(tmp_path):
    same_run.check_fingerprint({"digest": 1, "old": 2}, {"digest": 1}, tmp_path)
    with pytest.raises(UserError, match="digest was 1, is 2"):
        same_run.check_fingerprint({"digest": 1}, {"digest": 2}, tmp_path)
    with pytest.raises(UserError, match="seed was None, is 2"):
        same_run.check_fingerprint({}, {"seed": 2}, tmp_path)


def test_what_changed_in_the_data_is_said_file_by_file_and_may_be_allowed_by_name(tmp_path, capsys):
    before = {"files": [["a", 10, 1], ["b", 20, 2], ["c", 5, 3]], "seed": 0}
    now = {"files": [["a", 10, 9], ["b", 21, 4], ["d", 6, 5]], "seed": 1}
    with pytest.raises(UserError) as refused:
        same_run.check_fingerprint(before, now, tmp_path)
    *changes, instead = refused.value.args
    ends = [
        "c (5 pairs) is gone.",
        "d (6 pairs) is new.",
        "a has other bytes.",
        "b is another: it had 20 pairs, now 21.",
    ]
    assert [change.rpartition("files: ")[2] for change in changes[:4]] == ends
    assert changes[4].endswith("seed was 0, is 1.")
    assert "--allow_data_change=NAME" in instead
    with pytest.raises(UserError, match="seed was 0, is 1"):
        same_run.check_fingerprint(before, now, tmp_path, allow=["files"])
    same_run.check_fingerprint(before, now, tmp_path, allow=["files", "seed"])
    assert "c (5 pairs) is gone" in capsys.readouterr().out
    with pytest.raises(UserError, match="is none of files, seed"):
        same_run.check_fingerprint(before, now, tmp_path, allow=["file"])
    turned = {"files": before["files"][::-1], "seed": 0}
    with pytest.raises(UserError, match="their order is another"):
        same_run.check_fingerprint(before, turned, tmp_path)


def test_a_beginning_is_kept(tmp_path):
    c = tiny.config()
    fields = {field.name: None for field in dataclasses.fields(Description)}
    before = Description(**fields | {"config": c, "init_from": "base"})
    beginning = lambda init_from, begun: same_run.same_beginning(before, init_from, tmp_path, begun=begun)  # noqa: E731
    assert beginning(None, True) == beginning("base", True) == beginning("base", False) == "base"
    for init_from, begun, words in (("other", True, "began with --init_from=base"), (None, False, "was to begin with")):
        with pytest.raises(UserError, match=words):
            beginning(init_from, begun)
    assert same_run.same_beginning(None, "new", tmp_path, begun=False) == "new"


def test_a_workdir_is_made_and_a_file_is_none(tmp_path):
    same_run.check_kind(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    same_run.check_workdir(tiny.config(), tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        same_run.check_kind(tmp_path / "file")


def test_what_is_wrong_with_a_workdir_is_said_before_the_data_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    c = tiny.config(data={"sources": ("gone.csv",)})
    with pytest.raises(UserError, match="file cannot be written"):
        train.train(c, workdir=tmp_path / "file")
    with pytest.raises(UserError, match=r"gone\.csv"):  # the sibling
        train.train(c, workdir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_hugging_face_folder_is_no_workdir(tmp_path):
    """Training inside it would leave a folder that is both; a run that holds such a file beside its own is one."""
    (tmp_path / "config.json").write_text("{}")
    said = f"--workdir={tmp_path} is a Hugging Face folder; name another --workdir, and --init_from={tmp_path}."
    with pytest.raises(UserError, match=re.escape(said)):
        same_run.check_kind(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "workdir.json").write_text("{}")
    same_run.check_kind(tmp_path)


def test_what_may_change_by_name_is_no_other_config(tmp_path):
    before, now = tiny.config(), tiny.config(run={"seed": 5}, data={"batch_size": 16})
    with pytest.raises(UserError, match=r"config.run.seed=0, not 5"):
        same_run.refuse_changes(before, now, tmp_path, allow=["files"])
    same_run.refuse_changes(before, now, tmp_path, allow=["seed", "batch_size"])


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path):
    before = {"files": [["train.jsonl", 10, 1], ["train.jsonl", 20, 2]]}
    for now, said in (
        ([["train.jsonl", 11, 9], ["train.jsonl", 20, 2]], "train.jsonl is another: it had 10 pairs, now 11."),
        ([["train.jsonl", 20, 2]], "train.jsonl (10 pairs) is gone."),
        ([["train.jsonl", 10, 1], ["train.jsonl", 20, 2], ["train.jsonl", 3, 3]], "train.jsonl (3 pairs) is new."),
        ([["train.jsonl", 20, 2], ["train.jsonl", 10, 1]], "their order is another."),
    ):
        with pytest.raises(UserError) as refused:
            same_run.check_fingerprint(before, {"files": now}, tmp_path)
        assert refused.value.args[0].endswith(f"files: {said}")


def test_a_workdir_has_one_writer(tmp_path):
    with same_run.alone(tmp_path):
        with (
            pytest.raises(
                UserError, match=f"another process trains in .*, or, if its machine is gone, delete {tmp_path}/lock"
            ),
            same_run.alone(tmp_path),
        ):
            pass
        assert (tmp_path / same_run.LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with same_run.alone(tmp_path):  # one that was killed leaves the file, and no lock
        pass


def test_a_lock_that_cannot_be_had_is_a_sentence(tmp_path):
    (tmp_path / same_run.LOCK).mkdir()
    with pytest.raises(UserError, match="/lock cannot be opened: Is a directory"), same_run.alone(tmp_path):
        pass
