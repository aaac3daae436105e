"""Train an encoder; run the same command again to continue.

    python -m moe_embed.train --config=configs/demo.py --workdir=runs/demo
    python -m moe_embed.train --config=configs/demo.py:tiny --workdir=runs/tiny --config.optim.learning_rate=1e-3
    python -m moe_embed.train --config=configs/nomic_v2/finetune.py:tiny --init_from=MODEL --workdir=runs/finetuned

The workdir describes itself: workdir.json (config, prompts, versions), tokenizer.model, metrics.jsonl, evaluations.jsonl,
events.jsonl (when it began, resumed and saved), checkpoints/<step>, skipped.jsonl (steps that were not finite).
It is a folder, or gs://BUCKET/PATH with the gcs extra: there metrics.jsonl is put as a whole every half minute and before every save.
MLM, pretraining and finetuning are this one loop with another config.

Exit status: 0 done; 2 a fault of the user's; 75 preempted (SIGTERM: it has saved) and 76 another process is gone or stuck, or
this one (config.run.watchdog): run the same command again.
"""

import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import jax
import numpy as np

from moe_embed import (
    agreement,
    beginning,
    bucket,
    checkpoint,
    cluster,
    fields,
    health,
    held_out,
    metrics,
    optim,
    preemption,
    program,
    retrieval,
    run_data,
    same_run,
    saving,
    sharding,
    trackers,
    verb,
    watchdog,
)
from moe_embed import config as config_lib
from moe_embed.config import Config, UserError
from moe_embed.data import batches as batches_lib
from moe_embed.data import loading
from moe_embed.data import sources as sources_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import (
    DESCRIPTION,
    Model,
    find_tokenizer,
    load,
    prompts_of,
    read_description,
    write_description,
)
from moe_embed.model import capability

WARM_UP = 2  # steps before a trace: they compile


def main(argv: Sequence[str]) -> int:
    parser = verb.Parser("train", __doc__, overrides=True)
    parser.add_argument("--config", required=True, help="a config file, as in configs/demo.py or configs/demo.py:tiny")
    parser.add_argument(
        "--workdir",
        required=True,
        type=same_run.workdir_of,
        help="a folder or gs://BUCKET/PATH; made if absent, continued if not",
    )
    parser.add_argument("--init_from", help="start from this model: its parameters, shape, tokenizer and prompts")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N steps to WORKDIR/profile, for xprof"
    )
    parser.add_argument(
        "--strict_restore",
        action="store_true",
        help="end where the newest checkpoint does not verify, instead of going back",
    )
    parser.add_argument(
        "--allow_data_change",
        default="",
        help="continue although these changed, commas between: files, tokenizer, seed, batch_size, weights, by_language, smoothing",
    )
    cluster.add_flags(parser)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.profile < 0:
        raise UserError(f"--profile={arguments.profile} must be a number of steps.")
    if arguments.profile and bucket.is_remote(arguments.workdir):
        raise UserError("--profile writes a trace beside the run; give it a --workdir that is a folder.")
    preemption.nothing_to_save()
    cluster.start(
        coordinator=arguments.coordinator, num_processes=arguments.num_processes, process_id=arguments.process_id
    )
    explicit = {override.partition("=")[0].removeprefix("--config.") for override in overrides}
    config = config_lib.load(arguments.config, overrides)
    return train(
        config,
        workdir=arguments.workdir,
        init_from=arguments.init_from,
        explicit=explicit,
        profile=arguments.profile,
        strict_restore=arguments.strict_restore,
        allow_data_change=[name for name in arguments.allow_data_change.split(",") if name],
    )


