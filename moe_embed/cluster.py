"""Several processes, one run: whether this is one of many, jax.distributed started before any device, and talk between them.

Talk goes through the coordinator's key-value store, not through the devices: it needs nothing compiled, no equal number of
devices, and cannot meet the collectives of a train step. A process that ends with an error says so there, and the others end
with its sentence; without that they would wait in a collective, and it at its own exit, for minutes.
"""

import dataclasses
import faulthandler
import glob
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import typing
import urllib.request
from collections.abc import Callable, Mapping

import jax
from jax._src import distributed  # its client has no public door; Orbax takes this one too

from moe_embed.config import UserError

GONE = 76  # exit status where another process is gone or stuck: start all again
SECONDS_TO_MEET = 300  # how long the processes wait for each other at the start
HELP = """\
Several processes: start the same command on every host. Cloud TPU pods, TPU slices on GKE and Slurm (srun) are found by
themselves. Elsewhere say who is who, by the three flags below or by JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0); JAX_NUM_PROCESSES=1 makes a process one of its own, whatever is found.
On one machine: bash launch/local_cluster.sh 2 -m moe_embed.train ...
"""
_CALLS = itertools.count()  # every process makes the same calls in the same order: the number is the call's name
_LEAVING = threading.Event()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What this process is one of."""

    found: str  # where that was read, for a person
    count: int
    process: int | None = None  # None: jax finds it out itself
    coordinator: str | None = None  # likewise
    local_devices: tuple[int, ...] | None = None  # GPUs of this process; None: jax's own choice
    method: str | None = None  # what jax is to look at for the rest; None: whatever it knows


def find(environ: Mapping[str, str], *, coordinator=None, num_processes=None, process_id=None) -> Job | None:
    """The job of several processes that flags or environment describe; None: a single process, and nothing to wait for.

    UserError where they say half of it, or what cannot be.
    """
    said = {
        "--coordinator or JAX_COORDINATOR_ADDRESS": coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "--num_processes or JAX_NUM_PROCESSES": num_processes or environ.get("JAX_NUM_PROCESSES"),
        "--process_id or JAX_PROCESS_ID": environ.get("JAX_PROCESS_ID") if process_id is None else process_id,
    }
    coordinator, count, process = said.values()
    if not all(value is None or str(value).isdecimal() for value in (count, process)):
        raise UserError(f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={process} must be whole numbers.")
    if count is not None and int(count) == 1:
        return None
    job = _slurm(environ) or _tpu_pod(environ)
    if job is not None and count is None and process is None:
        return dataclasses.replace(job, coordinator=coordinator or job.coordinator)
    if all(value is None for value in said.values()):
        return None
    missing = [name for name, value in said.items() if value is None]
    if missing:
        there = ", ".join(f"{name.split()[-1]}={value}" for name, value in said.items() if value is not None)
        raise UserError(f"of several processes {there} is set, but not {' and not '.join(missing)}; set all three.")
    if int(process) >= int(count):
        raise UserError(f"JAX_PROCESS_ID={process} must be below JAX_NUM_PROCESSES={count}: they count from 0.")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={coordinator} must be HOST:PORT of process 0.")
    gpus = job.local_devices if job else None  # Slurm's, also where the rest was said otherwise
    return Job(found="flags or JAX_* variables", count=int(count), process=int(process), coordinator=coordinator,
               local_devices=gpus, method="deactivate")  # fmt: skip


def _slurm(environ: Mapping[str, str]) -> Job | None:
    """A step of srun with several tasks. jax.distributed reads the address of the first from the same variables."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environ for name in needed):  # in a batch script, outside of srun, there is no step
        return None
    count = int(environ["SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"])
    if count == 1:
        return None
    found = f"Slurm: job {environ['SLURM_JOB_ID']}, task {environ['SLURM_PROCID']} of {count}"
    gpus = _slurm_gpus(environ)
    return Job(found=found, count=count, process=int(environ["SLURM_PROCID"]), local_devices=gpus, method="slurm")


