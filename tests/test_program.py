"""The seam: loss and every gradient are the same on every mesh, for every cut into micro-batches, and one step trains."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_embed import config as config_lib
from moe_embed import infonce, objectives, optim, program, sharding
from moe_embed.model import encoder
from moe_embed.model import moe as moe_lib
from tests import tiny

TOLERANCE = 1e-5  # relative, float32 (CONTRIBUTING.md, "Three truths")


def batches_of(c, *, num_shards=1):
    return (tiny.mlm_batches if c.loss.objective == "mlm" else tiny.batches)(c, num_shards=num_shards)


def run(c, *, data=1, expert=1, params=None):
    """Loss, metrics and gradients of the first batch on a mesh; `params` are tiny.params(c) unless given."""
    devices = jax.devices()[: data * expert]
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert), devices=devices)
    prog = program.build(c, mesh, num_ids=tiny.FakeTokenizer.num_ids)
    params = tiny.params(c) if params is None else params
    arguments = (
        jax.device_put(params, sharding.shardings(params, column="optimizer", mesh=mesh)),
        sharding.put_batch(batches_of(c, num_shards=mesh.size).batch_at(0).arrays, mesh=mesh),
    )
    with jax.default_matmul_precision("highest"):
        (loss, metrics), gradients = tiny.compiled(prog.loss_and_gradients, *arguments)(*arguments)
    return params, float(loss), metrics, jax.device_get(gradients)


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


# Each with everything at once that can meet: what is tried alone is tried in test_infonce and test_objectives.
CASES = {
    "plain": {},
    "finetuning": {
        "data": {"num_negatives": 2},
        "loss": {"dims": (16, 8), "dim_weights": (1.0, 0.5), "false_negative_margin": 0.028, "distill": "scores",
                 "distill_temperature": 0.5},
        "run": {"recompute": True},
    },
    "ring": {
        "data": {"num_negatives": 1},
        "loss": {"form": "ring", "dims": (8,), "false_negative_margin": 0.025, "bidirectional": True},
    },
    "masked language modelling": {
        "encoder": {"position": "learned", "num_positions": 34, "position_offset": 2},
        "loss": {"objective": "mlm"},
    },
}  # fmt: skip


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


def test_the_cases_hold_what_they_are_there_for(reference):
    c, _, _, metrics, gradients = reference
    batch = batches_of(c).batch_at(0).arrays
    if c.loss.distill:
        assert metrics["distill_loss"] > 0.01
        assert (
            metrics["masked_candidates"] > 2
        )  # a query: copies and shared queries are fewer, so the margin is at work
        assert len(np.unique(batch["query_id_N"])) < len(batch["query_id_N"])
        assert -1 in batch["document_id_N"]
        assert np.isnan(batch["teacher_score_N"]).any()
        assert {"contrastive_loss_16", "contrastive_loss_8"} <= set(metrics)
    if c.loss.objective == "mlm":
        assert metrics["masked"] == (batch["target_MBZ"] >= 0).sum() > 50
        assert (batch["target_MBZ"] < 0).any()
        table_PD = gradients["embedding"]["position_PD"]
        assert not table_PD[:2].any()  # before the offset
        assert table_PD[2 : 2 + batch["positions_MBL"].max() + 1].any(1).all()
    assert {"balance_loss", "router_load_RE"} <= set(metrics)


def test_nothing_of_the_batch_is_near_a_tie(reference, monkeypatch):
    """Top-k is discontinuous: were a token's k-th and next logit within 1e-5, rounding would decide and it were exempt.

    So is the margin beyond which a document is no negative.
    """
    c, params, *_ = reference
    gaps, route, texts = [], moe_lib.route, []

    def noting(x_TD, real_T, w_router_ED, *, top_k):
        logits_TE = jax.lax.top_k(x_TD.astype(jnp.float32) @ w_router_ED.T, top_k + 1)[0]
        gap_T = jnp.where(real_T, logits_TE[:, top_k - 1] - logits_TE[:, top_k], jnp.inf)
        jax.debug.callback(lambda gap_T: gaps.append(np.array(gap_T)), gap_T)
        return route(x_TD, real_T, w_router_ED, top_k=top_k)

    def noting_texts(query_ND, document_ND, ids, **terms):
        jax.debug.callback(lambda *both: texts.extend(map(np.array, both)), query_ND, document_ND)
        return infonce.infonce(query_ND, document_ND, ids, **terms)

    monkeypatch.setattr(moe_lib, "route", noting)
    for form in ("infonce", "ring_infonce"):
        monkeypatch.setattr(objectives, form, noting_texts)
    batch = {name: jnp.array(array) for name, array in batches_of(c).batch_at(0).arrays.items()}
    objective = objectives.mlm if c.loss.objective == "mlm" else objectives.contrastive
    jax.block_until_ready(tiny.compiled(jax.jit(lambda p: objective(p, batch, config=c)), params)(params))
    jax.effects_barrier()
    gaps = np.concatenate(gaps)
    assert np.isfinite(gaps).sum() == 2 * int((batch["segments_MBL"] > 0).sum())  # two mixture layers
    assert not (gaps < 1e-5).sum()
    if texts:
        query_ND, document_ND = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in texts)
        positive_ND = document_ND[:: 1 + c.data.num_negatives]
        for a, b in ((query_ND, document_ND), (positive_ND, query_ND)):
            own_N = (query_ND * positive_ND).sum(1)
            assert np.abs(a @ b.T - own_N[:, None] - c.loss.false_negative_margin).min() > 1e-5


def test_the_ring_is_the_gathered_loss(eight_devices):
    c = tiny.config(**CASES["ring"])
    gathered = dataclasses.replace(c, loss=dataclasses.replace(c.loss, form="gathered"))
    params, loss, metrics, gradients = run(gathered)
    _, got_loss, got_metrics, got = run(c, data=4, expert=2, params=params)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert not differences(got, gradients)[0]
    assert set(got_metrics) == set(metrics)
    assert float(got_metrics["masked_candidates"]) == float(metrics["masked_candidates"]) > 2


def test_one_cpu_embeds_a_unit_at_a_time_and_copies_no_parameter(eight_devices):
    c = tiny.config()
    params, rows = tiny.params(c), {name: batches_of(c).batch_at(0).arrays[name] for name in objectives.ROWS}
    found = []
    for count in (1, 2):
        mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:count])
        held = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
        ready = program.lay_out(held, mesh)
        assert isinstance(ready["unit"], list) == (count == 1)
        if count == 1:
            (stacked, second) = (tree["1"]["moe"] for tree in (held["unit"], ready["unit"][1]))
            start = stacked["w_up_REDF"].unsafe_buffer_pointer() + stacked["w_up_REDF"][0].nbytes
            assert second["w_up_EDF"].unsafe_buffer_pointer() == start
        embed = program.build_embed(c.encoder, c.moe, mesh, num_segments=c.data.texts_per_row)
        found.append(jax.device_get(embed(ready, sharding.put_batch(rows, mesh=mesh))))
    (pooled, sums), (scanned, its_sums) = found
    np.testing.assert_allclose(pooled, scanned, atol=1e-6)
    np.testing.assert_array_equal(sums.choices_E, its_sums.choices_E)
    np.testing.assert_allclose(sums.probability_E, its_sums.probability_E, rtol=1e-5)
    assert np.abs(pooled - scanned[:, ::-1]).max() > 1e-2


def test_other_weights_are_noticed(reference):
    c, _, loss, _, gradients = reference
    _, got_loss, _, got = run(c, params=tiny.params(c, seed=1))
    assert got_loss != pytest.approx(loss, rel=1e-6)
    assert len(differences(got, gradients)[0]) == len(jax.tree.leaves(gradients))


@pytest.mark.parametrize("cut", [{"rows": 1}, {"rows": 16, "row_length": 64, "texts_per_row": 8}])
def test_loss_and_gradients_do_not_depend_on_rows_micro_batches_and_recomputing(reference, cut):
    c, params, loss, _, gradients = reference
    if c.loss.objective == "mlm":  # there a row is what a batch is made of
        cut = {"rows": cut["rows"]}
    run_section = dataclasses.replace(c.run, recompute=not c.run.recompute)
    other = dataclasses.replace(c, data=dataclasses.replace(c.data, **cut), run=run_section)
    assert batches_of(other).sizes != batches_of(c).sizes
    _, got_loss, _, got = run(other, params=params)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert not differences(got, gradients)[0]


def test_experts_are_really_split_over_the_mesh(eight_devices):
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, expert=4))
    prog = program.build(tiny.config(), mesh)
    state = prog.init()
    shapes = lambda params: {  # noqa: E731
        shard.data.shape for shard in params["unit"]["1"]["moe"]["w_up_REDF"].addressable_shards
    }
    assert shapes(state["params"]) == shapes(state["optimizer"][1][0].mu) == {(2, 2, 8, 32)}  # ZeRO: D over data too
    assert shapes(prog.assemble(state["params"])) == {(2, 2, 16, 32)}


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


def test_recomputing_keeps_the_products_and_computes_what_lies_between_them_again():
    """Nothing is multiplied more than twice forwards; the error functions are computed once more."""
    counts = {}
    for recompute in (False, True):
        c = tiny.config(run={"recompute": recompute})
        batch = {name: jnp.array(array) for name, array in tiny.batches(c).batch_at(0).arrays.items()}
        params = jax.eval_shape(lambda c=c: encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
        f = jax.grad(lambda p, b, c=c: objectives.contrastive(p, b, config=c)[0])
        text = jax.jit(f).lower(params, batch).as_text()
        counts[recompute] = {op: text.count(f"{op} ") for op in ("stablehlo.dot_general", "chlo.erf", "stablehlo.sort")}
    plain, again = counts[False], counts[True]
    assert again["chlo.erf"] > plain["chlo.erf"]
    # One encoding more: qkv, out, up, down, scores and values of its two blocks, the router's, the pooling; and the scores.
    assert again["stablehlo.dot_general"] - plain["stablehlo.dot_general"] <= 14 + 2
    assert again["stablehlo.sort"] == 2 * plain["stablehlo.sort"]


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


def test_a_whole_step_with_clipping_is_the_same_for_every_cut_into_micro_batches():
    """The public code clips on another micro-step than it updates on (CONTRIBUTING.md); here the step's gradient is clipped."""
    stepped = []
    for rows, clip_norm in ((16, 0.01), (1, 0.01), (1, 1e9)):
        c = tiny.config(data={"rows": rows}, optim={"clip_norm": clip_norm, "warmup_steps": 0})
        mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
        prog = program.build(c, mesh, num_ids=tiny.FakeTokenizer.num_ids)
        made = batches_of(c)
        state = prog.init(tiny.params(c))
        with jax.default_matmul_precision("highest"):
            state, metrics = prog.step(state, sharding.put_batch(made.batch_at(0).arrays, mesh=mesh))
        assert float(metrics["gradient_norm"]) > 0.1  # clipping has something to do
        (first_moments,) = optax.tree_utils.tree_get_all_with_path(state["optimizer"], "mu")
        stepped.append((made.sizes, jax.device_get(first_moments[1])))  # (1 - beta1) times the clipped gradient
    (few, one), (many, other), (_, unclipped) = stepped
    assert few != many
    assert not differences(other, one)[0]
    assert differences(unclipped, one)[0]


