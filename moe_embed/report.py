"""A run at a glance, in the terminal: the loss, the held-out figures, and which experts read which language.

    python -m moe_embed.report --workdir=runs/demo
    python -m moe_embed.report --workdir=runs/ablations/top1-seed0,runs/ablations/top1-seed1,runs/ablations/top2-seed0

Several runs become a table of their last dev figures, runs that differ in -seedN alone in one row.
"""

import argparse
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from moe_embed import metrics, verb
from moe_embed.config import Config, UserError
from moe_embed.data import inputs, sources
from moe_embed.load import DESCRIPTION, Model, load, read_description

BARS = "▁▂▃▄▅▆▇█"
SHADES = ((-0.25, "    "), (0.0, "  · "), (0.25, "  ░ "), (0.5, "  ▒ "), (1.0, "  ▓ "), (np.inf, "  █ "))
TEXTS = 200  # documents of a language that are read for the picture
WIDTH = 60


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moe_embed.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="what train wrote; several, separated by commas, are compared")
    workdirs = [pathlib.Path(part) for part in parser.parse_args(argv).workdir.split(",") if part]
    if len(workdirs) != 1:
        print(comparison(workdirs))
        return
    workdir = workdirs[0]
    if not (workdir / DESCRIPTION).is_file():
        raise UserError(f"{workdir} is no workdir: it has no {DESCRIPTION}; train writes one.")
    config = read_description(workdir).config
    if config is None:
        raise UserError(
            f"{workdir} is a model folder (import_hf, upcycle, soup), not a run: there is nothing to report."
        )
    print(training(workdir))
    texts = texts_by_language(config)
    if config.moe.num_experts and texts:
        print(experts(load(workdir), texts))


def comparison(workdirs: Sequence[pathlib.Path]) -> str:
    """A row for each group of runs, NAME-seed0, NAME-seed1, ...: the last dev nDCG@10 in %, mean, spread and each run's."""
    groups: dict[str, list[float]] = {}
    for workdir in workdirs:
        rows = metrics.read(workdir / "evaluations.jsonl")
        if not rows:
            raise UserError(f"{workdir} has no evaluations; train it with config.data.dev and config.run.eval_every.")
        groups.setdefault(re.sub(r"-seed[0-9]+$", "", workdir.name), []).append(100 * rows[-1]["ndcg"])
    width = max(map(len, groups))
    lines = [f"{'run':<{width}}  dev nDCG@10   spread  each seed"]
    for name, values in groups.items():
        spread = f"{np.std(values, ddof=1):7.2f}" if len(values) > 1 else "      -"
        lines.append(f"{name:<{width}}  {np.mean(values):11.1f}  {spread}  {', '.join(f'{v:.1f}' for v in values)}")
    return "\n".join(lines) + "\n(spread: standard deviation over seeds)"


def training(workdir: pathlib.Path) -> str:
    """Loss, accuracy and speed over the steps as sparklines, and the evaluations."""
    rows = metrics.read(workdir / "metrics.jsonl")
    if not rows:
        return f"{workdir} has no metrics yet."
    skipped = sum(not np.isfinite(row["loss"]) for row in rows)
    lines = [f"{len(rows)} steps" + (f", {skipped} of them not finite" if skipped else "")]
    for name in ("loss", "accuracy", "tokens_per_second"):
        values = np.array([row[name] for row in rows if np.isfinite(row["loss"])])
        if not len(values):
            return f"{len(rows)} steps, and none of them finite."
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


def texts_by_language(config: Config) -> dict[str, list[str]]:
    """The first documents, or texts, of each language in the run's monolingual data (`lang` without a "-")."""
    texts: dict[str, list[str]] = {}
    for path in [path for name in config.data.sources for path in inputs.find(name)]:
        for lang, text in _said(path, config):
            if lang and "-" not in lang and len(texts.setdefault(lang, [])) < TEXTS:
                texts[lang].append(text)
    return dict(sorted(texts.items()))


def _said(path: str, config: Config) -> Iterator[tuple[str, str]]:
    """(language, document or text) of a source; of each language at least the first TEXTS."""
    bad = config.data.max_bad_fraction
    if config.loss.objective == "mlm":
        for texts in sources.read_text_sources(path, column=config.data.document, max_bad_fraction=bad):
            yield from zip(texts.langs, texts.texts, strict=True)
        return
    for source in sources.read_sources(
        path, query=config.data.query, document=config.data.document, max_bad_fraction=bad
    ):
        for lang, places in source.by_language().items():
            yield from ((lang, pair.document) for pair in source.take(places[np.arange(min(len(places), TEXTS))]))


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
    verb.run(main, copies=True)
