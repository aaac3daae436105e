"""The arithmetic of a step, against figures worked out by hand and against what compiled programs do."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import estimate, program, sharding, topology
from moe_embed.config import UserError
from tests import tiny

PAPER = "configs/nomic_v2/pretrain.py:paper"


def paper(*overrides: str) -> config_lib.Config:
    """The paper's preset in 32 rows of 512, whatever it cuts them to now."""
    rows = ("--config.data.row_length=512", "--config.data.rows=32")
    return config_lib.load(PAPER, ["--config.data.sources=none", *rows, *overrides])


def of_state(config, num_devices: int) -> dict:
    mesh = sharding.imagine_mesh(config.mesh, num_devices=num_devices)
    return {"abstract_state": program.build(config, mesh).abstract_state, "mesh": mesh}


def step_of(config, num_devices=8, tokens=256.0):
    return estimate.step_of(config, num_devices=num_devices, tokens_a_pair=tokens)


def test_the_step_of_the_paper():
    step = step_of(paper())
    assert step == estimate.Step(8, 2048, 2048, 32, 2048 * 256, 2048 * 256)
    assert step.candidates == 16_384
    assert step_of(paper("--config.data.rows=8")).num_micro == 128
    assert step_of(paper(), tokens=257).num_micro == 33  # nothing spills
    assert step_of(paper("--config.data.num_negatives=3")).candidates == 4 * 16_384


def test_rows_that_follow_from_texts_must_be_given_where_none_are_read():
    with pytest.raises(UserError, match=r"config\.data\.rows=0 and config\.data\.row_length=512: .* give both"):
        step_of(paper("--config.data.rows=0"))


def test_tokens_of_a_pair_where_nobody_says():
    assert estimate.tokens_per_pair(paper()) == 256
    assert estimate.tokens_per_pair(paper("--config.data.num_negatives=10")) == 12 * 128
    assert estimate.tokens_per_pair(tiny.config()) == 8 + 24  # the caps


def test_rows_of_masked_language_modelling_are_full():
    c = config_lib.load("configs/nomic_v2/mlm.py:tiny", [])
    step = step_of(c, num_devices=1)
    assert step.tokens == step.places == c.data.batch_size * c.data.row_length
    assert step.candidates == 0


def test_flops_of_a_token_of_the_paper():
    """research: 231.3 million forwards at 128 tokens, of which 113.2 experts, 56.6 dense, 56.6 projections, 4.7 scores."""
    flops = estimate.forward_flops(paper("--config.data.row_length=512"))
    found = {name: round(value / 1e6, 1) for name, value in flops.items()}
    assert found == {"projections": 56.6, "scores": 18.9, "dense mlp": 56.6, "experts": 113.2, "router": 0.1}
    at_128 = sum(flops.values()) - flops["scores"] * 3 / 4
    assert round(at_128 / 1e6, 1) == 231.3


def test_a_dense_model_has_no_experts():
    flops = estimate.forward_flops(paper("--config.moe.num_experts=0"))
    assert (flops["experts"], flops["router"]) == (0, 0)
    assert flops["dense mlp"] == 12 * 4 * 768 * 3072


def test_model_flops_are_three_times_the_forward_pass_and_the_loss():
    c, step = paper(), step_of(paper())
    flops = estimate.model_flops(c, step)
    assert flops["experts"] == 3 * 2048 * 256 * estimate.forward_flops(c)["experts"]
    assert flops["loss"] == 6 * 2048 * 16_384 * 768
    assert sum(flops.values()) == pytest.approx(3.862e14, rel=1e-3)
    masked = config_lib.load("configs/nomic_v2/mlm.py:tiny", [])
    head = estimate.model_flops(masked, step_of(masked, 1))["mlm head"]
    places = int(np.ceil(masked.loss.mask_fraction * masked.data.row_length)) * masked.data.batch_size
    dim, vocab = masked.encoder.dim, masked.encoder.vocab_size
    assert head == 3 * places * (2 * dim * dim + 2 * dim * vocab)


