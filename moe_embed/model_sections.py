"""The sections of the HTML report that ask the model: which experts read what, how its vectors lie, what it takes for a translation.

Each takes what `ask` found and gives HTML: pictures, or a sentence on what is not there and why.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed import charts, expert_maps, geometry, heat_map, page, run_texts
from moe_embed.charts import Line
from moe_embed.config import UserError
from moe_embed.load import Model, load
from moe_embed.report_sections import Run

BINS = 40  # of a histogram
NUM_VALUES = 200  # of a spectrum


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run's model and a sample of its data; `no_model` and `no_texts` say why there is none."""

    run: Run
    model: Model | None = None
    texts: run_texts.Sample | None = None
    no_model: str = ""
    no_texts: str = ""


def ask(run: Run) -> Asked:
    """Open a run's newest checkpoint and read a sample of its data; what cannot be opened is a sentence in the page."""
    found = Asked(run)
    try:
        found = dataclasses.replace(found, model=load(run.workdir))
    except UserError as error:
        found = dataclasses.replace(found, no_model=f"The model of {run.name} cannot be opened: {error}")
    try:
        return dataclasses.replace(found, texts=run_texts.read(run.config))
    except UserError as error:
        return dataclasses.replace(found, no_texts=f"The data of {run.name} cannot be read: {error}")


def maps(asked: Sequence[Asked]) -> str:
    """Expert x language and expert x source: how much more often than on average an expert is chosen."""
    said, figures = "", []
    for a in asked:
        missing = (
            a.no_model
            or a.no_texts
            or ("" if a.run.config.moe.num_experts else f"{a.run.name} is dense: it has no experts.")
        )
        if missing:
            said += page.say(missing, missing=True)
            continue
        for kind, texts in (("language", a.texts.languages), ("source", a.texts.sources)):
            if len(texts) < 2:
                said += page.say(
                    f"The data of {a.run.name} names {len(texts) or 'no'} {kind}: there is nothing to tell apart.",
                    missing=True,
                )
                continue
            figures += expert_figures(a, kind, texts)
    return said + page.grid(figures)


def expert_figures(a: Asked, kind: str, texts: Mapping[str, Sequence[str]]) -> list[str]:
    """A map for each mixture layer."""
    share_NRE = expert_maps.shares(a.model, texts)
    figures = []
    for r in range(share_NRE.shape[1]):
        ratio_NE, information = expert_maps.against_mean(share_NRE[:, r])
        figures.append(heat_map.heat_map(
            ratio_NE.T, limit=1.5, rows=[f"e{e}" for e in range(ratio_NE.shape[1])], columns=list(texts),
            title=f"{a.run.name}, mixture layer {r + 1}: expert x {kind}", low="a third of the mean", high="3 x",
            note=f"normalised mutual information {information:.3f}; CSV: log2 of the share over the mean",
        ))  # fmt: skip
    return figures


def shape_of_vectors(asked: Sequence[Asked]) -> str:
    """Alignment, uniformity and effective rank of a sample of each run's pairs; their cosines, and the spectrum."""
    said, rows, cosines, spectra = "", [], [], []
    for a in asked:
        if missing := a.no_model or a.no_texts:
            said += page.say(missing, missing=True)
            continue
        if not a.texts.pairs:
            said += page.say(f"{a.run.name} trains on texts, not on pairs: there is no alignment.", missing=True)
        everything = []
        for name, texts in a.texts.sources.items():
            pairs = a.texts.pairs[name] if a.texts.pairs else []
            documents = [pair.document for pair in pairs] or list(texts)
            x_ND = a.model.encode(documents, a.model.prompt("document"))
            query_ND = a.model.encode([pair.query for pair in pairs], a.model.prompt("query")) if pairs else None
            _, first = np.unique(documents, return_index=True)  # copies would lie on one point
            everything.append((x_ND, query_ND, first))
            rows.append([a.run.name, name, *_figures(query_ND, x_ND, x_ND[first])])
        if len(everything) > 1:
            x_ND = np.concatenate([x for x, _, _ in everything])
            alone_ND = np.concatenate([x[first] for x, _, first in everything])
            query_ND = np.concatenate([q for _, q, _ in everything]) if a.texts.pairs else None
            rows.append([a.run.name, "all", *_figures(query_ND, x_ND, alone_ND)])
        else:
            x_ND, query_ND, first = everything[0]
            alone_ND = x_ND[first]
        share = geometry.spectrum(alone_ND)[:NUM_VALUES]
        spectra.append(a.run.line(a.run.name, range(1, 1 + len(share)), np.log10(np.maximum(share, 1e-9))))
        if query_ND is not None:
            cosines += _histograms(a.run, query_ND, x_ND)
    if not rows:
        return said
    about = page.say(
        f"These figures are of a sample of {sampled([a.run for a in asked])}; of other texts they may be others. "
        "Alignment: mean squared distance of a pair, 0 is perfect. Uniformity of documents: log mean exp(-2 d²), lower is more spread "
        "(arXiv 2005.10242). Effective rank of documents: exp of the entropy of the singular values (Roy and Vetterli 2007)."
    )
    table = page.table(["run", "source", "pairs or texts", "alignment", "uniformity", "effective rank", "of"], rows)
    figures = [
        charts.lines(
            cosines,
            title="cosine of pairs, and of texts that are none",
            x_label="cosine",
            share=True,
            note="share of each",
        ),
        charts.lines(
            spectra,
            title="singular values of documents",
            x_label="rank of the value",
            note="log10 of the share of their sum",
        ),
    ]
    return about + said + table + page.grid(figures)


