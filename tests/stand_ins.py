"""Programs that a launch script calls, played: each refuses a flag that its real help does not have, and writes down its call.

`folder(tmp_path)` makes a folder for PATH. What they play is in files of the folder STAND_INS, of which each test writes some:
states, on_create (a TPU's states, one a look, the last stays), node, refuse_create, actions (a line for each start of the program:
what it does on every host, the last for all later ones), setup (pip fails), unheard (a line for each look at a run's status that
fails), and calls, runs, creations, which they write themselves.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HELP = pathlib.Path(__file__).parent / "launch_help"
NAMES = ("gcloud", "tmux", "nvidia-smi", "srun", "scontrol")
PYTHON = """\
#!/usr/bin/env bash
# python3.13 of a TPU host, and the python of the .venv it makes
case "$*" in
    "-c "*ensurepip*) ;;
    "-c "*) echo 3.13 ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) echo "$*" >> "$HOME/pip"; [ ! -f "$STAND_INS/setup" ] ;;
    *) exec {python} -IS {file} run "$@" ;;
esac
"""


def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with every stand-in, and python3.13 of a TPU's host."""
    where = tmp_path / "bin"
    where.mkdir()
    for name in NAMES:
        (where / name).write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {name} "$@"\n')
    (where / "python3.13").write_text(PYTHON.format(python=sys.executable, file=__file__))
    for path in where.iterdir():
        path.chmod(0o755)
    return where


def known(name: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Flags and positionals, or exit 2 with the flag that the program's help does not have."""
    flags, rest = {}, []
    there = (HELP / f"{name}.txt").read_text().split("\n")[1:]
    for i, argument in enumerate(arguments):
        if not argument.startswith("-"):
            if name == "srun":  # what follows is the program
                return flags, arguments[i:]
            rest.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag + equals not in there:
            print(f"ERROR: {name}: unrecognized arguments: {argument}", file=sys.stderr)
            sys.exit(2)
        flags[flag] = value
    return flags, rest


class State:
    """The files of STAND_INS."""

    def __init__(self):
        self.folder = pathlib.Path(os.environ["STAND_INS"])

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def write(self, name: str, lines: list[str]) -> None:
        new = self.folder / f".{name}.{os.getpid()}"  # a reader sees the old or the new, never half
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.folder / name)

    def append(self, name: str, row) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")

    def hosts(self) -> list[pathlib.Path]:
        return sorted(self.folder.glob("worker*"))

    def reachable(self) -> bool:
        return self.lines("states")[:1] == ["ACTIVE"] and (self.lines("node") or ["READY"]) == ["READY"]


