"""How fast is it on one GPU? Kernels, the mixture, train steps and encoding, beside torch's best where torch is there.

    python -m tests.bench.gpu --output=runs/gpu/bench.md                     about six minutes, at most --seconds

The model is configs/nomic_v2/pretrain.py:paper at full size, in bfloat16, weights and ids random. MFU is the model's own FLOPs
(recomputation is not) a second over the chip's dense bfloat16 peak. Each part runs in a process of its own: one that fails or runs
out of time or memory is a line in the table, and the exit code is 1.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence

from moe_embed import config as config_lib
from moe_embed import hf_config, topology, verb

# FLOP/s, dense bfloat16, as the makers' data sheets have them.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
# name: (title, the most seconds it may take), in the order of what is wanted most
PARTS = {
    "kernels": ("Kernels of the grouped matmul (32,768 tokens, top 2 of 8 experts)", 75),
    "layer": ("The mixture, forwards and backwards (32,768 tokens)", 45),
    "train": ("Train step, full-length texts of 128 tokens in rows of 512", 180),
    "torch": ("torch at its best: SDPA, grouped_mm, torch.compile, bfloat16 throughout, no balance loss", 120),
    "encode": ("Encoding mixed lengths, from ids to vectors on the host", 90),
}
COLUMNS = {
    "ms": ("ms", "{:,.2f}"), "tflops": ("TFLOP/s", "{:,.1f}"), "mfu": ("MFU", "{:.1%}"),
    "tokens_per_second": ("useful tokens/s", "{:,.0f}"), "texts_per_second": ("texts/s", "{:,.0f}"),
    "gib": ("peak GiB", "{:.1f}"), "compile_seconds": ("compile s", "{:.0f}"), "fault": ("", "{}"),
}  # fmt: skip
GOALS = (  # of the project's issue 4: (what, ours, theirs, goal)
    ("train step, nothing recomputed: ours / torch, useful tokens/s", "train", "keep all", "torch", "keep all", 1.3),
    ("mixture: ours / torch, TFLOP/s", "layer", "mixture", "torch", "torch: mixture", 1.15),
    ("mixture / dense MLP of as many FLOPs, TFLOP/s", "layer", "mixture", "layer", "dense", 0.9),
    ("encode: ours / torch sorted and padded, useful tokens/s", "encode", "encode", "torch", "torch: encode", 1.0),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="write the tables to this file, as markdown, too")
    parser.add_argument("--seconds", type=float, default=360, help="no part begins, or goes on, after so many")
    parser.add_argument("--part", choices=PARTS, help="one part alone, as JSON on the last line")
    parser.add_argument("--peak", type=float, help="FLOP/s of a chip that this file does not know")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    if arguments.part:
        print(json.dumps(run_part(arguments.part, deadline=deadline, peak=arguments.peak)))
        return 0
    if arguments.output:
        verb.check_output(arguments.output, "--output")
    name = gpu_name()
    peak = arguments.peak or next((flops for chip, flops in PEAKS.items() if chip in name), None)
    parts = {}
    for part, (_, limit) in PARTS.items():
        left = min(limit, deadline - time.monotonic())
        parts[part] = in_process(part, seconds=left, peak=peak) if left > 10 else fault("not run: out of time")
        print(
            f"{part}: {len(parts[part]['rows'])} rows, {deadline - time.monotonic():.0f} s left",
            file=sys.stderr,
            flush=True,
        )
    text = report(parts, gpu=name, peak=peak)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return int(any("fault" in row for part in parts.values() for row in part["rows"]))


def gpu_name() -> str:
    """The first GPU's name. UserError without one."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise config_lib.UserError("nvidia-smi finds no GPU here; run this on a machine with one.") from error
    return done.stdout.splitlines()[0].strip()


def fault(sentence: str) -> dict:
    """A part that gave nothing."""
    return {"versions": {}, "rows": [{"what": "this part", "fault": sentence}]}