def test_bfloat16_keeps_float32_masters_and_is_close():
    c = tiny.config()
    params, loss, _, _ = run(c)
    _, low_loss, _, gradients = run(tiny.config(encoder={"dtype": "bfloat16"}), params=params)
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert low_loss != loss
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.float32.dtype}
    low = tiny.config(encoder={"dtype": "bfloat16"}, loss={"form": "ring"})
    _, ring_loss, _, gradients = run(low, params=params)
    assert low_loss != ring_loss == pytest.approx(low_loss, rel=0.01)  # it multiplies rounded vectors
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.float32.dtype}


def test_a_dense_model_is_built_by_the_same_seam():
    _, loss, metrics, gradients = run(tiny.config(moe={"num_experts": 0}))
    assert np.isfinite(loss)
    assert "balance_loss" not in metrics
    assert "moe" not in gradients["unit"]["0"]


FREEZING = {"moe": {"num_experts": 0}, "loss": {"objective": "mlm"}}
# Clipping would see the piece table's gradient; and Adam would blow up the rounding of a key's bias, whose true one is 0.
PACE = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 1e9, "epsilon": 1e-3}


def trained(c, *, steps):
    """Parameters before and after some steps on four devices, and the state."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, expert=2), devices=jax.devices()[:4])
    prog, source = program.build(c, mesh, num_ids=tiny.FakeTokenizer.num_ids), batches_of(c, num_shards=4)
    before = tiny.params(c)
    state = prog.init(jax.device_put(before, sharding.shardings(before, column="parameter", mesh=mesh)))
    batches = [sharding.put_batch(source.batch_at(step).arrays, mesh=mesh) for step in range(steps)]
    step = tiny.compiled(prog.step, state, batches[0])
    for batch in batches:
        state, _ = step(state, batch)
    return before, jax.device_get(state["params"]), state


def test_a_frozen_piece_table_stays_bit_for_bit_and_the_rest_learns_as_before(eight_devices):
    """The head scores against the same table: neither of its two uses may move it."""
    moved = lambda before, after: jax.tree.map(lambda a, b: a.tobytes() != b.tobytes(), before, after)  # noqa: E731
    frozen = tiny.config(**FREEZING, optim=PACE | {"freeze_embedding": True})
    before, after, state = trained(frozen, steps=1)
    changed = moved(before, after)
    assert not changed["embedding"].pop(optim.FROZEN)
    assert all(jax.tree.leaves(changed))
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(state["optimizer"]) if optim.FROZEN in str(path)]
    assert not moments

    before, free, state = trained(tiny.config(**FREEZING, optim=PACE), steps=1)
    assert all(jax.tree.leaves(moved(before, free)))
    assert any(optim.FROZEN in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state["optimizer"]))
    del after["embedding"][optim.FROZEN], free["embedding"][optim.FROZEN]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, free)


def test_the_gradient_of_a_frozen_piece_table_is_exactly_zero():
    _, loss, _, gradients = run(tiny.config(**FREEZING, optim={"freeze_embedding": True}))
    assert np.isfinite(loss)
    assert not gradients["embedding"].pop(optim.FROZEN).any()
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_only_the_objective_that_needs_a_head_has_one():
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    params = program.build(tiny.config(loss={"objective": "mlm"}), mesh).abstract_state["params"]
    assert set(params) == {"embedding", "unit", "head"}
    assert params["head"]["b_V"].shape == (64,)
    assert set(program.build(tiny.config(), mesh).abstract_state["params"]) == {"embedding", "unit"}


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"data": {"batch_size": 12}}, (8, 1), ("batch_size=12", "8 devices", "8, 16")),
        ({"data": {"batch_size": 0}}, (1, 1), ("batch_size=0", "number of pairs", "give both")),
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
