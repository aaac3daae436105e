"""Folding and two experts on paper, then whole random models: what starts equal, and that each part of it is needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import hf_layout, sharding, upcycle
from moe_embed.config import Encoder, Moe, UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load, save
from moe_embed.model import encoder as encoder_lib
from moe_embed.model import layers

TEXTS = [*upcycle.sample_texts()[:40:2], "x"]
SIZES = {"vocab_size": 16_064, "num_layers": 4, "dim": 16, "num_heads": 2, "ffn_dim": 24, "max_seq_length": 48}
ENCODERS = {
    "rotary": Encoder(**SIZES),
    "learned": Encoder(**SIZES, position="learned", num_positions=50, position_offset=2),
}


def dense(kind="rotary", *, seed=0, **changes) -> Model:
    """A random dense model in which no bias, gamma or beta is at a value that hides a mistake; `changes` by flat name."""
    c, moe, rng = ENCODERS[kind], Moe(num_experts=0), np.random.default_rng(seed)
    params = jax.tree.map(np.asarray, encoder_lib.init(c, moe, key=jax.random.key(seed), with_head=True))
    for name, array in hf_layout.flatten(params):
        *keys, last = name.split("/")
        node = params
        for key in keys:
            node = node[key]
        if last.startswith(("b_", "bias_")):
            node[last] = np.float32(rng.normal(0.2, 0.5, array.shape))
        elif last.startswith("scale_"):
            node[last] = np.float32(rng.uniform(0.5, 1.5, array.shape))
        if name in changes:
            node[last] = np.float32(np.broadcast_to(changes[name], array.shape))
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    tokenizer = tokenizer_lib.read(upcycle.SAMPLE.parent.parent / "tokenizer.model")
    return Model(c, moe, params, tokenizer, {"document": "search_document: "}, mesh, "a model")


def up(model, moe=None, **options):
    moe = Moe(num_experts=4, top_k=2, every=2) if moe is None else moe
    return upcycle.upcycle(model, moe, **({"texts": TEXTS, "noise": 0.0, "say": lambda line: None} | options))


def changed(model, name, change) -> Model:
    """The model with one of the mixtures' arrays changed."""
    params = jax.tree.map(lambda x: x, model.params)
    mixture = params["unit"][str(model.moe.every - 1)]["moe"]
    mixture[name] = change(mixture[name])
    return dataclasses.replace(model, params=params)


def mixture_of(model) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in model.params["unit"][str(model.moe.every - 1)]["moe"].items()}


def test_two_experts_on_paper():
    layer = {"mlp/w_up_DF": np.array([[1.0], [2.0]]), "mlp/b_up_F": np.array([8.0]),
             "mlp/w_down_FD": np.array([[3.0, 4.0]]), "mlp/b_down_D": np.array([5.0, 6.0])}  # fmt: skip
    layer = {name: np.float32(array) for name, array in layer.items()}
    rng = np.random.default_rng(0)
    mixture = upcycle.experts_of(layer, Moe(num_experts=2, top_k=1), v_D=np.array([1 / 4, 1 / 8]),
                                 mean_D=np.array([3.0, 2.0]), noise=0.0, rng=rng)  # fmt: skip
    np.testing.assert_array_equal(mixture["w_up_EDF"], [[[3.0], [3.0]]] * 2)  # 1 + 8 / 4, 2 + 8 / 8
    np.testing.assert_array_equal(mixture["w_down_EFD"], [[[6.0, 8.0]]] * 2)  # one expert of weight 1/2
    np.testing.assert_array_equal(mixture["b_out_D"], [5.0, 6.0])
    np.testing.assert_allclose(mixture["w_router_ED"] @ [3, 2], 0, atol=1e-10)
    assert 0 < np.abs(mixture["w_router_ED"]).max() < 1e-3
    copies = upcycle.copies_of(layer, Moe(num_experts=2, top_k=1), rng=rng)
    np.testing.assert_array_equal(copies["w_up_EDF"], [layer["mlp/w_up_DF"]] * 2)
    np.testing.assert_array_equal(copies["w_down_EFD"], [layer["mlp/w_down_FD"]] * 2)
    np.testing.assert_array_equal(copies["b_out_D"], [0, 0])


