"""The grouped matmul of grouped_matmul.py as two Pallas kernels for Triton: rows times experts, and the experts' gradient.

Same layout of rows: whole tiles, at least 16 rows each, `tile_expert` ascending over the tiles in use. Block sizes are pinned, a sum runs in
one program from its first term to its last: no split sums, no atomics, no tuning at run time, so a row's result depends on
nothing but that row and its expert, and a gradient is the same in every run. Tiles not in use are left at once.

Products of float32 are in full float32 (no TF32), of bfloat16 on tensor cores; both accumulate in float32. A dim that 16 does not
divide is padded with zeros beforehand (a copy; no real model's dims are such), so that no kernel masks.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_embed import config as config_lib

SMALLEST = 16  # of a side of a product in Triton


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program holds: rows x columns of the result, and how much of the sum it takes at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # loads under way: (rows + columns) * depth numbers of shared memory each


# Three stages of 32 KiB fit the shared memory of every GPU since Ampere. float32 has no tensor core: smaller, else registers spill.
BFLOAT16 = Blocks(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
FLOAT32 = Blocks(rows=64, columns=64, depth=32, num_warps=4, num_stages=3)


def rows_times_experts(
    x_XD: jax.Array,
    w_EDF: jax.Array,
    tile_expert: jax.Array,
    num_tiles: jax.Array,
    *,
    transposed: bool,
    interpret=False,
) -> jax.Array:
    """y[i] = x[i] @ w[expert of i's tile] for the first `num_tiles` tiles; rows after them hold anything.

    Args:
      x_XD: float32 or bfloat16, in tiles of X / len(tile_expert) rows. With `transposed` it is x_XF, and y[i] = x[i] @ w[...].T.
      w_EDF: in the dtype of x.
      tile_expert: int32, one for each tile. num_tiles: int32 [].
      interpret: run as plain jax, for tests on a CPU.

    Returns:
      y_XF (`transposed`: y_XD) in the dtype of x.
    """
    width = w_EDF.shape[1 if transposed else 2]
    x, w = _padded(x_XD, dims=(1,)), _padded(w_EDF, dims=(1, 2))
    num_rows, total = x.shape
    padded_width = w.shape[1 if transposed else 2]
    _check_size(num_rows, padded_width)
    blocks = _blocks(x.dtype)
    tile_rows = num_rows // len(tile_expert)
    rows, columns, depth = (
        min(blocks.rows, tile_rows),
        _divisor(padded_width, blocks.columns),
        _divisor(total, blocks.depth),
    )

    def kernel(x_ref, w_ref, tile_expert_ref, num_tiles_ref, y_ref):
        row, column = pl.program_id(1) * rows, pl.program_id(0) * columns
        tile = jax.lax.div(row, tile_rows)

        @pl.when(tile < num_tiles_ref[0])
        def _():
            expert = tile_expert_ref[tile]

            def add(k, y):
                part = pl.ds(k * depth, depth)
                x = x_ref[pl.ds(row, rows), part]
                if transposed:
                    return y + _dot(x, w_ref[expert, pl.ds(column, columns), part].T)
                return y + _dot(x, w_ref[expert, part, pl.ds(column, columns)])

            y = jax.lax.fori_loop(0, total // depth, add, jnp.zeros((rows, columns), jnp.float32))
            y_ref[pl.ds(row, rows), pl.ds(column, columns)] = y.astype(y_ref.dtype)

    y = pl.pallas_call(
        kernel,
        # Columns change fastest: programs that run at the same time share their rows, and one expert's matrix, in the cache.
        grid=(padded_width // columns, num_rows // rows),
        out_shape=jax.ShapeDtypeStruct((num_rows, padded_width), x.dtype),
        compiler_params=_params(blocks),
        interpret=interpret,
        name="rows_times_experts",
    )(x, w, tile_expert.astype(jnp.int32), num_tiles.astype(jnp.int32).reshape(1))
    return y[:, :width]


def expert_gradients(
    x_XD: jax.Array,
    dy_XF: jax.Array,
    tile_expert: jax.Array,
    num_tiles: jax.Array,
    *,
    num_experts: int,
    interpret=False,
) -> jax.Array:
    """dw[e] = the sum over e's tiles, in their order, of x.T @ dy: float32 dw_EDF; zeros for an expert without tiles.

    Args:
      x_XD, dy_XF: of one dtype, float32 or bfloat16; zero in the padding rows of a tile in use.
      tile_expert: int32, one for each tile, ascending over the tiles in use. num_tiles: int32 [].
      interpret: run as plain jax, for tests on a CPU.
    """
    dims = x_XD.shape[1], dy_XF.shape[1]
    x, dy = _padded(x_XD, dims=(1,)), _padded(dy_XF, dims=(1,))
    blocks = _blocks(x.dtype)
    rows, columns = _divisor(x.shape[1], blocks.rows), _divisor(dy.shape[1], blocks.columns)
    tile_rows = len(x) // len(tile_expert)
    depth = min(blocks.depth, tile_rows)
    in_use = jnp.arange(tile_expert.shape[0]) < num_tiles
    tiles_E = ((tile_expert[:, None] == jnp.arange(num_experts)) & in_use[:, None]).sum(0, dtype=jnp.int32)
    end_E = jnp.cumsum(tiles_E, dtype=jnp.int32) * (tile_rows // depth)
    start_E = end_E - tiles_E * (tile_rows // depth)

    def kernel(x_ref, dy_ref, start_ref, end_ref, dw_ref):
        expert = pl.program_id(2)
        row, column = pl.ds(pl.program_id(1) * rows, rows), pl.ds(pl.program_id(0) * columns, columns)

        def add(k, dw):
            part = pl.ds(k * depth, depth)
            return dw + _dot(x_ref[part, row].T, dy_ref[part, column])

        zeros = jnp.zeros((rows, columns), jnp.float32)
        dw_ref[expert, row, column] = jax.lax.fori_loop(start_ref[expert], end_ref[expert], add, zeros)

    dw = pl.pallas_call(
        kernel,
        grid=(dy.shape[1] // columns, x.shape[1] // rows, num_experts),
        out_shape=jax.ShapeDtypeStruct((num_experts, x.shape[1], dy.shape[1]), jnp.float32),
        compiler_params=_params(blocks),
        interpret=interpret,
        name="expert_gradients",
    )(x, dy, start_E, end_E)
    return dw[:, : dims[0], : dims[1]]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: else Triton rounds float32 to TF32. It says nothing to bfloat16, whose products are exact in float32.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _blocks(dtype) -> Blocks:
    return FLOAT32 if dtype == jnp.float32 else BFLOAT16


def _params(blocks: Blocks) -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages)


def _divisor(size: int, limit: int) -> int:
    """The largest power of two that divides `size`, at most `limit`."""
    return min(size & -size, limit)


def _padded(x: jax.Array, *, dims: tuple[int, ...]) -> jax.Array:
    """Zeros at the end of `dims`, up to a multiple of SMALLEST."""
    widths = [(0, -size % SMALLEST if dim in dims else 0) for dim, size in enumerate(x.shape)]
    _check_size(*(size + after for size, (_, after) in zip(x.shape, widths, strict=True)))
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _check_size(*shape: int) -> None:
    if math.prod(shape) >= 2**31:
        raise config_lib.UserError(
            f"the mixture's kernel for GPUs has {' x '.join(map(str, shape))} numbers in one array, but counts them in 31 "
            "bits; make config.data.rows smaller."
        )
