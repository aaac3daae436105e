"""The seam: loss and every gradient are the same on every mesh, for every cut into micro-batches, and one step trains."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import objectives, program, sharding
from moe_embed.model import encoder
from moe_embed.model import moe as moe_lib
from tests import tiny

TOLERANCE = 1e-5  # relative, float32 (CONTRIBUTING.md, "Three truths")


def run(c, *, data=1, expert=1, params=None, step=0):
    devices = jax.devices()[: data * expert]
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert), devices=devices)
    prog = program.build(c, mesh)
    state = prog.init() if params is None else None
    params = state["params"] if params is None else jax.device_put(
        params, sharding.shardings(params, column="parameter", mesh=mesh))  # fmt: skip
    batch = tiny.batches(c, num_shards=mesh.size).batch_at(step)
    with jax.default_matmul_precision("highest"):
        (loss, metrics), gradients = prog.loss_and_gradients(params, sharding.put_batch(batch.arrays, mesh=mesh))
    return jax.device_get(params), float(loss), metrics, jax.device_get(gradients)


def differences(got, expected):
    """Names of the leaves where ||a - b|| > TOLERANCE max(||b||, 1e-3 ||all||), and of those identically zero."""
    everything = np.sqrt(sum(np.sum(b**2) for b in jax.tree.leaves(expected)))
    wrong, zero = [], []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if not np.any(b):
            zero.append(jax.tree_util.keystr(path))
        if np.linalg.norm(a - b) > TOLERANCE * max(np.linalg.norm(b), 1e-3 * everything):
            wrong.append(jax.tree_util.keystr(path))
    return wrong, zero


CASES = {"plain": {}, "hard negatives": {"data": {"num_negatives": 2}, "run": {"recompute": True}}}


@pytest.fixture(scope="module", params=CASES)
def reference(request):
    c = tiny.config(**CASES[request.param])
    return c, *run(c)


@pytest.mark.parametrize(("data", "expert"), [(8, 1), (4, 2), (1, 8)])
def test_loss_and_every_gradient_are_the_same_on_every_mesh(reference, data, expert, eight_devices):
    c, params, loss, metrics, gradients = reference
    _, got_loss, got_metrics, got = run(c, data=data, expert=expert, params=params)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    wrong, zero = differences(got, gradients)
    assert not wrong
    assert not zero
    for name in metrics:
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_no_token_of_the_batch_is_near_a_tie(reference, monkeypatch):
    """Top-k is discontinuous: were a token's k-th and next logit within 1e-5, rounding would decide and it were exempt."""
    c, params, *_ = reference
    gaps, route = [], moe_lib.route

    def noting(x_TD, real_T, w_router_ED, *, top_k):
        logits_TE = jax.lax.top_k(x_TD.astype(jnp.float32) @ w_router_ED.T, top_k + 1)[0]
        gap_T = jnp.where(real_T, logits_TE[:, top_k - 1] - logits_TE[:, top_k], jnp.inf)
        jax.debug.callback(lambda gap_T: gaps.append(np.array(gap_T)), gap_T)
        return route(x_TD, real_T, w_router_ED, top_k=top_k)

    monkeypatch.setattr(moe_lib, "route", noting)
    batch = {name: jnp.array(array) for name, array in tiny.batches(c).batch_at(0).arrays.items()}
    jax.block_until_ready(jax.jit(lambda p: objectives.contrastive(p, batch, config=c))(params))
    jax.effects_barrier()
    gaps = np.concatenate(gaps)
    assert np.isfinite(gaps).sum() == 2 * int((batch["segments_MBL"] > 0).sum())  # two mixture layers
    assert not (gaps < 1e-5).sum()


def test_another_seed_of_the_weights_is_noticed(reference):
    c, _, loss, _, gradients = reference
    other = tiny.config(run={"seed": 1, "recompute": c.run.recompute}, data={"num_negatives": c.data.num_negatives})
    _, got_loss, _, got = run(other)
    assert got_loss != pytest.approx(loss, rel=1e-6)
    assert len(differences(got, gradients)[0]) == len(jax.tree.leaves(gradients))


