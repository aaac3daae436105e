"""Workdirs in a bucket: objects whole or not at all, rows before the checkpoint that has them, no half step ever believed."""

import itertools
import json
import sys

import numpy as np
import pytest

from moe_embed import bucket, checkpoint, metrics, saving, sharding, stored
from moe_embed import config as config_lib
from moe_embed.config import UserError
from tests import fake_gcs
from tests.test_checkpoint import abstract, assert_same, small_state

gcs = pytest.mark.gcs
FORBIDDEN = 403  # gcsfs does not try again
CHANGES = ("POST", "DELETE")


@pytest.fixture(scope="module")
def server():
    """gcsfs and tensorstore read where to go once."""
    with fake_gcs.serve() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        bucket._store.cache_clear()
        yield store


@pytest.fixture
def root(server, request):
    """A workdir in a bucket of its own."""
    name = f"bucket-{len(server.buckets)}"
    server.buckets[name] = {}
    server.asked.clear()
    yield bucket.path_of(f"gs://{name}/runs/w")
    server.refuse = lambda method, name: 0


def objects(server, path) -> dict[str, bytes]:
    """What is stored below a path."""
    of = server.buckets[path.parts[2]]
    start = "/".join(path.parts[3:]) + "/"
    return {name.removeprefix(start): item.data for name, item in of.items() if name.startswith(start)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.Mesh(data=4, expert=2))


def test_addresses_that_are_no_workdir():
    assert bucket.path_of("runs/w").parts == ("runs", "w")
    for text, said in (
        ("s3://b/w", "s3://b/w is an object store that checkpoints cannot be written to"),
        ("gs://bucket", "gs://bucket is not gs://BUCKET/PATH"),
        ("gs://bucket/", "gs://bucket/ is not gs://BUCKET/PATH"),
        ("gs://bucket/w?X-Goog-Signature=secret", "gs://bucket/w is not gs://BUCKET/PATH"),
        ("gs://key:secret@bucket/w", "gs://bucket/w is not gs://BUCKET/PATH"),
        ("s3://key:secret@bucket/w", "s3://bucket/w is an object store"),
        ("s3://key:half/secret@bucket/w", "s3://bucket/w is an object store"),
        ("gs://bucket/w*", "gs://bucket/w* is not gs://BUCKET/PATH, or has one of"),  # gcsfs deletes what it matches
        ("gs://bucket/lr[1]", "gs://bucket/lr[1] is not gs://BUCKET/PATH"),
    ):
        with pytest.raises(UserError) as error:
            bucket.path_of(text, flag="--workdir=")
        assert str(error.value).startswith(f"--workdir={said}")
        assert "secret" not in str(error.value)


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r'gs://bucket/w needs gcsfs.*pip install -e ".\[gcs\]"'):
        bucket.path_of("gs://bucket/w")


@gcs
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's advice to gcsfs
def test_objects_appear_whole_and_are_listed_by_their_paths(server, root):
    assert bucket.is_remote(root)
    assert bucket.read(root / "a") == b""
    assert bucket.names(root) == []
    for i in range(2 * fake_gcs.PAGE):
        bucket.write(root / "a" / f"{i:02}", bytes([i]) * i)
    bucket.write(root / "ab", b"a neighbour by its first letters")
    large = np.random.default_rng(0).bytes(51 * 2**20)  # above what gcsfs sends at once
    bucket.write(root / "large", large)
    assert bucket.read(root / "large") == large
    assert bucket.names(root / "a") == [f"{i:02}" for i in range(2 * fake_gcs.PAGE)]
    assert bucket.read(root / "a" / "05") == bytes([5]) * 5
    bucket.remove(root / "a", first="03")
    assert next(name for method, name in server.asked if method == "DELETE") == "runs/w/a/03"
    assert bucket.names(root) == ["ab", "large"]
    bucket.remove(root / "large")
    bucket.remove(root / "nothing")
    assert bucket.names(root) == ["ab"]
    stored.write_json(root / "x.json", {"ä": 1})
    assert stored.read_json(root / "x.json") == {"ä": 1}


