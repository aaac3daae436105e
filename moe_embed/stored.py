"""JSON and .npy files, and names in them, read without trusting whoever wrote them: a value, or a ValueError that says why not.

Callers make the ValueError their own sentence: what the file is, and what would mend it.
"""

import json
import pathlib
import tokenize

import numpy as np
from etils import epath

MOST = 2**26  # bytes of a JSON file: the largest of ours, XLM-R's tokenizer.json, is 17 MB


def read_json(path: pathlib.Path | epath.Path):
    """The value in a JSON file. ValueError: no JSON, no UTF-8, nested too deep, or more than MOST bytes; OSError: no file."""
    data = read_bytes(path, most=MOST)
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def read_bytes(path: pathlib.Path | epath.Path, *, most: int) -> bytes:
    """A file of at most `most` bytes. ValueError for a larger one, of which no more than that is read."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return data


def map_array(path: pathlib.Path, *, mode: str = "r") -> np.ndarray:
    """The array of a .npy file as a memory map. ValueError: no such file, or Python objects; nothing is unpickled."""
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
