"""Bad rows: counted by reason and quoted up to a share of all, never passed over in silence."""

import pytest

from moe_embed.config import UserError
from moe_embed.data.tables import BadRow
from moe_embed.data.tally import Tally

GOOD = [(f"f:{i}", {"n": i}) for i in range(1, 9)]
UNREADABLE = ("f:9", BadRow("f:9 is not JSON.", reason="not JSON"))


def make(row, place):
    if row["n"] == 3:
        raise BadRow(f"{place} is three.", reason="three")
    return row["n"], place


def test_good_rows_pass_and_bad_ones_are_counted():
    tally = Tally("f", max_bad_fraction=0.3)
    assert list(tally.good_of([*GOOD, UNREADABLE], make)) == [(n, f"f:{n}") for n in (1, 2, 4, 5, 6, 7, 8)]
    assert (tally.good, dict(tally.bad)) == (7, {"three": 1, "not JSON": 1})
    assert str(tally) == "f: 2 of 9 rows were left out (three: 1, not JSON: 1), such as: f:3 is three. f:9 is not JSON."


def test_the_share_is_a_bar_and_none_is_none():
    with pytest.raises(UserError, match=r"2 of 9 rows.*max_bad_fraction=0.2 allows less"):
        list(Tally("f", max_bad_fraction=0.2).good_of([*GOOD, UNREADABLE], make))
    with pytest.raises(BadRow, match="f:3 is three"):
        list(Tally("f").good_of(GOOD, make))
    with pytest.raises(UserError, match="f holds no pairs"):
        list(Tally("f").good_of([], make))
    with pytest.raises(UserError, match="f holds no texts"):
        list(Tally("f", of="texts").good_of([], make))
    with pytest.raises(UserError, match="1 of 1 rows"):
        list(Tally("f", max_bad_fraction=1.0).good_of([UNREADABLE], make))


def test_a_file_is_closed_before_its_fault_is_known():
    ended = []

    def rows(some):
        try:
            yield from some
        finally:
            ended.append(len(some))

    with pytest.raises(BadRow) as fault:
        list(Tally("f").good_of(rows([*GOOD, UNREADABLE]), make))
    assert ended == [9]  # while the traceback still holds all frames
    assert fault.tb is not None
    kept = rows(GOOD)
    with pytest.raises(BadRow):
        [make(row, place) for place, row in kept]
    assert ended == [9]  # what nobody closes stands open
    kept.close()


def test_only_the_first_are_quoted():
    tally = Tally("f", max_bad_fraction=1.0)
    list(tally.good_of([*GOOD[:1], *[UNREADABLE] * 50], make))
    assert len(tally.first) == 3
    assert tally.bad.total() == 50