def _slurm_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of the GPUs it sees a task takes: all, or the one of its number. UserError where some would be left or shared.

    jax gives task i of a node GPU i, of however many: with one task a node all but the first would be left, with
    --gpus-per-task=1, where a task sees one GPU as number 0, it would find none.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ or environ.get("JAX_PLATFORMS") == "cpu":
        return None
    if "CUDA_VISIBLE_DEVICES" in environ:
        visible = len([name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name])
    else:
        visible = len(glob.glob("/dev/nvidia[0-9]*"))
    if not visible:
        return None
    tasks = _tasks_on_this_node(environ)
    on_node = int(environ["SLURM_GPUS_ON_NODE"]) if "SLURM_GPUS_ON_NODE" in environ else visible
    if tasks == 1 or visible < on_node:  # the node's are its own, or Slurm has dealt them out
        return tuple(range(visible))
    if tasks == visible:
        return (int(environ["SLURM_LOCALID"]),)
    raise UserError(
        f"Slurm started {tasks} tasks on {socket.gethostname()}, and each sees the same {visible} GPUs; start one task a "
        f"GPU (--ntasks-per-node={visible}) or one a node (--ntasks-per-node=1)."
    )


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """Slurm's "2(x3),1" and the node's number -> how many tasks stand beside each other."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environ:
        return 1 + int(environ["SLURM_LOCALID"])  # not fewer
    of_node = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.partition("(x")
        of_node += [int(tasks)] * int(times.rstrip(")") or 1)
    return of_node[int(environ["SLURM_NODEID"])] if "SLURM_NODEID" in environ else of_node[0]


def _tpu_pod(environ: Mapping[str, str]) -> Job | None:
    """Hosts of a TPU slice, or of several: GKE names them in the environment, a Cloud TPU VM is asked."""
    if "JAX_PLATFORMS" in environ and "tpu" not in environ["JAX_PLATFORMS"]:
        return None
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environ and not environ[name].startswith("WARNING"):  # libtpu's own words where it knows of none
            hosts = len(environ[name].split(","))
            where = f"TPU slice: {hosts} hosts in {name}"
            return Job(found=where, count=slices * hosts) if slices * hosts > 1 else None
    if "TPU_SKIP_MDS_QUERY" in environ:  # jax sets it, when imported, where there are no TPU chips
        return None
    workers = _metadata("worker-network-endpoints")
    if workers is None:
        return None
    several = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env") or "")
    hosts = len(workers.split(",")) * (int(several[1]) if several else slices)
    return Job(found=f"Cloud TPU: {hosts} workers by the machine's metadata", count=hosts) if hosts > 1 else None


def _metadata(name: str) -> str | None:
    """What a Google machine knows of itself; None elsewhere."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as page:
            return page.read().decode()
    except OSError:
        return None


def add_flags(parser) -> None:
    """--coordinator, --num_processes and --process_id, with what they are for."""
    group = parser.add_argument_group("processes", HELP)
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)


def refuse_several(verb: str) -> None:
    """UserError where several processes would each do the whole of a verb that is one process's work."""
    job = find(os.environ)
    if job is not None:
        raise UserError(
            f"{verb} runs as one process, and this is one of {job.count} ({job.found}); start it once (under Slurm: "
            "srun --ntasks=1), or set JAX_NUM_PROCESSES=1 where each has work of its own."
        )


def start(*, coordinator=None, num_processes=None, process_id=None, seconds: float = SECONDS_TO_MEET) -> None:
    """Meet the other processes of the job, if there are any. Must come before anything that asks jax for a device.

    What processes other than 0 print goes nowhere from here on; errors go to stderr on all. CPU processes talk by gloo,
    jax's default. Exit 2, with a sentence, when not all have come in time.
    """
    job = find(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if job is None:
        if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" not in os.environ:
            print(f"processes   1: Slurm gave {os.environ['SLURM_NTASKS']} tasks, but only srun starts as many")
        return
    jax.config.update("jax_enable_preemption_service", True)  # it catches SIGTERM from here on: preemption.py
    sentence = (
        f"error: not all of {job.count} processes came within {seconds:.0f} s ({job.found}; coordinator "
        f"{job.coordinator or 'found by jax'}; this is process {'?' if job.process is None else job.process} on "
        f"{socket.gethostname()}); start every one, with the same coordinator."
    )
    alarm = threading.Timer(seconds, _stop_here, [sentence])  # jax's own end of this wait is an abort
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(job.coordinator, job.count if job.process is not None else None, job.process,
                                   local_device_ids=job.local_devices, cluster_detection_method=job.method,
                                   initialization_timeout=int(seconds) + 60)  # fmt: skip
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"jax cannot join the {job.count} processes ({job.found}): {said}") from error
    finally:
        alarm.cancel()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    threading.Thread(target=_watch, daemon=True).start()


