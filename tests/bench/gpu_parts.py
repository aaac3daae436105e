"""What tests/bench/gpu.py measures of ours: kernels, the mixture, a train step, encoding. Each part is a function Sizes -> rows.

A row is {"what", "ms", ...} as JSON takes it. Weights and ids are random: neither speed nor memory depends on their values, but for
how evenly tokens spread over experts, which for random weights is nearly even.
"""

import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_embed import config as config_lib
from moe_embed import program, sharding
from moe_embed.load import Model
from moe_embed.model import grouped_matmul as gm
from moe_embed.model import layers
from moe_embed.model import moe as moe_lib
from moe_embed.model import triton_grouped_matmul as kernels

PAPER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "nomic_v2" / "pretrain.py"
# Blocks beside the pinned one, to see whether that one is still right: rows, columns, depth, warps, stages.
CANDIDATES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 4, 4),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    overrides: tuple[str, ...]  # of configs/nomic_v2/pretrain.py:paper
    layer_tokens: int
    text_length: int  # of the train step's texts; row_length is a multiple
    # (pairs, packed rows in a micro-batch, recompute): most wanted first, since time may run out
    steps: tuple[tuple[int, int, bool], ...]
    encode_texts: int
    calls: int  # of a function in one timing
    repeats: int  # timings, of which the median counts


FULL = Sizes(
    overrides=(),
    layer_tokens=32_768,
    text_length=128,
    steps=(
        (2048, 64, True),
        (256, 64, False),
        (2048, 128, True),
        (256, 128, False),
        (2048, 32, True),
        (16_384, 64, True),
    ),
    encode_texts=20_000,
    calls=10,
    repeats=5,
)
TOY = Sizes(
    overrides=(
        *(
            f"--config.encoder.{name}"
            for name in ("vocab_size=64", "num_layers=2", "dim=32", "num_heads=2", "ffn_dim=64")
        ),
        *(f"--config.data.{name}" for name in ("row_length=64", "query_length=16", "document_length=16")),
        "--config.encoder.max_seq_length=64",
    ),
    layer_tokens=256,
    text_length=16,
    steps=((8, 1, True), (8, 2, False)),
    encode_texts=20,
    calls=1,
    repeats=2,
)


def configuration(sizes: Sizes, *changes: str) -> config_lib.Config:
    """The paper's pretraining, with what the sizes and `changes` override."""
    return config_lib.load(f"{PAPER}:paper", ("--config.data.sources=random", *sizes.overrides, *changes))


def flops_per_token(encoder: config_lib.Encoder, moe: config_lib.Moe, *, length: int) -> float:
    """Of a forward pass over texts of `length` tokens: the model's own, an addition and a multiplication being two.

    Embedding and pooling are none. Training is three times that; recomputation is not the model's.
    """
    mixtures = encoder.num_layers // moe.unit_length if moe.num_experts else 0
    mlp = 4 * encoder.dim * encoder.ffn_dim
    attention = 8 * encoder.dim**2 + 4 * length * encoder.dim
    mixture = moe.top_k * mlp + 2 * encoder.dim * moe.num_experts
    return encoder.num_layers * attention + (encoder.num_layers - mixtures) * mlp + mixtures * mixture


def seconds(f, *arguments, sizes: Sizes) -> float:
    """The median time of a call, several in a row without waiting for each."""
    for _ in range(2):
        jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(sizes.repeats):
        start = time.perf_counter()
        for _ in range(sizes.calls):
            result = f(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / sizes.calls)
    return statistics.median(times)


def rate(what: str, duration: float, flops: float) -> dict:
    """A row of the kernels' and the layers' tables."""
    return {"what": what, "ms": duration * 1e3, "tflops": flops / duration / 1e12}


