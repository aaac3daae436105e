"""Who this process is one of: what Slurm, GKE, a Cloud TPU VM or three variables say of a job of several processes."""

import dataclasses
import glob
import re
import socket
import urllib.request
from collections.abc import Mapping

from moe_embed.config import UserError


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
