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


@pytest.mark.parametrize(
    ("said", "room", "cut"), [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abcde…"), ("表を挿入", 3, "表を…")]
)
def test_a_cut_is_by_letters(said, room, cut):
    assert fields.cut(said, room) == cut


def test_words_in_one_line():
    assert fields.one_line(" a\r\nb\rc\u2028d ") == "a b c d"


def test_one_is_no_plural():
    assert [fields.count(n, "pair") for n in (0, 1, 2, 1_200)] == ["0 pairs", "1 pair", "2 pairs", "1,200 pairs"]
    assert [fields.count(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]


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


def test_a_number_no_float_can_hold_is_a_sentence():
    (sentence,) = built(count=1, rate=10**400)[1]
    assert sentence.startswith("config.s.rate is 1000")
    assert len(sentence) < 140


def test_an_error_without_words_has_a_name():
    assert fields.first_line(ValueError()) == "ValueError"
    assert fields.first_line(OSError("one\ntwo")) == "one"