def kernel_rows(sizes: Sizes, *, dtype=jnp.bfloat16, candidates=CANDIDATES) -> list[dict]:
    """The two kernels by block sizes, beside one dense product of as many rows, and XLA's ragged_dot."""
    c = configuration(sizes)
    num_experts, dim, width = c.moe.num_experts, c.encoder.dim, c.encoder.ffn_dim
    interpret = jax.default_backend() == "cpu"
    expert_TA = jax.random.randint(jax.random.key(0), (sizes.layer_tokens, c.moe.top_k), 0, num_experts)
    dispatch = moe_lib.plan_dispatch(expert_TA, num_experts=num_experts)
    tiles = dispatch.tile_expert, dispatch.num_tiles
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape, dtype)  # noqa: E731
    x, dy, w = (
        draw(1, len(dispatch.choice_X), dim),
        draw(2, len(dispatch.choice_X), width),
        draw(3, num_experts, dim, width),
    )
    flops = 2.0 * expert_TA.size * dim * width
    rows = []
    pinned = kernels.BFLOAT16
    for sizes_of_block in candidates:
        blocks = kernels.Blocks(*sizes_of_block)
        name = (
            "kernel "
            + "x".join(map(str, sizes_of_block[:3]))
            + f", {blocks.num_warps} warps, {blocks.num_stages} stages"
        )
        name += " (pinned)" if blocks == pinned else ""
        kernels.BFLOAT16 = blocks
        try:
            times = functools.partial(kernels.rows_times_experts, interpret=interpret)
            gradients = functools.partial(kernels.expert_gradients, num_experts=num_experts, interpret=interpret)
            for part, f, arguments in (
                ("x w", functools.partial(times, transposed=False), (x, w, *tiles)),
                ("dy wT", functools.partial(times, transposed=True), (dy, w, *tiles)),
                ("xT dy", gradients, (x, dy, *tiles)),
            ):
                rows.append(rate(f"{part}: {name}", seconds(jax.jit(f), *arguments, sizes=sizes), flops))
        except Exception as error:  # a block that this GPU has no room for is a row, not the end
            rows.append({"what": name, "fault": _first_line(error)})
        finally:
            kernels.BFLOAT16 = pinned
    x_TD, w_DF = x[: expert_TA.size], w[0]
    rows.append(rate("x w: one dense product", seconds(jax.jit(jnp.dot), x_TD, w_DF, sizes=sizes), flops))
    counts = jnp.bincount(expert_TA.reshape(-1), length=num_experts).astype(jnp.int32)
    rows.append(
        rate("x w: jax.lax.ragged_dot", seconds(jax.jit(jax.lax.ragged_dot), x_TD, w, counts, sizes=sizes), flops)
    )
    return rows


