"""Make the sample: a small real multilingual retrieval set in ten languages, cut from the help pages of LibreOffice.

    python moe_embed/sample/make.py --pairs=PATH/libreoffice-help.jsonl.gz --output=moe_embed/sample

The text is LibreOffice's help and its translations, by The Document Foundation and the LibreOffice contributors, as
Debian's libreoffice-help-* packages install it: one HTML page per topic and language. It is under the Mozilla Public
License 2.0 (LICENSE beside this file), and so is what this script writes.

PATH holds one JSON object a line, {"query": heading, "document": section, "lang": "de", "id": ".../de/PAGE.html#ANCHOR"}.
PAGE.html#ANCHOR is the same in every language, so a heading in one language and the section in another are a pair too.

Under --output it writes
    pairs/{monolingual,crosslingual,titles}.jsonl.gz    training pairs
    tasks/NAME/, dev/NAME/                              retrieval tasks in BEIR layout: corpus, queries, qrels
    tokenizer.model                                     a SentencePiece unigram model of the training texts
and prints what it kept, what it dropped and why. The same input gives the same bytes, every time.
"""

import argparse
import collections
import gzip
import hashlib
import io
import json
import pathlib

import sentencepiece

LANGUAGES = {
    "de": "de",
    "en": "en",
    "es": "es",
    "fr": "fr",
    "it": "it",
    "ja": "ja",
    "ko": "ko",
    "pt-BR": "pt",
    "ru": "ru",
    "zh-CN": "zh",
}
TEST_PERCENT, DEV_PERCENT = 5, 4
MONOLINGUAL = 2_300  # at most so many monolingual training pairs in a language other than English
PROMPTS = ["▁search_query:", "▁search_document:"]  # one piece each: text here is short, a prompt of five pieces is not
CHARACTERS = 200  # a document is cut here, so that two which begin alike are one text
VOCABULARY = 16_000
TASKS = {
    "tasks": (["de", "en", "ja", "ru", "zh"], ["de", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh"]),
    "dev": (["de", "ja"], ["de", "fr", "ja", "ko", "ru", "zh"]),
}  # folder -> languages of the monolingual tasks, languages of the queries that ask an English corpus

Row = collections.namedtuple("Row", "key lang query document")  # key: PAGE.html#ANCHOR


# ---- one text ----


def clean(text):
    return " ".join(text.split())


def cut(text, limit=CHARACTERS):
    """The first `limit` characters, back to the last space if that keeps half of them: Chinese and Japanese rarely have one."""
    if len(text) <= limit:
        return text
    space = text.rfind(" ", 0, limit + 1)
    return text[: space if space >= limit // 2 else limit].rstrip()


def near_empty(text):
    """Fewer than three letters, where a Chinese, Japanese or Korean one counts twice: 插入 is a title."""
    return sum(2 if c >= "\u2e80" else 1 for c in text if c.isalpha()) < 3


def digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def side(key):
    """train, dev or test, by a digest of the page alone: all sections and translations of a page are on one side."""
    percent = digest(key.partition("#")[0]) % 100
    return "test" if percent < TEST_PERCENT else "dev" if percent < TEST_PERCENT + DEV_PERCENT else "train"


# ---- all rows ----


def read(path, drops):
    """The rows of our languages, cleaned, once each, in the order of pages; and the (lang, key) that name more than one section."""
    rows, times = set(), collections.Counter()
    for line in gzip.open(path, "rt", encoding="utf-8"):  # noqa: SIM115 - read to its end
        raw = json.loads(line)
        lang = LANGUAGES.get(raw["lang"])
        if lang is None:
            continue
        row = Row(raw["id"].split("/", 2)[2], lang, clean(raw["query"]), cut(clean(raw["document"])))
        times[lang, row.key] += 1
        if near_empty(row.query) or near_empty(row.document):
            drops["near-empty query or document"] += 1
        else:
            rows.add(row)
    rows, seen = sorted(rows), set()
    unique = [row for row in rows if (row.query, row.document) not in seen and not seen.add((row.query, row.document))]
    drops["the same query and document"] = sum(times.values()) - drops["near-empty query or document"] - len(unique)
    return unique, {place for place, count in times.items() if count > 1}


def split(rows, drops):
    """{side: rows}, where no text of dev is in test, and none of dev or test in train, whatever its page and language."""
    sides = {name: [row for row in rows if side(row.key) == name] for name in ("dev", "test", "train")}
    held_out = set()
    for name, members in sides.items():
        sides[name] = [row for row in members if row.document not in held_out]
        drops[f"{name} document that is held out"] = len(members) - len(sides[name])
        held_out |= {row.document for row in sides[name]}
    return sides


def thin(rows, drops):
    """English whole and MONOLINGUAL rows of every other language, drawn by digest: each keeps other sections, all together few bytes."""
    kept = set()
    for lang in LANGUAGES.values():
        members = sorted((row for row in rows if row.lang == lang), key=lambda row: (digest(f"{lang}/{row.key}"), row))
        kept.update(members if lang == "en" else members[:MONOLINGUAL])
    drops["monolingual pair left out for size"] = len(rows) - len(kept)
    return [row for row in rows if row in kept]


def translated(rows, ambiguous, drops):
    """(row in another language, English row of the same section); not where the place is unclear or the title is still English."""
    english = {row.key: row for row in rows if row.lang == "en"}
    for row in rows:
        if row.lang == "en" or row.key not in english:
            continue
        if (row.lang, row.key) in ambiguous or ("en", row.key) in ambiguous:
            drops["translation: an anchor with several sections"] += 1
        elif row.query == english[row.key].query:
            drops["translation: the title is the English one"] += 1
        else:
            yield row, english[row.key]


# ---- what is written ----


def write_json(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects).encode()
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as f:
            f.write(data)
        data = buffer.getvalue()
    path.write_bytes(data)


def write_pairs(path, source, pairs, drops):
    """pairs: (query, document, lang, key or None), written once each; -> their texts."""
    seen, objects, counts = set(), [], collections.Counter()
    for query, document, lang, key in pairs:
        if (query, document) in seen:
            drops[f"{source}: the same pair in another language"] += 1
            continue
        seen.add((query, document))
        counts[lang] += 1
        objects.append(
            {"query": query, "document": document, "source": source, "lang": lang} | ({"id": key} if key else {})
        )
    write_json(path, objects)
    print(f"{path.name:26} {len(objects):6} pairs  ", *(f"{lang} {n}" for lang, n in sorted(counts.items())))
    return [text for pair in sorted(seen) for text in pair]


def write_task(folder, qrels, documents, pairs):
    """documents: the corpus; pairs: (query, document). The same text is one document; the same query asks for all of its documents."""
    document_ids = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(documents))}
    query_ids = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(query for query, _ in pairs))}
    write_json(folder / "corpus.jsonl", ({"_id": i, "title": "", "text": text} for text, i in document_ids.items()))
    write_json(folder / "queries.jsonl", ({"_id": i, "text": text} for text, i in query_ids.items()))
    lines = dict.fromkeys(f"{query_ids[query]}\t{document_ids[document]}\t1\n" for query, document in pairs)
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{qrels}.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8", newline=""
    )
    print(
        f"{folder.parent.name}/{folder.name:32} {len(document_ids):5} documents {len(query_ids):5} queries {len(lines):5} judgements"
    )