@gcs
def test_what_a_store_refuses_is_an_oserror_with_a_sentence(server, root):
    server.refuse = lambda method, name: FORBIDDEN
    for ask in (lambda: bucket.write(root / "a", b"1"), lambda: bucket.read(root / "a"), lambda: bucket.names(root)):
        with pytest.raises(OSError, match="refused by the test") as error:
            ask()
        assert not isinstance(error.value, FileNotFoundError)
    with pytest.raises(
        UserError, match=r"--workdir=gs://.*/runs/w cannot be written: refused by the test; gcloud auth"
    ):
        bucket.check(root)
    server.refuse = lambda method, name: 0
    bucket.check(root)
    assert objects(server, root) == {}
    with pytest.raises(UserError, match="there is no bucket another-one"):
        bucket.check(bucket.path_of("gs://another-one/w"))


@gcs
@pytest.mark.parametrize("status", [409, 401, FORBIDDEN])  # gcsfs tries none of them again, nor takes a while
def test_a_store_that_fails_for_a_while_is_waited_for_and_one_that_refuses_is_not(server, root, status, monkeypatch, capsys):  # fmt: skip
    monkeypatch.setattr(bucket, "PAUSE", 0.0)
    failures = iter([status] * 3)
    server.refuse = lambda method, name: next(failures, 0)
    if status != 409:
        with pytest.raises(UserError, match=r"/runs/w cannot be written: refused by the test.*gcloud auth"):
            bucket.check(root)
        assert len(server.asked) == 1
        return
    bucket.check(root)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0] == f"{root} cannot be written: refused by the test, 409; it is tried again for 120 s."
    assert objects(server, root) == {}
    server.refuse = lambda method, name: status
    monkeypatch.setattr(bucket, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"/runs/w cannot be written: refused by the test, 409; gcloud auth"):
        bucket.check(root)


def rows(data: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in data.splitlines()]


@gcs
def test_rows_are_in_the_bucket_before_what_is_saved_after_them(server, root):
    with metrics.Writer(root, first_step=0, last_step=9) as writer:
        writer.event(0, "begin")
        for step in range(5):
            writer.step(step, {"loss": 1.0, "tokens": 1.0})
        assert rows(objects(server, root)["metrics.jsonl"]) != list(range(5))  # some wait, for PUT_EVERY seconds
        writer.event(5, "save")
        assert rows(objects(server, root)["metrics.jsonl"]) == list(range(5))
        puts = [name for method, name in server.asked if method == "POST"]
        assert puts[-2:] == ["runs/w/metrics.jsonl", "runs/w/events.jsonl"]
        server.refuse = lambda method, name: FORBIDDEN if method == "POST" else 0
        writer.step(5, {"loss": 1.0, "tokens": 1.0})
        writer.evaluation(6, {"ndcg": 0.5})  # training goes on
        server.refuse = lambda method, name: 0
        writer.step(6, {"loss": 1.0, "tokens": 1.0})
        assert "evaluations.jsonl" not in objects(server, root)
    assert rows(objects(server, root)["metrics.jsonl"]) == list(range(7))
    assert rows(objects(server, root)["evaluations.jsonl"]) == [6]
    with metrics.Writer(root, first_step=5, last_step=9):
        assert rows(objects(server, root)["metrics.jsonl"]) == list(range(5))


@gcs
def test_a_log_that_cannot_be_read_is_not_begun_anew(server, root):
    metrics.append(root / "x.jsonl", '{"step": 0}\n')
    server.refuse = lambda method, name: FORBIDDEN if method == "GET" else 0
    with pytest.raises(OSError, match="refused"):
        metrics.append(root / "x.jsonl", '{"step": 1}\n')
    server.refuse = lambda method, name: 401 if method == "GET" else 0  # epath lets gcsfs's own error through
    with pytest.raises(OSError, match="refused by the test"):
        metrics.keep(root / "x.jsonl", -1)
    server.refuse = lambda method, name: 0
    assert rows(objects(server, root)["x.jsonl"]) == [0]
    metrics.keep(root / "x.jsonl", -1)
    assert rows(objects(server, root)["x.jsonl"]) == []


def saver(folder, said, *, keep=2):
    return saving.Saver(folder, facts={"seed": 0}, keep=keep, say=said.append)


