"""The loss of infonce.py without its N x C scores: in tiles, with the documents going round the ring of devices.

Every device keeps its queries; documents, and what is known of them, travel from device to device, once round (Ring
Attention, arXiv 2310.01889; for contrastive losses Inf-CL, arXiv 2410.17243). Of a tile of scores only the running maximum and
sum of exponentials of its rows (queries) and, for the other direction, of its columns (documents) are kept. The gradient
has the tiles computed a second time. Memory grows with N, not with N x C.

A Matryoshka prefix is a partial sum of the whole product times two inverse norms, so all prefixes share the matrix products,
forwards and backwards. Here R and K count tiles, r and c rows and columns of one.
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
    scale_NP: jax.Array  # inverse norm of each prefix
    own_N: jax.Array  # cosine with the positive, whole vectors
    document_id_N: jax.Array  # of the positive
    query_id_N: jax.Array
    label_N: jax.Array  # which of all documents the positive is


class Columns(NamedTuple):
    """Documents, [C, ...], as they travel."""

    x_CD: jax.Array
    scale_CP: jax.Array
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
    scale = lambda x: jnp.stack([inverse_norm(x[:, :dim]) for dim in form.dims], axis=1)  # noqa: E731
    scale_NP, scale_CP = scale(query_ND), scale(document_ND)
    own_NP = jnp.stack([(query_ND * document_ND[::per_query])[:, :dim].sum(1) for dim in form.dims], axis=1)
    own_NP *= scale_NP * scale_CP[::per_query]
    whole_N = lax.stop_gradient(own_NP[:, -1])
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
    forth_PN, back_PN, correct_N, masked_N = _log_sums(form, query_ND, scale_NP, document_ND, scale_CP, known)
    loss_PN = forth_PN - own_NP.T / c.temperature
    if c.bidirectional:
        loss_PN = (loss_PN + back_PN - own_NP.T / c.temperature) / 2
    sums = {"accuracy": correct_N.sum(), "masked_candidates": masked_N.sum()}
    return global_means(sums, dict(zip(form.dims, loss_PN, strict=True)), weights)


def _fold(state: Softmax, score: jax.Array, axis: int) -> Softmax:
    """One tile's scores more, along `axis`. The maximum is a running one: a fixed bound would flush small terms to 0."""
    high = jnp.maximum(state.max, score.max(axis))
    total = state.total * jnp.exp(state.max - high) + jnp.exp(score - jnp.expand_dims(high, axis)).sum(axis)
    return Softmax(high, total)


class Tile(NamedTuple):
    """One tile, [P, r, c] but for the mask."""

    product: jax.Array  # of the vectors as they are
    score: jax.Array  # query -> document, MASKED where it is no candidate
    back: jax.Array  # document -> query, of the positives alone: [P, r, c / per_query]
    masked: jax.Array  # [r, c] candidates that were taken out


def _tile(form: Form, row: Rows, col: Columns) -> Tile:
    product, total, start = [], 0.0, 0
    for dim in form.dims:
        a, b = row.x_ND[:, start:dim], col.x_CD[:, start:dim]
        total += jnp.einsum("ND,CD->NC", a, b, precision=lax.Precision.HIGHEST)
        product.append(total)
        start = dim
    product = jnp.stack(product)
    cosine = product * row.scale_NP.T[:, :, None] * col.scale_CP.T[:, None, :]
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
    score = cosine / c.temperature
    back = jnp.where(never_back, MASKED, score[:, :, positive])
    return Tile(product, jnp.where(never, MASKED, score), back, never & (col.document_id_C >= 0))


def _visit(tile_fn, rows, columns):
    """All tiles of this device's rows and the columns it holds: tile_fn(row, col) -> (row, col), each with its own sums."""

    def visit_row(columns, row):
        row, columns = lax.scan(tile_fn, row, columns)
        return columns, row

    columns, rows = lax.scan(visit_row, columns, rows)
    return rows, columns


def _round(tile_fn, rows, columns):
    """`_visit` on every device in turn, until the columns are at home again."""

    def hop(state, _):
        rows, columns = _visit(tile_fn, *state)
        return (rows, sharding.pass_on(columns, "N")), None

    return lax.scan(hop, (rows, columns), None, length=sharding.size("N"))[0]


def _tiled(form: Form, query_ND, scale_NP, document_ND, scale_CP, known) -> tuple[Rows, Columns]:
    """Rows [R, r, ...] and Columns [K, c, ...]: tiles of at most TILE, equal, a query's documents in one."""
    divisor = lambda n, most: next(size for size in range(max(min(n, most), 1), 0, -1) if n % size == 0)  # noqa: E731
    r = divisor(len(query_ND), TILE)
    c = form.per_query * divisor(len(document_ND) // form.per_query, TILE // form.per_query)
    cut = lambda tree, size: jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)  # noqa: E731
    return (
        cut(Rows(query_ND, scale_NP, *known["rows"]), r),
        cut(Columns(document_ND, scale_CP, *known["columns"]), c),
    )


