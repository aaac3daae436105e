"""The kernels for a GPU, interpreted on this CPU, against a loop over rows; and lowered for a GPU, which runs in tests/gpu."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed.model import triton_grouped_matmul as kernels
from tests import cuda

TILE = 128
LAYOUTS = [(5, 200, 130), (0, 0, 7), (128, 0, 256), (0, 0, 0)]
DTYPES = [np.float32, ml_dtypes.bfloat16]


def example(counts, *, dims=(24, 48), dtype=np.float32, seed=0):
    """Grouped rows x and dy, weights, tile_expert, num_tiles, and each row's expert, -1 where it is in no group.

    Rows in no group hold zeros in a tile in use, and noise after those, as does tile_expert.
    """
    rng = np.random.default_rng(seed)
    tiles = [-(-count // TILE) for count in counts]
    total, used = sum(counts) // TILE + len(counts), sum(tiles)
    row_expert = np.full(total * TILE, -1)
    start = 0
    for expert, (count, n) in enumerate(zip(counts, tiles, strict=True)):
        row_expert[start : start + count] = expert
        start += n * TILE
    noise = (row_expert >= 0) | (np.arange(len(row_expert)) >= used * TILE)
    x, dy = (rng.normal(size=(len(row_expert), dim)) * noise[:, None] for dim in dims)
    w = rng.normal(size=(len(counts), *dims))
    tile_expert = np.append(np.repeat(np.arange(len(counts)), tiles), rng.integers(len(counts), size=total - used))
    return (*(a.astype(dtype) for a in (x, dy, w)), tile_expert.astype(np.int32), np.int32(used), row_expert)


def loop(x, dy, w, row_expert):
    """y, dx and dw of the rows that are in a group, in float64."""
    x, dy, w = (a.astype(np.float64) for a in (x, dy, w))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for i, expert in enumerate(row_expert):
        if expert >= 0:
            y[i], dx[i] = x[i] @ w[expert], w[expert] @ dy[i]
            dw[expert] += np.outer(x[i], dy[i])
    return y, dx, dw


def run(x, dy, w, tile_expert, num_tiles):
    """What the loop gives, by the kernels; all rows, also those that may hold anything."""
    tiles = jnp.array(tile_expert), jnp.array(num_tiles)
    times = functools.partial(kernels.rows_times_experts, interpret=True)
    y = times(jnp.array(x), jnp.array(w), *tiles, transposed=False)
    dx = times(jnp.array(dy), jnp.array(w), *tiles, transposed=True)
    dw = kernels.expert_gradients(jnp.array(x), jnp.array(dy), *tiles, num_experts=len(w), interpret=True)
    return y, dx, dw


def farthest(got, expected, row_expert):
    """The largest error over the rows in a group, and in dw, in shares of the largest number."""
    (y, dx, dw), (y_, dx_, dw_) = got, expected
    real = row_expert >= 0
    pairs = ((y[real], y_[real]), (dx[real], dx_[real]), (dw, dw_))
    return max(np.abs(np.asarray(a, np.float64) - b).max(initial=0) / np.abs(b).max(initial=1) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", LAYOUTS)
def test_values_and_gradients_equal_a_loop_over_rows(counts, dtype):
    x, dy, w, tile_expert, num_tiles, row_expert = example(counts, dtype=dtype)
    got = run(x, dy, w, tile_expert, num_tiles)
    assert [a.dtype for a in got] == [dtype, dtype, np.float32]
    assert [a.shape for a in got] == [dy.shape, x.shape, w.shape]
    expected = loop(x, dy, w, row_expert)
    assert farthest(got, expected, row_expert) < (
        1e-6 if dtype == np.float32 else 2**-8
    )  # bfloat16 results are rounded once
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5, atol=1e-4)  # dw is float32 in both
    for expert, count in enumerate(counts):
        assert bool(np.any(got[2][expert])) == bool(count)


@pytest.mark.parametrize("dims", [(16, 32), (24, 40), (96, 160)])
def test_dims_that_no_block_divides(dims):
    x, dy, w, tile_expert, num_tiles, row_expert = example((5, 200, 130), dims=dims)
    expected = loop(x, dy, w, row_expert)
    assert farthest(run(x, dy, w, tile_expert, num_tiles), expected, row_expert) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_many_blocks(dtype):
    """More columns, deeper sums and more tiles than one program holds."""
    x, dy, w, tile_expert, num_tiles, row_expert = example((300, 20), dims=(192, 384), dtype=dtype)
    expected = loop(x, dy, w, row_expert)
    got = run(x, dy, w, tile_expert, num_tiles)
    assert farthest(got, expected, row_expert) < (1e-6 if dtype == np.float32 else 2**-8)


def test_what_differs_is_noticed():
    x, dy, w, tile_expert, num_tiles, row_expert = example((5, 200, 130))
    expected = loop(x, dy, w, row_expert)
    other_tile = tile_expert.copy()
    other_tile[0] = 1
    assert farthest(run(x, dy, w, other_tile, num_tiles), expected, row_expert) > 0.1
    dw_of_fewer_tiles = run(x, dy, w, tile_expert, num_tiles - 1)[2]
    assert np.abs(dw_of_fewer_tiles - expected[2]).max() > 0.1
    for changed in (0, 1, 2):
        arrays = [x, dy, w]
        arrays[changed] = arrays[changed] * np.float32(1.01)
        assert farthest(run(*arrays, tile_expert, num_tiles), expected, row_expert) > 1e-3


def test_a_row_is_bitwise_the_same_beside_other_rows():
    x, dy, w, tile_expert, num_tiles, _ = example((64, 200, 130))
    y, dx, _ = run(x, dy, w, tile_expert, num_tiles)
    rng = np.random.default_rng(7)
    others = [np.concatenate([a[:1], rng.normal(size=a[1:].shape).astype(a.dtype)]) for a in (x, dy)]
    moved = [np.roll(a, 3, axis=0) for a in others]
    for beside, place in ((others, 0), (moved, 3)):
        y_, dx_, _ = run(*beside, w, tile_expert, num_tiles)
        np.testing.assert_array_equal(y_[place], y[0])
        np.testing.assert_array_equal(dx_[place], dx[0])
        assert not np.array_equal(y_[4], y[4])


def test_what_lies_in_unused_tiles_goes_nowhere():
    x, dy, w, tile_expert, num_tiles, row_expert = example((5, 0, 130))
    assert num_tiles < len(tile_expert)
    x[num_tiles * TILE :], dy[num_tiles * TILE :] = np.nan, np.nan
    assert farthest(run(x, dy, w, tile_expert, num_tiles), loop(x, dy, w, row_expert), row_expert) < 1e-6


def test_more_numbers_than_an_offset_can_count_are_refused():
    """Triton's offsets are int32: beyond them a kernel would read and write elsewhere, without a word."""
    shape = jax.ShapeDtypeStruct
    x, w, tiles = shape((2**20, 2048), jnp.bfloat16), shape((8, 2048, 64), jnp.bfloat16), shape((2**13,), jnp.int32)
    times = functools.partial(kernels.rows_times_experts, transposed=False)
    with pytest.raises(config_lib.UserError, match=r"1048576 x 2048 numbers.*config\.data\.rows"):
        jax.eval_shape(times, x, w, tiles, shape((), jnp.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(768, 3072), (384, 1536), (24, 40)])
def test_lowers_for_a_gpu(dims, dtype):
    shape = jax.ShapeDtypeStruct
    x, dy = (shape((1024, dim), dtype) for dim in dims)
    w, tiles = shape((8, *dims), dtype), (shape((8,), jnp.int32), shape((), jnp.int32))
    for transposed in (False, True):
        times = functools.partial(kernels.rows_times_experts, transposed=transposed)
        assert cuda.lowered(times, dy if transposed else x, w, *tiles).count("xla.gpu.triton") == 1
    gradients = functools.partial(kernels.expert_gradients, num_experts=8)
    assert cuda.lowered(gradients, x, dy, *tiles).count("xla.gpu.triton") == 1
    assert "xla.gpu.triton" not in cuda.lowered(lambda x: x @ x.T, x)
