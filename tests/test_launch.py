"""launch/supervise.sh, gpu_host.sh and slurm.sbatch, with nvidia-smi, srun and scontrol played by tests/stand_ins.py; and shellcheck."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_embed import topology
from tests import stand_ins

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), ROOT / ".ci/run"]
# python: what jax would see, else each start does what the next line of `actions` says, and tells its arguments
PROGRAM = """\
#!/usr/bin/env bash
case "$*" in *local_device_count*) echo "${SEEN:-${GPUS##* }}"; exit ;; esac
printf '%s\\0' "$@" >> "$STAND_INS/arguments"
env > "$STAND_INS/environment"
echo start >> "$STAND_INS/starts"
eval "$(sed -n "$(wc -l < "$STAND_INS/starts")p" "$STAND_INS/actions")"
"""


class Host:
    """A folder of the stand-ins' files, and a python that does what a test says."""

    def __init__(self, tmp_path: pathlib.Path):
        self.state, self.folder = tmp_path / "state", tmp_path
        self.state.mkdir()
        (tmp_path / "program").write_text(PROGRAM)
        (tmp_path / "program").chmod(0o755)
        absent = ("XLA_FLAGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
        self.environment = {name: value for name, value in os.environ.items() if name not in absent} | {
            "PATH": f"{stand_ins.folder(tmp_path)}:{os.environ['PATH']}", "STAND_INS": str(self.state), "PAUSE": "0",
            "CLUSTER_PYTHON": str(tmp_path / "program"), "GPUS": "580.65.06 9.0 4", "TASKS": "1",
        }  # fmt: skip

    def start(self, script: str, *arguments: str, **more) -> subprocess.Popen:
        return subprocess.Popen(
            # a run of the tests in the background is deaf to SIGINT, one under nohup to SIGHUP, and hands that on
            ["env", "--default-signal=INT,HUP", "bash", f"launch/{script}", *arguments], cwd=ROOT, env=self.environment | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, script: str, *arguments: str, **more) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **more)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def actions(self, *lines: str) -> None:
        (self.state / "actions").write_text("".join(f"{line}\n" for line in lines))

    def starts(self) -> int:
        path = self.state / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def saw(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.state / "environment").read_text().splitlines() if "=" in line)

    def calls(self) -> list:
        path = self.state / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.mark.parametrize(("actions", "status", "starts"), [
    (["exit 75", "exit 76", "kill -9 $$", "exit 0"], 0, 4),
    (["kill -SEGV $$", "exit 1"], 1, 2),
    (["exit 75"] * 5, 75, 4),  # RESTARTS=3
    (["exit 0"], 0, 1), (["exit 1"], 1, 1), (["exit 2"], 2, 1), (["exit 130"], 130, 1), (["exit 141"], 141, 1),
    (["exit 253"], 253, 1), (["exit 255"], 255, 1),
])  # fmt: skip
def test_the_exit_status_says_whether_a_command_is_run_again(host, actions, status, starts):
    host.actions(*actions)
    done = host("supervise.sh", str(host.folder / "program"), "a b", "it's", RESTARTS="3")
    assert (done.returncode, host.starts()) == (status, starts), done.stderr
    assert done.stderr.count("; restart ") == starts - 1
    assert (host.state / "arguments").read_text() == "a b\0it's\0" * starts


@pytest.mark.parametrize(("status", "hours", "kept"), [
    (75, 3, False), (75, 2, True), (137, 3, False),
    (76, 3, True), (142, 3, True),  # a watchdog's: what always hangs also takes its time
    (76, 24, False), (142, 24, False),
])  # fmt: skip
def test_after_a_long_time_of_work_the_count_starts_anew(status, hours, kept):
    again = f"once_more {status} {hours * 3600}"
    script = f"source launch/supervise.sh; RESTARTS=2 PAUSE=0 next=0; {again} && {again} && {again}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "that is enough" in done.stderr) == ((1, True) if kept else (0, False)), done.stderr
    assert ("; restart 2 of 2" in done.stderr) == kept


