"""The loss of infonce.py without its N x C scores: in tiles, with the documents going round the ring of devices.

Every device keeps its queries; documents, and what is known of them, travel from device to device, once round (Ring
Attention, arXiv 2310.01889; for contrastive losses Inf-CL, arXiv 2410.17243). Of a tile of scores only the running maximum and
sum of exponentials of its rows (queries) and, for the other direction, of its columns (documents) are kept. The gradient
has the tiles computed a second time. Memory grows with N, not with N x C. One device alone, in one direction, computes loss and
gradient together, a few rows against all columns at a time, and nothing twice.

A Matryoshka prefix is a partial sum of the whole product times two inverse norms, so all prefixes share the matrix products,
forwards and backwards. Vectors in bfloat16 are multiplied as such and summed in float32. Here R and K count tiles, r and c rows
and columns of one, P prefixes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.infonce import MASKED, NONE, Ids, Teacher, global_means, inverse_norm, prefix_weights

TILE = 1024  # rows, and columns, of a tile at most


class Form(NamedTuple):
    """What is fixed when the loss is compiled."""

    dims: tuple[int, ...]  # Matryoshka prefixes, shortest first, the whole vector last
    per_query: int  # documents a query brings: its positive, then its hard negatives
    c: config_lib.Loss


class Rows(NamedTuple):
    """Queries, [N, ...]."""

    x_ND: jax.Array
    scale_PN: jax.Array  # inverse norm of each prefix; P first, or a TPU pads each to a line of 128
    own_N: jax.Array  # cosine with the positive, whole vectors
    document_id_N: jax.Array  # of the positive
    query_id_N: jax.Array
    label_N: jax.Array  # which of all documents the positive is


class Columns(NamedTuple):
    """Documents, [C, ...], as they travel."""

    x_CD: jax.Array
    scale_PC: jax.Array
    own_C: jax.Array  # a positive's cosine with its query
    document_id_C: jax.Array
    query_id_C: jax.Array
    place_C: jax.Array  # which of all documents this is


class Softmax(NamedTuple):
    """A sum of exponentials under way: max + log(total) is its logarithm."""

    max: jax.Array
    total: jax.Array


def ring_infonce(query_ND: jax.Array, document_ND: jax.Array, ids: Ids, *, c: config_lib.Loss, teacher: Teacher = NONE):
    """As infonce.infonce, with the same arguments and results, but for distillation, which it does not have."""
    if any(part is not None for part in teacher):
        raise config_lib.UserError('config.loss.form="ring" has no distillation; config.loss.form="gathered" has.')
    num_queries, per_query = query_ND.shape[0], document_ND.shape[0] // query_ND.shape[0]
    weights = prefix_weights(c, query_ND.shape[1])
    form = Form(tuple(sorted(weights)), per_query, c)
    scale = lambda x: jnp.stack([inverse_norm(x[:, :dim].astype(jnp.float32)) for dim in form.dims])  # noqa: E731
    scale_PN, scale_PC = scale(query_ND), scale(document_ND)
    both_ND = query_ND.astype(jnp.float32) * document_ND[::per_query].astype(jnp.float32)
    own_PN = jnp.stack([both_ND[:, :dim].sum(1) for dim in form.dims]) * scale_PN * scale_PC[:, ::per_query]
    whole_N = lax.stop_gradient(own_PN[-1])
    first = sharding.index("N") * len(document_ND)
    known = {
        "rows": (whole_N, ids.document_N[::per_query], ids.query_N, first + jnp.arange(num_queries) * per_query),
        "columns": (
            jnp.repeat(whole_N, per_query),
            ids.document_N,
            jnp.repeat(ids.query_N, per_query),
            first + jnp.arange(len(document_ND)),
        ),
    }
    vectors = query_ND, scale_PN, document_ND, scale_PC, known
    if sharding.size("N") == 1 and not c.bidirectional:
        weight_P = tuple(weights[dim] for dim in form.dims)
        forth_PN, correct_N, masked_N = _log_sums_at_once(form, weight_P, *vectors)
    else:
        forth_PN, back_PN, correct_N, masked_N = _log_sums(form, *vectors)
    loss_PN = forth_PN - own_PN / c.temperature
    if c.bidirectional:
        loss_PN = (loss_PN + back_PN - own_PN / c.temperature) / 2
    sums = {"accuracy": correct_N.sum(), "masked_candidates": masked_N.sum()}
    return global_means(sums, dict(zip(form.dims, loss_PN, strict=True)), weights)


class Tile(NamedTuple):
    """One tile, [r, c]; a tuple has one array for each prefix."""

    product: tuple[jax.Array, ...]  # of the vectors as they are
    score: tuple[jax.Array, ...]  # query -> document, MASKED where it is no candidate
    back: tuple[jax.Array, ...]  # document -> query, of the positives alone: [r, c / per_query]
    masked: jax.Array  # candidates that were taken out


def _tile(form: Form, row: Rows, col: Columns) -> Tile:
    product, total, start = [], 0.0, 0
    for dim in form.dims:
        total += _product("ND,CD->NC", row.x_ND[:, start:dim], col.x_CD[:, start:dim])
        product.append(total)
        start = dim
    cosine = [x * _outer(row, col, k) for k, x in enumerate(product)]
    whole, c = cosine[-1], form.c
    label = row.label_N[:, None] == col.place_C
    positive = slice(None, None, form.per_query)  # tiles begin with one
    never = (whole > row.own_N[:, None] + c.false_negative_margin) | (col.document_id_C < 0)
    never_back = whole[:, positive] > col.own_C[positive] + c.false_negative_margin
    if c.mask_duplicates:
        answer = (row.query_id_N[:, None] == col.query_id_C) & (jnp.arange(whole.shape[1]) % form.per_query == 0)
        same = (row.document_id_N[:, None] == col.document_id_C) | answer
        never |= same
        never_back |= same[:, positive]
    never &= ~label
    never_back &= ~label[:, positive]
    score = tuple(jnp.where(never, MASKED, x / c.temperature) for x in cosine)
    back = tuple(jnp.where(never_back, MASKED, x[:, positive] / c.temperature) for x in cosine)
    return Tile(tuple(product), score, back, never & (col.document_id_C >= 0))


def _outer(row: Rows, col: Columns, k: int) -> jax.Array:
    return row.scale_PN[k, :, None] * col.scale_PC[k]


def _fold(states: tuple[Softmax, ...], scores: tuple[jax.Array, ...], axis: int) -> tuple[Softmax, ...]:
    """One tile's scores more, along `axis`. The maximum is a running one: a fixed bound would flush small terms to 0."""

    def fold(state: Softmax, score: jax.Array) -> Softmax:
        high = jnp.maximum(state.max, score.max(axis))
        total = state.total * jnp.exp(state.max - high) + jnp.exp(score - jnp.expand_dims(high, axis)).sum(axis)
        return Softmax(high, total)

    return tuple(map(fold, states, scores))