def _untile_PN(x_RPN: jax.Array) -> jax.Array:
    return x_RPN.swapaxes(0, 1).reshape(x_RPN.shape[1], -1)


def _tile_PN(x_PN: jax.Array, size: int) -> jax.Array:
    return x_PN.reshape(len(x_PN), -1, size).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sums(form: Form, query_ND, scale_NP, document_ND, scale_CP, known):
    """log-sum-exp [P, N] of each query over documents and of each positive over queries; correct [N], masked [N]."""
    rows, columns = _tiled(form, query_ND, scale_NP, document_ND, scale_CP, known)
    (num_r, r), (num_k, c) = rows.own_N.shape, columns.own_C.shape
    fresh = lambda *shape: Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape))  # noqa: E731
    sums = {"forth": fresh(num_r, len(form.dims), r), "best": jnp.full((num_r, r), -jnp.inf),
            "place": jnp.zeros((num_r, r), jnp.int32), "masked": jnp.zeros((num_r, r))}  # fmt: skip
    back = fresh(num_k, len(form.dims), c // form.per_query)

    def fold(row, col):
        (row, sums), (col, back) = row, col
        tile = _tile(form, row, col)
        top, at = tile.score[-1].max(1), col.place_C[tile.score[-1].argmax(1)]
        first = (top > sums["best"]) | ((top == sums["best"]) & (at < sums["place"]))  # of equals the lower place
        sums = {
            "forth": _fold(sums["forth"], tile.score, 2),
            "best": jnp.maximum(top, sums["best"]),
            "place": jnp.where(first, at, sums["place"]),
            "masked": sums["masked"] + tile.masked.sum(1),
        }
        return (row, sums), (col, _fold(back, tile.back, 1) if form.c.bidirectional else back)

    (_, sums), (_, back) = _round(fold, (rows, sums), (columns, back))
    log_sum = lambda s: _untile_PN(s.max + jnp.log(s.total))  # noqa: E731
    correct_N = (sums["place"] == rows.label_N).astype(jnp.float32).reshape(-1)
    back_PN = log_sum(back) if form.c.bidirectional else jnp.zeros_like(log_sum(sums["forth"]))
    return log_sum(sums["forth"]), back_PN, correct_N, sums["masked"].reshape(-1)


def _forward(form: Form, *arguments):
    out = _log_sums(form, *arguments)
    return out, (arguments, out[:2])


def _backward(form: Form, residuals, cotangents):
    """The tiles once more: p = exp(score - log sum) of a row, and of a column, are the gradients of the two log sums."""
    arguments, (forth_PN, back_PN) = residuals
    rows, columns = _tiled(form, *arguments)
    r, c = rows.own_N.shape[1], columns.own_C.shape[1]
    of_rows = {"log": _tile_PN(forth_PN, r), "g": _tile_PN(cotangents[0], r)}
    of_columns = {"log": _tile_PN(back_PN, c // form.per_query), "g": _tile_PN(cotangents[1], c // form.per_query)}
    zero = lambda *arrays: tuple(map(jnp.zeros_like, arrays))  # noqa: E731

    def add(row, col):
        (row, lr, (dx_ND, dscale_NP)), (col, lc, (dx_CD, dscale_CP)) = row, col
        tile = _tile(form, row, col)
        p = jnp.exp(tile.score - lr["log"][:, :, None]) * lr["g"][:, :, None]
        if form.c.bidirectional:
            back = jnp.exp(tile.back - lc["log"][:, None, :]) * lc["g"][:, None, :]
            p = p.at[:, :, :: form.per_query].add(back)
        p = p / form.c.temperature  # the gradient of the cosines
        row_scale, col_scale = row.scale_NP.T[:, :, None], col.scale_CP.T[:, None, :]
        dscale_NP += (p * tile.product * col_scale).sum(2).T
        dscale_CP += (p * tile.product * row_scale).sum(1).T
        # The numbers of a segment are in every prefix that reaches beyond it: sums from the longest prefix down.
        p = jnp.cumsum((p * row_scale * col_scale)[::-1], axis=0)[::-1]
        start = 0
        for p_NC, dim in zip(p, form.dims, strict=True):
            part = slice(start, dim)
            to_row = jnp.einsum("NC,CD->ND", p_NC, col.x_CD[:, part], precision=lax.Precision.HIGHEST)
            to_col = jnp.einsum("NC,ND->CD", p_NC, row.x_ND[:, part], precision=lax.Precision.HIGHEST)
            dx_ND, dx_CD = dx_ND.at[:, part].add(to_row), dx_CD.at[:, part].add(to_col)
            start = dim
        return (row, lr, (dx_ND, dscale_NP)), (col, lc, (dx_CD, dscale_CP))

    state = (rows, of_rows, zero(rows.x_ND, rows.scale_NP)), (columns, of_columns, zero(columns.x_CD, columns.scale_CP))
    (_, _, of_rows), (_, _, of_columns) = _round(add, *state)
    whole = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return *map(whole, of_rows), *map(whole, of_columns), None


_log_sums.defvjp(_forward, _backward)
