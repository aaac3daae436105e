"""Texts on disk to vectors on disk: what embed and evaluate --cache write, with the memory of one chunk of texts.

Rows are appended to PATH.partial, and PATH.progress.json says how many of them are on disk and what they are made of. The same
call continues there after any kind of end; the whole file is renamed into place.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tqdm

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.load import Model

DTYPES = ("float32", "float16")


class Texts(typing.NamedTuple):
    """Texts that can be read again, and what data.corpus.survey said of them."""

    read: Callable[[], Iterable[str]]  # all of them, in order
    count: int
    digest: str


def write(
    model: Model,
    path: pathlib.Path,
    texts: Texts,
    *,
    task: str | None = None,
    dim: int | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> None:
    """Write a .npy [count, dim], row i for text i, the bytes that np.save of `model.encode` writes; go on where one was stopped.

    UserError if what is there was begun with another model or other texts or options, if another process writes it, if it
    cannot be read, if the texts are not those of `texts.digest`, or if there is no room for it.
    """
    dim = model.options(task, dim, None)[1]
    names = {"model": model.digest, "texts": texts.digest, "task": task, "dim": dim, "dtype": dtype}
    header, row_bytes = _header(texts.count, dim, dtype), dim * np.dtype(dtype).itemsize
    partial, record = (path.with_name(path.name + end) for end in (".partial", ".progress.json"))
    with _opened(partial) as file:
        done = _rows_done(partial, record, names)
        needed = len(header) + texts.count * row_bytes - os.path.getsize(partial)
        if needed > (free := shutil.disk_usage(partial.parent).free):
            raise UserError(f"{path} needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free.")
        if done and not os.path.getsize(partial):
            print(f"{partial} is gone; starting over.")
            done = 0
        if done and os.path.getsize(partial) < len(header) + done * row_bytes:
            raise UserError(f"{partial} is shorter than {record} says; delete both to start over.")
        if done:
            print(f"continuing {partial}: {done:,} of {texts.count:,} rows are there.")
            file.truncate(len(header) + done * row_bytes)
        else:
            stored.write_json(record, {"made_of": names, "rows": 0, "of": texts.count})
            file.truncate(0)
            _append(file, header)
        read = hashlib.blake2b(digest_size=16)
        rest = itertools.islice(_digested(texts.read(), read), done, None)
        with tqdm.tqdm(total=texts.count, initial=done, unit="text", disable=not progress, dynamic_ncols=True) as bar:
            for x_ND in model.encode_stream(rest, task, dim, bar=bar):
                _append(file, x_ND.astype(dtype).tobytes())
                done += len(x_ND)
                stored.write_json(record, {"made_of": names, "rows": done, "of": texts.count})
        if (done, read.hexdigest()) != (texts.count, texts.digest):
            for begun in (record, partial):  # its rows would be taken for those of the texts as they were
                begun.unlink()
            counts = f": {texts.count:,} before, now {done:,}" if done != texts.count else ""
            raise UserError(f"the texts of {path} changed while they were read{counts}; run it again.")
        partial.replace(path)
        record.unlink()


def cached(model: Model, folder: pathlib.Path, texts: Texts, *, task: str | None, progress: bool = False) -> np.ndarray:
    """The vectors of `texts` as a memory map, from a file of `folder` that is named by what it is made of, or is written now."""
    name = hashlib.blake2b(json.dumps([model.digest, texts.digest, task]).encode(), digest_size=12).hexdigest()
    path = folder / f"vectors-{name}.npy"
    if not path.is_file():
        write(model, path, texts, task=task, progress=progress)
    try:
        x_ND = stored.map_array(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to make it again.") from error
    if x_ND.shape != (texts.count, model.encoder.dim) or x_ND.dtype != np.float32:
        raise UserError(f"{path} is {x_ND.dtype} {list(x_ND.shape)}, not what was written; delete it to make it again.")
    return x_ND


def _digested(texts: Iterable[str], total) -> Iterator[str]:
    """The texts as they come; `total`, a hash, is told of each as in data.corpus.survey."""
    for text in texts:
        data = text.encode()
        total.update(b"%d:" % len(data) + data)
        yield text


def _header(count: int, dim: int, dtype: str) -> bytes:
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count, dim)})
    return file.getvalue()


@contextlib.contextmanager
def _opened(partial: pathlib.Path) -> Iterator[typing.BinaryIO]:
    """The file, to append to, for this process alone."""
    try:
        file = stored.open_alone(partial)
    except BlockingIOError as error:
        raise UserError(f"another process writes {partial}; wait for it, or name another file.") from error
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror}.") from error
    with file:
        yield file


def _append(file: typing.BinaryIO, data: bytes) -> None:
    """On the disk when this returns: before it counts."""
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{file.name} cannot be written: {error.strerror}.") from error


def _rows_done(partial: pathlib.Path, record: pathlib.Path, names: dict) -> int:
    if not record.is_file():
        return 0
    try:
        before = stored.read_json(record)
        rows, made_of = int(before["rows"]), before["made_of"]
        other = [name for name in names if made_of[name] != names[name]]
        if rows < 0:
            raise ValueError(f"it counts {rows} rows")
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"{record} cannot be read ({error}); delete it to start over.") from error
    if other and rows:
        raise UserError(f"{partial} was begun with another {' and another '.join(other)}; delete {record} to start "
                        "over, or name another file.")  # fmt: skip
    return rows
