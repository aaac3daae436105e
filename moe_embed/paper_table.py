"""One table: models measured here (launch/paper_table.sh) above what others have published, each row with its source.

    python -m moe_embed.paper_table --ours=runs/paper_table/demo,runs/paper_table/other

A folder of --ours has beir.json, miracl.json and mteb.json, as the script makes them, or some of these, or tasks.json (other
BEIR folders). A published figure stands here only where its source could be read; "-" is everything else, not a zero. Measured
and published rows differ in more than the model: prompts, lengths, precision and the versions of data are each author's own.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from moe_embed import retrieval, stored, verb
from moe_embed.config import UserError

COLUMNS = {
    "beir": "BEIR",
    "miracl16": "MIRACL 16",
    "miracl18": "MIRACL 18",
    "eng": "MTEB eng v2",
    "eng_types": "its types",
    "eng_retrieval": "its retrieval",
    "tasks": "these tasks",
}
BEIR, TASKS, LANGUAGES, BENCHMARK = 15, 26, 18, "MTEB(eng, v2)"  # CQADupStack is 12 tasks
DCG = (
    "nDCG@10 in %: BEIR the mean of 15, CQADupStack's forums as one; MIRACL of 16 languages (without de, yo) and of 18."
)
ENG = "MTEB(eng, v2): main scores in %, the mean of its 41 tasks, of its kinds of task, and of its 10 retrieval tasks."


@dataclasses.dataclass(frozen=True)
class Row:
    """A model's figures in %, by column, and where they are from."""

    name: str
    figures: Mapping[str, float]
    source: str


PUBLISHED = (
    Row(
        "Nomic Embed v2 MoE",
        {"beir": 52.86, "miracl16": 65.80},
        "model card of nomic-ai/nomic-embed-text-v2-moe (arXiv 2502.07972); MIRACL without de and yo as reported",
    ),
    Row(
        "Arctic-embed-m-v2.0",
        {"beir": 55.4},
        "model card of Snowflake/snowflake-arctic-embed-m-v2.0 (arXiv 2412.04506); its MIRACL is of 4 languages",
    ),
    Row(
        "EmbeddingGemma-300m",
        {"eng": 69.67, "eng_types": 65.11},
        "model card of google/embeddinggemma-300m (arXiv 2509.20354), 768 numbers",
    ),
    Row(
        "Qwen3-Embedding-0.6B",
        {"eng": 70.70, "eng_types": 64.88, "eng_retrieval": 61.83},
        "model card of Qwen/Qwen3-Embedding-0.6B (arXiv 2506.05176)",
    ),
)


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("paper_table", __doc__)
    parser.add_argument(
        "--ours", default="", help="folders of figures, separated by commas; without, the published rows"
    )
    arguments = parser.parse_args(argv)
    print(table([ours(pathlib.Path(folder)) for folder in arguments.ours.split(",") if folder]))


def ours(folder: pathlib.Path) -> Row:
    """The figures of one of our models. UserError for a folder without any, or with a part of a benchmark."""
    figures = {}
    if (beir := _read(folder / "beir.json")) is not None:
        _check(folder / "beir.json", {name.partition("/")[0] for name in beir}, BEIR, "BEIR's 15 sets")
        _check(folder / "beir.json", beir, TASKS, "the 26 tasks that BEIR's 15 sets are")
        figures["beir"] = _mean(beir, list(beir))
    if (miracl := _read(folder / "miracl.json")) is not None:
        _check(folder / "miracl.json", miracl, LANGUAGES, "MIRACL's 18 languages")
        figures["miracl18"] = _mean(miracl, list(miracl))
        figures["miracl16"] = _mean(miracl, [name for name in miracl if not name.endswith(retrieval.SURPRISE)])
    if (eng := _read(folder / "mteb.json", key="mean")) is not None:
        figures |= _english(folder / "mteb.json", eng)
    if (tasks := _read(folder / "tasks.json")) is not None:
        figures["tasks"] = _mean(tasks, list(tasks))
    if not figures:
        raise UserError(f"{folder} has no figures: none of beir.json, miracl.json, mteb.json, tasks.json.")
    return Row(folder.name, figures, "")


def table(rows: Sequence[Row]) -> str:
    """Our rows, the published ones with the numbers of their sources, and the sources. Columns that nobody fills are left out."""
    keys = [key for key in COLUMNS if any(key in row.figures for row in (*rows, *PUBLISHED))]
    named = [(row.name, row) for row in rows]
    named += [(f"{row.name}, published [{number}]", row) for number, row in enumerate(PUBLISHED, start=1)]
    width = max(len(name) for name, _ in named)
    lines = [" " * width + "".join(f"  {COLUMNS[key]:>{len(COLUMNS[key])}}" for key in keys)]
    for name, row in named:
        cells = [f"{row.figures[key]:.2f}" if key in row.figures else "-" for key in keys]
        lines.append(
            name.ljust(width) + "".join(f"  {cell:>{len(COLUMNS[key])}}" for cell, key in zip(cells, keys, strict=True))
        )
    lines.insert(1 + len(rows), "-" * len(lines[0]))
    return "\n".join([*lines, DCG, ENG, *(f"[{number}] {row.source}" for number, row in enumerate(PUBLISHED, start=1))])


def _read(path: pathlib.Path, *, key: str = "ndcg@10") -> dict | None:
    """What evaluate (or with "mean" mteb_benchmark) wrote; None where nothing is."""
    if not path.is_file():
        return None
    try:
        found = stored.read_json(path)
        fine = key in found if key == "mean" else found and all(key in values for values in found.values())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); launch/paper_table.sh makes it.") from error
    if not fine:
        raise UserError(f"{path} has no {key!r}; launch/paper_table.sh makes it.")
    return found


def _english(path: pathlib.Path, found: dict) -> dict[str, float]:
    try:
        benchmark = found["benchmark"]
        keys = {"eng": found["mean"], "eng_types": found["mean_of_types"], "eng_retrieval": found["types"]["Retrieval"]}
        figures = {key: 100.0 * value for key, value in keys.items()}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no output of mteb_benchmark on {BENCHMARK} ({error!r}); launch/paper_table.sh makes it."
        ) from error
    if benchmark != BENCHMARK:
        raise UserError(f"{path} is of {benchmark}; these columns are {BENCHMARK}'s.")
    return figures


def _check(path: pathlib.Path, found: Sequence[str], number: int, what: str) -> None:
    if len(found) != number:
        raise UserError(f"{path} has {len(found)} of {what}: their mean would be another figure than the papers'.")


def _mean(figures: dict, names: list[str]) -> float:
    return 100 * retrieval.mean_of(figures, names, "ndcg@10")


if __name__ == "__main__":
    verb.run(main)
