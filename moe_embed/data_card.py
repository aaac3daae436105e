"""What a data set is made of: where its pairs come from, in which languages, how long, and what was left out and why."""

from collections import Counter
from collections.abc import Sequence

from moe_embed.data.spool import BINS, Layout

SIDES = ("query", "document")


def card(reports: Sequence[dict], layout: Layout, *, tokenizer: str) -> dict:
    """Plain JSON: {"pairs", "tokenizer", "inputs": [...], "languages", "tokens": {side: {"mean", "histogram"}}}.

    An input has {"name", "rows", "pairs", "kept", "left_out": {reason: count}, "examples", "answers", "of_benchmark", "digest"}:
    every row is in one of those counts (a row with several documents is several pairs); "answers" and "of_benchmark" count
    negatives left out of pairs kept.
    """
    inputs = []
    for report, source, copies in zip(reports, layout.sources, layout.copies, strict=True):
        left_out = Counter(report["bad"]) + Counter(report["dropped"]) + Counter({"copy of another": copies})
        kept = sum(count for _, count in source["languages"])
        inputs.append(
            {"name": report["name"], "rows": report["rows"], "pairs": report["pairs"], "kept": kept, "left_out": dict(left_out),
             "examples": report["examples"], "answers": report["answers"], "of_benchmark": report["of_benchmark"],
             "digest": report["digest"]}
        )  # fmt: skip
    languages: dict[str, int] = {}
    for source in layout.sources:
        for lang, count in source["languages"]:
            languages[lang] = count + (languages[lang] if lang in languages else 0)
    tokens = {}
    for i, side in enumerate(SIDES):
        histogram = [sum(counts) for counts in zip(*(s["histogram"][i] for s in layout.sources), strict=True)]
        mean = sum(source["tokens"][i] for source in layout.sources) / layout.total
        tokens[side] = {"mean": mean, "histogram": histogram}
    return {"pairs": layout.total, "tokenizer": tokenizer, "inputs": inputs, "languages": languages, "tokens": tokens}


def table(card: dict) -> str:
    """A card for a terminal."""
    inputs, width = card["inputs"], max(len("all"), *(len(one["name"]) for one in card["inputs"]))
    width = min(width, 60)
    name = lambda text: ("..." + text[3 - width :] if len(text) > width else text).ljust(width)  # noqa: E731
    lines = [f"pairs: {card['pairs']}", name("input") + f"  {'rows':>13}  {'kept':>13}  left out"]
    for one in inputs:
        lines.append(f"{name(one['name'])}  {one['rows']:>13,}  {one['kept']:>13,}  {_reasons(one['left_out'])}")
        lines += [f"    {example}" for example in one["examples"]]
        lines += [f"    {sentence}" for sentence in _negatives(one)]
    if len(inputs) > 1:
        lines.append(f"{name('all')}  {sum(one['rows'] for one in inputs):>13,}  {card['pairs']:>13,}")
    langs = sorted(card["languages"].items(), key=lambda item: -item[1])
    lines.append("languages  " + ", ".join(f"{lang or '(none)'} {count:,}" for lang, count in langs[:30]))
    if len(langs) > 30:
        lines.append(f"           and {len(langs) - 30} more")
    for side in SIDES:
        tokens = card["tokens"][side]
        shown = [f"{label} {100 * count / card['pairs']:.0f} %" for label, count in zip(_labels(), tokens["histogram"], strict=True) if count]  # fmt: skip
        lines.append(f"{side:<9}  {tokens['mean']:.1f} tokens on average; {', '.join(shown)}")
    return "\n".join(lines)


def markdown(card: dict) -> str:
    """A card for a folder's page."""
    rows = [f"| {one['name'].rsplit('/', 1)[-1]} | {one['rows']:,} | {one['kept']:,} | {_reasons(one['left_out'])} |" for one in card["inputs"]]  # fmt: skip
    langs = sorted(card["languages"].items(), key=lambda item: -item[1])
    sides = [f"| {side} | {card['tokens'][side]['mean']:.1f} |" for side in SIDES]
    return "\n".join(
        [f"{card['pairs']:,} pairs.", "", "| input | rows | kept | left out |", "|---|---:|---:|---|", *rows, "",
         *(f"{one['name'].rsplit('/', 1)[-1]}: {sentence}\n" for one in card["inputs"] for sentence in _negatives(one)),
         "Languages: " + ", ".join(f"{lang or '(none)'} {count:,}" for lang, count in langs) + ".", "",
         "| side | tokens, mean |", "|---|---:|", *sides, ""]
    )  # fmt: skip


def _negatives(one: dict) -> list[str]:
    said = {"answers": "were answers of their own row", "of_benchmark": "are in a benchmark"}
    return [f"{one[name]:,} negatives {what}; they are left out." for name, what in said.items() if one[name]]


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))


def _labels() -> list[str]:
    return [f"<= {int(end)}" for end in BINS] + [f"> {int(BINS[-1])}"]
