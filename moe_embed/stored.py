"""JSON and .npy files, and names in them, read without trusting whoever wrote them: a value, or a ValueError that says why not.
JSON is written whole or not at all.

Callers make the ValueError their own sentence: what the file is, and what would mend it.
"""

import errno
import fcntl
import json
import os
import pathlib
import tokenize
import typing

import numpy as np
from etils import epath

from moe_embed import bucket

MOST = 2**26  # bytes of a JSON file: the largest of ours, XLM-R's tokenizer.json, is 17 MB
# Of a file system without locks: some FUSE, NFS without its lock service.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def read_json(path: pathlib.Path | epath.Path):
    """The value in a JSON file. ValueError: no JSON, no UTF-8, nested too deep, or more than MOST bytes; OSError: no file."""
    data = read_bytes(path, most=MOST)
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def write_json(path: pathlib.Path | epath.Path, value) -> None:
    """Put a value in a JSON file: whole or not at all, its bytes on the disk when this returns. OSError: it could not be."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: pathlib.Path | epath.Path, data: bytes) -> None:
    """The same of bytes."""
    if bucket.is_remote(path):
        return bucket.write(path, data)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def open_alone(path: pathlib.Path) -> typing.BinaryIO:
    """A file, made if absent, to append to, for this process alone until it is closed. BlockingIOError: another has it.

    Where the file system has no locks nobody is kept out.
    """
    file = open(path, "ab")  # noqa: SIM115 - the caller closes it
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if not (path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise BlockingIOError  # between the two lines another process moved or deleted it
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: pathlib.Path | epath.Path, *, most: int) -> bytes:
    """A file of at most `most` bytes. ValueError for a larger one, of which no more than that is read."""
    with bucket.errors_of(path), path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return data


def map_array(path: pathlib.Path, *, mode: str = "r") -> np.ndarray:
    """The array of a .npy file as a memory map. OSError: no such file; ValueError: Python objects; nothing is unpickled."""
    try:
        with np.errstate(all="raise"):  # sizes that overflow
            return np.lib.format.open_memmap(path, mode)
    except (
        ValueError,
        TypeError,
        SyntaxError,
        ArithmeticError,
        MemoryError,
        RecursionError,
        tokenize.TokenError,
    ) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"it is no .npy file of numbers: {said}") from error


def name_within(name) -> str:
    """`name`, if it names a file right in a folder. ValueError for a path that leads elsewhere, and for what is no string."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{name!r:.80} is no name of a file in this folder")
    return name
