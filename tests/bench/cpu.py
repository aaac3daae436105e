"""Us beside torch on this CPU: the same weights, token ids and loss, in turns, medians. Prints a dated table of ratios.

    python -m tests.bench.cpu --output=bench.md        about ten minutes on two quiet cores
    python -m tests.bench.cpu --quick                  a toy, under a minute: does it run
    python -m tests.bench.cpu --only=encode --texts=2000

Four layers of the full model (dim 768, 8 experts, top-2, every second layer a mixture), random weights written by our own
exporter. Peers: (a) a loop over the experts in torch, as the released code has one; (b) the torch file that our exports
carry. Numbers are compared before anything is timed. Peers get token ids; our encode is timed from texts.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_embed import config as config_lib
from moe_embed import program, sharding, verb
from moe_embed.load import load
from tests.bench import ratios, workloads
from tests.bench.ratios import Row, say
from tests.bench.workloads import Size

COSINE, LOSS = 0.9999, 1e-4  # what counts as the same: of a text's two vectors; relative, of the first loss


class Peers(NamedTuple):
    """The torch models by the letter that the table has for them, on the same weights."""

    a: object  # (a) torch_peers.with_expert_loop
    b: object  # (b) the exported file


def encoding(folder: pathlib.Path, peers: Peers, size: Size) -> tuple[list[Row], list[str]]:
    """Texts a second, and one text at a time."""
    from sentence_transformers import SentenceTransformer

    from tests.bench import torch_peers

    model, texts = load(folder), workloads.mixed_texts(size.texts)
    ids = model.tokenizer.encode(texts, max_length=size.encoder.max_seq_length)[0]
    sentence = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    found = {}
    sides = {
        "ours": lambda: found.update(ours=model.encode(texts)),
        "(b) torch file": lambda: found.update(b=torch_peers.encode(peers.b, ids, batch=32)),
        "(a) expert loop": lambda: found.update(a=torch_peers.encode(peers.a, ids, batch=32)),
        "(b) in sentence-transformers": lambda: found.update(s=sentence.encode(texts, batch_size=32)),
    }
    for side in sides.values():
        side()
    for name, vectors in found.items():
        cosine_N = (vectors * found["ours"]).sum(1)
        say(f"encode: cosine of ours and {name}: least {cosine_N.min():.7f}")
        if (
            cosine_N >= COSINE
        ).mean() < 0.99:  # a near tie of the router's, or of the tokenizers', may part a text or two
            raise SystemExit(f"{name} has other vectors: cosines {np.sort(cosine_N)[:5]}")
    say(f"encode: {size.texts} texts of {np.mean([len(text) for text in ids]):.1f} tokens, {size.rounds} rounds")
    seconds = ratios.interleaved(sides, rounds=size.rounds)
    rate = {name: size.texts / float(np.median(times)) for name, times in seconds.items()}
    bars = {"(b) torch file": "at least 1.2x", "(a) expert loop": "goal 3x"}
    rows = [Row(f"encode, {size.texts:,} texts, batch 32", name, rate[name], rate["ours"], "texts/s",
                ratios.ratio(seconds[name], seconds["ours"]), bars[name] if name in bars else "")
            for name in sides if name != "ours"]  # fmt: skip

    of_one = lambda f, places: lambda: f(slice(i := next(places), i + 1))  # noqa: E731
    one = {
        name: of_one(f, itertools.cycle(range(size.single)))
        for name, f in {
            "ours": lambda some: model.encode(texts[some]),
            "(b) torch file": lambda some: torch_peers.encode(peers.b, ids[some], batch=1),
            "(a) expert loop": lambda some: torch_peers.encode(peers.a, ids[some], batch=1),
        }.items()
    }
    say(f"encode: {size.single} texts one by one")
    ratios.interleaved(one, rounds=size.single)  # every shape once
    seconds = ratios.interleaved(one, rounds=2 * size.single)
    p50 = {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
    for name, bar in (("(b) torch file", "at least 1x (no slower)"), ("(a) expert loop", "")):
        ratio = ratios.ratio(seconds[name], seconds["ours"])
        rows.append(Row("encode, one text, median", name, p50[name], p50["ours"], "ms", ratio, bar))
    return rows, []


class Training:
    """Our program and the peers' steps from the same weights, on batches of one config."""

    def __init__(self, c: config_lib.Config, folder: pathlib.Path, peers: Peers):
        from tests.bench import torch_peers

        self.c, self.program = c, program.build(c, sharding.make_mesh(c.mesh, devices=jax.devices()[:1]))
        self.state = self.program.init(load(folder, mesh=self.program.mesh).params)
        steps = {name: torch_peers.train_step(torch_peers.copied(model), c) for name, model in peers._asdict().items()}
        self.steps = {"(b) torch file": steps["b"], "(a) expert loop": steps["a"]}

    def ours(self, arrays: dict) -> float:
        """One step on a packed batch; its loss before the update."""
        self.state, metrics = self.program.step(self.state, sharding.put_batch(arrays, mesh=self.program.mesh))
        return float(jax.block_until_ready(metrics)["loss"])

    def sides(self, batch: tuple[dict, list, list], *, chunk: int | None = None) -> dict:
        """What is timed: each side's step on this batch. With `chunk` also (b) in batches sorted by length."""
        arrays, queries, documents = batch
        sides = {"ours": lambda: self.ours(arrays)}
        sides |= {name: functools.partial(step, queries, documents) for name, step in self.steps.items()}
        if chunk:
            name = "(b) torch file"
            sides[f"{name}, sorted, {chunk} at once"] = lambda: self.steps[name](queries, documents, chunk=chunk)
        return sides

    def warm_up(self, batch: tuple[dict, list, list], *, compare: bool) -> None:
        """Compile. With `compare` (before any update) the losses before and after one update must be the same."""
        for when in ("before", "after") if compare else ("before",):
            losses = {name: side() for name, side in self.sides(batch).items() if compare or name == "ours"}
            if compare:
                say(f"loss {when} an update: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
            if max(losses.values()) - min(losses.values()) > LOSS * max(losses.values()):
                raise SystemExit(f"the losses differ: {losses}")


def full_length(folder: pathlib.Path, peers: Peers, size: Size) -> tuple[list[Row], list[str]]:
    """Training steps on texts of `length` tokens, all of them: nothing is padding on either side."""
    c = workloads.train_config(
        size, pairs=size.full_pairs, rows=2 * size.full_pairs, row_length=size.length, texts_per_row=1
    )
    batch, training = workloads.make_batch(c, workloads.long_pairs(size)), Training(c, folder, peers)
    training.warm_up(batch, compare=True)
    tokens = sum(map(len, batch[1] + batch[2]))
    say(f"training, full length: {tokens:,} tokens a step, {size.rounds} rounds")
    seconds = ratios.interleaved(training.sides(batch), rounds=size.rounds, in_a_row=2)
    rate = {name: tokens / float(np.median(times)) for name, times in seconds.items()}
    bars = {"(b) torch file": "at least 1x", "(a) expert loop": "goal 1.5x"}
    what = f"training, {size.full_pairs} pairs of {size.length} tokens each"
    return [Row(what, name, rate[name], rate["ours"], "tokens/s", ratios.ratio(seconds[name], seconds["ours"]), bar)
            for name, bar in bars.items()], []  # fmt: skip


def length_mix(folder: pathlib.Path, peers: Peers, size: Size) -> tuple[list[Row], list[str]]:
    """Training steps on the shipped pairs, a batch from each file, in the demo's shares: useful tokens a second."""
    (rows, length), chunk = size.mix_rows, 32
    c = workloads.train_config(size, pairs=size.mix_pairs, rows=rows, row_length=length, texts_per_row=64)
    training, weighted, useful, padded = Training(c, folder, peers), {}, 0.0, 0.0
    rounds = max(size.rounds - 1, 1)  # three batches a round
    for i, (name, share) in enumerate(workloads.SHIPPED.items()):
        batch = workloads.make_batch(c, workloads.distinct(workloads.shipped_pairs(name), size.mix_pairs))
        training.warm_up(batch, compare=i == 0)
        lengths = [list(map(len, texts)) for texts in batch[1:]]
        tokens, room = sum(map(sum, lengths)), sum(len(part) * max(part) for part in lengths)
        say(f"training, {name}: {tokens:,} useful tokens in {batch[0]['tokens_MBL'].size:,} packed, {room:,} padded")
        sides = training.sides(batch, chunk=chunk)
        for side, times in ratios.interleaved(sides, rounds=rounds, in_a_row=2).items():
            weighted[side] = weighted.get(side, 0) + share * np.array(times)
        useful, padded = useful + share * tokens, padded + share * room
    rate = {name: useful / float(np.median(times)) for name, times in weighted.items()}
    bars = {
        "(b) torch file": "at least 2x",
        "(a) expert loop": "goal 4x",
        f"(b) torch file, sorted, {chunk} at once": "",
    }
    what = f"training, shipped lengths, {size.mix_pairs} pairs, {useful / padded:.0%} useful when padded"
    return [Row(what, name, rate[name], rate["ours"], "useful tokens/s", ratios.ratio(weighted[name], weighted["ours"]), bar)
            for name, bar in bars.items()], []  # fmt: skip


def over_devices(folder: pathlib.Path, peers: Peers, size: Size) -> tuple[list[Row], list[str]]:
    """Notes: how far a text's vector depends on the number of devices."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "texts.json"
        path.write_text(json.dumps(workloads.mixed_texts(min(size.texts, 64))), encoding="utf-8")
        command = [sys.executable, "-m", "tests.bench.devices", str(folder), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"tests.bench.devices failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [], [f"Embeddings over virtual devices, {how}: " + "; ".join(
                f"{count} against 1: largest difference {of['difference']:.1e}, {of['identical']:.0%} of the texts bit for bit"
                for count, of in counts.items() if count != "1") + " (goal: bit for bit where the place is the same)."
            for how, counts in found.items()]  # fmt: skip


def loss_alone(folder: pathlib.Path, peers: Peers, size: Size) -> tuple[list[Row], list[str]]:
    """tests.bench.losses beside torch's plain loss."""
    from tests.bench import losses, torch_peers

    plain = functools.partial(torch_peers.infonce, temperature=config_lib.Loss().temperature)
    return losses.measure(size.losses, dim=size.encoder.dim, rounds=size.rounds, torch_loss=plain)


SECTIONS = {
    "encode": encoding, "full": full_length, "mix": length_mix, "loss": loss_alone, "devices": over_devices,
}  # fmt: skip


def run(size: Size, scratch: pathlib.Path, *, only: Sequence[str], facts: dict[str, str]) -> str:
    """The sections named in `only`; the table."""
    from tests.bench import torch_peers

    folder = scratch / "model"
    workloads.write_model(size, folder)
    say("the model is exported and reads back the same, in torch too")
    exported = torch_peers.open_model(folder, num_threads=ratios.threads())
    peers = Peers(torch_peers.with_expert_loop(exported), exported)
    rows, notes = [], []
    for name in only:
        say(name)
        found, said = SECTIONS[name](folder, peers, size)
        rows, notes = rows + found, notes + said
        for row in found:
            say(f"  {row.ratio:.2f}  {row.what}, {row.peer}")
    notes.append(
        "Ratios are medians over rounds of their time over ours, neighbours in time; above 1 we are ahead. Peers get "
        "token ids, our encode starts from texts. A training step is timed after one of the same side. (a) is a loop over the experts, (b) the torch file our exports carry. "
        "Memory is what the compiler plans."
    )
    return ratios.table(rows, facts=facts, notes=notes)


def main(argv: Sequence[str]) -> None:
    """The benchmark; UserError where torch is absent or --output cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at toy size: does it run, not how fast")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", help="turns of each side (3)")
    parser.add_argument("--texts", type=int, choices=range(2, 10_001), metavar="N", help="encoded in a round (256)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated: all of %(default)s")
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file for the table")
    arguments = parser.parse_args(argv)
    packages = ("jax", "jaxlib", "numpy", "torch", "transformers", "sentence-transformers")
    if not all(importlib.util.find_spec(name.replace("-", "_")) for name in packages):
        raise config_lib.UserError(f"the benchmark needs {', '.join(packages)}; install moe_embed[torch].")
    only = arguments.only.split(",")
    if not set(only) <= set(SECTIONS):
        raise config_lib.UserError(f"--only={arguments.only} names no section; there are {', '.join(SECTIONS)}.")
    if arguments.output is not None:
        verb.check_output(arguments.output, "--output")
    size = workloads.QUICK if arguments.quick else workloads.FULL
    given = {"rounds": arguments.rounds, "texts": arguments.texts}
    size = dataclasses.replace(size, **{name: value for name, value in given.items() if value is not None})
    os.environ["NPROC"] = str(ratios.threads())  # what XLA's CPU client starts, read when it is made
    facts = ratios.machine(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false"}
        text = run(size, pathlib.Path(scratch), only=only, facts=facts)
    print(f"\n{text}")
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    verb.run(main)
