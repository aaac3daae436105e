"""Train steps compiled for TPUs that are not here. Collected where libtpu is installed (tests/conftest.py)."""

import dataclasses
import itertools
import json

import pytest

from moe_embed import ahead, plan, sharding, topology
from moe_embed import config as config_lib

pytestmark = pytest.mark.aot
TINY = "configs/nomic_v2/pretrain.py:tiny"


def tiny(*overrides: str) -> config_lib.Config:
    small = ("encoder.num_layers=2", "data.rows=4", "data.row_length=128", "data.batch_size=64", "run.recompute=true")
    return config_lib.load(TINY, [*(f"--config.{change}" for change in (*small, *overrides)), plan.UNREAD])


@pytest.fixture(scope="module")
def made():
    return plan.plan(tiny(), topology.find("v5e-4"), tokens_a_pair=64)


def test_a_step_is_compiled_for_a_slice_and_counted(made):
    assert made["hbm"]["source"] == "compiled"
    assert made["hbm"]["peak"] < made["hbm"]["limit"] == 15.75 * 2**30
    assert made["fits"] is True
    assert made["verdict"].startswith("fits: ")
    assert 1.0 < made["flops"]["ratio"] < 2.5  # so small a model: encoding twice, and tiles that are half empty
    assert made["flops"]["compiled"] == made["flops"]["ratio"] * made["flops"]["model"]
    assert not any("NOT COUNTED" in note for note in made["notes"])
    assert json.loads(json.dumps(made)) == made
    assert max(map(len, plan.lines(made, title="tiny"))) <= 100


def test_gradients_are_summed_once(made):
    """Twice (n - 1) / n of the parameters, as sums and gathers; a sum in each of the micro-batches would be far more."""
    assert made["step"]["micro_batches"] > 1
    parameters = 4 * made["parameters"]["total"]
    assert 1.4 * parameters < made["collectives"]["total"] < 2.4 * parameters
    assert made["collectives_source"] == "compiled"


def test_what_does_not_fit_is_a_verdict():
    c = tiny("data.rows=16384", "data.batch_size=131072", "loss.form=ring")
    made = plan.plan(c, topology.find("v5e-4"), tokens_a_pair=64)
    assert made["fits"] is False
    assert made["hbm"]["peak"] > made["hbm"]["limit"]
    assert made["verdict"].startswith("does not fit: ")
    assert "; try --" in made["verdict"]
    assert made["flops"]["compiled"] is None or made["hbm"]["source"] == "compiled"


@pytest.mark.parametrize(
    ("name", "expert"), [("v5p-128", 8), ("v5p-128", 2), ("v6e-16", 2), ("v6e-64", 4), ("v5e-8", 2)]
)
def test_experts_need_no_whole_axis_of_a_slice(name, expert):
    """A v5p of 64 chips is 4 x 4 x 4, a v6e of 16 is 4 x 4: jax.make_mesh has no place for 8 or 2 experts there."""
    mesh = sharding.make_mesh(config_lib.Mesh(expert=expert), devices=ahead.devices(topology.find(name)))
    assert mesh.shape["expert"] == expert
    for row in mesh.devices:  # experts are next to each other
        steps = [
            sum(abs(a - b) for a, b in zip(one.coords, two.coords, strict=True)) for one, two in itertools.pairwise(row)
        ]
        assert max(steps) <= 2


def test_a_slice_that_libtpu_does_not_know_is_a_sentence():
    odd = dataclasses.replace(topology.find("v5e-4"), slice="v5e:3x5")
    with pytest.raises(config_lib.UserError, match="libtpu cannot plan for v5e-4"):
        ahead.devices(odd)


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v6e-16", "v5p-64", "v4-16"])
def test_slices_have_the_chips_of_their_name(name):
    found = topology.find(name)
    assert len(ahead.devices(found)) == found.num_chips


@pytest.mark.slow
def test_flops_do_not_depend_on_how_a_batch_is_cut():
    whole, cut = (
        plan.plan(
            tiny(f"data.rows={rows}", "data.batch_size=8192", "moe.num_experts=2"),
            topology.find("v5e-4"),
            tokens_a_pair=64,
        )
        for rows in (1024, 128)
    )
    assert (whole["step"]["micro_batches"], cut["step"]["micro_batches"]) == (1, 8)
    assert cut["flops"]["compiled"] == pytest.approx(whole["flops"]["compiled"], rel=0.02)
