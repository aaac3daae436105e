"""Rows to pairs: every kind of columns there is, and what each fault is counted as."""

import datetime
import json

import pytest

from moe_embed.config import UserError
from moe_embed.data import pairs as pairs_lib
from moe_embed.data.pairs import Pair
from moe_embed.data.tables import BadRow


def of(row, **columns) -> list[Pair]:
    return pairs_lib.of_row(row, "f:7", **{"query": "query", "document": "document"} | columns)


def test_every_kind_of_columns():
    expected = [Pair("q", "d", ("n",))]
    assert of({"query": "q", "document": "d", "negatives": ["n"]}) == expected
    assert of({"query": "q", "documents": ["d"], "negatives": ["n"]}) == expected
    assert of({"query": "q", "pos": ["d"], "neg": ["n"]}) == expected
    assert of({"anchor": "q", "positive": "d", "negative": "n"}) == expected
    assert of({"title": "q", "body": "d", "negatives": ["n"]}, query="title", document="body") == expected
    assert of({"title": "q", "body": "d"}, query="title", document="body") != expected
    assert of({"query": "q", "documents": ["d", "e"]}) == [Pair("q", "d"), Pair("q", "e")]


def test_nomics_rows_name_their_columns_themselves():
    paired = {"objective": {"self": [], "paired": [["title", "text"]], "triplet": []}}
    assert of({"title": "q", "text": "d", "metadata": paired}) == [Pair("q", "d")]
    triplet = {"objective": {"self": [], "paired": [], "triplet": [["query", "passage", "hard"]]}}
    row = {"question": "x", "passage": "d", "hard": ["n", "m"], "metadata": triplet}
    assert of({"query": "q", "document": "?", **row}) == [Pair("q", "?")]  # our names come first
    triplet["objective"]["triplet"] = [["question", "passage", "hard"]]
    assert of(row) == [Pair("x", "d", ("n", "m"))]
    assert of(row | {"hard": "n"}) == [Pair("x", "d", ("n",))]
    for objective in ({"paired": [["a", "b"], ["c", "d"]]}, {"paired": []}, {"triplet": [["a", "b"]]}, "paired", None):
        with pytest.raises(BadRow, match="one pair or one triplet"):
            of({"a": "x", "b": "y", "c": "z", "d": "w", "metadata": {"objective": objective}})
    with pytest.raises(BadRow, match="no column 'text'"):
        of({"title": "q", "metadata": paired})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["q", "d"], "no object"),
        ({"query": "q"}, "column missing"),
        ({"query": "", "document": "d"}, "empty text"),
        ({"query": " \u200b\ufeff\0", "document": "d"}, "empty text"),
        ({"query": None, "document": "d"}, "no text"),
        ({"query": float("nan"), "document": "d"}, "no text"),
        ({"query": "a \ud800", "document": "d"}, "empty text"),
        ({"query": "q", "documents": "d"}, "no list"),
        ({"query": "q", "document": "d", "negatives": ["\u200b"]}, "negatives"),
        ({"query": "q", "document": "d", "lang": []}, "lang"),
        ({"query": "q", "document": "d", "scores": [1, 2]}, "scores"),
        ({"query": "q", "pos": ["d"], "neg": ["n"], "pos_scores": [], "neg_scores": [1]}, "scores"),
        ({"query": "q", "pos": ["d"], "neg": ["n"], "pos_scores": [1], "neg_scores": []}, "scores"),
    ],
)
def test_reasons(row, reason):
    with pytest.raises(BadRow, match="f:7") as caught:
        of(row)
    assert caught.value.reason == reason


def test_text_that_only_looks_odd_is_text():
    for text in ("</s>", "a\0b", "\u200ba", "👍", "٣"):
        assert of({"query": text, "document": "d"})[0].query == text


def test_rows_keep_their_lines(tmp_path):
    lines = ['{"query":  "q", "document": "d"}', '{"document": "e", "query": "r", "x": 1}']
    (tmp_path / "a.jsonl").write_text(f"\n{lines[0]}\n\n{lines[1]}\n")
    rows = list(pairs_lib.read_rows(str(tmp_path / "a.jsonl")))
    assert [row.line for row in rows] == lines
    assert rows[1].columns == json.loads(lines[1])
    (tmp_path / "b.jsonl").write_text(lines[0] + "\n{}\n")
    with pytest.raises(BadRow, match=r"b.jsonl:2"):
        list(pairs_lib.read_rows(str(tmp_path / "b.jsonl")))


def test_a_byte_order_mark_alone_is_a_blank_line(tmp_path):
    lines = [f'{{"query": "q{i}", "document": "d"}}' for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "\n".join(lines).encode())
    rows = list(pairs_lib.read_rows(str(tmp_path / "a.jsonl")))
    assert [(row.line, row.pairs[0].query) for row in rows] == list(zip(lines, ("q0", "q1", "q2"), strict=True))


@pytest.mark.parametrize("objective", [{"paired": [["title", "text"]]}, {"triplet": [["title", "text", "other"]]}])
def test_what_mine_writes_of_nomics_rows_is_read_again(objective):
    row = {"title": "q", "text": "d", "other": "old", "metadata": {"objective": objective}}
    pair = of(row)
    line = pairs_lib.with_negatives(pairs_lib.Row("", row, pair), ["n1", "n2"], [0.9, 0.5, 0.4])
    assert of(json.loads(line)) == [Pair("q", "d", ("n1", "n2"), scores=(0.9, 0.5, 0.4))] != pair


def test_what_json_has_no_kind_for_is_written_as_text_but_for_bytes():
    row = pairs_lib.Row("", {"query": "q", "when": datetime.date(2026, 11, 30)}, [])
    assert json.loads(pairs_lib.with_negatives(row, [], []))["when"] == "2026-11-30"
    with pytest.raises(UserError, match="a column holds bytes"):
        pairs_lib.with_negatives(pairs_lib.Row("", {"query": "q", "image": b"\x00\xff"}, []), [], [])


def test_a_negatives_column_without_a_value_hides_no_negative():
    row = {"metadata": {"objective": {"triplet": [["q", "d", "n"]]}}, "q": "a", "d": "b", "n": ["c"], "negatives": None}
    (pair,) = pairs_lib.of_row(row, "here", query="query", document="document")
    assert pair.negatives == ("c",)


def test_an_empty_list_of_scores_is_none():
    """TFDS has no nulls: what prepare wrote of pairs without scores comes back as empty lists."""
    ours, bge = {"query": "q", "document": "d", "negatives": ["n"]}, {"query": "q", "pos": ["d"], "neg": ["n"]}
    assert of(ours | {"scores": []}) == of(bge | {"pos_scores": [], "neg_scores": []}) == [Pair("q", "d", ("n",))]
    assert of(bge | {"scores": [], "pos_scores": [2], "neg_scores": [1]}) == of(ours | {"scores": [2, 1]}) != of(ours)


def test_null_negatives_of_a_joined_file_hide_no_column_of_sentence_transformers():
    row = {"anchor": "q", "positive": "d", "negative": "n", "negative_1": None}
    assert of(row | {"negatives": None}) == of(row) == [Pair("q", "d", ("n",))]
    assert of(row | {"negatives": ["m"]}) == [Pair("q", "d", ("m",))]  # mined ones come first
    assert of(row | {"negatives": []}) == [Pair("q", "d")]  # mined, and none was found