def train_tokenizer(texts, vocabulary):
    """A serialised SentencePiece model; ids 0, 1, 2 are <unk>, <s>, </s>. One thread: the sums of several come in any order."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocabulary,
        character_coverage=0.9995,
        num_threads=1,
        minloglevel=1,
        user_defined_symbols=PROMPTS,
    )
    return model.getvalue()


def print_tokens(model, rows):
    """Mean tokens of a title and of a body, and how many of the tokens are <unk>, by language."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    for lang in LANGUAGES.values():
        titles = tokenizer.encode([row.query for row in rows if row.lang == lang])
        bodies = tokenizer.encode([row.document for row in rows if row.lang == lang])
        title, body = sum(map(len, titles)), sum(map(len, bodies))
        unknown = sum(ids.count(tokenizer.unk_id()) for ids in titles + bodies) / (title + body)
        print(
            f"tokens {lang}: {title / len(titles):5.1f} a title, {body / len(bodies):6.1f} a body, {unknown:.3%} unknown"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=pathlib.Path, required=True, help="libreoffice-help.jsonl.gz")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write into")
    args = parser.parse_args()
    out, drops = args.output, collections.Counter()

    rows, ambiguous = read(args.pairs, drops)
    sides = split(rows, drops)
    for name, members in sides.items():
        counts = collections.Counter(row.lang for row in members)
        print(
            f"{name:5} {len({row.key.partition('#')[0] for row in members}):5} pages {len(members):6} sections  ",
            *(f"{lang} {n}" for lang, n in sorted(counts.items())),
        )

    monolingual = [(r.query, r.document, r.lang, r.key) for r in thin(sides["train"], drops)]
    both = list(translated(sides["train"], ambiguous, drops))
    texts = write_pairs(out / "pairs/monolingual.jsonl.gz", "monolingual", monolingual, drops)
    texts += write_pairs(
        out / "pairs/crosslingual.jsonl.gz",
        "crosslingual",
        [(r.query, en.document, f"{r.lang}-en", None) for r, en in both],
        drops,
    )
    texts += write_pairs(
        out / "pairs/titles.jsonl.gz", "titles", [(r.query, en.query, f"{r.lang}-en", None) for r, en in both], drops
    )

    for folder, (monolingual, crosslingual) in TASKS.items():
        qrels = "test" if folder == "tasks" else "dev"
        members = sides[qrels]
        by_lang = {lang: [row for row in members if row.lang == lang] for lang in LANGUAGES.values()}
        for lang in monolingual:
            write_task(
                out / folder / f"libreoffice-help-{lang}",
                qrels,
                [r.document for r in by_lang[lang]],
                [(r.query, r.document) for r in by_lang[lang]],
            )
        both = list(translated(members, ambiguous, drops))
        for lang in crosslingual:
            pairs = [(r.query, en.document) for r, en in both if r.lang == lang]
            write_task(
                out / folder / f"xling-libreoffice-help-{lang}-en", qrels, [r.document for r in by_lang["en"]], pairs
            )

    model = train_tokenizer(sorted(set(texts)), VOCABULARY)
    (out / "tokenizer.model").write_bytes(model)
    print_tokens(model, sides["train"])
    for reason, count in drops.items():
        print(f"dropped {count:6}  {reason}")
    print(f"{sum(f.stat().st_size for f in out.rglob('*') if f.is_file()):,} bytes in {out.name}/")


if __name__ == "__main__":
    main()
