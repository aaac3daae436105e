"""The ring against the gathered loss: values, metrics and gradients, with every term, over every number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import ring_infonce as ring_lib
from moe_embed import sharding
from moe_embed.infonce import Ids, Teacher, infonce
from moe_embed.ring_infonce import ring_infonce

N, D = 32, 12
TERMS = {
    "plain": {},
    "unmasked": {"mask_duplicates": False},
    "margin": {"false_negative_margin": 0.15},
    "both ways": {"bidirectional": True},
    "prefixes": {"dims": (8, 3), "dim_weights": (1.0, 0.5)},
    "all": {"bidirectional": True, "dims": (8, 3), "dim_weights": (0.3, 2.0), "false_negative_margin": 0.15},
}


def example(h: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(N, D)).astype(np.float32) * rng.uniform(0.5, 2, size=(N, 1)).astype(np.float32)
    d = np.repeat(q, 1 + h, axis=0) + rng.normal(size=(N * (1 + h), D)).astype(np.float32)
    ids, query_ids = np.arange(len(d), dtype=np.int32), np.arange(N, dtype=np.int32)
    ids[(1 + h) * 29] = ids[(1 + h) * 3]  # a copy, on another device
    query_ids[[5, 30]] = query_ids[17]
    if h:
        ids[(1 + h) * 4 + 1] = -1
        ids[(1 + h) * 6 + h] = ids[(1 + h) * 20]
    return q, d, ids, query_ids


def of(loss_fn, terms):
    c = config_lib.Loss(temperature=0.1, **terms)

    return lambda q, d, ids, query_ids: loss_fn(q, d, Ids(ids, query_ids), c=c)


def graded(f):
    return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)


def on_mesh(f, devices, arguments):
    mesh = sharding.make_mesh(config_lib.Mesh(**devices), devices=jax.devices()[: devices["data"] * devices["expert"]])
    rows, numbers = sharding.spec("x_ND", column="activation"), sharding.spec("x_N", column="activation")
    in_specs = (rows, rows, numbers, numbers)
    f = sharding.on_each_device(f, mesh=mesh, in_specs=in_specs, out_specs=sharding.EVERYWHERE)
    return jax.jit(graded(f))(*map(jnp.array, arguments))


def same(got, expected) -> None:
    ((loss, metrics), gradients), ((loss_, metrics_), gradients_) = got, expected
    np.testing.assert_allclose(loss, loss_, rtol=1e-6)
    assert set(metrics) == set(metrics_)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_[name], rtol=2e-6, err_msg=name)
    for a, b in zip(gradients, gradients_, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_one_device_in_tiles_is_the_gathered_loss(terms, h, monkeypatch):
    monkeypatch.setattr(ring_lib, "TILE", 12)
    example_ = example(h)
    expected = graded(of(infonce, terms))(*example_)
    same(jax.jit(graded(of(ring_infonce, terms)))(*example_), expected)
    other = example(h, seed=1)
    with pytest.raises(AssertionError):
        same(graded(of(ring_infonce, terms))(*other), expected)


@pytest.mark.parametrize("devices", [(2, 1), (4, 1), (8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("terms", ["plain", "all"])
def test_round_the_ring_it_is_the_one_device_loss(devices, terms, monkeypatch, eight_devices):
    monkeypatch.setattr(ring_lib, "TILE", 6)
    terms, devices, example_ = TERMS[terms], dict(zip(("data", "expert"), devices, strict=True)), example(2)
    same(on_mesh(of(ring_infonce, terms), devices, example_), graded(of(infonce, terms))(*example_))


def test_a_term_left_out_is_noticed():
    full = graded(of(ring_infonce, TERMS["all"]))(*example(2))
    for name in TERMS["all"]:
        terms = {key: value for key, value in TERMS["all"].items() if key != name and key != "dim_weights"}
        with pytest.raises(AssertionError):
            same(graded(of(ring_infonce, terms))(*example(2)), full)


def test_distillation_is_refused_by_name():
    q, d, ids, query_ids = example(0)
    with pytest.raises(config_lib.UserError, match="has no distillation"):
        ring_infonce(q, d, Ids(ids, query_ids), c=config_lib.Loss(), teacher=Teacher(query_ND=q, document_ND=d))


@pytest.mark.parametrize("terms", ["plain", "all"])
def test_vectors_in_bfloat16_are_multiplied_as_such_and_summed_in_float32(terms):
    """The same as float32 vectors of those values but for the rounding of p and of the gradients: 2^-9."""
    q, d, ids, query_ids = example(1)
    q, d = (jnp.array(x, jnp.bfloat16) for x in (q, d))
    f = graded(of(ring_infonce, TERMS[terms]))
    (loss, _), gradients = f(q, d, ids, query_ids)
    (loss_, _), gradients_ = f(q.astype(jnp.float32), d.astype(jnp.float32), ids, query_ids)
    np.testing.assert_allclose(loss, loss_, rtol=1e-6)
    for a, b in zip(gradients, gradients_, strict=True):
        assert a.dtype == jnp.bfloat16
        assert 0 < np.linalg.norm(a.astype(jnp.float32) - b) <= 2**-7 * np.linalg.norm(b)


def test_the_gradient_is_scaled_by_what_is_made_of_the_loss():
    """Computed with the loss on one device and in one direction, it is for a factor of 1 until that is known."""
    f = of(ring_infonce, TERMS["prefixes"])
    (_, gradients), (_, threefold) = graded(f)(*example(1)), graded(lambda *x: (3 * f(*x)[0], {}))(*example(1))
    for a, b in zip(gradients, threefold, strict=True):
        assert np.linalg.norm(3 * a - b) <= 1e-6 * np.linalg.norm(b)


def test_large_scores_stay_finite():
    q, _, ids, query_ids = example(0)
    for d in (q, -q):
        loss, _ = ring_infonce(q, d, Ids(ids, query_ids), c=config_lib.Loss(temperature=1e-4))
        assert np.isfinite(float(loss))
