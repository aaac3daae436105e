"""launch/tpu_pod.sh and tpu_worker.sh, from the request to the end of the run, with gcloud, tmux and two hosts played by tests/stand_ins.py."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests import stand_ins

ROOT = pathlib.Path(__file__).parents[1]
HERE = ("--name=t", "--zone=us-west4-a", "--type=v5e-16")
TRAIN = ("--", "-m", "moe_embed.train", "--config=a.py", "--workdir=gs://b/w")
GIT = ("-c", "user.name=a", "-c", "user.email=a@b")


class Pod:
    """A checkout with the launch scripts, and the folder of the stand-ins' files."""

    def __init__(self, tmp_path: pathlib.Path):
        self.state, self.checkout = tmp_path / "state", tmp_path / "checkout"
        self.state.mkdir()
        for name in ("launch", "tests"):
            (self.checkout / name).mkdir(parents=True)
        for name in ("requirements.txt", "pyproject.toml", "tests/constraints.txt", "launch/tpu_pod.sh", "launch/tpu_worker.sh",
                     "launch/supervise.sh", "launch/venv.sh"):  # fmt: skip
            shutil.copy(ROOT / name, self.checkout / name)
        for command in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message=all")):
            subprocess.run(["git", *GIT, *command], cwd=self.checkout, check=True)
        self.environment = os.environ | {
            "PATH": f"{stand_ins.folder(tmp_path)}:{os.environ['PATH']}", "STAND_INS": str(self.state), "TPU": "t",
            "POLL": "0.1", "PAUSE": "0", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
        }  # fmt: skip

    def start(self, *arguments: str, **more) -> subprocess.Popen:
        return subprocess.Popen(
            # a run of the tests in the background is deaf to SIGINT, and hands that on
            ["env", "--default-signal=INT", "bash", "launch/tpu_pod.sh", *arguments], cwd=self.checkout, env=self.environment | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, **more) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def write(self, **files: str) -> None:
        for name, lines in files.items():
            (self.state / name).write_text("".join(f"{line}\n" for line in lines.split(",")))

    def rows(self, name: str) -> list:
        path = self.state / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self) -> list[str]:
        return [row[0] for row in self.rows("calls")]


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    for host in pod.state.glob("worker*"):
        stand_ins.end_session(host, "moe_embed")


def test_from_the_request_to_the_end(pod):
    done = pod(*HERE, "--spot", "--project=p", *TRAIN)
    assert done.returncode == 0, done.stderr
    (created,) = pod.rows("creations")
    assert created == {"--zone": "us-west4-a", "--project": "p", "--quiet": "", "--node-id": "t", "--spot": "",
                       "--accelerator-type": "v5litepod-16", "--runtime-version": "v2-alpha-tpuv5-lite"}  # fmt: skip
    assert [(run["host"], run["arguments"]) for run in pod.rows("runs")] == [
        (f"worker{i}", list(TRAIN[1:])) for i in (0, 1)
    ]
    assert {run["platforms"] for run in pod.rows("runs")} == {"tpu,cpu"}
    assert "start 0 of worker0" in done.stdout  # followed
    assert "worker1" not in done.stdout
    for state in ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"):
        assert f"t is {state}." in done.stderr
    assert "done. t stands, and costs, until --delete." in done.stderr
    assert "-e .[tpu,gcs]" in (pod.state / "worker1" / "pip").read_text()
    assert not [row for row in pod.rows("calls") if "--project=p" not in row]


def test_what_git_tracks_goes_there_as_it_is_here(pod):
    (pod.checkout / "requirements.txt").write_text("changed\n")
    (pod.checkout / "new.py").write_text("")
    done = pod(*HERE, *TRAIN)
    sent = pod.state / "worker1" / "moe_embed"
    assert (sent / "requirements.txt").read_text() == "changed\n"
    assert not (sent / "new.py").exists()
    assert "not sent, as git does not track it: new.py" in done.stderr
    (sent / "runs").mkdir()  # a workdir
    subprocess.run(["git", "rm", "--quiet", "-f", "launch/tpu_pod.sh"], cwd=pod.checkout, check=True)
    shutil.copy(ROOT / "launch/tpu_pod.sh", pod.checkout / "launch/renamed.sh")
    done = subprocess.run(
        ["bash", "launch/renamed.sh", *HERE, *TRAIN], cwd=pod.checkout, env=pod.environment, check=False
    )
    assert done.returncode == 0
    assert not (sent / "launch/tpu_pod.sh").exists()
    assert (sent / "launch/venv.sh").exists()
    assert (sent / "runs").is_dir()


