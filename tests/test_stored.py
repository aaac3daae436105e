"""What others wrote comes as a value or as a ValueError, whatever it is."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from moe_embed import stored

GARBAGE = (b"", b"{", b"\xff", b"[" * 200_000, b'{"a":' * 200_000, b'"\\', b"9" * 10_000, b"{}x")


def test_json(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": ["ü", 1]}', "utf-8")
    assert stored.read_json(path) == {"a": ["ü", 1]}
    for data in GARBAGE:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"line|decode|deep|Exceeds"):
            stored.read_json(path)
    path.write_text(json.dumps("x" * 98))
    monkeypatch.setattr(stored, "MOST", 100)
    assert stored.read_json(path) == "x" * 98
    monkeypatch.setattr(stored, "MOST", 99)
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        stored.read_json(path)
    with pytest.raises(FileNotFoundError):
        stored.read_json(tmp_path / "none")


def test_a_file_is_one_processs_alone_until_it_is_closed(tmp_path):
    with stored.open_alone(tmp_path / "lock"), pytest.raises(BlockingIOError):
        stored.open_alone(tmp_path / "lock")
    stored.open_alone(tmp_path / "lock").close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_gone_on_with(tmp_path, number, monkeypatch):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stored.fcntl, "flock", flock)
    with stored.open_alone(tmp_path / "lock") as file:
        file.write(b"x")
    assert (tmp_path / "lock").read_bytes() == b"x"
    number = errno.EIO  # another fault is one
    with pytest.raises(OSError, match="Input/output error"):
        stored.open_alone(tmp_path / "lock")


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_arrays(tmp_path):
    path, x_ND = tmp_path / "a.npy", np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(path, x_ND)
    np.testing.assert_array_equal(stored.map_array(path), x_ND)
    writable = stored.map_array(path, mode="r+")
    writable[0, 0] = 7
    writable.flush()
    assert stored.map_array(path)[0, 0] == 7
    whole = path.read_bytes()
    np.save(path, np.array([{}], object), allow_pickle=True)
    pickled = path.read_bytes()
    np.savez(tmp_path / "a", x_ND)
    zipped = (tmp_path / "a.npz").read_bytes()
    shape = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"
    lying = [
        header(shape % s)
        for s in ("(1000000000000, 8)", "(-1, 8)", "(2**62, 8)", f"({2**62}, {2**62})", "'a'", "(1.5,)")
    ]
    odd = [header("(" * 5000), header("-" * 9000 + "1"), header(shape % ("(2,)" * 2000))]
    objects = header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}\n") + bytes(64)
    for data in (whole[:-4], whole[:9], b"", b"PK\x03\x04", b"\x80\x04K\x01.", pickled, zipped, objects, *lying, *odd):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"no \.npy file of numbers: [^\n]+$"):
            stored.map_array(path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "a\\b", "..", ".", "", "a\0", 7, None, ["a"]])
def test_a_name_stays_in_its_folder(name):
    assert stored.name_within("pairs-train.array_record-00000-of-00001")
    with pytest.raises(ValueError, match="no name of a file in this folder"):
        stored.name_within(name)


def test_no_more_is_read_than_asked_for(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert stored.read_bytes(pathlib.Path(tmp_path / "a"), most=3) == b"abc"
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        stored.read_bytes(tmp_path / "a", most=2)


def test_a_value_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    stored.write_json(path, {"a": ["ü", "\ud800", 1]})  # a lone surrogate: what a file name can hold
    assert stored.read_json(path) == {"a": ["ü", "\ud800", 1]}
    with pytest.raises(TypeError):
        stored.write_json(path, {"b": object()})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        stored.write_json(path, {"b": 2})
    assert stored.read_json(path) == {"a": ["ü", "\ud800", 1]}
    monkeypatch.undo()
    stored.write_json(path, 2)
    assert stored.read_json(path) == 2
    assert not path.with_name("a.json.partial").exists()