def wait_for(path: pathlib.Path) -> None:
    until = time.monotonic() + 30
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)


@pytest.mark.parametrize(("name", "told"), [("TERM", "TERM"), ("INT", "INT"), ("HUP", "TERM")])
def test_a_signal_goes_to_the_command_which_is_not_run_again(host, name, told):
    host.actions(
        f"trap 'sleep 0.5; exit 75' {told}; : > {host.state}/deaf_no_more; for _ in {{1..200}}; do sleep 0.1; done",
        "exit 0",
    )
    process = host.start("supervise.sh", str(host.folder / "program"))
    wait_for(host.state / "deaf_no_more")
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=30)
    assert (process.returncode, host.starts()) == (75, 1)


def test_a_signal_between_two_runs_ends_it_at_once(host):
    host.actions("exit 76", "exit 0")
    process = host.start("supervise.sh", str(host.folder / "program"), PAUSE="60")
    assert "it ended with 76; restart 1 of 10 in 60 s." in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=10)
    assert (process.returncode, host.starts()) == (76, 1)


def test_sigterm_reaches_every_process_of_a_cluster_and_their_status_is_its(host):
    script = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(1), sys.exit(75))); print('up', flush=True); time.sleep(20)"
    process = host.start(
        "supervise.sh", "bash", "launch/local_cluster.sh", "2", "-c", script, CLUSTER_PYTHON=sys.executable
    )
    assert {process.stdout.readline(), process.stdout.readline()} == {"[p0] up\n", "[p1] up\n"}
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_cluster_of_this_machine_can_be_supervised(host):
    """A process that is killed takes the other along, and both are there again."""
    two = host.folder / "two"
    command = ("supervise.sh", "bash", "launch/local_cluster.sh", "2", "-c", "pass")
    done = host(*command, CLUSTER_PYTHON=str(two))
    assert done.returncode == 127  # there is no such program: not a thing to try again
    two.write_text(f"""#!/usr/bin/env bash
case "$*" in *socket*) echo 1; exit ;; esac
if [ "$JAX_PROCESS_ID" = 1 ] && mkdir {host.state}/killed 2> /dev/null; then kill -9 $$; fi
echo fine
""")
    two.chmod(0o755)
    done = host(*command, CLUSTER_PYTHON=str(two))
    assert done.returncode == 0, done.stderr
    assert "it ended with 137; restart 1" in done.stderr
    assert sorted(done.stdout.splitlines()) == ["[p0] fine", "[p0] fine", "[p1] fine"]


