"""What an environment means: alone, one of several by flags or variables, a task of Slurm, a host of a TPU slice."""

import pytest

from moe_embed import config as config_lib
from moe_embed import job as job_lib

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "TPU_SKIP_MDS_QUERY": "1"}  # fmt: skip
ALONE = {"TPU_SKIP_MDS_QUERY": "1"}  # as jax leaves it on a machine without TPU chips
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", **ALONE}


@pytest.mark.parametrize(
    "environ",
    [
        ALONE,
        {**ALONE, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {**EXPLICIT, "JAX_NUM_PROCESSES": "1"},
        {**SLURM, "JAX_NUM_PROCESSES": "1"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # the step's number counts, not the job's
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},  # a batch script, no srun
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set it", **ALONE},
        {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
    ],
)
def test_a_single_process_has_nothing_to_join(environ):
    assert job_lib.find(environ) is None


def test_explicit_words_come_first_and_flags_before_variables():
    expected = job_lib.Job(found="flags or JAX_* variables", count=2, process=1, coordinator="h:1", method="deactivate")
    assert job_lib.find(EXPLICIT) == expected
    assert job_lib.find({**SLURM, **EXPLICIT}) == expected
    job = job_lib.find(EXPLICIT, coordinator="g:2", num_processes=3, process_id=0)
    assert (job.coordinator, job.count, job.process) == ("g:2", 3, 0)
    assert job_lib.find(ALONE, coordinator="g:2", num_processes=3, process_id=0) == job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": None}, "but not --process_id or JAX_PROCESS_ID; set all three"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "not --coordinator or JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": None, "JAX_NUM_PROCESSES": None}, "JAX_COORDINATOR_ADDRESS=h:1 is set, but not"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": "one"}, "whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "h"}, "must be HOST:PORT"),
    ],
)
def test_half_of_it_is_refused(changes, words):
    environ = {name: value for name, value in {**EXPLICIT, **changes}.items() if value is not None}
    with pytest.raises(config_lib.UserError, match=words):
        job_lib.find(environ)


@pytest.fixture
def no_gpus(monkeypatch):
    monkeypatch.setattr(job_lib.glob, "glob", lambda pattern: [])


def test_slurm_says_what_was_found(no_gpus):
    job = job_lib.find(SLURM)
    assert (job.count, job.process, job.coordinator, job.method) == (4, 3, None, "slurm")
    assert job.found == "Slurm: job 7, task 3 of 4"
    assert job_lib.find({**SLURM, "JAX_COORDINATOR_ADDRESS": "h:1"}).coordinator == "h:1"


@pytest.mark.parametrize(
    ("tasks", "changes", "expected"),
    [
        ("1(x4)", {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, tuple(range(8))),  # one a node: all, not GPU 0 alone
        ("2(x2)", {"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),  # one a GPU
        ("2(x2)", {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}, (0,)),  # --gpus-per-task=1: its own is 0
        ("2(x2)", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, (0, 1)),  # --gpus-per-task=2
        ("1,3", {"CUDA_VISIBLE_DEVICES": "0,1,2"}, (1,)),  # three on this node, the second of the list
        ("2(x2)", {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),  # said otherwise
        ("2(x2)", {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, None),
        ("2(x2)", {}, None),  # none seen
    ],
)
def test_slurm_tasks_take_their_gpus(tasks, changes, expected, no_gpus):
    assert job_lib.find({**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, **changes}).local_devices == expected


def test_slurm_tasks_that_would_leave_or_share_gpus_are_refused(no_gpus):
    with pytest.raises(
        config_lib.UserError, match=r"2 tasks on .* each sees the same 8 GPUs; start one .*node=8.*node=1"
    ):
        job_lib.find({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    with pytest.raises(config_lib.UserError, match="the same 1 GPUs"):
        job_lib.find({**SLURM, "CUDA_VISIBLE_DEVICES": "0"})


def test_tpu_hosts_are_counted_and_the_rest_is_left_to_jax(monkeypatch):
    job = job_lib.find({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})
    assert (job.count, job.process, job.coordinator, job.method) == (4, None, None, None)
    assert job_lib.find({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}).count == 2
    knows = {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '3'\n"}
    monkeypatch.setattr(job_lib, "_metadata", lambda name: knows[name] if name in knows else None)
    assert job_lib.find({}).count == 6
    del knows["tpu-env"]
    assert job_lib.find({}).count == 2
    knows["worker-network-endpoints"] = "x:y:10.0.0.1"
    assert job_lib.find({}) is None  # v5e-8: one host
    knows.clear()
    assert job_lib.find({}) is None
