"""Rows grouped by expert times that expert's matrix: the one kernel of a dropless mixture of experts.

Each group is padded to whole tiles of TILE rows, so a tile has one expert and every row is reduced by a product of one
fixed shape: a row's result does not depend on its neighbours or on the number of devices. Unused tiles cost nothing.
`jax.lax.ragged_dot` computes all experts on CPU, CUDA and under several libtpu versions; it is not used.
"""

import jax
import jax.numpy as jnp

TILE = 128  # rows; a multiple of every platform's lane count


def num_rows(num_choices: int, *, num_experts: int) -> int:
    """Rows X that hold `num_choices` rows in any grouping into `num_experts` whole-tile groups."""
    return (num_choices // TILE + num_experts) * TILE


@jax.custom_vjp
def grouped_matmul(x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, num_tiles: jax.Array) -> jax.Array:
    """y[i] = x[i] @ w[tile_expert[i // TILE]] for the first `num_tiles` tiles, zero after them.

    Args:
      x_XD: rows, X a multiple of TILE.
      w_EDF: a matrix for each expert, in the dtype of x.
      tile_expert: int32 [X / TILE], the expert of each tile.
      num_tiles: int32 [], how many tiles are in use.

    Returns:
      y_XF in the dtype of x. Gradients of w are accumulated in float32, tile after tile: a fixed order.
    """
    return _forward(x_XD, w_EDF, tile_expert, num_tiles)[0]


def _tiles(x: jax.Array) -> jax.Array:
    return x.reshape(-1, TILE, x.shape[-1])


def _product(a, b, contract) -> jax.Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _each_tile(tiles, w_EDF, tile_expert, num_tiles, *, contract):
    """tiles[i] times its expert's matrix over the dims `contract`, in a loop whose length is the tiles in use."""
    width = w_EDF.shape[2 if contract[1] == (0,) else 1]  # the dim of [D, F] that is not summed over

    def body(i, y):
        w = jax.lax.dynamic_index_in_dim(w_EDF, tile_expert[i], keepdims=False)
        return y.at[i].set(_product(tiles[i], w, contract).astype(y.dtype))

    y = jnp.zeros((*tiles.shape[:2], width), tiles.dtype)
    return jax.lax.fori_loop(0, num_tiles, body, y)


def _forward(x_XD, w_EDF, tile_expert, num_tiles):
    y = _each_tile(_tiles(x_XD), w_EDF, tile_expert, num_tiles, contract=((1,), (0,)))
    return y.reshape(x_XD.shape[0], -1), (x_XD, w_EDF, tile_expert, num_tiles)


def _backward(residuals, dy_XF):
    x_XD, w_EDF, tile_expert, num_tiles = residuals
    x_tiles, dy_tiles = _tiles(x_XD), _tiles(dy_XF)
    dx = _each_tile(dy_tiles, w_EDF, tile_expert, num_tiles, contract=((1,), (1,)))

    def body(i, dw_EDF):
        return dw_EDF.at[tile_expert[i]].add(_product(x_tiles[i], dy_tiles[i], ((0,), (0,))))

    dw_EDF = jax.lax.fori_loop(0, num_tiles, body, jnp.zeros(w_EDF.shape, jnp.float32))
    return dx.reshape(x_XD.shape), dw_EDF.astype(w_EDF.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)
