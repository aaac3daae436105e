"""Arrays on paper first, then models: a soup of one model is that model, its ends are its members, and refusals are sentences."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import sharding, soup
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load, save
from moe_embed.model import encoder


@pytest.fixture(scope="module")
def models():
    c = config_lib.load("configs/demo.py:tiny")
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    tokenizer = tokenizer_lib.read(c.data.tokenizer)

    def model(seed):
        params = encoder.init(c.encoder, c.moe, key=jax.random.key(seed), with_head=True)
        params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
        return Model(c.encoder, c.moe, params, tokenizer, {"query": "q: "}, mesh, f"seed {seed}")

    return [model(seed) for seed in range(3)]


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


def test_average_on_paper():
    arrays = [np.array([[0.0, 4.0]], np.float32), np.array([[4.0, 8.0]], np.float32)]
    np.testing.assert_array_equal(soup.average(arrays, [0.25, 0.75]), [[3.0, 7.0]])


def test_slerp_on_paper():
    """A third of the way along a quarter circle is 30 degrees; halfway between lengths 2 and 4 the two sines stay equal."""
    arrays = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    np.testing.assert_allclose(soup.slerp(arrays, [2 / 3, 1 / 3]), [np.cos(np.pi / 6), 0.5], rtol=1e-12)
    np.testing.assert_allclose(soup.slerp([2 * arrays[0], 4 * arrays[1]], [0.5, 0.5]), np.array([2, 4]) * 2**-0.5)
    assert np.abs(soup.average(arrays, [2 / 3, 1 / 3]) - soup.slerp(arrays, [2 / 3, 1 / 3])).max() > 0.1


def test_slerp_takes_each_stacked_matrix_by_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 2, 4, 5))
    got = soup.slerp([a, b], [0.6, 0.4], num_stacked=2)
    for i, j in np.ndindex(3, 2):
        np.testing.assert_allclose(got[i, j], soup.slerp([a[i, j], b[i, j]], [0.6, 0.4]), rtol=1e-12)
    assert np.abs(got - soup.slerp([a, b], [0.6, 0.4])).max() > 1e-3


@pytest.mark.parametrize("b", [[2.0, 0.0], [-1.0, 0.0], [1.0, 1e-3], [0.0, 0.0]])
def test_slerp_is_the_average_where_there_is_no_arc(b):
    arrays = [np.array([1.0, 0.0]), np.array(b)]
    np.testing.assert_array_equal(soup.slerp(arrays, [0.3, 0.7]), soup.average(arrays, [0.3, 0.7]))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [1 / 3] * 3, [0.1, 0.9]])
def test_a_soup_of_one_model_is_that_model_bit_for_bit(models, shares):
    mixed = soup.soup([models[0]] * len(shares), shares)
    for got, expected in zip(leaves(mixed), leaves(models[0]), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float32
    assert soup.distance(models[0], mixed) == 0 < soup.distance(models[1], mixed)


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_the_ends_are_the_members_and_between_is_neither(models, method):
    a, b, _ = models
    for shares, end in (([1.0, 0.0], a), ([0.0, 1.0], b)):
        for got, expected in zip(leaves(soup.soup([a, b], shares, method=method)), leaves(end), strict=True):
            np.testing.assert_array_equal(got, expected)
    between = soup.soup([a, b], [0.5, 0.5], method=method)
    assert min(soup.distance(a, between), soup.distance(b, between)) > 0.1


def test_weights_and_the_head(models):
    mixed = soup.soup(models, [0.5, 0.25, 0.25])
    for got, a, b, c in zip(*map(leaves, (mixed, *models)), strict=True):
        np.testing.assert_allclose(got, (a.astype(np.float64) * 2 + b + c) / 4, rtol=1e-6, atol=1e-9)
    assert set(mixed.params) == {"embedding", "unit", "head"}
    one = soup.soup(models[:2], [0.5, 0.5], method="slerp").params["unit"]["1"]["moe"]["w_up_REDF"][1, 2]
    pair = [np.asarray(m.params["unit"]["1"]["moe"]["w_up_REDF"][1, 2]) for m in models[:2]]
    np.testing.assert_allclose(one, soup.slerp(pair, [0.5, 0.5]), rtol=1e-6, atol=1e-9)


def test_each_difference_is_one_sentence(models):
    a = models[0]
    other_tokenizer = dataclasses.make_dataclass("T", ["model_bytes"])(b"")
    bare = {key: value for key, value in a.params.items() if key != "head"}
    b = dataclasses.replace(
        a, encoder=dataclasses.replace(a.encoder, norm_epsilon=0.1, max_seq_length=9), origin="other",
        moe=dataclasses.replace(a.moe, top_k=1), tokenizer=other_tokenizer, prompts={}, params=bare,
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        soup.soup([a, a, b], [0.4, 0.3, 0.3])
    sentences = raised.value.args
    assert len(sentences) == 6
    for sentence, word in zip(
        sentences,
        ("max_seq_length", "norm_epsilon", "moe.top_k: 2 and 1", "tokenizers", "prompts", "head"),
        strict=True,
    ):
        assert sentence.startswith("seed 0 and other")
        assert word in sentence


def test_numbers_that_are_not_finite_and_counts(models):
    params = jax.tree.map(lambda x: x, models[0].params)
    params["embedding"]["type_YD"] = params["embedding"]["type_YD"].at[0, 0].set(np.nan)
    with pytest.raises(UserError, match="type_YD of the soup is not finite"):
        soup.soup([models[0], dataclasses.replace(models[0], params=params)], [0.5, 0.5])
    with pytest.raises(UserError, match="names 1 model; a soup needs two"):
        soup.soup(models[:1], [1.0])
    with pytest.raises(UserError, match="slerp goes from one model to another"):
        soup.soup(models, [0.4, 0.3, 0.3], method="slerp")


def test_the_verb_writes_a_model_folder(models, tmp_path, capsys):
    a, b = (str(tmp_path / name) for name in "ab")
    save(models[0], a, made_by="test")
    save(models[1], b, made_by="test")
    soup.main([f"--models={a},{b}", f"--output={tmp_path / 'c'}", "--weights=1,3"])
    said = capsys.readouterr().out
    assert "25.0% of" in said
    assert "75.0% of" in said
    for got, expected in zip(leaves(load(tmp_path / "c")), leaves(soup.soup(models[:2], [0.25, 0.75])), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["a", "b", "link"])
def test_no_model_is_replaced_by_its_soup(models, tmp_path, name):
    for model, place in zip(models, ("a", "b", "earlier"), strict=True):
        save(model, tmp_path / place, made_by="test")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    arguments = [f"--models={tmp_path / 'a'},{tmp_path / 'b'}"]
    with pytest.raises(UserError, match=f"{name} is the model that is read"):
        soup.main([*arguments, f"--output={tmp_path / name}"])
    for model, place in zip(models, "ab", strict=False):
        assert all(map(np.array_equal, leaves(load(tmp_path / place)), leaves(model)))
    soup.main([*arguments, f"--output={tmp_path / 'earlier'}"])  # not one of them: it is replaced
    assert not all(map(np.array_equal, leaves(load(tmp_path / "earlier")), leaves(models[2])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models=a"], "names 1 model"),
        (["--models=a,b", "--weights=1"], "--weights=1 must be 2 numbers"),
        (["--models=a,b", "--weights=1,x"], "must be 2 numbers"),
        (["--models=a,b", "--weights=0,0"], "not all 0"),
        (["--models=a,b", "--weights=-1,2"], "0 or more"),
        (["--models=a,b", "--weights=1e308,1e308"], "must be 2 numbers"),
        (["--models=a,b,c", "--method=slerp"], "--models names 3"),
        (["--models=a,b"], "a holds no model"),
    ],
)
def test_refusals(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        soup.main([*arguments, f"--output={tmp_path / 'o'}"])
    assert not (tmp_path / "o").exists()


def test_a_fault_exits_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moe_embed.soup", "--models=a", f"--output={tmp_path / 'o'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "names 1 model" in done.stderr
    assert "Traceback" not in done.stderr
