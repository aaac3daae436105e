"""What is known about a model beyond its parameters, for the card of an export: from its workdir, evaluate's output, and the user.

Nothing is guessed: what nobody wrote down is not in the card.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from moe_embed import bucket, checkpoint, held_out, results, run_data
from moe_embed.config import UserError
from moe_embed.load import DESCRIPTION, read_description

HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)")  # how huggingface_hub names a downloaded model's folder
REPO = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}")


class Facts(NamedTuple):
    """For model_card. What is empty is not known."""

    files: tuple[tuple[str, int], ...] = ()  # what it was trained on: a file's name, and how many pairs or rows of it
    objective: str = ""  # contrastive or mlm
    steps: int = 0
    batch_size: int = 0
    data_card: str = ""  # what prepare said of the data, markdown
    began_with: str = ""  # the name of the folder
    held_out: str = ""  # one sentence, of held_out.conclude
    evaluation: Mapping[str, Mapping] = {}  # system -> task -> figures, as evaluate writes them
    license: str = ""
    languages: tuple[str, ...] = ()
    base_model: str = ""  # OWNER/NAME


def of_workdir(root: pathlib.Path) -> Facts:
    """What the workdir at `root` knows of its newest step that verifies; no facts of a folder of another kind.

    Paths are cut to names.
    """
    if not bucket.is_file(root / DESCRIPTION):
        return Facts()
    description = read_description(root)
    if description.config is None:
        return Facts()
    step = checkpoint.newest_verified(root / "checkpoints", say=print)
    written = checkpoint.facts(root / "checkpoints", step) if step is not None else {}
    data_card, verdict = root / run_data.CARD, held_out.concluded(root, steps=step or 0)
    try:
        files = tuple((str(name), int(count)) for name, count, _ in written["files"]) if "files" in written else ()
        of_data = bucket.read(data_card).decode("utf-8")
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{root} does not say what it was trained on: {error!r:.200}.") from error
    began = description.init_from or ""
    cached = HUB_CACHE.search(began)
    return Facts(
        files=files,
        objective=description.config.loss.objective,
        steps=step or 0,
        batch_size=written["batch_size"] if "batch_size" in written else 0,
        data_card=of_data,
        began_with=pathlib.Path(began).name,
        held_out=verdict,
        base_model=f"{cached[1]}/{cached[2]}" if cached else "",
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What only the user can say of a model, or point to."""
    parser.add_argument("--evaluation", type=pathlib.Path, help="an output of evaluate, for the card")
    parser.add_argument(
        "--license", default="", help="of the model, for the card: apache-2.0, ... (default: none stated)"
    )
    parser.add_argument("--languages", default="", help="for the card: de,en,ja")
    parser.add_argument("--base_model", default="", help="for the card: OWNER/NAME of what it began with")


def from_flags(facts: Facts, args: argparse.Namespace) -> Facts:
    """`facts` and what the user says. UserError for what the hub's front matter would not take, or no output of evaluate."""
    codes = tuple(filter(None, args.languages.split(",")))
    if args.license and not LICENSE.fullmatch(args.license):
        raise UserError(f"--license={args.license} is no identifier of the hub; give one like apache-2.0 or mit.")
    if not all(map(LANGUAGE.fullmatch, codes)):
        raise UserError(f"--languages={args.languages} is no list of language codes, as in --languages=de,en.")
    if args.base_model and not REPO.fullmatch(args.base_model):
        raise UserError(f"--base_model={args.base_model} is no OWNER/NAME.")
    if args.evaluation:
        facts = facts._replace(evaluation=results.read(args.evaluation, "--evaluation"))
    return facts._replace(license=args.license, languages=codes, base_model=args.base_model or facts.base_model)


def section(facts: Facts) -> str:
    """Markdown of the data and the figures; "" where nothing is known."""
    parts = []
    if facts.files or facts.began_with:
        what = "rows of text" if facts.objective == "mlm" else "pairs"
        head = f"Trained for {facts.steps:,} steps" + (f" of {facts.batch_size:,} {what}" if facts.batch_size else "")
        began = f", from `{facts.began_with}`" if facts.began_with else ", from fresh parameters"
        rows = "".join(f"| {name} | {count:,} |\n" for name, count in facts.files)
        table = f"\n\n| file | {what} |\n|---|---:|\n{rows}" if rows else "\n"
        parts.append(f"## Data\n\n{head}{began}.{table}")
    if facts.data_card:
        parts.append(f"What was prepared, and what was left out of it:\n\n{facts.data_card}")
    if facts.held_out:
        parts.append(f"Held-out pairs, before and after: {facts.held_out}\n")
    if facts.evaluation:
        systems = list(facts.evaluation)
        header = "| task | " + " | ".join(f"{name}: nDCG@10 | recall@10" for name in systems) + " |\n"
        lines = [header, "|---|" + "---:|---:|" * len(systems) + "\n"]
        for task in facts.evaluation[systems[0]]:
            of_systems = (of[task] if task in of else None for of in facts.evaluation.values())
            cells = (
                f"{100 * figures[metric]:.1f}" if figures else "-"  # that system was not measured on it
                for figures in of_systems
                for metric in ("ndcg@10", "recall@10")
            )
            lines.append(f"| {task} | {' | '.join(cells)} |\n")
        parts.append("## Retrieval\n\nIn %, `python -m moe_embed.evaluate`.\n\n" + "".join(lines))
    return "\n".join(parts)