@gcs
def test_steps_are_saved_verified_restored_and_dropped(server, root, mesh):
    folder, said = root / "checkpoints", []
    with saver(folder, said) as saves:
        for step in (1, 2, 3):
            saves.save(small_state(step, mesh))
    assert said == []
    assert checkpoint.steps(folder) == [2, 3]
    assert checkpoint.newest_verified(folder, say=print, strict=True) == 3
    assert {name.partition("/")[0] for name in objects(server, folder)} == {"2", "3"}  # no mark is left
    state = small_state(3, mesh)
    assert_same(checkpoint.restore(folder, 3, abstract_state=abstract(state)), state)
    with pytest.raises(AssertionError):
        assert_same(checkpoint.restore(folder, 2, abstract_state=abstract(state)), state)
    checkpoint.save(folder, small_state(9, mesh), facts={}, keep=1)  # as upcycle saves, waiting for it
    assert checkpoint.steps(folder) == [9]


@gcs
def test_any_flipped_bit_is_noticed_and_the_step_before_is_taken(server, root, mesh):
    folder = root / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, small_state(step, mesh), facts={}, keep=2)
    stored_here = server.buckets[root.parts[2]]
    rng = np.random.default_rng(0)
    for name in [name for name in stored_here if name.startswith("runs/w/checkpoints/2/")]:
        data = bytearray(stored_here[name].data)
        whole, place = bytes(data), rng.integers(len(data))
        data[place] ^= 1 << rng.integers(8)
        stored_here[name].data = bytes(data)
        said = []
        assert checkpoint.newest_verified(folder, say=said.append) == 1, name
        assert "checkpoint 2 is passed over: digest mismatch in gs://" in said[0]
        del stored_here[name]
        assert checkpoint.problem(folder, 2)
        stored_here[name] = fake_gcs.Object(whole, 1)
        assert checkpoint.newest_verified(folder, say=print, strict=True) == 2


@gcs
@pytest.mark.faults
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # tensorstore's, to a loop that Orbax has closed
def test_wherever_a_save_is_cut_off_a_whole_step_is_found(server, root, mesh):
    """Cut off after every single change of the bucket: what the next process finds is whole, and nothing is lost."""
    folder = root / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, small_state(step, mesh), facts={}, keep=2)
    before = dict(server.buckets[root.parts[2]])
    found = []
    for allowed in itertools.count():
        server.buckets[root.parts[2]].clear()
        server.buckets[root.parts[2]].update(before)
        left = iter(range(allowed))
        server.refuse = lambda method, name, left=left: (
            FORBIDDEN if method in CHANGES and next(left, None) is None else 0
        )
        said = []
        with saver(folder, said) as saves:
            saves.save(small_state(3, mesh))
        server.refuse = lambda method, name: FORBIDDEN if method == "POST" else 0  # Orbax's threads may still be at it
        counted = "3/digests.json" in objects(server, folder)  # not `allowed`: Orbax's threads write in no fixed order
        found.append(checkpoint.newest_verified(folder, say=print, strict=True))
        assert found[-1] == (3 if counted else 2)
        assert checkpoint.steps(folder) in ([1, 2], [1, 2, 3], [2, 3])
        checkpoint.clean(folder)
        steps = checkpoint.steps(folder)
        assert {name.partition("/")[0] for name in objects(server, folder)} == set(map(str, steps))
        assert checkpoint.newest_verified(folder, say=print, strict=True) == found[-1]
        server.refuse = lambda method, name: 0
        if not said and steps == [2, 3]:
            break
    assert set(found) == {2, 3}


@gcs
def test_a_step_that_lost_its_manifest_is_damage_and_not_an_unfinished_save(server, root, mesh):
    folder = root / "checkpoints"
    checkpoint.save(folder, small_state(1, mesh), facts={}, keep=2)
    del server.buckets[root.parts[2]]["runs/w/checkpoints/1/digests.json"]
    with pytest.raises(UserError, match="has 1 checkpoints and none verifies"):
        checkpoint.newest_verified(folder, say=print)
    bucket.write(folder / "1.saving", b"")
    assert checkpoint.newest_verified(folder, say=print) is None


