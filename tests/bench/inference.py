"""What a mixture costs in use, beside dense models: one query, many texts, memory. Each model in a process, all in turns.

    python -m tests.bench.inference --output=inference.md       twelve layers, 256 texts: 10 GB of memory
    python -m tests.bench.inference --layers=4 --texts=64         less of it
    python -m tests.bench.inference --quick                     toys, under a minute: does it run

The mixture has Nomic Embed v2's shape (475 M parameters, a token meets 305 M of them); the dense models have MLPs as wide as
it takes to have as many parameters as it is active with, and as it has in all; then its own parent, and the dense shape of
twice its depth that it is often held against. Weights are random: nothing is said of quality, and a trained router may send a
query's tokens to more experts than are counted here. float32, by Model.encode, from texts.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_embed import config as config_lib
from moe_embed import hf_layout, sharding, verb
from moe_embed.config import Encoder, Moe
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib
from tests.bench import ratios, workloads
from tests.bench.ratios import Row, say

MIXTURE, DENSE = workloads.MOE, Moe(num_experts=0)
FULL = Encoder(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=512)
LARGE = {"dim": 1024, "num_heads": 16, "ffn_dim": 4096}  # XLM-R large, but for its positions


class Size(NamedTuple):
    """How much is measured."""

    base: Encoder  # the mixture's, and its parent's
    large: Encoder
    texts: int  # encoded at once
    queries: int  # encoded one by one
    rounds: int


def size_of(*, quick: bool, layers: int, texts: int, rounds: int) -> Size:
    """What the flags ask for."""
    base = workloads.QUICK.encoder if quick else dataclasses.replace(FULL, num_layers=layers)
    large = dataclasses.replace(base, num_layers=2 * base.num_layers, **({} if quick else LARGE))
    return Size(base, large, 24, 3, 1) if quick else Size(base, large, texts, 24, rounds)


def models(size: Size) -> dict[str, tuple[Encoder, Moe]]:
    """What is measured, the mixture first."""
    base = size.base
    wide = lambda experts: dataclasses.replace(base, ffn_dim=dense_width(base, MIXTURE, experts))  # noqa: E731
    return {
        "the mixture": (base, MIXTURE),
        "dense, equal active": (wide(MIXTURE.top_k), DENSE),
        "dense, equal total": (wide(MIXTURE.num_experts), DENSE),
        "dense, the parent": (base, DENSE),
        "dense, twice as deep": (size.large, DENSE),
    }


def dense_width(encoder: Encoder, moe: Moe, experts: int) -> int:
    """The MLP width of a dense model with as many MLP parameters as one whose mixtures have `experts` experts."""
    return encoder.ffn_dim * (moe.every - 1 + experts) // moe.every


def serve(name: str, size: Size) -> None:
    """A worker: make the model, encode everything once, say what it holds; then encode what each line of stdin names."""
    c, moe = models(size)[name]
    tokenizer = tokenizer_lib.read(workloads.SAMPLE / "tokenizer.model")
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    texts, queries = workloads.mixed_texts(size.texts), questions(size)
    before = ratios.resident()
    params = jax.block_until_ready(encoder_lib.init(c, moe, key=jax.random.key(0)))
    model = Model(c, moe, params, tokenizer, workloads.PROMPTS, mesh, name)
    model.encode(texts)
    visited = []
    for query in queries:
        choices_RE = model.encode_with_sums([query])[1]
        visited.append(0.0 if choices_RE is None else float((choices_RE > 0).sum(1).mean()))
    held = {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "resident": ratios.resident() - before,
            "experts": statistics.mean(visited), "parameters": hf_layout.num_parameters(c, moe)}  # fmt: skip
    print(json.dumps(held), flush=True)
    for line in sys.stdin:
        what = line.split()
        model.encode(texts if what[0] == "texts" else [queries[int(what[1])]])
        print("done", flush=True)


def questions(size: Size) -> list[str]:
    """The queries that are encoded one by one, behind their prompt."""
    return workloads.mixed_texts(2 * size.queries)[::2]


class Worker:
    """A process with one model."""

    def __init__(self, name: str, flags: Sequence[str]):
        command = [sys.executable, "-m", "tests.bench.inference", *flags, f"--worker={name}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.held = json.loads(self._answer())

    def ask(self, what: str) -> None:
        """Have it encode, and wait."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("a worker has ended; its reason is above")
        return line

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def measure(size: Size, flags: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows and the notes; a worker gets this program's own flags."""
    workers: dict[str, Worker] = {}
    try:
        for name in models(size):
            workers[name] = Worker(name, flags)
            say(f"{name}: {workers[name].held}")
        ours, *peers = workers
        one = {name: [] for name in workers}
        for i in range(size.queries):
            sides = {name: lambda worker=worker: worker.ask(f"query {i}") for name, worker in workers.items()}  # noqa: B023
            for name, seconds in ratios.interleaved(sides, rounds=size.rounds).items():
                one[name] += seconds
        say(f"queries, ms: { {name: round(1e3 * statistics.median(seconds), 1) for name, seconds in one.items()} }")
        sides = {name: lambda worker=worker: worker.ask("texts") for name, worker in workers.items()}
        many = ratios.interleaved(sides, rounds=size.rounds)
        say(f"texts, s: { {name: round(statistics.median(seconds), 2) for name, seconds in many.items()} }")
    finally:
        for worker in workers.values():
            worker.close()
    count, held = size.texts, {name: worker.held for name, worker in workers.items()}
    label = {name: f"{name}, {held[name]['parameters'][0] / 1e6:,.0f} M" for name in workers}
    rows = []
    for name in peers:
        p50 = [1e3 * statistics.median(one[side]) for side in (name, ours)]
        rows.append(Row("one query, median", label[name], *p50, "ms", ratios.ratio(one[name], one[ours]), ""))
    for name in peers:
        rate = [count / statistics.median(many[side]) for side in (name, ours)]
        rows.append(
            Row(f"{count} mixed texts", label[name], *rate, "texts/s", ratios.ratio(many[name], many[ours]), "")
        )
    for what, key in (("parameters", "bytes"), ("resident: model, code, buffers", "resident")):
        for name in peers:
            mib = [held[side][key] / 2**20 for side in (name, ours)]
            rows.append(Row(what, label[name], *mib, "MiB", mib[0] / mib[1], ""))
    total, active = held[ours]["parameters"]
    experts, chosen = MIXTURE.num_experts, MIXTURE.top_k
    return rows, [
        f"Ours is the mixture: {total:,} parameters, {active:,} active, random weights, float32. Ratios above 1: it is cheaper.",
        f"One query meets {held[ours]['experts']:.1f} of {experts} experts of a layer on average, though each of its tokens meets {chosen}.",
        f"{size.base.num_layers} layers of {size.base.dim}; {size.queries} queries, {size.rounds} rounds; each model is a process of its own, and they take turns.",
    ]  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """The benchmark; UserError where /proc is missing or --output cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="at toy size: does it run, not how fast")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", default=3, help="turns of each (3)")
    parser.add_argument("--layers", type=int, choices=range(2, 13, 2), default=12, help="of the full width (12)")
    parser.add_argument("--texts", type=int, choices=range(2, 1025), metavar="N", default=256, help="at once (256)")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file for the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = size_of(quick=arguments.quick, layers=arguments.layers, texts=arguments.texts, rounds=arguments.rounds)
    if arguments.worker:
        serve(arguments.worker, size)
        return
    if not os.path.exists("/proc/self/statm"):
        raise config_lib.UserError("resident memory is read from /proc, which this system has not; run it on Linux.")
    if arguments.output is not None:
        verb.check_output(arguments.output, "--output")
    os.environ["NPROC"] = str(ratios.threads())  # what XLA's CPU client starts, read when it is made
    facts = ratios.machine(f"jax {jax.__version__}, numpy {np.__version__}")
    rows, notes = measure(size, argv)
    text = ratios.table(rows, facts=facts, notes=notes)
    print(f"\n{text}")
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    verb.run(main)
