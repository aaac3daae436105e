"""A run at a glance, in the terminal: the loss, the held-out figures, and which experts read which language.

python -m moe_embed.report --workdir=runs/demo
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from moe_embed import config as config_lib
from moe_embed import metrics
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.load import DESCRIPTION, Model, load, read_description

BARS = "▁▂▃▄▅▆▇█"
SHADES = ((-0.25, "    "), (0.0, "  · "), (0.25, "  ░ "), (0.5, "  ▒ "), (1.0, "  ▓ "), (np.inf, "  █ "))
TEXTS = 200  # documents of a language that are read for the picture
WIDTH = 60


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moe_embed.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="what train wrote")
    workdir = parser.parse_args(argv).workdir
    if not (workdir / DESCRIPTION).is_file():
        raise UserError(f"{workdir} is no workdir: it has no {DESCRIPTION}; train writes one.")
    print(training(workdir))
    config, _ = read_description(workdir)
    texts = texts_by_language(config)
    if config.moe.num_experts and texts:
        print(experts(load(workdir), texts))


def training(workdir: pathlib.Path) -> str:
    """Loss, accuracy and speed over the steps as sparklines, and the evaluations."""
    rows = metrics.read(workdir / "metrics.jsonl")
    if not rows:
        return f"{workdir} has no metrics yet."
    lines = [f"{len(rows)} steps"]
    for name in ("loss", "accuracy", "tokens_per_second"):
        values = np.array([row[name] for row in rows])
        lines.append(f"{name:<18} {sparkline(values)} {values[0]:,.3f} -> {values[-1]:,.3f}")
    evaluations = metrics.read(workdir / "evaluations.jsonl")
    if evaluations:
        values = np.array([row["ndcg"] for row in evaluations])
        lines.append(f"{'dev nDCG@10':<18} {sparkline(values)} {values[0]:.3f} -> {values[-1]:.3f}")
    return "\n".join(lines)


def sparkline(values: np.ndarray) -> str:
    """At most WIDTH bars, each the mean of its stretch.

    >>> sparkline(np.array([0.0, 1.0]))
    '▁█'
    """
    means = np.array([part.mean() for part in np.array_split(values, min(WIDTH, len(values)))])
    span = means.max() - means.min()
    return "".join(BARS[int(7 * (mean - means.min()) / span) if span else 0] for mean in means)


def texts_by_language(config: config_lib.Config) -> dict[str, list[str]]:
    """The first documents of each language in the run's monolingual pairs (`lang` without a "-")."""
    texts: dict[str, list[str]] = {}
    for path in config.data.sources:
        for pair in sources.read_source(path, query=config.data.query, document=config.data.document).pairs:
            if pair.lang and "-" not in pair.lang and len(texts.setdefault(pair.lang, [])) < TEXTS:
                texts[pair.lang].append(pair.document)
    return dict(sorted(texts.items()))


def experts(model: Model, texts: dict[str, list[str]]) -> str:
    """Expert x language: how much more often than on average an expert is chosen for a language's tokens.

    A picture a mixture layer, and the mutual information of expert and language over the entropy of the experts.
    """
    chosen = {lang: model.encode_with_sums(some, model.prompt("document"))[1]
              for lang, some in texts.items()}  # fmt: skip
    languages = list(texts)
    share = np.stack([chosen[lang] / chosen[lang].sum(-1, keepdims=True) for lang in languages])  # language, R, E
    lines = []
    for r in range(share.shape[1]):
        mean_E = share[:, r].mean(0)
        ratio = np.log2(np.maximum(share[:, r], 1e-6) / np.maximum(mean_E, 1e-6))
        information = (share[:, r] * ratio).sum(1).mean() / -(mean_E * np.log2(np.maximum(mean_E, 1e-9))).sum()
        lines.append(f"\nmixture layer {r + 1}: expert x language (normalised mutual information {information:.2f})")
        lines.append("      " + "".join(f"{lang:>4}" for lang in languages) + "   share of all")
        for e in range(share.shape[2]):
            cells = "".join(next(shade for limit, shade in SHADES if value <= limit) for value in ratio[:, e])
            lines.append(f"  e{e:<3} {cells}   {mean_E[e]:6.1%}")
    lines.append("  chosen by a language, beside the mean:  · as often  ░ more  ▒ 1.2x  ▓ 1.4x  █ 2x  (blank: less)")
    return "\n".join(lines)


if __name__ == "__main__":
    config_lib.run_verb(main)