def layer_rows(sizes: Sizes) -> list[dict]:
    """The whole mixture (route, sort, experts, combine) forwards and backwards, beside a dense MLP of as many FLOPs."""
    c = configuration(sizes)
    wide = dataclasses.replace(c.encoder, ffn_dim=c.moe.top_k * c.encoder.ffn_dim)
    row = c.data.row_length
    x = jax.random.normal(jax.random.key(0), (sizes.layer_tokens // row, row, c.encoder.dim), jnp.bfloat16)
    segments = jnp.ones(x.shape[:2], jnp.int32)
    flops = 3.0 * sizes.layer_tokens * c.moe.top_k * 4 * c.encoder.dim * c.encoder.ffn_dim
    mixture, dense = moe_lib.Moe(c.encoder, c.moe, rngs=nnx.Rngs(0)), layers.Mlp(wide, rngs=nnx.Rngs(0))
    rows = []
    for what, module, call in (
        ("mixture", mixture, lambda module, x: module(x, segments)[0]),
        ("dense MLP of as many FLOPs", dense, lambda module, x: module(x)),
    ):
        graph, state = nnx.split(module)

        def both(state, x, graph=graph, call=call):
            y, pull = jax.vjp(lambda state, x: call(nnx.merge(graph, state), x), state, x)
            return pull(y)

        rows.append(rate(what, seconds(jax.jit(both), state, x, sizes=sizes), flops))
    return rows


def full_batch(c: config_lib.Config, *, text_length: int) -> dict[str, np.ndarray]:
    """c.data.batch_size pairs whose texts all have `text_length` tokens, in rows without padding."""
    rng = np.random.default_rng(0)
    per_row = c.data.row_length // text_length
    num_micro = 2 * c.data.batch_size // (per_row * c.data.rows)
    shape = num_micro, c.data.rows, c.data.row_length
    place = np.arange(c.data.row_length)
    texts = np.arange(2 * c.data.batch_size)
    slot_N = (texts // per_row * c.data.texts_per_row + texts % per_row).astype(np.int32)
    ids = np.arange(c.data.batch_size, dtype=np.int32)
    return {
        "tokens_MBL": rng.integers(4, c.encoder.vocab_size, shape).astype(np.int32),
        "segments_MBL": np.broadcast_to(1 + place // text_length, shape).astype(np.int32),
        "positions_MBL": np.broadcast_to(place % text_length, shape).astype(np.int32),
        "query_slot_N": slot_N[0::2],
        "document_slot_N": slot_N[1::2],
        "document_id_N": ids,
        "query_id_N": ids,
    }


def train_rows(sizes: Sizes, *, deadline: float = float("inf"), peak: float | None = None) -> list[dict]:
    """Whole train steps on full-length texts, until `deadline` (of time.monotonic()); `peak` is the device's FLOP/s."""
    rows = []
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    for pairs, micro_rows, recompute in sizes.steps:
        what = f"{pairs} pairs, {micro_rows} rows a micro-batch, {'recompute' if recompute else 'keep all'}"
        if time.monotonic() > deadline:
            rows.append({"what": what, "fault": "not run: out of time"})
            continue
        per_row = configuration(sizes).data.row_length // sizes.text_length
        c = configuration(sizes, f"--config.data.batch_size={pairs}", f"--config.data.rows={micro_rows}",
                          f"--config.data.texts_per_row={per_row}", f"--config.run.recompute={recompute}")  # fmt: skip
        prog = program.build(c, mesh)
        batch = sharding.put_batch(full_batch(c, text_length=sizes.text_length), mesh=mesh)
        try:
            rows.append({"what": what, **_train(prog, batch, sizes, c, peak)})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append({"what": what, "fault": "out of memory"})
    return rows


def _train(prog: program.Program, batch: dict, sizes: Sizes, c: config_lib.Config, peak: float | None) -> dict:
    start = time.perf_counter()
    step = prog.step.lower(prog.abstract_state, batch).compile()
    compiled = time.perf_counter() - start
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    state, times = prog.init(), []
    for i in range(2 + sizes.repeats):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if i >= 2:
            times.append(time.perf_counter() - start)
    tokens, duration = float(metrics["tokens"]), statistics.median(times)
    flops = 3 * tokens * flops_per_token(c.encoder, c.moe, length=sizes.text_length)
    row = {"ms": duration * 1e3, "tokens_per_second": tokens / duration, "tflops": flops / duration / 1e12,
           "gib": (held + memory.temp_size_in_bytes) / 2**30, "compile_seconds": compiled}  # fmt: skip
    return row | ({"mfu": flops / duration / peak} if peak else {})


def text_lengths(count: int) -> np.ndarray:
    """Tokens of mixed texts: log-normal, a median of 40 and a mean of about 70, from 4 to 512. A bench's own assumption."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(40), 1.0, count), 4, 512).astype(int)


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """A tokenizer of texts that are numbers: text "7" has the random ids of row 7."""

    ids: list[np.ndarray]

    def encode(self, texts, *, prompt, max_length):
        return [self.ids[int(text)][:max_length] for text in texts], 0


def encode_rows(sizes: Sizes, *, peak: float | None = None) -> list[dict]:
    """`Model.encode` of texts of mixed lengths, from ids to vectors on the host."""
    c = configuration(sizes)
    rng = np.random.default_rng(1)
    lengths = np.minimum(text_lengths(sizes.encode_texts), c.encoder.max_seq_length)
    ids = [rng.integers(4, c.encoder.vocab_size, n).astype(np.int32) for n in lengths]
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = program.build(c, mesh).init()["params"]
    model = Model(c.encoder, c.moe, params, RandomTokens(ids), {}, mesh, "random weights")
    texts = [str(i) for i in range(len(ids))]
    start = time.perf_counter()
    model.encode(texts)  # compiles each shape of rows
    first, times = time.perf_counter() - start, []
    for _ in range(3):
        start = time.perf_counter()
        vectors = model.encode(texts)
        times.append(time.perf_counter() - start)
    assert np.isfinite(vectors).all()
    duration = statistics.median(times)
    flops = sum(int(n) * flops_per_token(c.encoder, c.moe, length=int(n)) for n in lengths)
    row = {"what": f"encode {len(ids)} texts", "ms": duration * 1e3, "tokens_per_second": float(lengths.sum()) / duration,
           "texts_per_second": len(ids) / duration, "tflops": flops / duration / 1e12, "compile_seconds": first - duration}  # fmt: skip
    return [row | ({"mfu": flops / duration / peak} if peak else {})]


def grouped_matmul_is_right() -> None:
    """Nothing wrong is timed: a product of the mixture as it runs here, against the loop over tiles, in bfloat16."""
    x = jax.random.normal(jax.random.key(0), (4 * gm.TILE, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (3, 256, 384), jnp.bfloat16)
    tile_expert = jnp.array([0, 0, 2, 2])
    y = gm.grouped_matmul(x, w, tile_expert, jnp.array(3))[: 3 * gm.TILE].astype(jnp.float32)
    expected = jnp.einsum("tid,tdf->tif", x.reshape(4, gm.TILE, -1), w[tile_expert], preferred_element_type=jnp.float32)
    expected = expected.reshape(-1, 384)[: 3 * gm.TILE]
    error = float(jnp.abs(y - expected).max() / jnp.abs(expected).max())
    if not error < 2**-7:
        raise AssertionError(f"grouped_matmul is off by {error:.1e} of the largest number: nothing is timed")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