@pytest.mark.parametrize("expert", [1, 8])
def test_memory_of_the_paper(expert):
    """475,292,928 parameters of four bytes, of which the experts' are split; two moments, split over data."""
    c = paper(f"--config.mesh.expert={expert}")
    bars = estimate.memory(c, step_of(c), **of_state(c, 8))
    experts = 6 * 8 * (2 * 768 * 3072 + 768)  # with their rows of the routers
    assert bars["gradients"] == 4 * (475_292_928 - experts + experts // expert)
    assert bars["parameters"] >= bars["gradients"]
    assert bars["loss"] == 8 * 2048 * 16_384
    assert bars["activations"] == estimate.activation_bytes(c) * 32 * 512
    if expert == 1:
        assert bars["optimizer"] == pytest.approx(2 * 4 * 475_292_928 / 8, rel=0.01)


def test_without_recomputation_all_activations_are_kept():
    c = paper("--config.run.recompute=false")
    assert estimate.memory(c, step_of(c), **of_state(c, 8))["activations"] == estimate.activation_bytes(c) * 2048 * 256


def test_activations_of_a_token():
    """research: 25 KB a token and dense layer, 41 KB a token and mixture."""
    none = "--config.run.recompute=false"
    both, dense = paper(none), paper(none, "--config.moe.num_experts=0")
    assert 0.5 < estimate.activation_bytes(paper()) / estimate.activation_bytes(both) < 0.7  # products' results alone
    assert estimate.activation_bytes(dense) / 12 == pytest.approx(25e3, rel=0.05)
    assert estimate.activation_bytes(both) / 6 - estimate.activation_bytes(dense) / 12 == pytest.approx(41e3, rel=0.05)


def test_bytes_sent_by_the_paper():
    """research: 3.33 GB a device for the gradients on 8; tokens dwarf that where experts are split."""
    c = paper()
    sent = estimate.wires(c, step_of(c), **of_state(c, 8))
    assert sent["gradients"] == pytest.approx(3.33e9, rel=0.01)
    assert sent["documents"] == 2 * 7 * 2048 * 768 * 4
    assert sent["experts"] == 0
    split = paper("--config.mesh.expert=8")
    moved = estimate.wires(split, step_of(split), **of_state(split, 8))
    assert moved["gradients"] == pytest.approx(3.33e9 - 7 / 4 * 6 * 8 * 2 * 768 * 3072 * 4, rel=0.01)
    assert moved["experts"] == 3 * 6 * 2 * 7 * 768 * 2 * 2048 * 256
    crossover = estimate.expert_crossover(c, step_of(c))
    assert crossover["token_bytes"] == moved["experts"]
    assert crossover["gradient_bytes_saved"] == pytest.approx(sent["gradients"] - moved["gradients"], rel=1e-3)
    assert crossover["pays_below_tokens_per_device"] < crossover["tokens_per_device"]


def test_experts_cannot_be_split_where_there_are_none_or_one_device():
    assert estimate.expert_crossover(paper("--config.moe.num_experts=0"), step_of(paper())) is None
    assert estimate.expert_crossover(paper(), step_of(paper(), num_devices=1)) is None


def test_the_ring_takes_less_memory_and_more_flops_from_some_size_on():
    c = paper()
    small, large = (estimate.loss_forms(c, step_of(dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=n))))
                    for n in (64, 2**20))  # fmt: skip
    assert large["ring"]["bytes"] < large["gathered"]["bytes"] / 100
    assert small["gathered"]["bytes"] < small["ring"]["bytes"]
    assert large["ring"]["flops"] == large["gathered"]["flops"] * 8 / 6
    at = estimate.ring_from(c, step_of(c))
    assert at == 16_384  # the paper's own batch, on 8 chips
    for pairs, form in ((at, "gathered"), (at + 8, "ring")):
        n = dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=pairs))
        assert estimate.loss_form(n, step_of(n)) == form


def test_the_memory_of_a_state_is_what_its_arrays_hold(eight_devices):
    c = tiny.config()
    mesh = sharding.make_mesh(config_lib.Mesh(data=4, expert=2), devices=eight_devices)
    prog = program.build(c, mesh)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), prog.abstract_state)
    shards = [shard for x in jax.tree.leaves(state) for shard in x.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards if shard.device == eight_devices[3])
    assert estimate.bytes_on_device(prog.abstract_state) == held
    assert estimate.expert_parts(mesh) == 2


def test_time_lies_between_the_roofs():
    v5e = topology.find("v5e-8")
    found = estimate.seconds(v5e, model=197e12, computed=4 / 3 * 197e12, moved=819e9, sent=200e9 / 4)
    assert found["roof_compute"] == pytest.approx(4 / 3)
    assert (found["roof_hbm"], found["roof_wires"]) == (1, 0.25)
    assert found["low"] == pytest.approx(1 / 0.6)
    assert found["high"] == pytest.approx(1 / 0.4 + 0.5)
    assert estimate.seconds(v5e, model=1.0, computed=1.0, moved=3 * 819e9, sent=0.0)["low"] == 3
    sending = estimate.seconds(v5e, model=1.0, computed=1.0, moved=819e9, sent=1e12)
    assert (sending["low"], sending["high"]) == (5, 1 + 2 * 5)  # what is sent counts once: over half of the wires


def test_traffic_of_a_trained_token():
    """research: 0.85 MB a token forwards, about 2.5 in training."""
    c = paper("--config.run.recompute=false")
    state = of_state(c, 8)
    both = [estimate.traffic(c, step_of(c, tokens=n)._replace(num_micro=32), **state) for n in (256.0, 512.0)]
    assert (both[1] - both[0]) / (2048 * 256) == pytest.approx(2.5e6, rel=0.02)