def train(
    config: Config,
    *,
    workdir: pathlib.Path,
    init_from: str | None = None,
    explicit: Collection[str] = (),
    profile: int = 0,
    strict_restore: bool = False,
    allow_data_change: Collection[str] = (),
) -> int:
    """Run `config` to its last step in `workdir`, from the newest verified checkpoint if there is one.

    Returns the exit status: 0, or preemption.STATUS where it was told to stop and has saved.

    A run that begins takes parameters, shape, tokenizer and prompts from the model at `init_from`, if one is named;
    `explicit` are the names ("encoder.dim") that the user set and that must then agree. A run that continues has its own.
    `profile` steps, after the first WARM_UP, are traced for xprof.
    Of several processes (cluster.start) all call this; process 0 alone writes, but for the checkpoints' arrays.
    """
    trackers.check(config.run.log_to, workdir)
    agreement.check(config, others={"--workdir": str(workdir), "--init_from": init_from})
    mesh = sharding.make_mesh(config.mesh)
    cluster.choose_cache(mesh.devices.flat[0].platform)
    cluster.on_first(lambda: same_run.check_kind(workdir))
    checkpoints = workdir / "checkpoints"
    first = checkpoint.newest_verified(checkpoints, say=print, strict=strict_restore)
    prompts, base, tokenizer = prompts_of(config), None, None
    described = read_description(workdir) if bucket.is_file(workdir / DESCRIPTION) else None
    init_from = same_run.same_beginning(described, init_from, workdir, begun=first is not None)
    if first is not None and described and described.config:
        config = held_out.as_begun(config, described.config)
    files = run_data.read_files(config, with_tokenizer=not init_from)  # a fault in them is said before weights are read
    if init_from:
        if first is None:
            base = load(init_from, mesh=mesh)
        origin, tokenizer = (init_from, base.tokenizer) if base else (str(workdir), find_tokenizer(workdir))
        config, prompts = beginning.inherit(config, base or described, origin=origin, explicit=explicit)
        if (
            "data.tokenizer" in explicit
            and tokenizer_lib.read(config.data.tokenizer).model_bytes != tokenizer.model_bytes
        ):
            raise UserError(
                f"--config.data.tokenizer={config.data.tokenizer} is not the tokenizer of {origin}; leave it out."
            )
    agree = lambda step, rows: cluster.largest(rows, turn=step)  # noqa: E731
    config, batches, tokenizer, tasks, held = run_data.open_data(
        config, num_shards=mesh.size, files=files, tokenizer=tokenizer, own=sharding.own_parts(mesh), agree=agree
    )
    agreement.check_data(config, batches.fingerprint)
    prog = program.build(config, mesh, num_ids=tokenizer.num_ids)
    say_what_will_run(config, prog, batches, held)
    cluster.on_first(lambda: same_run.check_workdir(config, workdir, allow=allow_data_change))

    if first is None:
        cluster.on_first(lambda: same_run.say_if_begun(workdir))
        state, first = prog.init(beginning.parameters_of(base, prog, batches)), 0
        del base  # its parameters are the state's now
    else:
        same_run.check_fingerprint(
            checkpoint.facts(checkpoints, first), batches.fingerprint, workdir, allow=allow_data_change
        )
        finished = first >= config.run.steps
        verdict = cluster.on_first(lambda: held_out.concluded(workdir, steps=first)) if held else ""
        if finished and (not held or verdict):
            print(f"{workdir} is finished: step {first} of {config.run.steps}, verified. Nothing to do.")
            if verdict:
                print(verdict)
            return 0
        more = "; what it learned is still to be measured" if finished else ""
        print(f"continuing {workdir} from step {first} of {config.run.steps}{more}.")
        state = checkpoint.restore(checkpoints, first, abstract_state=prog.abstract_state)
    started = time.perf_counter()
    writes_to = workdir if cluster.is_first() else None
    with (
        same_run.alone(writes_to),
        trackers.opened(
            config.run.log_to if writes_to else (), workdir, config=config_lib.to_dict(config), first_step=first
        ) as also,
        metrics.Writer(writes_to, first_step=first, last_step=config.run.steps, also=also) as writer,
        saving.Saver(checkpoints, facts=batches.fingerprint, keep=config.run.keep, say=writer.say) as saver,
        preemption.heard(first) as told_to_stop,
        watchdog.Watchdog(config.run.watchdog, done=first) as watching,
    ):
        if first < config.run.steps:  # the saver has removed what earlier saves left unfinished
            cluster.on_first(lambda: same_run.check_space(workdir, checkpoint.num_bytes(prog.abstract_state)))
        looking = health.Health(writes_to, first_step=first, max_skips=config.run.max_skips)
        cluster.on_first(lambda: write_description(workdir, config, tokenizer, prompts=prompts, init_from=init_from))
        cluster.on_first(lambda: run_data.keep_cards(config, workdir))
        agreement.check_shared(workdir / DESCRIPTION)
        writer.event(first, "resume" if first else "begin")
        measure = lambda: evaluate(model_of(prog, state, tokenizer, prompts), tasks)  # noqa: E731

        def search() -> dict[str, float]:
            writer.say(f"held out: encoding {fields.count(len(held.corpus), 'document')} and the queries ...")
            return per_query(model_of(prog, state, tokenizer, prompts), held)

        if held and first == 0:
            at_first = search()
            writer.say(f"held out: nDCG@10 {100 * np.mean(list(at_first.values())):.1f} before training.")
            cluster.on_first(lambda: held_out.remember(workdir, at_first))
        if (
            tasks
            and due(first, config.run.eval_every, config)
            and not cluster.on_first(lambda: writer.evaluated(first))
        ):
            writer.evaluation(first, measure())  # what the run begins with, or what a preempted one had no time for
        if told_to_stop(first):
            return preemption.STATUS
        step_of_size = {}  # compiled, by the number of micro-batches
        unwritten = None  # the step before: its metrics are fetched while the device runs this one
        owed = False  # a checkpoint
        record = lambda *step: write_row(writer, looking, batches.names, *step)  # noqa: E731
        steps = enumerate(loading.iterate(batches, first, config.run.steps, workers=config.data.workers), start=first)
        for step, batch in traced(steps, workdir / "profile", count=profile if cluster.is_first() else 0):
            arrays = sharding.put_parts(batch.arrays, mesh=mesh)
            num_micro = batch.arrays["tokens_MBL"].shape[0]
            if num_micro not in step_of_size:
                if unwritten is not None:
                    record(*unwritten)
                    unwritten = None
                watching.beat(step, more=watchdog.COMPILING)
                step_of_size[num_micro] = compile_step(prog, state, arrays, writer)
            state, device_metrics = step_of_size[num_micro](state, arrays)
            if unwritten is not None:
                record(*unwritten)
            unwritten = step, device_metrics, batch
            done = step + 1
            last, stop = done == config.run.steps, told_to_stop(done)
            owed = owed or stop or saver.wants_again() or due(done, config.run.save_every, config)
            look = tasks and due(done, config.run.eval_every, config) and (last or not stop)
            finite = True
            if owed or look:
                finite = record(*unwritten)
                unwritten = None
            if look:  # before the save: a step that counts as saved has its evaluation
                watching.beat(done)
                writer.evaluation(done, measure())
                watching.beat(done)
            if owed and (finite or last or stop):  # else the parameters may be what is wrong: the next step tells
                owed = False
                writer.event(done, "save")
                (saver.save_now if last or stop else saver.save)(state)
                writer.lap()
            watching.beat(done)
            if stop and not last:
                writer.say(
                    f"stopped after step {done} of {config.run.steps}, which is saved; the same command continues."
                )
                return preemption.STATUS
        after = search() if held else {}
    print(
        f"trained {fields.count(config.run.steps - first, 'step')} in {time.perf_counter() - started:.0f} s, compilation included."
    )
    if said := run_data.what_was_cut(() if cluster.several() else metrics.read(workdir / "metrics.jsonl"), config):
        print(said)
    if held:
        print(f"held out: nDCG@10 {100 * np.mean(list(after.values())):.1f} after training.")
        length = {"steps": config.run.steps, "warmup_steps": config.optim.warmup_steps}
        cluster.on_first(lambda: print(held_out.conclude(workdir, after, **length)))
    return 0


