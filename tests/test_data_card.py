"""A data card by hand."""

import pathlib

import numpy as np

from moe_embed import data_card
from moe_embed.data.spool import BINS, Layout

REPORT = {"name": "folder/a.jsonl", "rows": 5, "pairs": 4, "bad": {"not JSON": 1}, "dropped": {"too short": 1}, "examples": ["a.jsonl:3 is not JSON."], "answers": 2, "of_benchmark": 3, "digest": 7}  # fmt: skip


def histogram(*tokens: int) -> list[int]:
    return np.bincount(np.searchsorted(BINS, tokens), minlength=len(BINS) + 1).tolist()


def test_by_hand():
    sources = [{"name": "folder/a.jsonl", "languages": [["", 1], ["de", 1]], "tokens": [10, 60], "histogram": [histogram(4, 6), histogram(20, 40)]}]  # fmt: skip
    layout = Layout([(0, np.array([0, 1]))], [pathlib.Path("x")], sources, [1])
    card = data_card.card([REPORT], layout, tokenizer="tokenizer.model")
    (one,) = card["inputs"]
    assert one["left_out"] == {"not JSON": 1, "too short": 1, "copy of another": 1}
    assert one["rows"] == one["kept"] + sum(one["left_out"].values())
    assert card["languages"] == {"": 1, "de": 1}
    assert card["tokens"]["document"]["mean"] == 30
    assert data_card.table(card).splitlines() == [
        "pairs: 2",
        "input                    rows           kept  left out",
        "folder/a.jsonl              5              2  not JSON 1, too short 1, copy of another 1",
        "    a.jsonl:3 is not JSON.",
        "    2 negatives were answers of their own row; they are left out.",
        "    3 negatives are in a benchmark; they are left out.",
        "languages  (none) 1, de 1",
        "query      5.0 tokens on average; <= 16 100 %",
        "document   30.0 tokens on average; <= 32 50 %, <= 64 50 %",
    ]
    page = data_card.markdown(card)
    assert "| a.jsonl | 5 | 2 | not JSON 1, too short 1, copy of another 1 |" in page
    assert "| document | 30.0 |" in page
    assert "a.jsonl: 2 negatives were answers of their own row" in page
    without = data_card.card([REPORT | {"answers": 0, "of_benchmark": 0}], layout, tokenizer="tokenizer.model")
    assert "negatives" not in data_card.table(without) + data_card.markdown(without)
