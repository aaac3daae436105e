"""Was the mixture worth it? A dense model goes on as a mixture of experts, and as it is for the same time, on your own pairs.

    python -m moe_embed.worth --config=configs/finetune_pairs.py --config.data.sources=pairs.csv --init_from=DENSE --workdir=W

DENSE (a Hugging Face folder or a workdir) is upcycled to W/start as config.moe says (`upcycle`, preset ours) and finetuned in
W/mixture; DENSE itself is finetuned in W/dense, on the same pairs, with as many more steps as its steps are faster. How much
faster is measured before, in turns of PROBE steps on the same batches. Schedule and warm-up stretch with the steps. The end is a
table, with the seconds that both really took, and a verdict over the queries that both kept out (config.data.held_out).

Run again, it continues where it stopped. Each part is a `train` or `upcycle` of its own; W/mixture and W/dense are their
workdirs: evaluate, export, embed them.
"""

import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from moe_embed import (
    bucket,
    held_out,
    hf_config,
    hf_folder,
    hf_layout,
    metrics,
    preemption,
    run_data,
    significance,
    stored,
    verb,
)
from moe_embed import config as config_lib
from moe_embed.config import Config, Moe, UserError
from moe_embed.load import DESCRIPTION, no_model, read_description

FILE = "worth.json"  # in the workdir: {"asked", "init_from", "seconds": {"mixture": [...], "dense": [...]} a step}
PARTS = ("mixture", "dense")
PROBE, TURNS = 5, 2  # steps of a turn, and turns of each; the first step of a turn is not counted
SMALLEST = 0.05  # share by which the two times may differ before it is said


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("worth", __doc__, overrides=True)
    parser.add_argument("--config", required=True, help="a config file of `train` with data.held_out above 0")
    parser.add_argument("--init_from", required=True, help="a dense model: a Hugging Face folder or a workdir")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="made if absent, continued if not")
    arguments, overrides = parser.parse_known_args(argv)
    if str(arguments.workdir).startswith("gs:"):
        raise UserError("worth compares its runs in a folder here; give it a --workdir that is one.")
    config = config_lib.load(arguments.config, overrides)
    check(config, arguments.init_from)
    config = decided(config)
    workdir, moe = arguments.workdir, config.moe
    begin(workdir, config, arguments.init_from)
    start = {"mixture": str(workdir / "start"), "dense": arguments.init_from}
    if not (workdir / "start" / DESCRIPTION).is_file():  # it is renamed into its place when it is whole
        shape = (f"--num_experts={moe.num_experts}", f"--top_k={moe.top_k}", f"--every={moe.every}")
        part("upcycle", f"--model={arguments.init_from}", f"--output={start['mixture']}", *shape)

    # Which experts there are is the models' to say from here on: config.moe was for upcycle.
    common = [f"--config={arguments.config}", *(o for o in overrides if not o.startswith("--config.moe."))]
    common.append(f"--config.data.batch_size={config.data.batch_size}")
    probe(workdir, common, start)
    ratio = ratio_of(read(workdir)["seconds"])
    steps = {"mixture": config.run.steps, "dense": max(round(config.run.steps * ratio), 1)}
    print(
        f"a step of the mixture takes {ratio:.2f} times as long: {steps['mixture']} steps, and {steps['dense']} dense."
    )
    for name in PARTS:
        warm_up = round(config.optim.warmup_steps * steps[name] / config.run.steps)
        length = (f"--config.run.steps={steps[name]}", f"--config.optim.warmup_steps={warm_up}")
        part("train", *common, *length, f"--init_from={start[name]}", f"--workdir={workdir / name}")
    print(conclude(workdir))


def decided(config: Config) -> Config:
    """`config` with the batch size, the steps and the warm-up that `train` will choose from its pairs. UserError as there."""
    read = [source for some in run_data.read_sources(config) for source in some]
    kept, _ = held_out.split(read, share=config.data.held_out, say=lambda sentence: None)  # train says it
    return held_out.fit(config, num_pairs=sum(map(len, kept)), num_shards=num_devices(config))


def num_devices(config: Config) -> int:
    """Of the mesh that `train` will have. A process of its own looks: this one leaves the devices to the parts."""
    if config.mesh.data != -1:
        return config.mesh.data * config.mesh.expert
    look = "import jax; from moe_embed import verb; verb.run(lambda argv: print(jax.device_count()))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the devices cannot be counted: {done.stderr.strip().rpartition(chr(10))[2]}")
    return int(done.stdout)


def check(config: Config, init_from: str) -> None:
    """UserError unless `config` has experts and keeps pairs out, and `init_from` is a dense model."""
    if not config.data.held_out:
        raise UserError("config.data.held_out=0 keeps nothing out to compare with; give --config.data.held_out=0.1.")
    if not config.moe.num_experts:
        raise UserError("config.moe.num_experts=0 leaves no mixture to compare; give --config.moe.num_experts=8.")
    moe = moe_of(bucket.path_of(init_from))
    if moe.num_experts:
        raise UserError(
            f"--init_from={init_from} is a mixture of {moe.num_experts} experts already; give the dense model that it came "
            "from, or another: it is finetuned as it is, and upcycled."
        )


def moe_of(root: pathlib.Path) -> Moe:
    """What experts the model at `root` has, from its description alone. UserError where there is no model."""
    if bucket.is_file(root / DESCRIPTION):
        return read_description(root).moe
    if bucket.is_file(root / "config.json"):
        return hf_config.read_hf_config(hf_folder.read_json(root / "config.json"))[1]
    raise UserError(f"--init_from={no_model(root)}")


