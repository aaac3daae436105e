"""Whether the processes of a run may start together: one config, one code, the same versions and data, no device left.

Compared before anything is compiled. What differs would otherwise be found hours later, in a collective that never ends or
in a loss that is nobody's. The rules are functions of rows of plain JSON, one a process.
"""

import dataclasses
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import time
from collections.abc import Mapping, Sequence

import jax
from jax._src import hardware_utils  # TPU chips by their PCI ids, as jax itself counts them

from moe_embed import cluster
from moe_embed import config as config_lib
from moe_embed.config import Config, UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
SETTINGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)  # change what is compiled
SECONDS_TO_APPEAR = 30  # a network file system may show a new file late
BY_CONTENT = ("data.sources", "data.tokenizer")  # may lie elsewhere on each host: the data's fingerprint is compared
HIDING = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "JAX_LOCAL_DEVICE_IDS",
)  # fmt: skip - whoever sets these leaves devices on purpose
ADVICE = {
    "config": "give every process the same command",
    "code": "bring the same moe_embed to every host",
    "version": "install the same versions on every host",
    "setting": "set the same environment on every host",
    "fingerprint": "bring the same files to every host",
}


def check(config: Config, *, others: Mapping[str, str | None]) -> None:
    """The first thing of a run: who is here, and that all would run the same. `others`: what else a command says.

    Process 0 prints a table. Raises UserError on every process alike. A single process is only told of an accelerator that
    it does not use.
    """
    config_tree = config_lib.to_dict(config)
    asked = {
        f"config.{s}.{k}": v for s in config_tree for k, v in config_tree[s].items() if f"{s}.{k}" not in BY_CONTENT
    }
    versions = {name: _version(name) for name in PACKAGES}
    same = {
        "config": asked | others,
        "code": code(pathlib.Path(__file__).parent),
        "version": {"python": platform.python_version(), **versions},
        "setting": {name: _without_dumps(os.environ.get(name)) for name in SETTINGS},
    }
    rows = cluster.gather({"host": socket.gethostname(), **dataclasses.asdict(devices(os.environ)), "same": same})
    if len(rows) == 1:
        for sentence in unused(rows):
            print(f"note        {sentence}")
        return
    print(table(rows))
    _refuse(differences(rows) or uneven(rows) or unused(rows))


def check_data(config: Config, fingerprint: Mapping) -> None:
    """Before the step is compiled: the data, and the config as --init_from has left it, are the same everywhere."""
    config_tree = config_lib.to_dict(config)
    resolved = {f"config.{s}.{k}": v for s in ("encoder", "moe") for k, v in config_tree[s].items()}
    rows = cluster.gather(
        {"host": socket.gethostname(), "same": {"config": resolved, "fingerprint": dict(fingerprint)}}
    )
    _refuse(differences(rows))


def check_shared(path: pathlib.Path) -> None:
    """UserError on every process unless all see the file that process 0 has just written: a run needs one folder."""
    if not cluster.several():
        return
    digest = cluster.on_first(lambda: hashlib.blake2b(path.read_bytes()).hexdigest())
    until = time.monotonic() + SECONDS_TO_APPEAR
    while not (seen := path.is_file() and hashlib.blake2b(path.read_bytes()).hexdigest() == digest):
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    rows = cluster.gather({"host": socket.gethostname(), "seen": seen})
    _refuse(unshared(rows, path))


def unshared(rows: Sequence[Mapping], path: pathlib.Path) -> list[str]:
    """A sentence if some process does not see process 0's file."""
    blind = [f"process {i} on {row['host']}" for i, row in enumerate(rows) if not row["seen"]]
    if not blind:
        return []
    return [
        f"{', '.join(blind)} does not see {path}, which process 0 on {rows[0]['host']} wrote; put --workdir on a file "
        "system that all hosts share."
    ]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError(*faults)


@dataclasses.dataclass(frozen=True)
class Devices:
    """What one process computes on, and what its machine has."""

    platform: str  # jax's: cpu, gpu, tpu
    kind: str
    local: int
    accelerators: dict[str, int]  # on the machine, whether used or not
    chosen: bool  # JAX_PLATFORMS was set: a CPU beside an accelerator is meant
    hidden: bool  # some were hidden on purpose