def traced(items: Iterable, folder: pathlib.Path, *, count: int) -> Iterator:
    """Pass `items` on; while the `count` of them after the first WARM_UP are worked on, trace to `folder`."""
    tracing = False
    try:
        for i, item in enumerate(items):
            if count and i == WARM_UP:
                jax.profiler.start_trace(str(folder))
                tracing = True
            elif tracing and i == WARM_UP + count:
                jax.profiler.stop_trace()
                tracing = False
                print(f"traced {count} steps to {folder}; look at them with xprof.")
            yield item
    finally:
        if tracing:
            jax.profiler.stop_trace()
            print(f"traced to {folder}, up to the end of the run; look at it with xprof.")


def due(done: int, every: int, config: Config) -> bool:
    """Whether something done every `every` steps (0: never) is due after `done` of them; the last step always is."""
    return every > 0 and (done % every == 0 or done == config.run.steps)


def compile_step(prog: program.Program, state: dict, arrays: dict, writer: metrics.Writer):
    """The train step for arrays of these shapes; says so, and how long it took."""
    num_micro = arrays["tokens_MBL"].shape[0]
    writer.say(f"compiling the train step for {fields.count(num_micro, 'micro-batch', 'micro-batches')} ...")
    start = time.perf_counter()
    compiled = prog.step.lower(state, arrays).compile()
    writer.say(f"compiled in {time.perf_counter() - start:.1f} s.")
    cluster.gather("compiled")  # gloo gives the others 30 s to come to the first collective, and so may the watchdog
    writer.lap()
    return compiled