def begin(workdir: pathlib.Path, config: Config, init_from: str) -> None:
    """Make or recognise the workdir. UserError if it cannot be made, is something else, or was begun otherwise."""
    asked = {"asked": json.loads(json.dumps(config_lib.to_dict(config))), "init_from": init_from}
    if (workdir / FILE).is_file():
        before = {name: read(workdir)[name] for name in asked}
        if before != asked:
            old, new = before["asked"], asked["asked"]
            changed = [
                f"config.{s}.{k}" for s in new for k in new[s] if s not in old or (k, new[s][k]) not in old[s].items()
            ]
            changed += ["--init_from"] if before["init_from"] != init_from else []
            raise UserError(
                f"{workdir} was begun with another {', '.join(changed)}; say it as before, or name another --workdir."
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if any(workdir.iterdir()):
            raise UserError(f"--workdir={workdir} holds something else, and no {FILE}; name another.")
        write(workdir, asked | {"seconds": {}})
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error


def probe(workdir: pathlib.Path, common: Sequence[str], start: dict[str, str]) -> None:
    """Time PROBE steps of both, TURNS times in turns, in runs that are thrown away, unless the workdir has their times.

    Nothing is kept out and no dev task looked at in these runs; both train on the same batches, of the run's size.
    """
    state = read(workdir)
    if state["seconds"]:
        return
    seconds, scratch = {name: [] for name in PARTS}, workdir / "probe"
    flags = (f"--config.run.steps={PROBE}", "--config.data.held_out=0", "--config.run.eval_every=0")
    for turn in range(TURNS):
        for name in PARTS if turn % 2 == 0 else PARTS[::-1]:
            shutil.rmtree(scratch, ignore_errors=True)  # of an earlier try too
            print(f"timing {PROBE} steps, {name} ...")
            part("train", *common, *flags, f"--init_from={start[name]}", f"--workdir={scratch}")
            seconds[name] += [row["seconds"] for row in metrics.read(scratch / "metrics.jsonl")[1:]]
    shutil.rmtree(scratch)
    write(workdir, state | {"seconds": seconds})


def ratio_of(seconds: dict[str, Sequence[float]]) -> float:
    """How many times as long a step of the mixture takes: the median over steps on the same batch."""
    return statistics.median(m / d for m, d in zip(seconds["mixture"], seconds["dense"], strict=True))


def conclude(workdir: pathlib.Path) -> str:
    """The table, the verdict, and what must be known with it. UserError if a run has not measured its held-out queries."""
    figures, lines = {}, [f"{'':8}{'steps':>8}{'seconds':>10}{'parameters':>15}{'active':>15}{'before':>9}{'after':>8}"]
    for name in PARTS:
        root = workdir / name
        config, rows = read_description(root).config, metrics.read(root / "metrics.jsonl")
        measured = held_out.read(root)
        if measured is None or measured.after is None:
            raise UserError(f"{root} has not measured its held-out queries to the end; remove {root} and run again.")
        total, active = hf_layout.num_parameters(config.encoder, config.moe)
        took, before, after = (
            sum(row["seconds"] for row in rows),
            *(100 * np.mean(list(ndcg.values())) for ndcg in (measured.before, measured.after)),
        )
        lines.append(f"{name:8}{len(rows):8,}{took:10,.0f}{total:15,}{active:15,}{before:9.1f}{after:8.1f}")
        figures[name] = measured.after, took
    (mixture, long), (dense, short) = (figures[name] for name in PARTS)
    if mixture.keys() != dense.keys():
        raise UserError(f"{workdir}: the two runs kept other queries out; remove {workdir} and run again.")
    lines.append(
        "(nDCG@10 in % on the held-out queries; seconds in train steps, without compiling, measuring and saving)"
    )
    if abs(short / long - 1) > SMALLEST:
        lines.append(
            f"the dense model trained {abs(short / long - 1):.0%} {'longer' if short > long else 'less'} than the mixture: "
            "this machine's speed changed between the runs, and the comparison is off by that much time."
        )
    differences = np.array([mixture[query] - dense[query] for query in mixture])
    doubt = held_out.doubt(
        steps=config.run.steps, warmup_steps=config.optim.warmup_steps
    )  # PARTS ends with the dense one
    names = ("the mixture", "the dense model given the same time")
    return "\n".join([*lines, significance.verdict([differences], names=names, doubt=doubt)])


def part(name: str, *arguments: str) -> None:
    """Run a verb as a process of its own: it has the device, and its memory, to itself. UserError where it fails.

    SIGTERM goes to it: `train` saves, and this process ends with its status (preemption.STATUS), or with 143.
    """
    sys.stdout.flush()
    told, children = [], []

    def pass_on(*_) -> None:
        told.append(True)
        for child in children:
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with subprocess.Popen([sys.executable, "-m", f"moe_embed.{name}", *arguments]) as child:
            children.append(child)
            if told:  # before there was a child
                child.terminate()
            code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if told or code == preemption.STATUS:
        sys.exit(code if code == preemption.STATUS else 128 + signal.SIGTERM)
    if code:
        raise UserError(f"this part ended with exit code {code}, its reason is above: {name} {' '.join(arguments)}")


def read(workdir: pathlib.Path) -> dict:
    """What is known so far. UserError if the file is damaged."""
    try:
        state = stored.read_json(workdir / FILE)
        return {name: state[name] for name in ("asked", "init_from", "seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / FILE} cannot be read ({error!r}); remove {workdir} and begin again.") from error


def write(workdir: pathlib.Path, state: dict) -> None:
    """Remember it, whole or not at all."""
    stored.write_json(workdir / FILE, state)


if __name__ == "__main__":
    verb.run(main)