def in_process(part: str, *, seconds: float, peak: float | None) -> dict:
    """`--part` in a process of its own, so that what it breaks or fills is its own."""
    command = [sys.executable, "-m", "tests.bench.gpu", f"--part={part}", f"--seconds={seconds - 5}"]
    command += [f"--peak={peak}"] if peak else []
    # A process of one part may fill the GPU; and the last line of a traceback is to be the error.
    environment = os.environ | {"XLA_CLIENT_MEM_FRACTION": str(topology.GPU_SHARE), "JAX_TRACEBACK_FILTERING": "off"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return fault(f"stopped after {seconds:.0f} s")
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return fault(f"exit code {done.returncode}: {lines[-1][:200] if lines else 'no word'}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(part: str, *, deadline: float, peak: float | None, sizes=None) -> dict:
    """One part here and now: {"versions", "rows"}. `sizes` (gpu_parts.Sizes) are the full ones unless given."""
    if part == "torch":
        return torch_part(sizes=sizes, deadline=deadline)
    import jax

    from tests.bench import gpu_parts

    if sizes is None:
        check_jax_has_a_gpu()
        sizes = gpu_parts.FULL
    gpu_parts.grouped_matmul_is_right()
    rows = {
        "kernels": lambda: gpu_parts.kernel_rows(sizes),
        "layer": lambda: gpu_parts.layer_rows(sizes),
        "train": lambda: gpu_parts.train_rows(sizes, deadline=deadline, peak=peak),
        "encode": lambda: gpu_parts.encode_rows(sizes, peak=peak),
    }[part]()
    device = jax.devices()[0]
    return {"versions": {"jax": jax.__version__, "device": f"{device.device_kind} ({device.platform})"}, "rows": rows}


def check_jax_has_a_gpu() -> None:
    """UserError where the machine has a GPU and jax cannot use it."""
    import jax

    try:
        jax.devices("gpu")
    except (RuntimeError, AssertionError) as error:  # jax's words for a platform that is absent or does not start
        version = jax.__version__
        raise config_lib.UserError(
            f"jax {version} sees no GPU; it needs its CUDA plugin, and JAX_PLATFORMS=cuda."
        ) from error


def torch_part(*, sizes, deadline: float) -> dict:
    """torch's rows, as far as time goes; a line that says so where torch is not installed or sees no GPU."""
    try:
        import torch

        from tests.bench import gpu_torch
    except ImportError as error:
        absent = (
            "torch not installed"
            if error.name == "torch"
            else f"{error.name} not installed, which the torch file needs"
        )
        return fault(absent)
    from tests.bench import gpu_parts

    toy, sizes = sizes is not None, gpu_parts.FULL if sizes is None else sizes
    if not toy and not torch.cuda.is_available():
        return fault("torch sees no GPU")
    device = "cpu" if toy else "cuda"
    c = gpu_parts.configuration(sizes)
    hf = hf_config.hf_config(c.encoder, dataclasses.replace(c.moe))
    kept = next(pairs for pairs, _, recompute in sizes.steps if not recompute)
    flops = gpu_parts.flops_per_token(c.encoder, c.moe, length=sizes.text_length)
    lengths = [min(int(n), c.encoder.max_seq_length) for n in gpu_parts.text_lengths(sizes.encode_texts)]
    common = {"device": device, "repeats": sizes.repeats}
    rows = []
    for make in (
        lambda: gpu_torch.layer_row(hf, tokens=sizes.layer_tokens, compiled=not toy, calls=sizes.calls, **common),
        lambda: gpu_torch.train_row(
            hf, pairs=kept, length=sizes.text_length, flops_per_token=flops, compiled=not toy, **common
        ),
        lambda: gpu_torch.encode_row(hf, lengths=lengths, batch_tokens=65_536, **common),
    ):
        if time.monotonic() < deadline:
            rows.append(make())
    return {"versions": {"torch": torch.__version__}, "rows": rows}


def report(parts: dict[str, dict], *, gpu: str, peak: float | None) -> str:
    """The tables as markdown, with the date, the hardware, the versions, and the ratios that have a goal."""
    versions = {name: value for part in parts.values() for name, value in part["versions"].items()}
    versions = {"python": platform.python_version(), **versions}
    lines = [
        f"# One GPU, {datetime.date.today()}",
        "",
        f"{gpu}; " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
        f"Peak: {peak / 1e12:,.0f} TFLOP/s dense bfloat16."
        if peak
        else "Peak of this chip unknown: no MFU (give --peak).",
        "Medians; weights and ids random; the model is configs/nomic_v2/pretrain.py:paper unless a row says otherwise.",
    ]
    for part, (title, _) in PARTS.items():
        rows = parts[part]["rows"]
        columns = [name for name in COLUMNS if any(name in row for row in rows)]
        lines += ["", f"## {title}", "", "| |" + "".join(f" {COLUMNS[name][0]} |" for name in columns)]
        lines.append("|---|" + "---:|" * len(columns))
        for row in rows:
            cells = (COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns)
            lines.append(f"| {row['what']} |" + "".join(f" {cell} |" for cell in cells))
    lines += ["", "## Ratios", "", "| | measured | goal |", "|---|---:|---:|"]
    for what, *sides, goal in GOALS:
        ours, theirs = (best(parts[part]["rows"], name) for part, name in (sides[:2], sides[2:]))
        lines.append(f"| {what} | {f'{ours / theirs:.2f}' if ours and theirs else 'not measured'} | {goal} |")
    return "\n".join(lines)


def best(rows: list[dict], name: str) -> float | None:
    """The highest rate of the rows whose name holds `name`: useful tokens a second, or else FLOPs."""
    rates = [row["tokens_per_second"] if "tokens_per_second" in row else row["tflops"]
             for row in rows if name in row["what"] and "fault" not in row]  # fmt: skip
    return max(rates, default=None)


if __name__ == "__main__":
    verb.run(main)