def sampled(runs: Sequence[Run]) -> str:
    """What run_texts reads of these runs: it does not leave out what a run kept out."""
    names: dict[str, list[str]] = {}
    for run in runs:
        kind = "texts" if run.config.loss.objective == "mlm" else "pairs"
        more = " and the held-out ones" if run.config.data.held_out else ""
        names.setdefault(f"the training {kind}{more}", []).append(run.name)
    return ", ".join(what if len(names) == 1 else f"{what} ({', '.join(of)})" for what, of in names.items())


def _figures(query_ND: np.ndarray | None, x_ND: np.ndarray, alone_ND: np.ndarray) -> list:
    """Cells of the table; None where there are no pairs, or fewer than two texts."""
    return [
        len(x_ND),
        None if query_ND is None else geometry.alignment(query_ND, x_ND),
        geometry.uniformity(alone_ND) if len(alone_ND) > 1 else None,
        geometry.effective_rank(alone_ND),
        min(alone_ND.shape),
    ]


def _histograms(run: Run, query_ND: np.ndarray, x_ND: np.ndarray) -> list[Line]:
    """The cosines of pairs, and of each query with the document of the pair half the sample away; one pair has no other."""
    kinds = {"pairs": x_ND} | ({"others": np.roll(x_ND, len(x_ND) // 2, axis=0)} if len(x_ND) > 1 else {})
    cosines = {kind: np.clip((query_ND * other_ND).sum(1), -1, 1) for kind, other_ND in kinds.items()}
    edges = np.linspace(min(map(np.min, cosines.values())) - 1e-3, 1, BINS + 1)
    found = []
    for i, (kind, of_kind) in enumerate(cosines.items()):
        count = np.histogram(of_kind, edges)[0]
        color = run.index if i == 0 else 6
        found.append(run.line(f"{run.name}: {kind}", (edges[1:] + edges[:-1]) / 2, count / count.sum(), color=color))
    return found


def translations(asked: Sequence[Asked]) -> str:
    """A matrix of cosines: sentences down, their translations across. A good model has a bright diagonal and nothing else."""
    said, figures = "", []
    for a in asked:
        if a.no_model:
            said += page.say(a.no_model, missing=True)
            continue
        if own := a.texts.translations if a.texts else []:
            rows = [(pair.lang, pair.query, pair.document) for pair in own]
            what = f"{len(rows)} of {sampled([a.run])}"
        else:
            rows = run_texts.PARALLEL
            what = f"{len(rows)} that come with this program"
            said += page.say(
                f"{a.run.name} has no cross-lingual pairs to show: these sentences come with this program."
            )
        query_ND = a.model.encode([row[1] for row in rows], a.model.prompt("query"))
        document_ND = a.model.encode([row[2] for row in rows], a.model.prompt("document"))
        cosine_NC = np.clip(query_ND @ document_ND.T, -1, 1)
        mean = float(cosine_NC.mean())
        limit = max(float(cosine_NC.max()) - mean, 1e-6)
        own_is_best = float((cosine_NC.argmax(1) == np.arange(len(rows))).mean())
        figures.append(heat_map.heat_map(
            cosine_NC - mean, limit=limit, shown=cosine_NC, rows=[f"{lang}  {query}" for lang, query, _ in rows], columns=[row[2] for row in rows],
            title=f"{a.run.name}: sentences and their translations", low=f"cosine {mean - limit:.2f} or less",
            high=f"{mean + limit:.2f}; the middle is the mean of all, {mean:.2f}", wide=True,
            note=f"the own translation is the nearest for {own_is_best:.0%} of {what}",
        ))  # fmt: skip
    return said + page.grid(figures)