def gcloud(arguments: list[str]) -> int:
    state = State()
    assert arguments[:2] == ["compute", "tpus"], arguments
    group, verb = arguments[2:4]
    flags, rest = known(f"gcloud_{group}_{verb}", arguments[4:])
    state.append("calls", [verb if group == "queued-resources" else f"vm {verb}", *arguments[4:]])
    assert "--zone" in flags
    assert "--quiet" in flags  # nobody is there to answer a question
    states = state.lines("states")
    if verb != "create" and group == "queued-resources" and not states:
        print(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) NOT_FOUND: Resource was not found.", file=sys.stderr)
        return 1
    if verb == "describe":
        if group == "tpu-vm":
            if state.lines("node") == ["ABSENT"]:
                print(
                    "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found.", file=sys.stderr
                )
                return 1
            print((state.lines("node") or ["READY"])[0])
            return 0
        print(states[0])
        state.write("states", states[1:] or states)
    elif verb == "create":
        if states:
            print("ERROR: ALREADY_EXISTS", file=sys.stderr)
            return 1
        refused = state.lines("refuse_create")
        if refused:
            state.write("refuse_create", refused[1:])
            print(f"ERROR: {refused[0]}", file=sys.stderr)
            return 1
        state.append("creations", flags)
        state.write("states", state.lines("on_create") or ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
        state.write("node", ["READY"])
        for host in state.hosts():
            shutil.rmtree(host)
        for i in range(2):
            (state.folder / f"worker{i}").mkdir()
    elif verb == "delete":
        assert "--force" in flags  # else only a TPU whose nodes are gone
        for host in state.hosts():
            end_session(host, "moe_embed")
        (state.folder / "states").unlink()
    elif not state.reachable() or (
        state.lines("runs") and "status" in flags.get("--command", "") and state.lines("unheard")
    ):
        state.write("unheard", state.lines("unheard")[1:])
        print("ssh: connect to host 10.0.0.2 port 22: Connection timed out", file=sys.stderr)
        return 255
    elif verb == "scp":
        assert rest[1] == f"{os.environ['TPU']}:moe_embed.tar.gz"
        for host in state.hosts():
            shutil.copy(rest[0], host / "moe_embed.tar.gz")
    elif verb == "ssh":
        hosts = state.hosts() if flags["--worker"] == "all" else [state.hosts()[int(flags["--worker"])]]
        statuses = []
        for host in hosts:  # as sshd: a login shell gets one string
            environment = {"HOME": str(host), "PATH": os.environ["PATH"], "STAND_INS": str(state.folder)}
            statuses.append(
                subprocess.run(["bash", "-c", flags["--command"]], cwd=host, env=environment, check=False).returncode
            )
        return next((status for status in statuses if status), 0)
    return 0


def end_session(home: pathlib.Path, name: str) -> bool:
    pid = home / f".tmux-{name}"
    if not pid.exists():
        return False
    try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        pid.unlink()
    return True


def tmux(arguments: list[str]) -> int:
    usage = {line.split()[0]: line for line in (HELP / "tmux.txt").read_text().splitlines()[1:]}[arguments[0]]
    switches = "".join(re.findall(r"\[-(\w+)\]", usage))
    valued = "".join(re.findall(r"\[-(\w) ", usage))
    home, name, rest, i = pathlib.Path(os.environ["HOME"]), None, [], 1
    while i < len(arguments):
        letter = arguments[i][1:]
        if not arguments[i].startswith("-"):
            rest.append(arguments[i])
        elif letter in valued:
            i += 1
            name = arguments[i]
        elif letter not in switches:
            print(f"tmux: unknown flag {arguments[i]}", file=sys.stderr)
            return 1
        i += 1
    pid = home / f".tmux-{name}"
    if arguments[0] == "kill-session":
        return 0 if end_session(home, name) else 1
    there = (
        pid.exists()
        and subprocess.run(["kill", "-0", pid.read_text()], capture_output=True, check=False).returncode == 0
    )
    if arguments[0] == "has-session":
        return 0 if there else 1
    if there:
        print(f"duplicate session: {name}", file=sys.stderr)
        return 1
    null = subprocess.DEVNULL
    pid.write_text(
        str(subprocess.Popen(["sh", "-c", *rest], start_new_session=True, stdin=null, stdout=null, stderr=null).pid)
    )
    return 0


def wait_until(true) -> None:
    until = time.monotonic() + 60
    while not true() and time.monotonic() < until:
        time.sleep(0.05)


def run(arguments: list[str]) -> int:
    """The program itself, on a TPU's host: what the actions say for the how manieth start of it this is."""
    state, host = State(), pathlib.Path(os.environ["HOME"]).name
    before = sum(json.loads(row)["host"] == host for row in state.lines("runs"))
    state.append("runs", {"host": host, "arguments": arguments, "platforms": os.environ["JAX_PLATFORMS"]})
    actions = state.lines("actions") or ["0"]
    action = actions[min(before, len(actions) - 1)].split()
    action = action[int(host[-1])] if len(action) > 1 else action[0]
    print(f"start {before} of {host}", flush=True)
    if action == "preempt":  # when it is being followed: first the node is gone, a little later the request says so
        if host == "worker0":
            wait_until(lambda: any("follow 1" in row for row in state.lines("calls")))
            time.sleep(2)
            state.write("node", ["PREEMPTED"])
            state.write("states", ["ACTIVE", "SUSPENDING", "SUSPENDED"])
        wait_until(lambda: state.lines("node") == ["PREEMPTED"])
        os.kill(os.getppid(), signal.SIGKILL)
        return 137
    if action == "wait":
        wait_until((state.folder / "go").exists)
        return 0
    if action.startswith("-"):
        os.kill(os.getpid(), -int(action))
    print(f"last words of {host}", flush=True)
    return int(action)


def nvidia_smi(arguments: list[str]) -> int:
    flags, _ = known("nvidia-smi", arguments)
    driver, capability, count = os.environ["GPUS"].split()
    if count == "0":
        print("No devices were found")
        return 6
    for i in range(int(count)):
        print(f"GPU {i}: NVIDIA (UUID: GPU-{i})" if "-L" in flags else f"{driver}, {capability}")
    return 0


def srun(arguments: list[str]) -> int:
    """TASKS tasks on one node; the highest status, 128 + n for a signal."""
    _, program = known("srun", arguments)
    State().append("calls", ["srun", *arguments])
    tasks, running = int(os.environ["TASKS"]), []
    for i in range(tasks):
        step = {"SLURM_STEP_NODELIST": "n0", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0",
                "SLURM_STEP_NUM_TASKS": os.environ["SLURM_NTASKS"], "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)"}  # fmt: skip
        running.append(subprocess.Popen(program, env=os.environ | step))
    # Told to end, srun has the tasks told and killed; scancel has told them already (seen, Slurm 22.05).
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
    return max(status if status >= 0 else 128 - status for status in [process.wait() for process in running])


def scontrol(arguments: list[str]) -> int:
    assert arguments[0] == "requeue", arguments
    State().append("calls", ["scontrol", *arguments])
    return 0


if __name__ == "__main__":
    program = {"gcloud": gcloud, "tmux": tmux, "nvidia-smi": nvidia_smi, "srun": srun, "scontrol": scontrol, "run": run}
    sys.exit(program[sys.argv[1]](sys.argv[2:]))
