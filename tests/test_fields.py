"""Values against typed fields; what a whole config makes of it: test_config.py."""

import dataclasses
import math

import pytest

from moe_embed import fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    count: int
    rate: float = 0.5
    kind: str = "a"
    names: tuple[str, ...] = ()


CHOICES = {"s.kind": ("a", "b")}


def built(**values):
    faults = []
    return fields.build(Section, values, "s", faults, choices=CHOICES), faults


def test_values_that_fit_become_the_fields():
    assert built(count=3, rate=1, names=["x"]) == (Section(count=3, rate=1.0, names=("x",)), [])
    assert built(count=3)[0] != built(count=4)[0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "config.s.count is missing; it must be an integer."),
        ({"count": 1.5}, "config.s.count is 1.5; it must be an integer."),
        ({"count": 1, "kind": "c"}, "config.s.kind is 'c'; it must be one of a, b."),
        ({"count": 1, "rates": 1}, "config.s.rates is not a key; did you mean rate?"),
        ({"count": 1, "names": (1,)}, "config.s.names is (1,); it must be a list of strings."),
    ],
)
def test_what_does_not_fit_is_a_sentence(values, sentence):
    assert built(**values)[1] == [sentence]


def test_a_text_is_read_by_the_type_of_its_field():
    assert fields.parse("5", str) == "5"
    assert fields.parse("5", int) == 5
    assert fields.parse("inf", float) == math.inf
    assert fields.parse("a,b", tuple[str, ...]) == ("a", "b")
    assert fields.parse("x", int) == "x"  # for build to complain about


def test_a_key_unlike_any_other_is_answered_with_all():
    assert fields.did_you_mean("zzz", ("rate", "kind")) == "; known: rate, kind."