def test_routing_on_paper():
    """Logits log 1, log 2, log 5 of one token, log 5, log 2, log 1 of another: the two best have 7/8 of the weight."""
    mass, load_E = upcycle.routing(np.eye(2), np.log([[1, 5], [2, 2], [5, 1]]), top_k=2)
    assert mass == pytest.approx(7 / 8)
    np.testing.assert_allclose(load_E, [0.75, 1.5, 0.75])


def test_where_each_layer_goes():
    place = np.arange(6.0)
    arrays = {"embedding/word_VD": place, "unit/0/norm1/scale_RD": place[:, None], "unit/0/mlp/b_up_RF": place[:, None]}
    out = upcycle.expand(arrays, [{"b_out_D": np.array([10.0])}, {"b_out_D": np.array([11.0])}], every=3)
    assert set(out) == {"embedding/word_VD", *(f"unit/{b}/norm1/scale_RD" for b in range(3)), "unit/0/mlp/b_up_RF",
                        "unit/1/mlp/b_up_RF", "unit/2/moe/b_out_RD"}  # fmt: skip
    for block in range(3):
        np.testing.assert_array_equal(out[f"unit/{block}/norm1/scale_RD"][:, 0], [block, block + 3])
    np.testing.assert_array_equal(out["unit/1/mlp/b_up_RF"][:, 0], [1, 4])
    np.testing.assert_array_equal(out["unit/2/moe/b_out_RD"][:, 0], [10, 11])
    np.testing.assert_array_equal(upcycle.layer_of(arrays, 4)["mlp/b_up_F"], [4])


@pytest.mark.parametrize("kind", ENCODERS)
def test_hidden_states_lead_to_the_models_own_vectors(kind):
    model = dense(kind)
    (_, x_TD), *_ = reversed(list(upcycle.hidden_states(model, TEXTS[:1])))
    p = upcycle.layer_of({k: np.asarray(v) for k, v in hf_layout.flatten(model.params)}, 3)
    up_TF = layers.gelu(x_TD @ p["mlp/w_up_DF"] + p["mlp/b_up_F"])
    y_TD = layers.standardise(x_TD + up_TF @ p["mlp/w_down_FD"] + p["mlp/b_down_D"], epsilon=1e-5)
    vector_D = (y_TD * p["norm2/scale_D"] + p["norm2/bias_D"]).mean(0)
    expected = model.encode(TEXTS[:1], "document")[0]
    np.testing.assert_allclose(vector_D / jnp.linalg.norm(vector_D), expected, atol=1e-6)
    assert np.abs(model.encode(TEXTS[:1])[0] - expected).max() > 1e-3  # the prompt is part of it


@pytest.mark.parametrize(
    ("kind", "moe"),
    [
        ("rotary", Moe(num_experts=4, top_k=2, every=2)),
        ("learned", Moe(num_experts=4, top_k=2, every=2)),
        ("learned", Moe(num_experts=8, top_k=1, every=1)),
        ("rotary", Moe(num_experts=3, top_k=3, every=4)),
    ],
)
def test_ours_starts_as_the_dense_model_and_no_part_of_it_can_go(kind, moe):
    model = dense(kind)
    sparse = up(model, moe)
    expected = model.encode(TEXTS, "document")
    off = lambda m: np.abs(m.encode(TEXTS, "document") - expected).max()  # noqa: E731
    assert off(sparse) < 2e-4
    assert upcycle.cosines(model, sparse, TEXTS)[1] > 1 - 1e-6
    assert (sparse.moe, sparse.encoder, sparse.prompts) == (moe, model.encoder, model.prompts)
    if moe.top_k < moe.num_experts:
        assert off(changed(sparse, "w_down_REFD", lambda w: w * moe.top_k / moe.num_experts)) > 1e-2
    assert off(changed(sparse, "b_out_RD", jnp.zeros_like)) > 1e-2
    dense_up_RDF = model.params["unit"]["0"]["mlp"]["w_up_RDF"][moe.every - 1 :: moe.every]
    assert off(changed(sparse, "w_up_REDF", lambda w: jnp.broadcast_to(dense_up_RDF[:, None], w.shape))) > 1e-2


