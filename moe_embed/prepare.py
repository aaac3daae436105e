"""Pairs of any kind become one prepared data set: checked, without copies, sharded, with a manifest and a data card.

    python -m moe_embed.prepare --input='pairs/*.jsonl.gz' --output=DIR
    python -m moe_embed.prepare --input=mine.csv --query=title --document=body --output=DIR
    python -m moe_embed.prepare --input=tfds:my_pairs:train,hf:OWNER/NAME@CONFIG:train,beir_folder --output=DIR
    python -m moe_embed.prepare --describe=DIR

DIR is what `--config.data.sources=DIR` takes, and `tfds.builder_from_directory(DIR).as_data_source("train")`. Each input is a
source of its own; inputs are read in parallel, and but for a BEIR folder's never held in memory. A run that was stopped continues when it is run
again. The same inputs and options give the same bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence

import tqdm

from moe_embed import data_card, run_data, stored, verb
from moe_embed.config import UserError
from moe_embed.data import inputs, loading, prepared, spool
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.hygiene import Rules

WORK = ".preparing"  # in DIR, until the manifest is there
SAMPLE_TOKENIZER = pathlib.Path(__file__).parent / "sample" / "tokenizer.model"


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("prepare", __doc__)
    parser.add_argument("--input", help="files, patterns, BEIR folders, tfds:NAME:SPLIT, hf:NAME:SPLIT; commas between")
    parser.add_argument("--output", type=verb.local_path, help="the folder to make")
    parser.add_argument("--describe", type=pathlib.Path, help="verify a prepared data set and print its card instead")
    parser.add_argument("--query", default="query", help="the column of the queries")
    parser.add_argument("--document", default="document", help="the column of the documents")
    parser.add_argument("--lang", default="", help="the language of rows that have none")
    parser.add_argument(
        "--tokenizer", default=str(SAMPLE_TOKENIZER), help="counts tokens for the card (default: the sample's)"
    )
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.0, help="bad rows an input may have (default: none)"
    )
    parser.add_argument("--languages", default="", help="keep only these, separated by commas")
    parser.add_argument("--min_characters", type=int, default=Rules.min_characters, help="of a text")
    parser.add_argument("--max_characters", type=int, default=Rules.max_characters, help="of a text")
    parser.add_argument("--max_symbols", type=float, default=Rules.max_symbols, help="share of a text, 0 to 1")
    parser.add_argument("--decontaminate", default="", help="BEIR folders whose texts must not be trained on")
    parser.add_argument("--ngram", type=int, default=Rules.ngram, help="words in a row that are too many in common")
    parser.add_argument("--shard_size", type=int, default=500_000, help="pairs in a shard")
    parser.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 16), help="inputs and shards worked on at once"
    )
    a = parser.parse_args(argv)
    if a.describe:
        manifest = prepared.read_manifest(a.describe)
        prepared.verify(a.describe, manifest)
        try:
            said = data_card.table(manifest["card"])
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{a.describe / prepared.MANIFEST} has no card that prepare wrote ({error!r:.100})."
            ) from error
        print(said)
        return
    if not (a.input and a.output):
        parser.error("give --input and --output, or --describe=DIR")
    for name in ("min_characters", "max_characters", "ngram", "shard_size", "processes"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name}={getattr(a, name)} must be 1 or more.")
    for name in ("max_bad_fraction", "max_symbols"):
        if not 0 <= getattr(a, name) <= 1:
            raise UserError(f"--{name}={getattr(a, name)} is a share; give a number from 0 to 1.")
    rules = Rules(a.min_characters, a.max_characters, a.max_symbols, _list(a.languages), a.ngram)
    settings = spool.Settings(
        a.query, a.document, a.lang, a.tokenizer, a.max_bad_fraction, rules, _list(a.decontaminate)
    )
    prepare(inputs.find(a.input), a.output, settings=settings, shard_size=a.shard_size, processes=a.processes)


def prepare(
    names: Sequence[str], output: pathlib.Path, *, settings: spool.Settings, shard_size: int, processes: int
) -> None:
    """Read the inputs `names` and write the data set `output`; prints its card. UserError, and no manifest, at a fault."""
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:  # digests leave Python's lock alone
        identities = list(pool.map(spool.identity, names))
    order = {"inputs": identities, "shard_size": shard_size}  # to know it again
    order |= {"benchmarks": [spool.benchmark_identity(folder) for folder in settings.benchmarks]}
    tokenizer = zlib.crc32(tokenizer_lib.read(settings.tokenizer).model_bytes)  # wherever it lies
    order |= {"settings": dataclasses.asdict(settings) | {"tokenizer": tokenizer}, "format": prepared.FORMAT}
    order = json.loads(json.dumps(order))  # as it is read back
    if _is_finished(output, order):
        if (output / WORK).exists():  # the call that wrote the manifest was killed before it could delete this
            with _begun(output, order) as work:
                shutil.rmtree(work)
        print(f"{output} is finished: the same inputs and options. Nothing to do.")
        return
    with _begun(output, order) as work:
        try:
            _carry_out(names, output, work, order, settings=settings, shard_size=shard_size, processes=processes)
        except UserError:
            if not any(work.glob("*/report.json")):  # no input is read: nothing of it is worth keeping
                shutil.rmtree(work)
                if not any(output.iterdir()):
                    output.rmdir()
            raise


def _carry_out(
    names: Sequence[str],
    output: pathlib.Path,
    work: pathlib.Path,
    order: dict,
    *,
    settings: spool.Settings,
    shard_size: int,
    processes: int,
) -> None:
    spool.check(settings)
    folders = [work / f"input-{i:05d}" for i in range(len(names))]
    jobs = [(name, folder, settings) for name, folder in zip(names, folders, strict=True)]
    sizes = {one["name"]: one["bytes"] for one in order["inputs"]}
    by_size = sorted(jobs, key=lambda job: -sizes[job[0]])  # the longest first: no core waits at the end
    _all(spool.fill, by_size, processes=processes, label="reading")
    kept = spool.without_copies(folders)
    layout = spool.lay_out(names, folders, kept)
    count = max(-(-layout.total // shard_size), 1)
    shard_jobs = [(output, work, spool.pieces_of(layout, n, count), n, count) for n in range(count)]
    shards = _all(spool.write_shard, shard_jobs, processes=processes, label="writing")
    spool.write_tfds_metadata(output, shards)
    card = data_card.card(spool.reports(folders), layout, tokenizer=pathlib.Path(settings.tokenizer).name)
    manifest = {"format": prepared.FORMAT, "order": order, "shards": shards, "sources": layout.sources}
    manifest["card"] = card
    (output / run_data.CARD).write_text(data_card.markdown(card), "utf-8")
    prepared.write_manifest(output, manifest)
    shutil.rmtree(work)
    print(data_card.table(card))
    print(f"{output}: {layout.total:,} pairs in {count} shards; --config.data.sources={output}")


def _is_finished(output: pathlib.Path, order: dict) -> bool:
    """Whether this order's data set is at `output`. UserError: another order's is."""
    if not (output / prepared.MANIFEST).exists():
        return False
    if prepared.read_manifest(output)["order"] == order:
        return True
    raise UserError(
        f"{output} was prepared from other inputs or with other options (bytes of inputs, benchmarks and the tokenizer count); "
        "name another --output."
    )


@contextlib.contextmanager
def _begun(output: pathlib.Path, order: dict) -> Iterator[pathlib.Path]:
    """The folder of the work, new or an earlier call's of the same order, for this process alone."""
    work = output / WORK
    if output.exists() and not work.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} exists and is no prepared data set; name another.")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = stored.open_alone(work / "lock")
    except BlockingIOError as error:
        raise UserError(f"another process prepares {output}; wait for it, or name another --output.") from error
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            if not (work / "order.json").exists():
                stored.write_json(work / "order.json", order)
            elif stored.read_json(work / "order.json") != order:
                raise UserError(
                    f"{output} was begun from other inputs or with other options (bytes of inputs, benchmarks and the tokenizer count); "
                    "delete it, or name another --output."
                )
        except OSError as error:
            raise UserError(f"--output={output} cannot be written: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(
                f"{work / 'order.json'} cannot be read ({error}); delete {output} to start over."
            ) from error
        yield work


def _all(work: Callable, jobs: Sequence[tuple], *, processes: int, label: str) -> list:
    """work(*job) of every job, in processes of their own. The first fault ends it; what is done stays done."""
    bar = tqdm.tqdm(total=len(jobs), desc=label, disable=None, dynamic_ncols=True)
    with bar:
        if processes == 1 or len(jobs) == 1:
            return [_step(bar, work(*job)) for job in jobs]
        context = multiprocessing.get_context("spawn")
        pool_size, pid = min(processes, len(jobs)), os.getpid()
        with concurrent.futures.ProcessPoolExecutor(pool_size, context, loading.end_with, (pid,)) as pool:
            futures = [pool.submit(work, *job) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    "a process of prepare was killed, perhaps for its memory; run it again, it goes on, or with fewer --processes."
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _step(bar, result):
    bar.update()
    return result


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    verb.run(main)