def say_what_will_run(config: Config, prog: program.Program, batches: batches_lib.Batches, held=None) -> None:
    """A few lines a person reads before the bar starts: devices, parameters, data."""
    total, active = program.count_parameters(prog.abstract_state["params"], config)
    mesh = " x ".join(f"{axis}={size}" for axis, size in prog.mesh.shape.items())
    print(
        f"devices     {prog.mesh.size} x {prog.mesh.devices.flat[0].device_kind}, mesh {mesh}, {config.encoder.dtype}"
    )
    print(f"parameters  {total:,}, of which a token uses {active:,}")
    print(f"data        {batches.summary}")
    if config.loss.objective != "mlm":
        print(f"prompts     query {config.data.query_prompt!r}, document {config.data.document_prompt!r}")
    if prog.config.loss.form == "ring":
        print("loss        in tiles (ring): the batch's scores are never held")
    if old := capability.too_old(jax.devices()):
        print(f"kernels     XLA's own, slower: {old}")
    if held:
        print(
            f"held out    {fields.count(len(held.queries), 'query', 'queries')}, searched for among {len(held.corpus):,} documents before and after"
        )
    if config.optim.freeze_embedding:
        frozen = prog.abstract_state["params"]["embedding"][optim.FROZEN]
        print(f"frozen      the piece table, {frozen.size:,} of the parameters")
    if config.optim.warmup_steps >= config.run.steps:
        print(f"warm-up     {config.optim.warmup_steps} steps: this run ends before the learning rate reaches its peak")
    rows, row_length = batches.c.rows, batches.c.row_length
    print(f"rows        [M, {rows}, {row_length}] on each device, M in {batches.sizes}")


def write_row(
    writer: metrics.Writer,
    looking: health.Health,
    names: Callable[[int], Sequence[str]],
    step: int,
    device_metrics: dict,
    batch: batches_lib.Batch,
) -> bool:
    """Fetch a finished step's metrics, write them, and say what is wrong with them. Whether the step changed parameters.

    UserError where too many steps of the run did not.
    """
    row = metrics.scalars(device_metrics)
    if "router_load_RE" in device_metrics:
        row |= health.of_router(np.asarray(device_metrics["router_load_RE"]))
    writer.step(step, row | batch.counts)
    for sentence in looking.look(step, row, source=batch.source, names=names):
        writer.say(sentence)
    return not row["skipped"]


def model_of(prog: program.Program, state: dict, tokenizer, prompts: dict[str, str]) -> Model:
    """The model as it stands at this step."""
    c, params = prog.config, prog.assemble(state["params"])
    return Model(c.encoder, c.moe, params, tokenizer, prompts, prog.mesh, "training")


def evaluate(model: Model, tasks: Sequence[sources_lib.Task]) -> dict[str, float]:
    """nDCG@10 on the dev tasks: {"ndcg": mean, "ndcg/<task>": ...}."""
    figures = {task.name: {"ndcg@10": float(values.mean())} for task, values in ndcg_of(model, tasks)}
    mean = retrieval.mean_of(figures, list(figures), "ndcg@10")
    return {"ndcg": mean} | {f"ndcg/{name}": of_task["ndcg@10"] for name, of_task in figures.items()}


def per_query(model: Model, task: sources_lib.Task) -> dict[str, float]:
    """nDCG@10 of each query of a task."""
    ((_, values),) = ndcg_of(model, [task])
    return dict(zip(task.queries, map(float, values), strict=True))


def ndcg_of(model: Model, tasks: Sequence[sources_lib.Task]) -> Iterator[tuple[sources_lib.Task, np.ndarray]]:
    """Each task with its queries' nDCG@10."""
    encode = lambda texts, name: model.encode(texts, model.prompt(name))  # noqa: E731
    for task, query_ND, document_CD in retrieval.embed_tasks(encode, tasks):
        yield task, retrieval.measure_queries(task, retrieval.run_of(task, query_ND, document_CD))["ndcg@10"]


if __name__ == "__main__":
    verb.run(main, copies=True)  # it joins them