@gcs
def test_a_damaged_newer_step_pushes_no_good_one_out(server, root, mesh):
    """Passed over when the run began, it lies above what the run writes, and its data are not read again."""
    folder = root / "checkpoints"
    for step in (5, 10, 15):
        checkpoint.save(folder, small_state(step, mesh), facts={}, keep=2)
    objects_here = server.buckets[root.parts[2]]
    (name, *_) = [name for name in objects_here if name.startswith("runs/w/checkpoints/15/params/") and "/d/" in name]
    objects_here[name].data = objects_here[name].data[:-1] + b"?"
    assert checkpoint.newest_verified(folder, say=lambda _: None) == 10
    for keep, steps in ((2, [10, 12, 15]), (1, [12, 15])):
        checkpoint.save(folder, small_state(12, mesh), facts={}, keep=keep)
        assert checkpoint.steps(folder) == steps
        assert checkpoint.newest_verified(folder, say=lambda _: None) == 12


@gcs
def test_a_step_that_cannot_be_dropped_is_said_and_the_new_one_counts(server, root, mesh):
    folder, said = root / "checkpoints", []
    with saver(folder, said, keep=1) as saves:
        saves.save_now(small_state(1, mesh))
        server.refuse = lambda method, name: FORBIDDEN if method == "DELETE" and "/1/" in name else 0
        saves.save_now(small_state(2, mesh))
        assert saves._failures == 0
    assert [line.partition(":")[0] for line in said] == ["warning"]
    assert "steps before 2 could not be dropped: OSError: " in said[0]
    assert checkpoint.newest_verified(folder, say=print, strict=True) == 2
    assert checkpoint.steps(folder) == [1, 2]  # its manifest, the first to go, is there: it is whole
    server.refuse = lambda method, name: 0
    with saver(folder, said, keep=1) as saves:
        saves.save_now(small_state(3, mesh))
    assert checkpoint.steps(folder) == [3]
    assert {name.partition("/")[0] for name in objects(server, folder)} == {"3"}


@gcs
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_what_a_failed_save_writes_late_is_no_step(server, root, mesh):
    folder, said = root / "checkpoints", []
    checkpoint.save(folder, small_state(1, mesh), facts={}, keep=2)
    server.refuse = lambda method, name: FORBIDDEN if method == "POST" and "/2/params/" in name else 0
    with saver(folder, said) as saves:
        saves.save(small_state(2, mesh))
        saves.wait()
        assert len(said) == 1
        bucket.write(folder / "2" / "training" / "late", b"written when the save had failed")
        assert checkpoint.newest_verified(folder, say=print, strict=True) == 1
        server.refuse = lambda method, name: 0
        saves.save_now(small_state(2, mesh))
    bucket.write(folder / "2" / "training" / "later", b"and after the next one")
    assert checkpoint.newest_verified(folder, say=print, strict=True) == 2
    bucket.remove(folder / "2" / checkpoint.files_of(folder, 2)[1])
    assert checkpoint.problem(folder, 2, contents=False).startswith(f"{folder / '2'} lacks or has too many files")


@gcs
def test_a_deletion_that_is_asked_for_again_goes_on(server, root):
    """The store has deleted, its answer is lost, gcsfs asks again and is told that there is nothing."""
    for name in ("manifest", "x", "y"):
        bucket.write(root / name, b"1")
    lost = {"runs/w/manifest", "runs/w/x"}

    def refuse(method: str, name: str) -> int:
        if method == "DELETE" and name in lost:
            lost.remove(name)
            del server.buckets[root.parts[2]][name]
            return 503
        return 0

    server.refuse = refuse
    bucket.remove(root, first="manifest")
    assert not lost
    assert bucket.names(root) == []


@gcs
def test_whether_there_is_a_file_is_known_or_an_error(server, root):
    bucket.write(root / "a" / "b", b"1")
    assert bucket.is_file(root / "a" / "b")
    assert not bucket.is_file(root / "a")
    assert not bucket.is_file(root / "c")
    server.refuse = lambda method, name: FORBIDDEN
    for ask in (lambda: bucket.is_file(root / "a" / "b"), lambda: stored.read_json(root / "a" / "b")):
        with pytest.raises(OSError, match="refused by the test") as error:
            ask()
        assert error.value.filename.startswith("gs://")
