"""The loss against a ten-line numpy loop: hard negatives, duplicates, both directions, and over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.infonce import NONE, Ids, Teacher, infonce

N, D = 16, 8


def run(q, d, ids, *, query_ids=None, teacher=NONE, **loss):
    """infonce of Loss(**loss); queries are all different unless `query_ids` says otherwise."""
    query_ids = np.arange(N, dtype=np.int32) if query_ids is None else query_ids
    return infonce(q, d, Ids(ids, query_ids), c=config_lib.Loss(**loss), teacher=teacher)


def example(h=0, seed=0, duplicates=False):
    rng = np.random.default_rng(seed)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    ids = np.arange(N * (1 + h), dtype=np.int32)
    if duplicates:
        ids[(1 + h) * 3] = ids[0]
    if h:
        ids[1 + h + 1] = -1  # the second query lacks its first hard negative
    return unit(rng.normal(size=(N, D))), unit(rng.normal(size=(N * (1 + h), D))), ids


def loop(q, d, ids, *, temperature, h=0, bidirectional=False):
    losses, hits = [], 0
    for i in range(N):
        label = i * (1 + h)
        allowed = [j for j in range(len(d)) if ids[j] >= 0 and (j == label or ids[j] != ids[label])]
        scores = {j: float(q[i] @ d[j]) / temperature for j in allowed}
        loss = np.log(sum(np.exp(s) for s in scores.values())) - scores[label]
        if bidirectional:
            back = [k for k in range(N) if k == i or ids[k * (1 + h)] != ids[label]]
            loss = (loss + np.log(sum(np.exp(q[k] @ d[label] / temperature) for k in back)) - scores[label]) / 2
        losses.append(loss)
        hits += max(scores, key=scores.get) == label
    return np.mean(losses), hits / N


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_the_loop(h, bidirectional, duplicates):
    q, d, ids = example(h, duplicates=duplicates)
    loss, metrics = run(q, d, ids, temperature=0.1, bidirectional=bidirectional)
    expected, accuracy = loop(q, d, ids, temperature=0.1, h=h, bidirectional=bidirectional)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(accuracy)


def test_a_swapped_document_is_noticed():
    q, d, ids = example()
    expected, _ = loop(q, d, ids, temperature=0.1)
    loss, _ = run(q, d[::-1], ids, temperature=0.1)
    assert abs(float(loss) - expected) > 1e-2


def test_an_unmasked_duplicate_is_noticed():
    q, d, ids = example(duplicates=True)
    d[3] = d[0]
    masked, _ = run(q, d, ids, temperature=0.1)
    unmasked, _ = run(q, d, ids, temperature=0.1, mask_duplicates=False)
    assert float(unmasked) - float(masked) > 1e-3


def by_hand(q, d, ids, query_ids, *, temperature, h, margin=2.0, dims=None, weights=None, bidirectional=False):
    """The whole loss as loops over queries, candidates and prefixes."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    full, total = unit(q) @ unit(d).T, 0.0
    terms = {q.shape[1]: 1.0} | dict(
        zip(dims or [], weights or [1.0] * 9, strict=False)
    )  # the whole vector always counts
    for dim, weight in terms.items():
        cosine = unit(q[:, :dim]) @ unit(d[:, :dim]).T / temperature
        losses = []
        for i in range(N):
            label = i * (1 + h)
            candidates = []
            for j in range(len(d)):
                copy = ids[j] == ids[label] or (j % (1 + h) == 0 and query_ids[j // (1 + h)] == query_ids[i])
                if j == label or (ids[j] >= 0 and not copy and full[i, j] <= full[i, label] + margin):
                    candidates.append(j)
            loss = np.log(sum(np.exp(cosine[i, j]) for j in candidates)) - cosine[i, label]
            if bidirectional:
                back = [k for k in range(N) if k == i or (
                    ids[k * (1 + h)] != ids[label] and query_ids[k] != query_ids[i]
                    and full[k, label] <= full[i, label] + margin)]  # fmt: skip
                loss = (loss + np.log(sum(np.exp(cosine[k, label]) for k in back)) - cosine[i, label]) / 2
            losses.append(loss)
        total += weight * np.mean(losses)
    return total


TERMS = {
    "same query": {},
    "margin": {"margin": 0.1},
    "prefixes": {"dims": (8, 3, 5), "weights": (1.0, 0.5, 2.0)},
    "prefixes beside the whole vector": {"dims": (3, 5), "weights": (0.5, 2.0)},
    "all, both ways": {"margin": 0.2, "dims": (8, 4), "weights": (1.0, 0.3), "bidirectional": True},
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("h", [0, 2])
def test_every_term_equals_the_loop_and_leaving_it_out_is_noticed(terms, h):
    q, d, ids = example(h, duplicates=True)
    q, d = 3 * q, 0.5 * d  # any norm
    query_ids = np.arange(N, dtype=np.int32)
    query_ids[5], d[7 * (1 + h)] = query_ids[7], q[5]  # of one query: its answer is no negative of the other
    terms = TERMS[terms]
    expected = by_hand(q, d, ids, query_ids, temperature=0.1, h=h, **terms)
    names = {"margin": "false_negative_margin", "weights": "dim_weights"}
    loss_terms = {names[name] if name in names else name: value for name, value in terms.items()}
    loss, metrics = run(q, d, ids, query_ids=query_ids, temperature=0.1, **loss_terms)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_loss"], loss, rtol=1e-6)
    assert float(metrics["masked_candidates"]) > 0
    plain, _ = run(q, d, ids, query_ids=query_ids if loss_terms else None, temperature=0.1)
    assert abs(float(plain) - expected) > 1e-4


def test_a_positive_is_never_masked_and_a_zero_margin_leaves_only_easier_documents():
    q, d, ids = example()
    d[0] = -q[0]  # its positive is the worst document there is: all others score above it
    loss, metrics = run(q, d, ids, temperature=0.1, false_negative_margin=0.0)
    assert np.isfinite(float(loss))
    assert float(metrics["masked_candidates"]) * N >= N - 1


@pytest.mark.parametrize("distill", ["scores", "embeddings"])
def test_distillation_equals_the_loop_and_is_zero_for_a_teacher_that_agrees(distill):
    h, (q, d, ids) = 2, example(2)
    rng = np.random.default_rng(1)
    score = rng.uniform(-1, 1, N * (1 + h)).astype(np.float32)
    score[[4, 6, 7, 8]] = np.nan  # one document without a score; a whole query without
    theirs_q, theirs_d = (rng.normal(size=(N, 5)).astype(np.float32) for _ in "qd")
    if distill == "scores":
        teacher, students = Teacher(score_N=jnp.array(score)), np.einsum("nsd,nd->ns", d.reshape(N, 1 + h, D), q)
        teachers = score.reshape(N, 1 + h)
    else:
        teacher, students = Teacher(query_ND=jnp.array(theirs_q), document_ND=jnp.array(theirs_d)), q @ d[:: 1 + h].T
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        teachers = unit(theirs_q) @ unit(theirs_d).T
    expected = []
    for t, s in zip(teachers, students, strict=True):
        known = ~np.isnan(t)
        p = np.exp(t[known] / 0.3) / np.exp(t[known] / 0.3).sum()
        own = np.exp(s[known] / 0.1) / np.exp(s[known] / 0.1).sum()
        expected.append((p * np.log(p / own)).sum() if known.sum() > 1 else 0.0)
    settings = {"temperature": 0.1, "distill": distill, "distill_temperature": 0.3, "distill_weight": 0.5}
    loss, metrics = run(q, d, ids, teacher=teacher, **settings)
    np.testing.assert_allclose(metrics["distill_loss"], np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["contrastive_loss"] + 0.5 * metrics["distill_loss"], rtol=1e-6)
    own = Teacher(score_N=jnp.array(np.einsum("nsd,nd->ns", d.reshape(N, 1 + h, D), q).reshape(-1)))
    same = own if distill == "scores" else Teacher(query_ND=jnp.array(q), document_ND=jnp.array(d[:: 1 + h]))
    _, agreed = run(q, d, ids, teacher=same, **settings | {"distill_temperature": 0.1})
    assert abs(float(agreed["distill_loss"])) < 1e-5 < np.mean(expected)


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("h", [0, 2])
def test_loss_and_gradients_are_the_same_on_every_mesh(data, expert, h, eight_devices):
    q, d, ids = example(h, duplicates=True)
    query_ids = np.arange(N, dtype=np.int32) // 2
    theirs = np.random.default_rng(3).normal(size=(N, 5)).astype(np.float32)
    terms = {"temperature": 0.05, "bidirectional": True, "dims": (8, 4), "false_negative_margin": 0.3,
             "distill": "embeddings"}  # fmt: skip

    def f(q, d, ids, query_ids, theirs):
        teacher = Teacher(query_ND=theirs, document_ND=theirs[:, ::-1])
        return run(q, d, ids, query_ids=query_ids, teacher=teacher, **terms)[0]

    expected, (dq, dd) = jax.value_and_grad(f, argnums=(0, 1))(q, d, ids, query_ids, theirs)
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert), devices=eight_devices[: data * expert])
    rows = sharding.spec("x_ND", column="activation"), sharding.spec("x_N", column="activation")
    in_specs = (rows[0], rows[0], rows[1], rows[1], rows[0])
    sharded = sharding.on_each_device(f, mesh=mesh, in_specs=in_specs, out_specs=sharding.EVERYWHERE)
    sharded = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))
    loss, (got_dq, got_dd) = sharded(*map(jnp.array, (q, d, ids, query_ids, theirs)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(got_dq, dq, atol=1e-6)
    np.testing.assert_allclose(got_dd, dd, atol=1e-6)


def test_large_scores_stay_finite():
    q, _, ids = example()
    assert np.isfinite(float(run(q, q, ids, temperature=1e-4)[0]))
    assert np.isfinite(float(run(q, -q, ids, temperature=1e-4)[0]))