def _stop_here(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(2)


def several() -> bool:
    """Whether this process is one of many."""
    return distributed.global_state.client is not None


def is_first() -> bool:
    """Whether this process is the one that writes and prints: process 0, or the only one."""
    return distributed.global_state.process_id == 0


def new_call() -> str:
    """The name of a `gather` or `on_first` that a thread makes later: numbered where all processes are in step."""
    return str(next(_CALLS))


def gather(row, *, call: str | None = None) -> list:
    """The `row` (plain JSON) of every process, by number, on every process: nobody goes on before all have come."""
    if not several():
        return [json.loads(json.dumps(row))]
    call = call or new_call()
    _put(f"{call}/{distributed.global_state.process_id}", row)
    return [_take(f"{call}/{i}") for i in range(distributed.global_state.num_processes)]


def largest(number: int, *, turn: int) -> int:
    """The largest `number` of any process. One thread of each calls it, for the same turns in the same order."""
    if not several():
        return number
    found = max(gather(number, call=f"largest/{turn}"))
    client, me = distributed.global_state.client, distributed.global_state.process_id
    client.key_value_delete(
        f"moe_embed/largest/{turn - 1}/{me}"
    )  # all are at this turn: nobody reads the last any more
    return found


def on_first(f: Callable[[], typing.Any], *, call: str | None = None):
    """f() on process 0 alone; its result (plain JSON), or its UserError, on all."""
    if not several():
        return f()
    call = call or new_call()
    if is_first():
        try:
            _put(call, {"result": f()})
        except UserError as error:
            _put(call, {"faults": error.args})
    said = _take(call)
    if "faults" in said:
        raise UserError(*said["faults"])
    return said["result"]


def _put(name: str, value) -> None:
    client = distributed.global_state.client
    client.key_value_set(f"moe_embed/{name}", json.dumps(value), allow_overwrite=True)


def _take(name: str):
    """Wait for what another process puts: however long it takes, a second at a time so that Ctrl-C is heard."""
    while True:
        try:
            return json.loads(distributed.global_state.client.blocking_key_value_get(f"moe_embed/{name}", 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def tell(done: int, *, since: float) -> None:
    """How many steps this process has done, and how many seconds ago the last: for whoever asks `told`."""
    if several():
        me = distributed.global_state.process_id
        _put(f"told/{me}", {"host": socket.gethostname(), "done": done, "since": since, "at": time.time()})


def told() -> list[dict]:
    """What each process told last, with "silent", how many seconds ago that was; none of a process that never did."""
    if not several():
        return []
    found = distributed.global_state.client.key_value_dir_get("moe_embed/told/")
    rows = [{"process": int(key.rpartition("/")[2])} | json.loads(value) for key, value in found]
    return sorted((row | {"silent": time.time() - row["at"]} for row in rows), key=lambda row: row["process"])


def failure() -> tuple[int, str] | None:
    """(exit code, sentences) of the first process known to have ended with an error; None if all is well."""
    if not several():
        return None
    known = distributed.global_state.client.key_value_dir_get("moe_embed/failed/")
    return tuple(json.loads(known[0][1])) if known else None


def end(status: int, why: str) -> None:
    """The last call of every process: without a `why` wait for the others, else tell them, and exit here and now."""
    if not several():
        return
    if not why:
        gather("done")
        _LEAVING.set()
        jax.distributed.shutdown()
        return
    leave(status, why)


def leave(status: int, why: str) -> typing.NoReturn:
    """Exit here and now, from any thread; the other processes end with the same status, and this sentence."""
    _LEAVING.set()
    if not several():
        sys.stdout.flush()
        os._exit(status)
    _leave(status, f"process {distributed.global_state.process_id} on {socket.gethostname()} ended: {why}")


def _watch() -> None:
    """Beside the main thread, which may be in a collective that never ends: leave when another process has failed."""
    while not _LEAVING.wait(1.0):
        try:
            said = failure()
        except (jax.errors.JaxRuntimeError, AttributeError):  # the coordinator has gone: jax itself ends this process
            return
        if said and not _LEAVING.is_set():
            if said[0] == GONE:  # where this one stands is what whoever looks for the cause wants to know
                faulthandler.dump_traceback(all_threads=True)
            print(f"error: {said[1]}", file=sys.stderr)
            _leave(*said)


def _leave(status: int, why: str) -> typing.NoReturn:
    """Exit without jax's own good-bye, which waits for all. Process 0 holds the store: it goes last, in five seconds at most."""
    state = distributed.global_state
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if failure() is None:
            _put(f"failed/{state.process_id}", [status, why])
        _put(f"left/{state.process_id}", status)
        until = time.monotonic() + 5
        while is_first() and time.monotonic() < until:
            if len(state.client.key_value_dir_get("moe_embed/left/")) == state.num_processes:
                break
            time.sleep(0.1)
    finally:
        os._exit(status)
