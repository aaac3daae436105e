"""Rows grouped by expert times that expert's matrix: the one kernel of a dropless mixture of experts.

Each group is padded to whole tiles of `tile_rows` rows, so a tile has one expert and every row is reduced by a product of one
fixed shape: a row's result does not depend on its neighbours or on the number of devices. Unused tiles cost nothing.
The kernel is that of the platform a program is lowered for: megablox, which comes with jax, on TPU; a pair for Triton on
CUDA (capability.py says from which GPU on); a loop over tiles elsewhere. `jax.lax.ragged_dot` computes all experts on CPU, CUDA and under several libtpu versions; it
is not used.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_embed.model import capability, triton_grouped_matmul

TILE = 128  # rows; a multiple of every platform's lane count
SMALL_TILE = 16  # where an expert has few rows: a query alone would else be computed with many rows of padding
LANES = 128  # megablox wants dims of whole lanes
TPU_ROWS = 256  # rows that megablox takes at once; it visits those that two experts share twice
TPU_BLOCK = 5 << 19  # bytes of an expert's matrix that stand in VMEM at once, of which there are two


def tile_rows(num_choices: int, *, num_experts: int) -> int:
    """Rows of a tile: TILE, or SMALL_TILE if the experts have less than half of that on average."""
    return SMALL_TILE if 2 * num_choices < num_experts * TILE else TILE


def num_rows(num_choices: int, *, num_experts: int) -> int:
    """Rows X that hold `num_choices` rows in any grouping into `num_experts` whole-tile groups; a multiple of TPU_ROWS."""
    tile = tile_rows(num_choices, num_experts=num_experts)
    return -(-(num_choices // tile + num_experts) * tile // TPU_ROWS) * TPU_ROWS


@jax.custom_vjp
def grouped_matmul(x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, num_tiles: jax.Array) -> jax.Array:
    """y[i] = x[i] @ w[expert of i's tile] for the first `num_tiles` tiles; rows after them may hold anything.

    Args:
      x_XD: rows, in tiles of X / len(tile_expert).
      w_EDF: a matrix for each expert, in the dtype of x.
      tile_expert: int32, the expert of each tile, ascending.
      num_tiles: int32 [], how many tiles are in use.

    Returns:
      y_XF in the dtype of x. Gradients of w are accumulated in float32, tile after tile: a fixed order.
    """
    return _forward(x_XD, w_EDF, tile_expert, num_tiles)[0]


def _forward(x_XD, w_EDF, tile_expert, num_tiles):
    return _times(x_XD, w_EDF, tile_expert, num_tiles, transposed=False), (x_XD, w_EDF, tile_expert, num_tiles)


def _backward(residuals, dy_XF):
    x_XD, w_EDF, tile_expert, num_tiles = residuals
    dx_XD = _times(dy_XF, w_EDF, tile_expert, num_tiles, transposed=True)
    on = lambda kernel: functools.partial(kernel, num_experts=len(w_EDF))  # noqa: E731
    dw_EDF = lax.platform_dependent(
        x_XD, dy_XF, tile_expert, num_tiles,
        tpu=on(gradient_on_tpu if _whole_lanes(w_EDF) else gradient_in_tiles),
        cuda=on(capability.choose(triton_grouped_matmul.expert_gradients, otherwise=gradient_in_tiles)),
        default=on(gradient_in_tiles),
    )  # fmt: skip
    return dx_XD, dw_EDF.astype(w_EDF.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)


def _times(rows, w_EDF, tile_expert, num_tiles, *, transposed: bool) -> jax.Array:
    on = lambda kernel: functools.partial(kernel, transposed=transposed)  # noqa: E731
    return lax.platform_dependent(
        rows, w_EDF, tile_expert, num_tiles,
        tpu=on(times_on_tpu if _whole_lanes(w_EDF) else times_in_tiles),
        cuda=on(capability.choose(triton_grouped_matmul.rows_times_experts, otherwise=times_in_tiles)),
        default=on(times_in_tiles),
    )  # fmt: skip


def _whole_lanes(w_EDF: jax.Array) -> bool:
    return w_EDF.shape[1] % LANES == w_EDF.shape[2] % LANES == 0


def _product(a, b, contract) -> jax.Array:
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _tiles_E(tile_expert, num_tiles, num_experts: int) -> jax.Array:
    """How many of the tiles in use each expert has."""
    used = jnp.arange(tile_expert.shape[0]) < num_tiles
    return ((tile_expert == jnp.arange(num_experts)[:, None]) & used).sum(1, dtype=jnp.int32)


def times_in_tiles(rows, w_EDF, tile_expert, num_tiles, *, transposed: bool) -> jax.Array:
    """x_XD times w, or dy_XF times w transposed: loops over experts and, as often as there are, over an expert's tiles."""
    tiles, width = rows.reshape(len(tile_expert), -1, rows.shape[1]), w_EDF.shape[1 if transposed else 2]
    end_E = jnp.cumsum(_tiles_E(tile_expert, num_tiles, len(w_EDF)))

    def of_expert(e, y):
        w = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)  # here, not in the inner loop: XLA:CPU copies it
        body = lambda i, y: y.at[i].set(_product(tiles[i], w, ((1,), (1 if transposed else 0,))).astype(y.dtype))  # noqa: E731
        return lax.fori_loop(jnp.where(e > 0, end_E[e - 1], 0), end_E[e], body, y)

    y = lax.fori_loop(0, len(w_EDF), of_expert, jnp.zeros((*tiles.shape[:2], width), tiles.dtype))
    return y.reshape(rows.shape[0], width)


