"""The whole encoder: names, shapes, specs as a golden; packing does not matter; repeats are what they say."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.model import encoder, layers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "demo.params.txt"
SMALL = config_lib.Encoder(vocab_size=64, num_layers=4, dim=16, num_heads=2, ffn_dim=24, max_seq_length=32)
MOE = config_lib.Moe(num_experts=4)


def table(c, moe):
    """name, shape, dtype, and the partition as parameter and as optimiser state; one line each."""
    abstract = jax.eval_shape(lambda: encoder.init(c, moe, key=jax.random.key(0)))
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = "/".join(entry.key for entry in path)
        specs = (sharding.spec(name, column=column) for column in ("parameter", "optimizer"))
        lines.append(" ".join([name, str(leaf.shape), str(leaf.dtype), *map(str, specs)]))
    return "\n".join(lines) + "\n"


def test_the_parameter_table_is_the_golden_one():
    """If the change is meant: python -m tests.test_encoder writes it anew; say in the commit why."""
    c = config_lib.load("configs/demo.py")
    assert table(c.encoder, c.moe) == GOLDEN.read_text()


def test_full_size_is_the_papers():
    c = config_lib.Encoder(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=512)
    abstract = jax.eval_shape(lambda: encoder.init(c, config_lib.Moe(), key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 475_292_928


def rows(texts, length=24):
    """Texts one after another in one row."""
    ids, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for i, text in enumerate(texts):
        where = slice(start, start + len(text))
        ids[0, where], segments[0, where], positions[0, where] = text, i + 1, np.arange(len(text))
        start += len(text)
    return jnp.array(ids), jnp.array(segments), jnp.array(positions)


def embed(params, texts, length=24):
    arrays = rows(texts, length)
    hidden, _ = encoder.apply(params, *arrays, c=SMALL, moe=MOE)
    return np.array(layers.mean_pool(hidden, arrays[1], num_segments=len(texts)))[0]


def test_a_text_is_embedded_alike_wherever_it_is_packed():
    params = encoder.init(SMALL, MOE, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(4, 64, n) for n in (7, 9, 5))
    together, alone = embed(params, [a, b, c]), embed(params, [b], length=32)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-6)
    np.testing.assert_allclose(together[1], embed(params, [c, b])[1], atol=1e-6)
    assert np.abs(together[1] - together[0]).max() > 1e-2
    b[0] += 1 if b[0] < 63 else -1
    assert np.abs(embed(params, [a, b, c])[1] - alone[0]).max() > 1e-3


def test_the_scan_runs_the_repeats_in_order():
    params, arrays = encoder.init(SMALL, MOE, key=jax.random.key(0)), rows([np.arange(4, 20)])

    def by_hand(order):
        x_BLD, angles = encoder.enter(params["embedding"], arrays[0], arrays[2], c=SMALL)
        for r in order:
            unit = encoder.one_of(params["unit"], r)
            x_BLD, _ = encoder.run_unit(unit, x_BLD, arrays[1], angles, c=SMALL, moe=MOE)
        return x_BLD

    scanned, _ = encoder.apply(params, *arrays, c=SMALL, moe=MOE)
    np.testing.assert_allclose(scanned, by_hand((0, 1)), atol=1e-5)
    assert np.abs(scanned - by_hand((1, 0))).max() > 1e-2


def test_repeats_are_layers_with_weights_of_their_own():
    params = encoder.init(SMALL, MOE, key=jax.random.key(0))
    text = [np.arange(4, 20)]
    two = embed(params, text)
    half = SMALL.__class__(**{**SMALL.__dict__, "num_layers": 2})
    arrays = rows(text)
    first = {**params, "unit": jax.tree.map(lambda x: x[:1], params["unit"])}
    hidden, _ = encoder.apply(first, *arrays, c=half, moe=MOE)
    once = np.array(layers.mean_pool(hidden, arrays[1], num_segments=1))[0]
    assert np.abs(two - once).max() > 1e-2
    same = {**params, "unit": jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:1]]), params["unit"])}
    assert np.abs(embed(same, text) - two).max() > 1e-2


if __name__ == "__main__":
    c = config_lib.load("configs/demo.py")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(table(c.encoder, c.moe))
