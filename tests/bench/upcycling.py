"""Was the mixture worth it? A pretrained encoder goes on dense, and as a mixture of experts, on the pairs that ship here.

    python tests/bench/upcycling.py --model=multilingual-e5-small --output=runs/bench/upcycling --steps=400

The encoder is pruned to 49,152 pieces and upcycled (8 experts in every second layer, top-2). Both see the same batches in the
same order, in alternating slices; the dense one then goes on until its steps have taken the time of the mixture's. Prints
nDCG@10 in % on the shipped test pages with 95 % intervals of the differences, from a paired bootstrap over the queries of
each task.
"""

import argparse
import datetime
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from moe_embed import doctor, metrics, retrieval
from moe_embed.data.sources import read_task
from moe_embed.load import load

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "moe_embed" / "sample"
SLICES = 4
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a new folder")
    parser.add_argument("--steps", type=int, required=True, help="of the mixture, 64 pairs each")
    parser.add_argument("--learning_rate", default="1e-4")
    parser.add_argument("--query_prompt", default="query: ", help="the encoder's own; the default is E5's")
    parser.add_argument("--document_prompt", default="passage: ")
    arguments = parser.parse_args()
    out, steps = arguments.output, arguments.steps
    if not (out / "moe").exists():
        texts = "--prune_vocab=" + ",".join(map(str, sorted((SAMPLE / "pairs").glob("*.gz"))))
        prompts = (f"--query_prompt={arguments.query_prompt}", f"--document_prompt={arguments.document_prompt}")
        verb("import_hf", f"--model={arguments.model}", f"--output={out / 'base'}", texts, "--keep=49152", *prompts)
        verb("upcycle", f"--model={out / 'base'}", f"--output={out / 'moe'}")

    go = lambda name, start, until: train(out / name, out / start, until, arguments.learning_rate)  # noqa: E731
    for part in range(1, SLICES + 1):
        go("mixture", "moe", steps * part // SLICES)
        go("dense", "base", steps * part // SLICES)
    ratio = seconds(out / "mixture") / seconds(out / "dense")
    if not (out / "dense_equal_time").exists():
        shutil.copytree(out / "dense", out / "dense_equal_time")
    go("dense_equal_time", "base", round(steps * ratio))

    tasks = [read_task(folder) for folder in sorted((SAMPLE / "tasks").iterdir())]
    systems = {
        "before training": out / "base",
        f"dense, equal data ({steps} steps)": out / "dense",
        f"dense, equal time ({round(steps * ratio)} steps)": out / "dense_equal_time",
        f"mixture ({steps} steps)": out / "mixture",
    }
    figures = {name: ndcg(path, tasks) for name, path in systems.items()}
    print(f"\n{datetime.date.today()}, {doctor.multiply_rate(jnp.float32):,.0f} GFLOP/s float32")
    print(f"a step: mixture {seconds(out / 'mixture'):.2f} s, dense {seconds(out / 'dense'):.2f} s, ratio {ratio:.2f}")
    print(table(figures))


def verb(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"moe_embed.{name}", *arguments], check=True)


def train(workdir: pathlib.Path, start: pathlib.Path, until: int, learning_rate: str) -> None:
    """To step `until`, from where it is. The schedule is constant after the warm-up: a longer run begins as a shorter one."""
    sources = ",".join(str(SAMPLE / "pairs" / f"{name}.jsonl.gz") for name in ("crosslingual", "monolingual", "titles"))
    config = {
        "data.sources": sources, "data.weights": "0.5,0.3,0.2", "data.batch_size": 64, "data.num_negatives": 0,
        "data.by_language": False, "data.query_length": 32, "data.document_length": 128, "data.row_length": 128,
        "data.rows": 16, "data.texts_per_row": 16, "encoder.dtype": "float32", "loss.dims": "()", "optim.schedule": "constant",
        "optim.learning_rate": learning_rate, "optim.warmup_steps": 50, "run.steps": until, "run.eval_every": 0,
        "run.save_every": 100_000, "run.recompute": False,
    }  # fmt: skip
    flags = [f"--config.{field}={value}" for field, value in config.items()]
    preset = pathlib.Path(__file__).resolve().parents[2] / "configs" / "nomic_v2" / "finetune.py"
    verb("train", f"--config={preset}:ours", f"--init_from={start}", f"--workdir={workdir}", *flags)


def seconds(workdir: pathlib.Path) -> float:
    """The median time of a step."""
    return float(np.median([row["seconds"] for row in metrics.read(workdir / "metrics.jsonl")]))


def ndcg(model: pathlib.Path, tasks) -> dict[str, np.ndarray]:
    """nDCG@10 of each query, by task."""
    loaded = load(str(model))
    encode = lambda texts, name: loaded.encode(texts, loaded.prompt(name))  # noqa: E731
    return {
        task.name: retrieval.measure_queries(task, retrieval.run_of(task, query_ND, document_CD))["ndcg@10"]
        for task, query_ND, document_CD in retrieval.embed_tasks(encode, tasks)
    }


def table(figures: dict[str, dict[str, np.ndarray]]) -> str:
    """A row a system: the mean over tasks of each kind; for all but the last also the last's gain over it, with its interval."""
    ours = list(figures)[-1]
    cross_lingual = lambda name: name.startswith("xling-")  # noqa: E731
    kinds = {"cross-lingual": cross_lingual, "monolingual": lambda name: not cross_lingual(name)}
    width = max(map(len, figures))
    lines = [" " * width + "".join(f"  {kind:>13}  {'gain [95 %]':>20}" for kind in kinds)]
    for name in figures:
        cells = ""
        for chosen in kinds.values():
            tasks = [task for task in figures[name] if chosen(task)]
            mean = 100 * np.mean([figures[name][task].mean() for task in tasks])
            gain = "" if name == ours else interval([figures[ours][task] - figures[name][task] for task in tasks])
            cells += f"  {mean:13.1f}  {gain:>20}"
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines) + "\n(gain: of the mixture over the row, points of nDCG@10)"


def interval(differences: list[np.ndarray]) -> str:
    """Mean over tasks of the mean difference, and its 95 % interval: queries drawn again within each task."""
    rng = np.random.default_rng(0)
    draws = np.zeros(RESAMPLES)
    for difference in differences:
        draws += difference[rng.integers(len(difference), size=(RESAMPLES, len(difference)))].mean(axis=1)
    low, high = 100 * np.percentile(draws / len(differences), (2.5, 97.5))
    return f"{100 * np.mean([d.mean() for d in differences]):+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
