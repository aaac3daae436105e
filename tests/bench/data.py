"""What loading costs: useful tokens, tokens a second on one core, a hundred million pairs, and an object store's latency.

    python -m tests.bench.data                                                       # the sample
    python -m tests.bench.data --data=DIR --tokenizer=sentencepiece.bpe.model        # DIR: made by moe_embed.prepare

Prints tables. The bars: 97 % useful; a million tokens a second on a core, with an XLM-R vocabulary; a hundred million pairs
opened in 10 s and 500 MB; step 1,000,000 in a second. Latency is real: reads of files wait 20 ms each, in a preloaded pread.
"""

import argparse
import datetime
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import numpy as np

from moe_embed import config as config_lib
from moe_embed import prepare, run_data
from moe_embed.data import prepared
from moe_embed.data import tokenizer as tokenizer_lib
from tests.bench.ratios import machine, resident, say

BATCH, DEVICES, STEPS = 16_384, 8, 6
HUNDRED_MILLION = 100_000_000
SLOW = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#include <sys/stat.h>
static int is_file(int fd) { struct stat s; return !fstat(fd, &s) && S_ISREG(s.st_mode); }
ssize_t pread(int fd, void *to, size_t n, off_t at) {
  static ssize_t (*real)(int, void *, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread");
  if (is_file(fd)) usleep(20000);
  return real(fd, to, n, at);
}
ssize_t pread64(int fd, void *to, size_t n, off_t at) { return pread(fd, to, n, at); }
"""


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, help="made by prepare (default: the sample, prepared for this)")
    parser.add_argument("--tokenizer", default="moe_embed/sample/tokenizer.model")
    parser.add_argument("--part", choices=("start", "latency"), help="what the parts run as processes of their own")
    flags = parser.parse_args(argv)
    if flags.part:
        return {"start": start, "latency": latency}[flags.part](flags)
    if flags.data is None:
        with tempfile.TemporaryDirectory() as scratch:
            flags.data = pathlib.Path(scratch, "sample")
            prepare.main(["--input=moe_embed/sample/pairs/*.jsonl.gz", f"--output={flags.data}"])
            return tables(flags)
    return tables(flags)


def tables(flags) -> None:
    """All parts, one after the other, under the date and the machine."""
    print(f"# Loading, {datetime.date.today().isoformat()}: {flags.data}, {flags.tokenizer}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "sentencepiece", "array_record"))
    for name, value in machine(versions).items():
        print(f"{name}: {value}")
    say("useful tokens")
    useful(flags)
    say("one core")
    speed(flags)
    say("a hundred million pairs")
    with tempfile.TemporaryDirectory(dir=flags.data.parent) as scratch:
        print(child("start", linked(flags.data, pathlib.Path(scratch)), flags.tokenizer))
    say("20 ms a read")
    if shutil.which("cc") is None:
        print("not run: no C compiler to build the slow pread with")
        return
    with tempfile.TemporaryDirectory() as scratch:
        source, library = pathlib.Path(scratch, "slow.c"), pathlib.Path(scratch, "slow.so")
        source.write_text(SLOW)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        print(child("latency", flags.data, flags.tokenizer))
        print(child("latency", flags.data, flags.tokenizer, LD_PRELOAD=str(library)))


def open_batches(flags, *, steps: int = STEPS, rows: int = 4):
    """The batches of a run over `flags.data`: BATCH pairs a step on DEVICES devices, rows of 512, 64 and 256 tokens a side."""
    settings = {
        "data.sources": flags.data, "data.tokenizer": flags.tokenizer, "data.batch_size": BATCH, "data.row_length": 512,
        "data.rows": rows, "data.texts_per_row": 128, "data.query_length": 64, "data.document_length": 256, "data.dev": "()", "data.weights": "()",
        "run.steps": steps, "run.eval_every": 0, "encoder.vocab_size": 250_048,
    }  # fmt: skip
    config = config_lib.load("configs/demo.py:tiny", [f"--config.{name}={value}" for name, value in settings.items()])
    return run_data.open_data(config, num_shards=DEVICES)[1]


def useful(flags) -> None:
    """Of the tokens that a device would compute, how many are text: padded, bucketed, packed."""
    batches = open_batches(flags)
    shares = {
        "padded to the caps": [],
        "padded to the longest": [],
        "bucketed by length (64 a bucket)": [],
    }
    for step in range(STEPS):
        _, pairs = batches.pairs_at(step)
        length = np.array(batches._lengths([pair for pair, _ in pairs]))
        total, caps = length.sum(), np.array([batches.c.query_length, batches.c.document_length])
        shares["padded to the caps"].append(total / (len(length) * caps.sum()))
        shares["padded to the longest"].append(total / (len(length) * length.max(0).sum()))
        buckets = [np.sort(side).reshape(-1, 64) for side in length.T]
        shares["bucketed by length (64 a bucket)"].append(total / sum((b.max(1) * 64).sum() for b in buckets))
    for rows in (4, 16):
        batches = open_batches(flags, rows=rows)
        shares[f"packed, {rows} rows a micro-batch"] = [
            batches.batch_at(step).counts["useful"] for step in range(STEPS)
        ]
        say(f"{rows} rows a micro-batch: M in {batches.sizes}")
    for name, values in shares.items():
        print(f"{name:34} {100 * np.mean(values):5.1f} % useful, least of {STEPS} steps {100 * min(values):.1f} %")


def speed(flags) -> None:
    """Tokens a second of SentencePiece alone, and of reading, tokenising and packing, in turns on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batches, rates = open_batches(flags), {"SentencePiece alone": [], "read, tokenise, pack": []}
    tokenizer = tokenizer_lib.read(flags.tokenizer)
    for step in range(STEPS):
        _, pairs = batches.pairs_at(step)
        texts = [text for pair, _ in pairs for text in (pair.query, pair.document)]
        begin = time.perf_counter()
        pieces = sum(map(len, tokenizer._model.encode(texts, num_threads=1)))
        rates["SentencePiece alone"].append(pieces / (time.perf_counter() - begin))
        begin = time.perf_counter()
        batch = batches.batch_at(step)
        tokens = int((batch.arrays["segments_MBL"] > 0).sum())
        rates["read, tokenise, pack"].append(tokens / (time.perf_counter() - begin))
    for name, values in rates.items():
        print(
            f"{name:22} {np.median(values) / 1e6:.2f} M tokens/s, of {STEPS} steps {min(values) / 1e6:.2f} to {max(values) / 1e6:.2f}"
        )


def linked(data: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """A data set of HUNDRED_MILLION pairs or more: the shards of `data`, hard-linked again and again."""
    manifest = prepared.read_manifest(data)
    once = sum(shard["records"] for shard in manifest["shards"])
    shards, copies = [], -(-HUNDRED_MILLION // once)
    for copy in range(copies):
        for shard in manifest["shards"]:
            name = f"{copy:05d}-{shard['file']}"
            os.link(data / shard["file"], root / name)
            shards.append(shard | {"file": name})
    languages = [[lang, count] for source in manifest["sources"] for lang, count in source["languages"]] * copies
    whole = {"name": "many", "languages": [["", sum(count for _, count in languages)]]}
    prepared.write_manifest(root, manifest | {"shards": shards, "sources": [whole]})
    return root


def start(flags) -> None:
    """Open the data, and make the batch of step 1,000,000."""
    before, begin = resident(), time.perf_counter()
    batches = open_batches(flags, steps=1_000_001)
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    batches.pairs_at(1_000_000)
    print(
        f"{sum(batches.mixture.sizes):,} pairs in {len(batches.sources[0].pairs.shards.shards)} shards: open in {opened:.1f} s (a "
        f"schedule of a million steps in it), the pairs of step 1,000,000 in {time.perf_counter() - begin:.2f} s; "
        f"{(resident() - before) / 1e6:,.0f} MB more in memory, {resident() / 1e6:,.0f} MB in all"
    )


def latency(flags) -> None:
    """The time to read the pairs of a step, and of one host's share of it."""
    batches = open_batches(flags)
    batches.pairs_at(0)
    begin = time.perf_counter()
    batches.pairs_at(1)
    seconds = time.perf_counter() - begin
    print(f"{'20 ms a read' if 'LD_PRELOAD' in os.environ else 'page cache'}: {BATCH:,} pairs read in {seconds:.2f} s")


def child(part: str, data: pathlib.Path, tokenizer: str, **environment: str) -> str:
    command = [
        sys.executable,
        "-m",
        "tests.bench.data",
        f"--data={data}",
        f"--tokenizer={tokenizer}",
        f"--part={part}",
    ]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