def test_what_is_no_mlp_is_carried_over_bit_for_bit():
    model = dense()
    sparse = up(model, noise=0.1)
    for name in ("embedding", "head"):
        jax.tree.map(np.testing.assert_array_equal, sparse.params[name], model.params[name])
    for block in range(2):
        for part in ("attention", "norm1", "norm2", *(["mlp"] if block == 0 else [])):
            for name, array in sparse.params["unit"][str(block)][part].items():
                np.testing.assert_array_equal(array, model.params["unit"]["0"][part][name][block::2])
    fresh = encoder_lib.init(model.encoder, sparse.moe, key=jax.random.key(0), with_head=True)
    assert jax.tree.map(jnp.shape, sparse.params) == jax.tree.map(jnp.shape, fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(sparse.params)} == {np.dtype(np.float32)}


def test_contrastors_is_something_else_and_says_so():
    model, said = dense(), []
    sparse = up(model, preset="contrastors", say=said.append)
    assert upcycle.cosines(model, sparse, TEXTS)[0] < 0.99
    mixture, mlp = mixture_of(sparse), model.params["unit"]["0"]["mlp"]
    for expert in range(4):
        np.testing.assert_array_equal(mixture["w_up_REDF"][:, expert], mlp["w_up_RDF"][1::2])
        np.testing.assert_array_equal(mixture["w_down_REFD"][:, expert], mlp["w_down_RFD"][1::2])
    assert not mixture["b_out_RD"].any()
    assert mixture["w_router_RED"].std() == pytest.approx(0.02, rel=0.3)
    assert len(said) == 2
    assert "top-2 mass 0.5" in said[0]


def test_noise_sums_to_zero_and_has_the_size_asked_for():
    model = dense()
    without, with_noise = mixture_of(up(model)), mixture_of(up(model, noise=0.1))
    for name, dense_name in (("w_up_REDF", "w_up_RDF"), ("w_down_REFD", "w_down_RFD")):
        delta = with_noise[name] - without[name]
        np.testing.assert_allclose(delta.mean(1), 0, atol=1e-6)
        rms = np.sqrt(np.square(model.params["unit"]["0"]["mlp"][dense_name][1::2]).mean((1, 2)))
        scale = 2 if name == "w_down_REFD" else 1  # E / k
        np.testing.assert_allclose(delta.std((1, 2, 3)), 0.1 * scale * rms * (1 - 1 / 4) ** 0.5, rtol=0.1)
    np.testing.assert_array_equal(with_noise["w_router_RED"], without["w_router_RED"])


def test_more_noise_costs_more_cosine():
    model = dense()
    mean = [upcycle.cosines(model, up(model, noise=noise), TEXTS)[0] for noise in (0.0, 0.02, 0.2)]
    assert mean[0] > mean[1] > mean[2]
    assert mean[1] > 0.9999 > mean[2]


def test_equal_experts_that_meet_the_same_tokens_learn_the_same_until_noise_parts_them():
    model, everyone = dense(), Moe(num_experts=4, top_k=4, every=2)
    ids = model.tokenizer.encode(TEXTS, max_length=24)[0]
    tokens = np.stack([text for text in ids if len(text) == 24])
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    target = jax.random.normal(jax.random.key(0), (*tokens.shape, 16))

    def unlike(sparse):
        def loss(params):
            hidden = encoder_lib.apply(
                params, tokens, np.ones_like(tokens), positions, c=sparse.encoder, moe=sparse.moe
            )
            return (hidden[0] * target).sum()

        gradient = np.asarray(jax.grad(loss)(sparse.params)["unit"]["1"]["moe"]["w_up_REDF"])
        return np.linalg.norm(gradient - gradient.mean(1, keepdims=True)) / np.linalg.norm(gradient)

    assert unlike(up(model, everyone)) < 1e-3
    assert unlike(up(model, everyone, noise=0.1)) > 1e-2


def test_the_seed_is_all_the_chance_there_is():
    a, b, other = (mixture_of(up(dense(), noise=0.1, seed=seed)) for seed in (1, 1, 2))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert np.abs(a["w_up_REDF"] - other["w_up_REDF"]).max() > 1e-2
    assert np.abs(a["w_up_REDF"][0] - a["w_up_REDF"][1]).max() > 1e-2
    assert np.abs(np.diff(a["w_router_RED"], axis=0)).max() > 1e-5  # nor do layers share a stream


