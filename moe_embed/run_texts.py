"""A sample of what a run trains on, for pictures of it: texts by language and by source, pairs, and translations."""

import dataclasses
import pathlib
import re
import statistics
from collections.abc import Iterable

import numpy as np

from moe_embed.config import Config
from moe_embed.data import inputs, mixture, sources
from moe_embed.data.pairs import Pair

TEXTS = 200  # of a language, and of a source
PAIRS = 600  # of all sources together
TRANSLATIONS = 30
CROSSING = re.compile(r"[a-z]{2,3}-[a-z]{2,3}")  # de-en; a region or a script (pt-BR, zh-Hant) is no second language

# For runs that have none: from the user interfaces of everyday programs, written for this file.
PARALLEL = (
    ("de", "Die Datei wurde gespeichert.", "The file has been saved."),
    ("de", "Bitte geben Sie Ihr Passwort ein.", "Please enter your password."),
    ("es", "¿Quiere cerrar la ventana?", "Do you want to close the window?"),
    ("es", "La búsqueda no dio resultados.", "The search gave no results."),
    ("fr", "Choisissez une langue dans la liste.", "Choose a language from the list."),
    ("fr", "La page suivante est vide.", "The next page is empty."),
    ("it", "La stampante non è collegata.", "The printer is not connected."),
    ("pt", "Você pode desfazer a última alteração.", "You can undo the last change."),
    ("ru", "Проверьте подключение к сети.", "Check the network connection."),
    ("ja", "画像の大きさを変更します。", "Change the size of the picture."),
    ("ko", "새 폴더를 만드세요.", "Create a new folder."),
    ("zh", "在表格中插入一行。", "Insert a row into the table."),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was read of a run's data, each list spread over its file. `pairs` and `translations` are empty of an MLM run."""

    languages: dict[str, list[str]]  # monolingual documents, or texts
    sources: dict[str, list[str]]
    pairs: dict[str, list[Pair]]  # by source
    translations: list[Pair]  # whose language is two: de-en


def read(config: Config) -> Sample:
    """The sample of a run's sources. UserError where they cannot be read."""
    languages: dict[str, list[str]] = {}
    of_source: dict[str, list[str]] = {}
    pairs: dict[str, list[Pair]] = {}
    crossing: dict[str, dict[str, list[Pair]]] = {}
    paths = [path for name in config.data.sources for path in inputs.find(name)]
    names = short_names(paths)
    mlm = config.loss.objective == "mlm"
    for path in paths if mlm else ():
        _read_texts(path, names[path], config, languages=languages, of_source=of_source)
    found = [] if mlm else [source for path in paths for source in _sources(path, config)]  # a path may hold many
    for source in found:
        name = names[source.path] if source.path in names else source.path
        some = source.take(spread(len(source), PAIRS // len(found)))
        pairs[name], of_source[name] = some, [some[i].document for i in spread(len(some), TEXTS)]
        for lang, places in source.by_language().items():
            chosen = source.take(places[spread(len(places), TEXTS)])
            if lang and not CROSSING.fullmatch(lang):
                languages.setdefault(lang, []).extend(pair.document for pair in chosen)
            elif lang:
                crossing.setdefault(name, {})[lang] = chosen
    languages = {lang: [texts[i] for i in spread(len(texts), TEXTS)] for lang, texts in sorted(languages.items())}
    return Sample(languages, of_source, pairs, _translations(crossing))


def _sources(path: str, config: Config) -> list[sources.Source]:
    data = config.data
    return sources.read_sources(path, query=data.query, document=data.document, max_bad_fraction=data.max_bad_fraction)


def _read_texts(path: str, name: str, config: Config, *, languages: dict, of_source: dict) -> None:
    """An MLM run's texts, into `languages` and `of_source`."""
    for texts in sources.read_text_sources(
        path, column=config.data.document, max_bad_fraction=config.data.max_bad_fraction
    ):
        of_source.setdefault(name, []).extend(texts.texts[i] for i in spread(len(texts), TEXTS))
        for lang, places in mixture.by_language(texts.langs).items():
            if lang and not CROSSING.fullmatch(lang):
                languages.setdefault(lang, []).extend(texts.texts[i] for i in places[spread(len(places), TEXTS)])


def _translations(crossing: dict[str, dict[str, list[Pair]]]) -> list[Pair]:
    """TRANSLATIONS of the source whose queries and documents are most alike in length, each document once."""
    if not crossing:
        return []
    ratio = lambda pair: abs(np.log(len(pair.query) / len(pair.document)))  # noqa: E731
    by_lang = min(
        crossing.values(), key=lambda found: statistics.mean(ratio(p) for some in found.values() for p in some)
    )
    found, seen, each = [], set(), max(TRANSLATIONS // len(by_lang), 1)
    for some in by_lang.values():
        new = list({pair.document: pair for pair in some if pair.document not in seen}.values())
        chosen = [new[i] for i in spread(len(new), each)]
        seen |= {pair.document for pair in chosen}
        found += chosen
    return found[:TRANSLATIONS]


def spread(size: int, count: int) -> np.ndarray:
    """`count` places of `size`, or all if there are fewer, evenly from the first to the last.

    >>> spread(9, 3), spread(2, 3)
    (array([0, 4, 8]), array([0, 1]))
    """
    return np.unique(np.linspace(0, size - 1, min(size, max(count, 1))).astype(int)) if size else np.zeros(0, int)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Paths -> their file names without endings where those differ, else the paths themselves."""
    paths = list(paths)
    stems = [pathlib.PurePath(path).name.partition(".")[0] for path in paths]
    return dict(zip(paths, stems if len(set(stems)) == len(stems) else paths, strict=True))
