"""The kernel against a loop over rows, values and gradients; a row's result does not depend on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed.model import grouped_matmul as gm

E, D, F = 3, 16, 24


def layout(counts):
    """tile_expert, num_tiles, and for each used row its expert, -1 for padding, for groups of `counts` rows."""
    tile = gm.tile_rows(sum(counts), num_experts=len(counts))
    tiles = [-(-count // tile) for count in counts]
    rows = gm.num_rows(sum(counts), num_experts=len(counts))
    tile_expert = [e for e, n in enumerate(tiles) for _ in range(n)]
    row_expert = []
    for e, (count, n) in enumerate(zip(counts, tiles, strict=True)):
        row_expert += [e] * count + [-1] * (n * tile - count)
    row_expert += [-1] * (rows - len(row_expert))
    padded = tile_expert + [len(counts) - 1] * (rows // tile - len(tile_expert))
    return jnp.array(padded), jnp.array(len(tile_expert)), np.array(row_expert)


def example(counts, seed=0):
    rng = np.random.default_rng(seed)
    tile_expert, num_tiles, row_expert = layout(counts)
    x = rng.normal(size=(len(row_expert), D)).astype(np.float32) * (row_expert >= 0)[:, None]
    w = rng.normal(size=(len(counts), D, F)).astype(np.float32)
    return jnp.array(x), jnp.array(w), tile_expert, num_tiles, row_expert


def loop(x, w, row_expert):
    y = np.zeros((len(x), F), np.float32)
    for i, e in enumerate(row_expert):
        if e >= 0:
            y[i] = x[i] @ w[e]
    return y


@pytest.mark.parametrize("counts", [(5, 200, 130), (0, 0, 7), (128, 256, 0), (0, 0, 0)])
def test_values_equal_a_loop_over_rows(counts):
    x, w, tile_expert, num_tiles, row_expert = example(counts)
    y = jax.jit(gm.grouped_matmul)(x, w, tile_expert, num_tiles)
    np.testing.assert_allclose(y, loop(np.array(x), np.array(w), row_expert), atol=1e-5)


def test_gradients_equal_those_of_the_loop():
    x, w, tile_expert, num_tiles, row_expert = example((5, 200, 130))
    cotangent = np.random.default_rng(1).normal(size=(len(x), F)).astype(np.float32) * (row_expert >= 0)[:, None]
    _, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, tile_expert, num_tiles), x, w)
    dx, dw = pull(jnp.array(cotangent))
    expected_dw = np.zeros(w.shape, np.float32)
    for i, e in enumerate(row_expert):
        if e >= 0:
            expected_dw[e] += np.outer(x[i], cotangent[i])
            np.testing.assert_allclose(dx[i], np.array(w[e]) @ cotangent[i], atol=1e-4)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-4)


def test_another_expert_for_a_tile_is_noticed():
    x, w, tile_expert, num_tiles, row_expert = example((5, 200, 130))
    y = gm.grouped_matmul(x, w, tile_expert.at[0].set(1), num_tiles)
    assert np.abs(np.array(y) - loop(np.array(x), np.array(w), row_expert)).max() > 0.1


def test_a_row_is_bitwise_the_same_beside_other_rows():
    x, w, tile_expert, num_tiles, _ = example((64, 200, 130))
    other = x.at[1:].set(jax.random.normal(jax.random.key(7), x[1:].shape))
    a = gm.grouped_matmul(x, w, tile_expert, num_tiles)[0]
    b = gm.grouped_matmul(other, w, tile_expert, num_tiles)[0]
    np.testing.assert_array_equal(a, b)


def test_num_rows_holds_every_grouping():
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.multinomial(rng.integers(0, 1500), rng.dirichlet(np.ones(8) * 0.3))
        tile, rows = (f(counts.sum(), num_experts=8) for f in (gm.tile_rows, gm.num_rows))
        assert sum(-(-c // tile) for c in counts) * tile <= rows
        assert rows % tile == rows % gm.TPU_ROWS == 0


def test_few_rows_are_in_small_tiles():
    assert gm.tile_rows(8 * 64, num_experts=8) == 128
    assert gm.tile_rows(8 * 64 - 1, num_experts=8) == 16


@pytest.mark.parametrize("counts", [(5, 200, 130), (0, 0, 7), (128, 256, 0)])
def test_megablox_is_the_loop_over_tiles(counts):
    rng = np.random.default_rng(0)
    tile_expert, num_tiles, row_expert = layout(counts)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    real = jnp.array(row_expert >= 0)[:, None]
    x, dy, w = draw(len(row_expert), 128) * real, draw(len(row_expert), 256) * real, draw(len(counts), 128, 256)
    used = slice(0, int(num_tiles) * len(row_expert) // len(tile_expert))
    for rows, transposed in ((x, False), (dy, True)):
        ours = gm.times_in_tiles(rows, w, tile_expert, num_tiles, transposed=transposed)
        theirs = gm.times_on_tpu(rows, w, tile_expert, num_tiles, transposed=transposed, interpret=True)
        np.testing.assert_allclose(theirs[used], ours[used], atol=1e-4)
        other = gm.times_on_tpu(rows, w[::-1], tile_expert, num_tiles, transposed=transposed, interpret=True)
        assert np.abs(other[used] - ours[used]).max() > 0.1
    ours = gm.gradient_in_tiles(x, dy, tile_expert, num_tiles, num_experts=len(counts))
    theirs = gm.gradient_on_tpu(x, dy, tile_expert, num_tiles, num_experts=len(counts), interpret=True)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_on_tpu_whole_lanes_take_megablox_and_other_dims_the_loop():
    for width, calls in ((128, 3), (48, 0)):
        x, w = jax.ShapeDtypeStruct((512, width), jnp.bfloat16), jax.ShapeDtypeStruct((3, width, 256), jnp.bfloat16)
        f = lambda x, w: gm.grouped_matmul(x, w, jnp.zeros(4, jnp.int32), 4).astype(jnp.float32).sum()  # noqa: E731
        lowered = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).trace(x, w).lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("@tpu_custom_call") == calls