def gradient_in_tiles(x_XD, dy_XF, tile_expert, num_tiles, *, num_experts: int) -> jax.Array:
    """dw_EDF float32: for each expert the sum of x^T dy over its tiles."""
    x_tiles, dy_tiles = (rows.reshape(len(tile_expert), -1, rows.shape[1]) for rows in (x_XD, dy_XF))

    def body(i, dw_EDF):
        return dw_EDF.at[tile_expert[i]].add(_product(x_tiles[i], dy_tiles[i], ((0,), (0,))))

    shape = num_experts, x_XD.shape[1], dy_XF.shape[1]
    return lax.fori_loop(0, num_tiles, body, jnp.zeros(shape, jnp.float32))


def _columns(size: int, *, rows: int, itemsize: int) -> int:
    """The most columns, whole lanes that divide `size`, of which `rows` fit into a block."""
    lanes = [n for n in range(LANES, size + 1, LANES) if size % n == 0]
    return max([n for n in lanes if n * rows * itemsize <= TPU_BLOCK], default=LANES)


def times_on_tpu(rows, w_EDF, tile_expert, num_tiles, *, transposed: bool, interpret: bool = False) -> jax.Array:
    """`times_in_tiles` by megablox. The summed dim is one block: a matrix stays in VMEM from tile to tile."""
    summed, width = rows.shape[1], w_EDF.shape[1 if transposed else 2]
    tiling = (TPU_ROWS, summed, _columns(width, rows=summed, itemsize=rows.dtype.itemsize))
    sizes = _tiles_E(tile_expert, num_tiles, len(w_EDF)) * (len(rows) // len(tile_expert))
    return gmm(rows, w_EDF, sizes, rows.dtype, tiling, transpose_rhs=transposed, interpret=interpret)


def gradient_on_tpu(x_XD, dy_XF, tile_expert, num_tiles, *, num_experts: int, interpret: bool = False) -> jax.Array:
    """`gradient_in_tiles` by megablox."""
    d, f = x_XD.shape[1], dy_XF.shape[1]
    rows = _columns(d, rows=LANES, itemsize=4)
    tiling = (TPU_ROWS, rows, _columns(f, rows=rows, itemsize=4))
    sizes = _tiles_E(tile_expert, num_tiles, num_experts) * (len(x_XD) // len(tile_expert))
    return tgmm(x_XD.swapaxes(0, 1), dy_XF, sizes, jnp.float32, tiling, interpret=interpret)