def test_taken_away_it_is_asked_for_again_and_the_same_command_resumes(pod):
    pod.write(actions="preempt,0")
    done = pod(*HERE, "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert len(pod.rows("creations")) == 2
    assert pod.rows("creations")[0] == pod.rows("creations")[1]
    assert pod.calls().count("delete") == 1
    assert pod.calls().count("vm scp") == 2  # the new hosts have nothing
    assert [run["arguments"] for run in pod.rows("runs")] == [list(TRAIN[1:])] * 4
    assert "t is PREEMPTED." in done.stderr
    assert "start 0 of worker0" in done.stdout
    assert "start 1 of worker0" in done.stdout


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_request_that_came_to_nothing_is_made_again(pod, state):
    pod.write(on_create="WAITING_FOR_RESOURCES,ACTIVE", states=f"{state}")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert pod.calls()[:3] == ["describe", "delete", "describe"]


def test_a_node_that_somebody_deleted_is_asked_for_again(pod):
    pod.write(states="ACTIVE", node="ABSENT")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "t is without its node." in done.stderr
    assert pod.calls()[:4] == ["describe", "vm describe", "delete", "describe"]


def test_hosts_that_cannot_be_set_up_end_it(pod):
    pod.write(setup="1")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 1
    assert done.stderr.count("not every host could be set up and started.") == 3
    assert not pod.rows("runs")


def test_a_venv_that_cannot_be_completed_in_the_session_is_a_fault_with_a_log(pod):
    """Between setup and session something changed. Without a status it would be started again and again."""
    worker = pod.checkout / "launch" / "tpu_worker.sh"
    text = worker.read_text()
    changed = text.replace("    session)\n", '    session)\n        rm .venv/stamp-*; touch "$STAND_INS/setup"\n')
    assert changed != text
    worker.write_text(changed)
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 1
    assert "the run ended with 1. t stands" in done.stderr
    assert "setting up .venv for Python" in done.stderr  # of the log
    assert not pod.rows("runs")


def test_a_request_that_always_fails_ends_it(pod):
    pod.write(on_create="FAILED")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 1
    assert "the request for v5litepod-16 failed 3 times in a row" in done.stderr


def test_a_refused_request_is_final_at_first_and_tried_again_later(pod):
    pod.write(refuse_create="no such zone")
    done = pod(*HERE, *TRAIN)
    assert (done.returncode, pod.calls()) == (1, ["describe", "create"])
    assert "no such zone" in done.stderr
    pod.write(refuse_create="quota,quota", states="SUSPENDED")
    assert pod(*HERE, *TRAIN).returncode == 0


@pytest.mark.parametrize("status", ["75", "76 76", "75 1", "1 -9"])
def test_saved_or_killed_it_starts_again_on_the_same_tpu(pod, status):
    pod.write(actions=f"{status},0")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert len(pod.rows("creations")) == 1
    assert len(pod.rows("runs")) == 4
    assert pod.calls().count("vm scp") == 1
    assert done.stdout.count("last words of worker0") == 2  # every line once


def test_a_host_that_does_not_end_with_the_others_is_stopped(pod):
    pod.write(actions="1 wait,0")
    done = pod(*HERE, *TRAIN, SETTLE="1")
    assert done.returncode == 0, done.stderr
    assert "it ended with 137; restart 1" in done.stderr
    assert len(pod.rows("runs")) == 4


def following(pod, times: int) -> bool:
    return sum("tpu_worker.sh follow" in " ".join(row) for row in pod.rows("calls")) >= times


def test_a_line_to_the_log_that_breaks_stops_no_run(pod):
    pod.write(actions="wait")
    process = pod.start(*HERE, *TRAIN, SETTLE="0")
    stand_ins.wait_until(lambda: len(pod.rows("runs")) == 2 and following(pod, 1))
    stand_ins.wait_until(
        lambda: not subprocess.run(["pkill", "-f", f"tail .*{pod.state}/worker0/"], check=False).returncode
    )
    stand_ins.wait_until(lambda: following(pod, 2))
    (pod.state / "go").write_text("")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert len(pod.rows("runs")) == 2
    assert "restart" not in err


def test_a_tpu_that_is_deleted_under_way_is_made_anew_with_all_it_needs(pod):
    pod.write(actions="wait,0")
    process = pod.start(*HERE, *TRAIN)
    stand_ins.wait_until(lambda: len(pod.rows("runs")) == 2 and following(pod, 1))
    (pod.state / "states").unlink()
    for host in pod.state.glob("worker*"):
        stand_ins.end_session(host, "moe_embed")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert pod.calls().count("vm scp") == len(pod.rows("creations")) == 2
    assert len(pod.rows("runs")) == 4


@pytest.mark.parametrize("status", ["2", "0"])
def test_a_run_that_ended_while_a_host_could_not_be_asked_is_not_run_again(pod, status):
    pod.write(actions=status, unheard="once")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == int(status), done.stderr
    assert not pod.rows("unheard")
    assert len(pod.rows("runs")) == 2


# Fails as often as the file `down` has lines, calls with `$WORD` in them; from the first look at the log on, or at once.
FAILING = """\
#!/usr/bin/env bash
case "$*" in *"tpu_worker.sh follow"*) touch "$STAND_INS/followed" ;; esac
if [ -z "$AT_ONCE" ] && [ ! -f "$STAND_INS/followed" ]; then exec {gcloud} "$@"; fi
if [[ "$*" != *"$WORD"* ]] || [ ! -s "$STAND_INS/down" ]; then exec {gcloud} "$@"; fi
sed -i 1d "$STAND_INS/down"
echo "ERROR: there is no network" >&2
exit 1
"""


def follow_with_failures(pod, failures: int, *, word: str = "", at_once: str = "") -> subprocess.CompletedProcess:
    folder = pod.state / "failing"
    folder.mkdir()
    (folder / "gcloud").write_text(FAILING.format(gcloud=shutil.which("gcloud", path=pod.environment["PATH"])))
    (folder / "gcloud").chmod(0o755)
    pod.write(down=",".join(["x"] * failures))
    return pod(*HERE, *TRAIN, PATH=f"{folder}:{pod.environment['PATH']}", WORD=word, AT_ONCE=at_once, POLL="0.01")


@pytest.mark.parametrize("word", ["", "describe", "tpu-vm ssh"])
def test_a_network_that_is_gone_for_a_while_does_not_end_it(pod, word):
    pod.write(actions="75,0")
    done = follow_with_failures(pod, 14, word=word)
    assert done.returncode == 0, done.stderr
    assert not (pod.state / "down").read_text()
    assert len(pod.rows("runs")) == 4
    assert "12 of 16 in a row" in done.stderr


@pytest.mark.parametrize("word", ["", "tpu-vm ssh"])
def test_nor_is_it_waited_for_for_ever(pod, word):
    done = follow_with_failures(pod, 99, word=word)
    assert done.returncode == 1
    assert "16 of 16 in a row" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tpu_pod: no longer following. The run goes on; the same command")


def test_before_there_is_a_run_less_is_enough(pod):
    done = follow_with_failures(pod, 99, at_once="1")
    assert done.returncode == 1
    assert len((pod.state / "down").read_text().splitlines()) == 94
    assert done.stderr.splitlines()[-1] == "tpu_pod: ERROR: there is no network (5 of 5 in a row)"


def test_it_does_not_start_again_for_ever(pod):
    pod.write(actions="75,75,75,75")
    done = pod(*HERE, *TRAIN, RESTARTS="2")
    assert done.returncode == 75
    assert len(pod.rows("runs")) == 6
    assert "after 2 restarts in a row; that is enough" in done.stderr


@pytest.mark.parametrize(("statuses", "status"), [("2", 2), ("0 1", 1), ("3 0", 3)])
def test_a_fault_ends_it_with_its_status_and_the_end_of_the_logs(pod, statuses, status):
    pod.write(actions=f"{statuses},0")
    done = pod(*HERE, *TRAIN)
    assert done.returncode == status
    assert len(pod.rows("runs")) == 2
    assert "last words of worker1" in done.stderr
    assert f"the run ended with {status}. t stands" in done.stderr


def test_said_again_it_follows_the_run_that_is_there(pod):
    pod.write(actions="wait")
    first = pod.start(*HERE, *TRAIN)
    while len(pod.rows("runs")) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    first.send_signal(signal.SIGINT)  # as Ctrl-C, which only stops following
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert out.splitlines()[-1] == "start 0 of worker0"
    assert "The run goes on; the same command follows it again" in err
    other = pod(*HERE, *TRAIN, "--more")
    assert other.returncode == 2
    assert "t runs another command: -m moe_embed.train --config=a.py --workdir=gs://b/w; wait" in other.stderr
    second = pod.start(*HERE, *TRAIN)
    time.sleep(2)
    (pod.state / "go").write_text("")
    out, err = second.communicate(timeout=60)
    assert out.splitlines()[-1] == "start 0 of worker0"
    assert second.returncode == 0, err
    assert "the run is there; following it" in err
    assert len(pod.rows("runs")) == 2
    assert len(pod.rows("creations")) == 1


AWKWARD = (
    "a b",
    "it's",
    'a "b"',
    "$HOME",
    "`id`",
    "back\\slash",
    "new\nline",
    "*",
    "ü",
    "",
    "#",
    "~",
    "a;b|c&d>e",
    "{1,2}",
    "!x",
)


def test_arguments_arrive_as_they_were_given(pod):
    done = pod(*HERE, "--", "-m", "moe_embed.train", *AWKWARD)
    assert done.returncode == 0, done.stderr
    assert [run["arguments"] for run in pod.rows("runs")] == [["-m", "moe_embed.train", *AWKWARD]] * 2
    assert pod.rows("runs")[0]["arguments"] != [*AWKWARD]


def test_a_dry_run_prints_every_command_and_runs_none(pod):
    done = pod(*HERE, *TRAIN, "--name=it's", "--dry-run")  # after -- all is the program's
    assert done.returncode == 0, done.stderr
    assert "NOT_FOUND" not in done.stderr
    dry = pod(*HERE, "--dry-run", *TRAIN)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.splitlines()[1:3] == [
        "gcloud compute tpus queued-resources describe t --zone=us-west4-a --quiet '--format=value(state.state)'",
        "gcloud compute tpus queued-resources create t --zone=us-west4-a --quiet --node-id=t --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite",
    ]  # fmt: skip
    for words in (
        "tpu-vm scp moe_embed.tar.gz t:moe_embed.tar.gz",
        "git archive",
        "tpu_worker.sh start",
        "follow 1",
        "delete t",
    ):
        assert words in dry.stdout
    assert pod.rows("calls")[-1:] != [["delete"]]
    before = len(pod.rows("calls"))
    pod(*HERE, "--dry-run", *TRAIN)
    pod("--name=t", "--zone=us-west4-a", "--delete", "--dry-run")
    assert len(pod.rows("calls")) == before
    commands = [line for line in dry.stdout.splitlines() if line.startswith("gcloud")]
    pod.write(states="ACTIVE")
    (pod.state / "worker0").mkdir(exist_ok=True)
    for line in commands:  # pasted into a shell each is taken; what it answers is another matter
        done = subprocess.run(
            ["bash", "-c", line], cwd=pod.state, env=pod.environment, capture_output=True, text=True, check=False
        )
        assert "unrecognized" not in done.stderr
        assert done.returncode != 2


def test_the_stand_in_refuses_a_flag_that_gcloud_does_not_have(pod):
    line = "gcloud compute tpus queued-resources create t --zone=z --quiet --node-id=t --preemptable"
    done = subprocess.run(line.split(), env=pod.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "ERROR: gcloud_queued-resources_create: unrecognized arguments: --preemptable\n",
    )


def test_delete(pod):
    pod.write(states="ACTIVE")
    done = pod("--name=t", "--zone=us-west4-a", "--delete")
    assert (done.returncode, pod.calls()) == (0, ["describe", "delete"])
    done = pod("--name=t", "--zone=us-west4-a", "--delete")
    assert (done.returncode, done.stderr) == (0, "tpu_pod: there is no t in us-west4-a.\n")


@pytest.mark.parametrize(("arguments", "words"), [
    ([*HERE, "--sport", *TRAIN], "does not know --sport"),
    (["--zone=z", "--type=v5e-8", *TRAIN], "--name= and --zone="),
    (["--name=t", "--zone=z", *TRAIN], "--type= is no TPU"),
    (["--name=t", "--zone=z", "--type=h100-8", *TRAIN], "--type=h100-8 is no TPU that queued resources give; it is v5e-N"),
    ([*HERE], "no command"),
    ([*HERE, "--delete", *TRAIN], "runs no command"),
])  # fmt: skip
def test_a_wrong_argument_is_one_sentence(pod, arguments, words):
    done = pod(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not pod.calls()


@pytest.mark.parametrize(("plan", "type", "runtime"), [
    ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"), ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v5p-64", "v5p-64", "v2-alpha-tpuv5"), ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"), ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
])  # fmt: skip
def test_names_and_runtimes_of_the_types(pod, plan, type, runtime):
    dry = pod("--name=t", "--zone=z", f"--type={plan}", "--dry-run", *TRAIN).stdout
    assert f"--accelerator-type={type} --runtime-version={runtime}\n" in dry
    assert (
        "--runtime-version=mine"
        in pod("--name=t", "--zone=z", f"--type={plan}", "--version=mine", "--dry-run", *TRAIN).stdout
    )
