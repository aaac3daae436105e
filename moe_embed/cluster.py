"""Several processes, one run: jax.distributed started before any device, and talk between them. job.py finds who they are.

Talk goes through the coordinator's key-value store, not through the devices: it needs nothing compiled, no equal number of
devices, and cannot meet the collectives of a train step. A process that ends with an error says so there, and the others end
with its sentence; without that they would wait in a collective, and it at its own exit, for minutes.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable

import jax
from jax._src import distributed  # its client has no public door; Orbax takes this one too

from moe_embed import job as job_lib
from moe_embed.config import UserError
from moe_embed.fields import first_line

OWN_CACHE = os.path.expanduser("~/.cache/moe_embed/xla")  # of compiled programs, where no other is named
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


def add_flags(parser) -> None:
    """--coordinator, --num_processes and --process_id, with what they are for."""
    group = parser.add_argument_group("processes", HELP)
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)


def refuse_several(verb: str) -> None:
    """UserError where several processes would each do the whole of a verb that is one process's work."""
    job = job_lib.find(os.environ)
    if job is not None:
        raise UserError(
            f"{verb} runs as one process, and this is one of {job.count} ({job.found}); start it once (under Slurm: "
            "srun --ntasks=1), or set JAX_NUM_PROCESSES=1 where each has work of its own."
        )


def start(*, coordinator=None, num_processes=None, process_id=None, seconds: float = SECONDS_TO_MEET) -> None:
    """Meet the other processes of the job, if there are any. Must come before anything that asks jax for a device.

    What processes other than 0 print goes nowhere from here on; errors go to stderr on all. CPU processes talk by gloo,
    jax's default. Exit GONE, with a sentence, when not all have come in time: one may be starting again, later than the others.
    """
    job = job_lib.find(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
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
        raise UserError(f"jax cannot join the {job.count} processes ({job.found}): {first_line(error)}") from error
    finally:
        alarm.cancel()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    threading.Thread(target=_watch, daemon=True).start()


def choose_cache(platform: str) -> None:
    """Of several processes on GPUs, compiled programs are kept only where the user says: JAX_COMPILATION_CACHE_DIR, seen by all hosts.

    jax lets process 0 alone write them. With a directory on each host process 0 would find the step at a restart, the others
    would compile it, and XLA's autotuner wait for process 0's share of the measurements for a day.
    """
    if several() and platform == "gpu" and jax.config.jax_compilation_cache_dir == OWN_CACHE:
        jax.config.update("jax_enable_compilation_cache", False)


def _stop_here(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(GONE)


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
    """f() on process 0 alone; its result (plain JSON), or its UserError, on all. Another fault of f is the others' UserError."""
    if not several():
        return f()
    call = call or new_call()
    if is_first():
        try:
            _put(call, {"result": f()})
        except UserError as error:
            _put(call, {"faults": error.args})
        except Exception as error:  # the others wait to hear of it
            _put(call, {"faults": [f"process 0: {type(error).__name__}: {error}"]})
            raise
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


def failure_after(why: str) -> tuple[int, str] | None:
    """`failure`, for a process that ends with the error `why`: it may have that because process 0 is gone, and the store with it."""
    try:
        return failure()
    except (jax.errors.JaxRuntimeError, AttributeError):
        return GONE, f"process 0 is gone without a word, killed or with its machine ({why})"


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