@pytest.mark.parametrize("cut", [{"rows": 1}, {"rows": 16, "row_length": 64, "texts_per_row": 8}])
def test_loss_and_gradients_do_not_depend_on_rows_micro_batches_and_recomputing(reference, cut):
    c, params, loss, _, gradients = reference
    other = tiny.config(data=cut | {"num_negatives": c.data.num_negatives}, run={"recompute": not c.run.recompute})
    assert tiny.batches(other).sizes != tiny.batches(c).sizes
    _, got_loss, _, got = run(other, params=params)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert not differences(got, gradients)[0]


def test_experts_are_really_split_over_the_mesh(eight_devices):
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, expert=4))
    state = program.build(tiny.config(), mesh).init()
    w = state["params"]["unit"]["1"]["moe"]["w_up_REDF"]
    assert {shard.data.shape for shard in w.addressable_shards} == {(2, 2, 16, 32)}
    moments = state["optimizer"][1][0].mu["unit"]["1"]["moe"]["w_up_REDF"]
    assert {shard.data.shape for shard in moments.addressable_shards} == {(2, 2, 8, 32)}  # ZeRO: D over data too


def test_gradients_are_summed_over_devices_outside_of_every_loop(eight_devices):
    """No collective of a gradient's size inside a loop body: with experts whole, none at all."""
    c = tiny.config(data={"rows": 1}, run={"recompute": True})
    mesh = sharding.make_mesh(config_lib.Mesh(data=8, expert=1))
    prog = program.build(c, mesh)
    batch = sharding.put_batch(tiny.batches(c, num_shards=8).batch_at(0).arrays, mesh=mesh)
    text = prog.loss_and_gradients.lower(prog.abstract_state["params"], batch).compile().as_text()
    collectives_in = lambda part: [op for op in ("all-reduce(", "all-gather(", "reduce-scatter(") if op in part]  # noqa: E731
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    computations = {part.split(" ", 1)[0].lstrip("%"): part for part in text.split("\n\n")}
    assert bodies
    assert bodies <= set(computations)
    assert not {body: collectives_in(computations[body]) for body in bodies if collectives_in(computations[body])}
    assert collectives_in(text)


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_is_what_checkpoints_the_micro_batches(recompute):
    c = tiny.config(run={"recompute": recompute})
    batch = {name: jnp.array(array) for name, array in tiny.batches(c).batch_at(0).arrays.items()}
    params = jax.eval_shape(lambda: encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    text = str(jax.make_jaxpr(lambda p: objectives.contrastive(p, batch, config=c)[0])(params))
    assert ("checkpoint" in text or "remat" in text) == recompute


def test_steps_lower_the_loss_and_count():
    c = tiny.config(run={"steps": 12})
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    prog, source = program.build(c, mesh), tiny.batches(c)
    state, losses, rates = prog.init(), [], []
    batch = sharding.put_batch(source.batch_at(0).arrays, mesh=mesh)
    for _ in range(12):
        state, metrics = prog.step(state, batch)
        losses.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
    assert int(state["step"]) == 12
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(rates[:3], [0.0, 0.005, 0.01], rtol=1e-6)  # warm-up of two steps


def test_bfloat16_keeps_float32_masters_and_is_close():
    c = tiny.config()
    params, loss, _, _ = run(c)
    _, low_loss, _, gradients = run(tiny.config(encoder={"dtype": "bfloat16"}), params=params)
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert low_loss != loss
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.float32.dtype}


def test_a_dense_model_is_built_by_the_same_seam():
    _, loss, metrics, gradients = run(tiny.config(moe={"num_experts": 0}))
    assert np.isfinite(loss)
    assert "balance_loss" not in metrics
    assert "moe" not in gradients["unit"]["0"]


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"data": {"batch_size": 12}}, (8, 1), ("batch_size=12", "8 devices", "8, 16")),
        ({"moe": {"num_experts": 6}}, (1, 4), ("E=6", "not divisible by 4", "expert")),
    ],
)
def test_what_the_mesh_does_not_divide_is_said(changes, mesh, words, eight_devices):
    devices = eight_devices[: mesh[0] * mesh[1]]
    with pytest.raises(config_lib.UserError) as error:
        program.build(
            tiny.config(**changes), sharding.make_mesh(config_lib.Mesh(data=mesh[0], expert=mesh[1]), devices=devices)
        )
    for word in words:
        assert word in str(error.value)