def devices(environ: Mapping[str, str]) -> Devices:
    """This process's; starts jax's backends."""
    found = {
        "NVIDIA GPU": len(glob.glob("/dev/nvidia[0-9]*")),
        "TPU": hardware_utils.num_available_tpu_chips_and_device_id()[0],
        "AMD GPU": len(glob.glob("/dev/dri/renderD*")) if os.path.exists("/dev/kfd") else 0,
    }
    here = jax.local_devices()
    return Devices(
        platform=here[0].platform,
        kind=here[0].device_kind,
        local=len(here),
        accelerators={name: count for name, count in found.items() if count},
        chosen="JAX_PLATFORMS" in environ,
        hidden=any(name in environ for name in HIDING) or "SLURM_LOCALID" in environ,  # cluster has looked at Slurm's
    )


def code(folder: pathlib.Path) -> dict[str, str]:
    """A digest of each Python file of the package, by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        for path in sorted(folder.rglob("*.py"))
    }


def table(rows: Sequence[Mapping]) -> str:
    """Process, host, local devices of all, kind: a line each."""
    total = sum(row["local"] for row in rows)
    width = max(len("host"), *(len(row["host"]) for row in rows))
    lines = [f"process  {'host':<{width}}  local devices  global devices  kind"]
    lines += [
        f"{i:>7}  {row['host']:<{width}}  {row['local']:>13}  {total:>14}  {row['kind']}" for i, row in enumerate(rows)
    ]
    return "\n".join(lines)


def differences(rows: Sequence[Mapping]) -> list[str]:
    """A sentence for each kind of thing in which some process is not like process 0: who, what, and both values."""
    sentences, first = [], rows[0]
    for kind, expected in first["same"].items():
        other = [i for i, row in enumerate(rows) if row["same"][kind] != expected]
        if not other:
            continue
        found = rows[other[0]]["same"][kind]
        names = [name for name in {**expected, **found} if _value(expected, name) != _value(found, name)]
        what = [f"{name} ({_value(found, name)}, not {_value(expected, name)})" for name in names[:3]]
        what = [f"moe_embed/{name}" for name in names[:3]] if kind == "code" else what
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        who = f"process {other[0]} on {rows[other[0]]['host']}"
        also = f" (so do {len(other) - 1} more)" if len(other) > 1 else ""
        sentences.append(
            f"{who}{also} differs from process 0 on {first['host']} in {', '.join(what)}{more}: {ADVICE[kind]}."
        )
    return sentences


def uneven(rows: Sequence[Mapping]) -> list[str]:
    """A sentence if the processes have not as many devices each, of one kind: some are left, or hidden, somewhere."""
    first = rows[0]
    for i, row in enumerate(rows):
        if (row["local"], row["kind"]) != (first["local"], first["kind"]):
            return [
                f"process {i} on {row['host']} has {row['local']} x {row['kind']}, process 0 on {first['host']} "
                f"{first['local']} x {first['kind']}; every process needs as many devices of one kind."
            ]
    return []


def unused(rows: Sequence[Mapping]) -> list[str]:
    """A sentence for each host with accelerators that no process on it computes on, unless that was asked for."""
    sentences = []
    for host in dict.fromkeys(row["host"] for row in rows):
        here = [row for row in rows if row["host"] == host]
        row = here[0]
        for name, count in row["accelerators"].items():
            if row["platform"] == "cpu" and not row["chosen"]:
                sentences.append(
                    f"{host} has {count} x {name}, and jax computes on the CPU: install jax for it, "
                    "or set JAX_PLATFORMS=cpu if that is meant."
                )
            elif row["platform"] != "cpu" and not row["hidden"] and sum(r["local"] for r in here) < count:
                sentences.append(
                    f"{host} has {count} x {name}, and its {len(here)} process(es) use {sum(r['local'] for r in here)} "
                    "of them: start more processes, or hide the others (CUDA_VISIBLE_DEVICES)."
                )
    return sentences


def _value(tree: Mapping, name: str):
    return tree[name] if name in tree else "absent"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _without_dumps(flags: str | None) -> str:
    return " ".join(flag for flag in (flags or "").split() if not flag.startswith("--xla_dump"))
