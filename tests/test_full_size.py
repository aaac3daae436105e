"""The 475M model of the paper, really: one training step of it on a CPU, in a process of its own whose memory is read."""

import json
import subprocess
import sys

import pytest

STEP = """
import json, resource, sys
import jax
from moe_embed import config as config_lib
from moe_embed import program, sharding
from tests import tiny

small = ("data.batch_size=2", "data.rows=2", "data.row_length=32", "data.query_length=32", "data.document_length=32",
         "data.num_negatives=0", "data.sources=random", "data.texts_per_row=4", "encoder.dtype=float32")
c = config_lib.load("configs/nomic_v2/finetune.py:paper", [f"--config.{change}" for change in small])
mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
prog = program.build(c, mesh)
state, metrics = prog.step(prog.init(), sharding.put_batch(tiny.batches(c).batch_at(0).arrays, mesh=mesh))
total, active = program.count_parameters(prog.abstract_state["params"], c)
print(json.dumps({"total": total, "active": active, "loss": float(metrics["loss"]), "step": int(state["step"]),
                  "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


@pytest.mark.slow
def test_one_step_of_the_whole_model_fits_in_twelve_gib():
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["total"], found["active"]) == (475_292_928, 305_423_616)
    assert found["step"] == 1
    assert found["loss"] > 0
    assert found["peak_gib"] < 12