@pytest.mark.parametrize(("gpus", "extra"), [
    ("580.65.06 9.0 4", "cuda13"), ("590.1 7.5 1", "cuda13"), ("570.1 9.0 4", "cuda12"), ("580.65.06 7.0 4", "cuda12"),
])  # fmt: skip
def test_jax_for_the_cuda_that_driver_and_cards_can_run(host, gpus, extra):
    host.actions("exit 0")
    done = host("gpu_host.sh", "--", "-m", "moe_embed.train", "a b", GPUS=gpus)
    assert done.returncode == 0, done.stderr
    count = gpus.split()[-1]
    assert f"{count} GPUs, {extra}." in done.stdout
    assert (host.state / "arguments").read_text() == "-m\0moe_embed.train\0a b\0"
    assert host.saw()["JAX_PLATFORMS"] == "cuda,cpu"
    assert host.saw()["XLA_CLIENT_MEM_FRACTION"] == str(topology.GPU_SHARE)
    assert ("--xla_gpu_enable_latency_hiding_scheduler=true" in host.saw().get("XLA_FLAGS", "")) == (count != "1")
    assert f"{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_flags_of_several_hosts_and_of_xla_reach_the_program(host):
    host.actions("exit 75", "exit 0")
    done = host("gpu_host.sh", "--coordinator=h0:8476", "--num_processes=2", "--process_id=1", "--", "-m", "x",
                XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=false", CUDA_VISIBLE_DEVICES="0,2", SEEN="2",
                XLA_PYTHON_CLIENT_MEM_FRACTION=".5")  # fmt: skip
    assert (done.returncode, host.starts()) == (0, 2)
    saw = host.saw()
    assert [saw[f"JAX_{name}"] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")] == [
        "h0:8476",
        "2",
        "1",
    ]
    assert "XLA_CLIENT_MEM_FRACTION" not in saw  # jax refuses both
    assert saw["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false"
    assert "2 GPUs" in done.stdout


@pytest.mark.parametrize(("arguments", "more", "words"), [
    (["--gpus=3", "--", "-m", "x"], {}, "does not know --gpus=3"),
    (["-m", "x"], {}, "does not know -m"),
    (["--"], {}, "no command for python"),
    (["--coordinator=h:1", "--", "-m", "x"], {}, "all three or none"),
    (["--", "-m", "x"], {"GPUS": "580.1 9.0 0"}, "nvidia-smi finds no GPU here (No devices were found)"),
    (["--", "-m", "x"], {"GPUS": "470.82 8.0 2"}, "the NVIDIA driver here is 470.82; jax needs 525 or newer."),
    (["--", "-m", "x"], {"SEEN": "1"}, "of 4 GPUs here jax sees 1"),
])  # fmt: skip
def test_what_gpu_host_refuses(host, arguments, more, words):
    host.actions("exit 0")
    more = {"SEEN": "0"} | more if "GPUS" in more else more
    done = host("gpu_host.sh", *arguments, **more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert host.starts() == 0


JOB = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}


def test_the_job_asks_sbatch_for_what_sbatch_has():
    text = (ROOT / "launch/slurm.sbatch").read_text()
    asked = re.findall(r"^#SBATCH (\S+)$", text, flags=re.MULTILINE)
    assert len(asked) == text.count("#SBATCH") > 3
    flags, rest = stand_ins.known("sbatch", asked)
    assert not rest
    # To the tasks alone: with B: it would be this script's, and srun kills its tasks where it is to hand a SIGTERM on.
    assert flags["--signal"] == "TERM@120"
    with pytest.raises(SystemExit):
        stand_ins.known("sbatch", ["--signals=TERM@120"])


def test_a_saved_job_goes_back_into_the_queue(host):
    host.actions("exit 75")
    done = host("slurm.sbatch", "-m", "moe_embed.train", 'it\'s "a b"', **JOB, SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 75, done.stderr
    assert host.calls() == [
        ["srun", "--wait=60", "--label", str(host.folder / "program"), "-m", "moe_embed.train", 'it\'s "a b"'],
        ["scontrol", "requeue", "7"],
    ]
    assert (host.state / "arguments").read_text() == '-m\0moe_embed.train\0it\'s "a b"\0'
    assert host.saw()["SRUN_CPUS_PER_TASK"] == "12"


@pytest.mark.parametrize(("actions", "status", "starts"), [
    (["exit 0"], 0, 1), (["exit 1"], 1, 1), (["exit 2"], 2, 1), (["exit 76", "exit 0"], 0, 2), (["kill -9 $$", "exit 0"], 0, 2),
])  # fmt: skip
def test_another_end_does_not(host, actions, status, starts):
    host.actions(*actions)
    done = host("slurm.sbatch", "-m", "x", **JOB)
    assert (done.returncode, host.starts()) == (status, starts), done.stderr
    assert ["scontrol", "requeue", "7"] not in host.calls()


def test_a_cancelled_job_does_not_go_back_into_the_queue(host):
    host.actions("trap 'exit 75' TERM; for _ in {1..200}; do sleep 0.1; done")
    process = host.start("slurm.sbatch", "-m", "x", **JOB)
    wait_for(host.state / "starts")
    process.terminate()  # as scancel, which tells this script and the tasks
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert ["scontrol", "requeue", "7"] not in host.calls()


def test_the_queue_is_not_for_ever(host):
    host.actions("exit 75")
    done = host("slurm.sbatch", "-m", "x", **JOB, SLURM_RESTART_COUNT="3", REQUEUES="3")
    assert done.returncode == 2
    assert "put back into the queue 3 times; that is enough" in done.stderr


CLUSTER = """
import os, sys
from moe_embed import config
from moe_embed import job as job_lib
try:
    job = job_lib.find(os.environ)
except config.UserError as error:
    sys.exit(f"error: {error}")
print(f"task {job.process} of {job.count} takes {job.local_devices}")
"""


@pytest.mark.parametrize(("tasks", "said"), [
    (1, "task 0 of 2 takes (0, 1)"), (2, "task 0 of 4 takes (0,)"), (3, None),
])  # fmt: skip
def test_a_task_a_node_or_a_task_a_gpu_and_nothing_between(host, tasks, said):
    host.actions(
        *[f'[ $SLURM_PROCID = 0 ] || exit 1; exec {sys.executable} "$@"'] * 3
    )  # the others' like is in test_cluster.py
    done = host("slurm.sbatch", "-c", CLUSTER, **JOB | {"SLURM_NTASKS": str(2 * tasks)}, TASKS=str(tasks),
                CUDA_VISIBLE_DEVICES="0,1", GPUS="580.1 9.0 2", SLURM_GPUS_ON_NODE="2", PYTHONPATH=str(ROOT))  # fmt: skip
    if said is None:
        assert "each sees the same 2 GPUs; start one task a GPU (--ntasks-per-node=2) or one a node" in done.stderr
    else:
        assert said in done.stdout.splitlines(), done.stderr
    assert host.starts() == tasks  # and no restart


@pytest.mark.parametrize(("arguments", "more", "words"), [
    (["-m", "x"], {}, "this is a job script"),
    ([], JOB, "no command for python"),
    (["-m", "x"], JOB | {"SLURM_SUBMIT_DIR": "/"}, "sbatch was called in /, which is not the checkout's top"),
    (["-m", "x"], JOB | {"SLURM_NTASKS": "1"}, "the job has 2 nodes and 1 tasks"),
])  # fmt: skip
def test_what_the_job_refuses(host, arguments, more, words):
    done = host("slurm.sbatch", *arguments, **more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


VENV_PYTHON = """\
#!/usr/bin/env bash
case "$*" in *sys.exit*|*sys.version_info*) echo {version}; exit ;; esac
echo "{name} $*" >> "$STAND_INS/calls"
if [[ "$*" = *--clear* ]]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
"""


@pytest.mark.parametrize(
    ("environment", "made"), [({}, False), ({"PYTHON": "python3"}, True), ({"PYTHON": "python3.12"}, False)]
)
def test_a_venv_of_another_python_stays_unless_one_is_named(tmp_path, environment, made):
    for name in ("launch", "tests", "path", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "launch/venv.sh", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml", "tests/constraints.txt"):
        (tmp_path / name).touch()
    for path, version in (("path/python3", "3.11"), ("path/python3.12", "3.12"), (".venv/bin/python", "3.12")):
        (tmp_path / path).write_text(VENV_PYTHON.format(version=version, name=path))
        (tmp_path / path).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {
        "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}", "STAND_INS": str(tmp_path),
    } | environment  # fmt: skip
    command = ["bash", "-c", "source launch/venv.sh; ready_venv test"]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert any("--clear" in call for call in calls) == made
    assert "pip install" in calls[-1]
    assert (tmp_path / ".venv/stamp-test").read_text().startswith("3.11 " if made else "3.12 ")
    subprocess.run(command, cwd=tmp_path, env=environ, check=True)  # the stamp is right: there is nothing to do
    assert (tmp_path / "calls").read_text().splitlines() == calls


def shellcheck(*paths: pathlib.Path) -> str:
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, 'shellcheck is of the test requirements: pip install -e ".[test]"'
    return subprocess.run([program, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_shellcheck_finds_nothing():
    assert shellcheck(*SCRIPTS) == ""


def test_shellcheck_finds_what_there_is(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/sh\nrm $1/*\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh")
