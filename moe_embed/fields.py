"""Plain values and the typed fields of a dataclass: what fits, what a text means, and the sentence where it does not."""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping


def did_you_mean(key: str, known) -> str:
    """The end of a sentence about an unknown key."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}."


def count(number: int, thing: str, things: str = "") -> str:
    """ "1 pair", "1,200 pairs", "2 queries"."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def one_line(said: str) -> str:
    """Words with one space between them, whatever stood there: a line break of any kind too."""
    return " ".join(said.split())


def cut(said: str, room: int) -> str:
    """At most `room` letters, with an ellipsis for the rest. Not by words: Japanese, Chinese and Thai have no spaces."""
    return said if len(said) <= room else said[: max(room - 1, 1)] + "…"


def first_line(error: Exception) -> str:
    """What an error says, in a line for a sentence; its name if it has no words."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def parse(text: str, kind: type):
    """An override's text as a value of `kind`; left a string where it is none, for `build` to complain about."""
    if kind is str:
        return text
    if kind is float and text == "inf":  # a preset's clip_norm
        return math.inf
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}[text] if text in ("true", "false") else text
    if typing.get_origin(kind) is tuple and not isinstance(value, tuple | list):
        return tuple(part for part in text.split(",") if part) if typing.get_args(kind)[0] is str else (value,)
    return value


def build(kind: type, values: dict, section: str, faults: list[str], *, choices: Mapping[str, tuple[str, ...]]):
    """`kind` (a frozen dataclass) of plain values, None if one that it must have is missing or wrong; adds to `faults`.

    `choices`: what a string field ("encoder.dtype") may be.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    good = {}
    for key, value in values.items():
        where = f"config.{section}.{key}"
        if key not in known:
            faults.append(f"{where} is not a key{did_you_mean(key, known)}")
        elif not _fits(value, hints[key]):
            faults.append(f"{where} is {value!r:.80}; it must be {_name(hints[key])}.")
        else:
            good[key] = _cast(value, hints[key])
            allowed = choices[f"{section}.{key}"] if f"{section}.{key}" in choices else (value,)
            if value not in allowed:
                faults.append(f"{where} is {value!r}; it must be one of {', '.join(a or repr(a) for a in allowed)}.")
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            faults.append(f"config.{section}.{key} is missing; it must be {_name(hints[key])}.")
    return kind(**good) if all(f.name in good or f.default is not dataclasses.MISSING for f in known.values()) else None


def _fits(value, kind) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, float) or (_fits(value, int) and abs(value) < 2**1023)  # what a float can be
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _cast(value, kind):
    if typing.get_origin(kind) is tuple:
        return tuple(_cast(item, typing.get_args(kind)[0]) for item in value)
    return float(value) if kind is float else value


def _name(kind) -> str:
    if isinstance(kind, types.GenericAlias):
        return {str: "a list of strings", float: "a list of numbers", int: "a list of integers"}[
            typing.get_args(kind)[0]
        ]
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