def _first_at(score: jax.Array, top_N: jax.Array, place_C: jax.Array) -> jax.Array:
    """The lowest place of a row's highest score: what argmax says, in a form that every backend vectorises."""
    return jnp.where(score == top_N[:, None], place_C, jnp.iinfo(jnp.int32).max).min(1)


def _product(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32; float32 vectors are not rounded, on any platform."""
    return jnp.einsum(dims, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _round(tile_fn, rows: Rows, columns: Columns, of_rows, of_columns):
    """All tiles: tile_fn(row, col, of_row, of_col) -> (of_row, of_col), each with its own sums; the columns end at home.

    Written with indices into what a loop carries, so that the sums are updated in place.
    """
    at = lambda tree, i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)  # noqa: E731
    put = lambda tree, i, part: jax.tree.map(lambda x, y: x.at[i].set(y), tree, part)  # noqa: E731

    def hop(_, state):
        def visit_row(i, state):
            columns, of_rows, of_columns = state
            row = at(rows, i)

            def visit_tile(j, state):
                of_row, of_columns = state
                of_row, of_col = tile_fn(row, at(columns, j), of_row, at(of_columns, j))
                return of_row, put(of_columns, j, of_col)

            of_row, of_columns = lax.fori_loop(0, len(columns.own_C), visit_tile, (at(of_rows, i), of_columns))
            return columns, put(of_rows, i, of_row), of_columns

        columns, of_rows, of_columns = lax.fori_loop(0, len(rows.own_N), visit_row, state)
        columns, of_columns = sharding.pass_on((columns, of_columns), "N")
        return columns, of_rows, of_columns

    return lax.fori_loop(0, sharding.size("N"), hop, (columns, of_rows, of_columns))[1:]


def _tiled(form: Form, query_ND, scale_PN, document_ND, scale_PC, known, *, r: int, c: int) -> tuple[Rows, Columns]:
    """Rows [R, r, ...] and Columns [K, c, ...]: equal tiles of at most r and c, a query's documents in one."""
    r = _divisor(len(query_ND), r)
    c = form.per_query * _divisor(len(document_ND) // form.per_query, c // form.per_query)
    cut = lambda x, size: x.reshape(-1, size, *x.shape[1:])  # noqa: E731
    rows, columns = known["rows"], known["columns"]
    return (
        Rows(cut(query_ND, r), _tile_PN(scale_PN, r), *(cut(x, r) for x in rows)),
        Columns(cut(document_ND, c), _tile_PN(scale_PC, c), *(cut(x, c) for x in columns)),
    )


def _divisor(n: int, most: int) -> int:
    return next(size for size in range(max(min(n, most), 1), 0, -1) if n % size == 0)


def _tile_PN(x_PN: jax.Array, size: int) -> jax.Array:
    return x_PN.reshape(len(x_PN), -1, size).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sums(form: Form, query_ND, scale_PN, document_ND, scale_PC, known):
    """log-sum-exp [P, N] of each query over documents and of each positive over queries; correct [N], masked [N]."""
    rows, columns = _tiled(form, query_ND, scale_PN, document_ND, scale_PC, known, r=TILE, c=TILE)
    (num_r, r), (num_k, c) = rows.own_N.shape, columns.own_C.shape
    fresh = lambda *shape: tuple(Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape)) for _ in form.dims)  # noqa: E731
    sums = {"forth": fresh(num_r, r), "best": jnp.full((num_r, r), -jnp.inf),
            "place": jnp.zeros((num_r, r), jnp.int32), "masked": jnp.zeros((num_r, r))}  # fmt: skip
    back = fresh(num_k, c // form.per_query) if form.c.bidirectional else ()

    def fold(row, col, sums, back):
        tile = _tile(form, row, col)
        top = tile.score[-1].max(1)
        at = _first_at(tile.score[-1], top, col.place_C)
        first = (top > sums["best"]) | ((top == sums["best"]) & (at < sums["place"]))
        sums = {
            "forth": _fold(sums["forth"], tile.score, 1),
            "best": jnp.maximum(top, sums["best"]),
            "place": jnp.where(first, at, sums["place"]),
            "masked": sums["masked"] + tile.masked.sum(1),
        }
        return sums, (_fold(back, tile.back, 0) if form.c.bidirectional else back)

    sums, back = _round(fold, rows, columns, sums, back)
    log_sum = lambda states: jnp.stack([(s.max + jnp.log(s.total)).reshape(-1) for s in states])  # noqa: E731
    forth_PN = log_sum(sums["forth"])
    correct_N = (sums["place"] == rows.label_N).astype(jnp.float32).reshape(-1)
    back_PN = log_sum(back) if form.c.bidirectional else jnp.zeros_like(forth_PN)
    return forth_PN, back_PN, correct_N, sums["masked"].reshape(-1)


def _forward(form: Form, *arguments):
    out = _log_sums(form, *arguments)
    return out, (arguments, out[:2])


class Gradients(NamedTuple):
    """Of rows or of columns, float32: with respect to the vectors and to their scales."""

    x_ND: jax.Array
    scale_PN: jax.Array


def _no_gradients(x: jax.Array, scale: jax.Array) -> Gradients:
    return Gradients(jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(scale))


def _add_gradients(form: Form, row: Rows, col: Columns, product, p, of_row: Gradients, of_col: Gradients):
    """Add what one tile gives, of whose scores the gradients are `p`, for each prefix [r, c]."""
    dx_ND, dx_CD, scales = of_row.x_ND, of_col.x_ND, []
    weight = 0.0  # a segment's numbers are in every prefix that reaches beyond it: sums from the longest down
    for k in reversed(range(len(form.dims))):
        part = slice(form.dims[k - 1] if k else 0, form.dims[k])
        own = p[k] * _outer(row, col, k) / form.c.temperature  # the gradient of the products of this prefix
        weight += own
        low = weight.astype(row.x_ND.dtype)
        a_ND, b_CD = _product("NC,CD->ND", low, col.x_CD[:, part]), _product("NC,ND->CD", low, row.x_ND[:, part])
        dx_ND, dx_CD = dx_ND.at[:, part].add(a_ND), dx_CD.at[:, part].add(b_CD)
        if len(form.dims) == 1:  # sum_j own_ij (q_i . d_j) = q_i . sum_j own_ij d_j: no need to go over the tile again
            scales.append(((row.x_ND * a_ND).sum(1), (col.x_CD * b_CD).sum(1)))
        else:
            scales.append(((own * product[k]).sum(1), (own * product[k]).sum(0)))
    by_row, by_col = (jnp.stack(parts[::-1]) for parts in zip(*scales, strict=True))
    return (
        Gradients(dx_ND, of_row.scale_PN + by_row / row.scale_PN),
        Gradients(dx_CD, of_col.scale_PN + by_col / col.scale_PC),
    )


def _untiled(arguments, of_rows: Gradients, of_columns: Gradients):
    """Gradients of all tiles -> those of the arguments of `_log_sums`, in their dtypes."""
    whole = lambda x_RND, like: x_RND.reshape(like.shape).astype(like.dtype)  # noqa: E731
    untile = lambda x_RPN: jnp.moveaxis(x_RPN, 0, -2).reshape(x_RPN.shape[-2], -1)  # noqa: E731
    query_ND, _, document_ND, *_ = arguments
    return (
        whole(of_rows.x_ND, query_ND),
        untile(of_rows.scale_PN),
        whole(of_columns.x_ND, document_ND),
        untile(of_columns.scale_PN),
        None,
    )


def _backward(form: Form, residuals, cotangents):
    """The tiles once more: p = exp(score - log sum) of a row, and of a column, are the gradients of the two log sums."""
    arguments, (forth_PN, back_PN) = residuals
    rows, columns = _tiled(form, *arguments, r=TILE, c=TILE)
    r, c = rows.own_N.shape[1], columns.own_C.shape[1]
    of_rows = _tile_PN(forth_PN, r), _tile_PN(cotangents[0], r), _no_gradients(rows.x_ND, rows.scale_PN)
    of_back = [_tile_PN(x_PN, c // form.per_query) for x_PN in (back_PN, cotangents[1]) if form.c.bidirectional]
    of_columns = *of_back, _no_gradients(columns.x_CD, columns.scale_PC)

    def add(row, col, of_row, of_col):
        (log, g, of_row), (*back, of_col) = of_row, of_col
        tile = _tile(form, row, col)
        p = [jnp.exp(score - log[k, :, None]) * g[k, :, None] for k, score in enumerate(tile.score)]
        if form.c.bidirectional:
            for k, score in enumerate(tile.back):
                p_back = jnp.exp(score - back[0][k]) * back[1][k]
                p[k] = p[k].at[:, :: form.per_query].add(p_back)
        of_row, of_col = _add_gradients(form, row, col, tile.product, p, of_row, of_col)
        return (log, g, of_row), (*back, of_col)

    (_, _, of_rows), (*_, of_columns) = _round(add, rows, columns, of_rows, of_columns)
    return _untiled(arguments, of_rows, of_columns)


_log_sums.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_sums_at_once(form: Form, weight_P: tuple[float, ...], *arguments):
    """`_log_sums` of one device and one direction, without the second result.

    Its gradient is computed with it, for a cotangent of `weight_P` for every query; that of a mean is a multiple of it.
    """
    return _at_once(form, weight_P, arguments, graded=False)[0]


def _at_once(form: Form, weight_P, arguments, *, graded: bool):
    num_columns = len(arguments[2])
    rows, columns = _tiled(form, *arguments, r=max(TILE * TILE // num_columns, 1), c=num_columns)
    col = jax.tree.map(lambda x: x[0], columns)

    def visit(of_col, row):
        tile = _tile(form, row, col)
        top = [score.max(1) for score in tile.score]
        power = [jnp.exp(score - top_N[:, None]) for score, top_N in zip(tile.score, top, strict=True)]
        total = [x.sum(1) for x in power]
        log_PN = jnp.stack([top_N + jnp.log(total_N) for top_N, total_N in zip(top, total, strict=True)])
        correct_N = (_first_at(tile.score[-1], top[-1], col.place_C) == row.label_N).astype(jnp.float32)
        out = log_PN, correct_N, tile.masked.sum(1).astype(jnp.float32)
        if not graded:
            return of_col, (out, ())
        p = [x * (w / total_N)[:, None] for x, total_N, w in zip(power, total, weight_P, strict=True)]
        of_row = _no_gradients(row.x_ND, row.scale_PN)
        of_row, of_col = _add_gradients(form, row, col, tile.product, p, of_row, of_col)
        return of_col, (out, of_row)

    of_col, ((log_RPN, *others), of_rows) = lax.scan(visit, _no_gradients(col.x_CD, col.scale_PC), rows)
    of_col = jax.tree.map(lambda x: x[None], of_col)  # one tile
    out = log_RPN.swapaxes(0, 1).reshape(len(form.dims), -1), *(x.reshape(-1) for x in others)
    return out, _untiled(arguments, of_rows, of_col) if graded else ()


def _scaled(form: Form, weight_P, gradients, cotangents):
    factor = cotangents[0].sum() / (sum(weight_P) * cotangents[0].shape[1])
    return tuple(None if g is None else (g * factor).astype(g.dtype) for g in gradients)


_log_sums_at_once.defvjp(
    lambda form, weight_P, *arguments: _at_once(form, weight_P, arguments, graded=True),
    _scaled,
)