def test_a_router_across_the_mean_spreads_tokens():
    """Hidden states far from the origin: a router that sees the mean sends most of them one way."""
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(2000, 16)) + 3
    layer = {name: np.zeros(shape, np.float32) for name, shape in
             (("mlp/w_up_DF", (16, 2)), ("mlp/b_up_F", 2), ("mlp/w_down_FD", (2, 16)), ("mlp/b_down_D", 16))}  # fmt: skip
    loads = []
    for mean_D in (x_TD.mean(0), np.zeros(16)):
        mixture = upcycle.experts_of(
            layer, Moe(), v_D=np.zeros(16), mean_D=mean_D, noise=0.0, rng=np.random.default_rng(1)
        )
        loads.append(upcycle.routing(x_TD, mixture["w_router_ED"], top_k=2)[1].max())
    assert loads[0] < 1.5 < 2.5 < loads[1]


def test_a_whole_model_with_a_fitted_direction():
    """beta 0 in every layer; a large attention bias at one dim makes the states nearly constant there."""
    spike = np.eye(16)[0] * 60
    changes = {"unit/0/norm1/bias_RD": 0.0, "unit/0/attention/b_out_RD": spike, "unit/0/norm1/scale_RD": 1.0}
    model, said = dense(**changes), []
    sparse = up(model, say=said.append)
    assert all("fitted" in line for line in said)
    assert upcycle.cosines(model, sparse, TEXTS)[1] > 0.999
    with pytest.raises(UserError, match="layer 1's first MLP bias cannot be folded"):
        up(dense(**changes | {"unit/0/attention/b_out_RD": 0.0}))


@pytest.mark.parametrize(
    ("moe", "options", "words"),
    [
        (Moe(num_experts=4, every=3), {}, "--every=3 does not divide the 4 layers of a model"),
        (Moe(num_experts=4, every=0), {}, "--every=0"),
        (Moe(num_experts=2, top_k=3), {}, "--top_k=3 must be between 1 and --num_experts=2"),
        (Moe(num_experts=0, top_k=0), {}, "--top_k=0"),
        (Moe(num_experts=4), {"noise": -0.1}, "--noise=-0.1"),
        (Moe(num_experts=4), {"noise": float("nan")}, "--noise=nan"),
        (Moe(num_experts=4), {"seed": -1}, "--seed=-1"),
    ],
)
def test_refusals(moe, options, words):
    with pytest.raises(UserError, match=words):
        up(dense(), moe, **options)


def test_a_fresh_model_has_no_bias_to_fold():
    changes = {"unit/0/norm1/bias_RD": 0.0, "unit/0/mlp/b_up_RF": 0.0}
    model, said = dense(**changes), []
    assert upcycle.cosines(model, up(model, say=said.append), TEXTS)[1] > 1 - 1e-6
    assert "no bias to fold" in said[0]


def test_a_mixture_and_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="is a mixture of 4 experts already"):
        up(up(dense()))
    with pytest.raises(UserError, match="not finite") as raised:
        up(dense(**{"unit/0/mlp/b_down_RD": np.inf}))
    assert "unit/0/mlp/b_down_RD" in str(raised.value)


def test_the_dense_model_is_not_replaced(tmp_path):
    save(dense("learned"), tmp_path / "dense", made_by="test")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="dense is the model that is read"):
        upcycle.main([f"--model={tmp_path / 'dense'}", f"--output={tmp_path / 'dense'}", "--every=4"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    upcycle.main([f"--model={tmp_path / 'dense'}", f"--output={tmp_path / 'moe'}", "--every=4"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} != before


@pytest.mark.parametrize("preset", ["ours", "contrastors"])
def test_the_verb(preset, tmp_path, capsys):
    model = dense("learned")
    save(model, tmp_path / "dense", made_by="test")
    arguments = [f"--model={tmp_path / 'dense'}", f"--output={tmp_path / 'moe'}", f"--preset={preset}", "--every=4"]
    upcycle.main(arguments)
    said = capsys.readouterr().out
    sparse = load(tmp_path / "moe")
    assert sparse.moe == Moe(num_experts=8, top_k=2, every=4)
    least = upcycle.cosines(model, sparse, TEXTS)[1]
    assert (least > 0.999) == (preset == "ours")
    assert ("does not keep the dense model's function" in said) == (preset == "contrastors")
    assert "layer  3: " in said
    assert f"{hf_layout.num_parameters(sparse.encoder, sparse.moe)[1]:,}" in said
    if preset == "contrastors":
        with pytest.raises(UserError, match="--noise belongs to --preset=ours"):
            upcycle.main([*arguments, "--noise=0.1"])
