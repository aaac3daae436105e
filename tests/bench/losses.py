"""The contrastive loss alone: compiled temporary memory and time of the plain form, our gathered form and our ring."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_embed import config as config_lib
from moe_embed.infonce import Ids, infonce
from moe_embed.ring_infonce import ring_infonce
from tests.bench import ratios
from tests.bench.ratios import Row, say

PREFIXES = (2 / 3, 1 / 3, 1 / 6, 1 / 12)  # of the whole vector, beside it: 512, 256, 128, 64 of 768


def plain(query_ND: jax.Array, document_ND: jax.Array, ids: Ids, *, c: config_lib.Loss):
    """InfoNCE as one writes it down: all scores, log_softmax, the diagonal."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    scores_NC = unit(query_ND) @ unit(document_ND).T / c.temperature
    return -jnp.diagonal(jax.nn.log_softmax(scores_NC)).mean(), {}


def compiled(form, size: int, *, dim: int, dims: tuple[int, ...] = ()):
    """Value and both gradients of a loss for `size` pairs of one device, compiled."""
    c = config_lib.Loss(dims=dims)
    f = jax.value_and_grad(lambda q, d, ids: form(q, d, ids, c=c), argnums=(0, 1), has_aux=True)
    x, i = jax.ShapeDtypeStruct((size, dim), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
    return jax.jit(f).lower(x, x, Ids(i, i)).compile()


def temporary(program) -> int:
    """Bytes of its temporaries, as the compiler plans them."""
    return program.memory_analysis().temp_size_in_bytes


def measure(sizes: tuple[int, ...], *, dim: int, rounds: int, torch_loss) -> tuple[list[Row], list[str]]:
    """Rows on memory for all `sizes` (two or more), on time for the last; and notes. `torch_loss(query, document)` gives a call of the peer's."""
    forms = {"gathered": infonce, "ring": ring_infonce}
    rows, bytes_of = [], {}
    for size in sizes:
        theirs = temporary(compiled(plain, size, dim=dim)) / 2**20
        for name, form in forms.items():
            ours = temporary(compiled(form, size, dim=dim)) / 2**20
            bytes_of[name, size] = ours
            bar = "at least 15x" if name == "ring" and size == 8192 else ""
            what = f"loss memory, {size:,} pairs, {name}"
            rows.append(Row(what, "plain jnp", theirs, ours, "MiB", theirs / ours, bar))
            say(f"{what}: plain {theirs:,.0f} MiB, ours {ours:,.1f} MiB")
    notes = []
    for name in forms:
        low, high = sizes[0], sizes[-1]
        exponent = math.log(bytes_of[name, high] / bytes_of[name, low]) / math.log(high / low)
        notes.append(
            f"Memory of the {name} loss grows with pairs to the power of {exponent:.2f}, {low:,} to {high:,} (bar: 1.05 for the ring)."
        )

    size = sizes[-1]
    rng = np.random.default_rng(0)
    query = rng.normal(size=(size, dim)).astype(np.float32)
    document = query / 8 + rng.normal(size=(size, dim)).astype(np.float32)
    ids = Ids(*(jnp.arange(size, dtype=jnp.int32) for _ in range(2)))
    arguments = jnp.asarray(query), jnp.asarray(document), ids
    five = tuple(round(part * dim) for part in PREFIXES)
    programs = {"plain jnp": compiled(plain, size, dim=dim)}
    programs |= {name: compiled(form, size, dim=dim) for name, form in forms.items()}
    programs |= {f"{name}, {len(five) + 1} dims": compiled(form, size, dim=dim, dims=five)
                 for name, form in forms.items()}  # fmt: skip
    sides = {name: (lambda p=program: jax.block_until_ready(p(*arguments))) for name, program in programs.items()}
    values = {name: float(sides[name]()[0][0]) for name in ("plain jnp", *forms)}
    sides["torch"] = torch_loss(query, document)
    values["torch"] = sides["torch"]()
    say(f"loss of {size:,} pairs: {', '.join(f'{name} {value:.6f}' for name, value in values.items())}")
    if max(values.values()) - min(values.values()) > 1e-5 * max(values.values()):
        raise SystemExit(f"the losses differ: {values}")
    for name in programs:
        sides[name]()
    seconds = ratios.interleaved(sides, rounds=rounds)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, peer, bar in (
        ("ring", "plain jnp", "at least 0.87 (at most 1.15x its time)"), ("gathered", "plain jnp", ""),
        ("ring", "torch", ""), ("gathered", "torch", ""),
    ):  # fmt: skip
        what = f"loss time, {size:,} pairs, {name}"
        rows.append(Row(what, peer, median[peer], median[name], "s", ratios.ratio(seconds[peer], seconds[name]), bar))
    for name in forms:
        many = f"{name}, {len(five) + 1} dims"
        cost = ratios.ratio(seconds[many], seconds[name])
        what = f"{len(five) + 1} Matryoshka dims against 1, {name}"
        rows.append(Row(what, "1 dim", median[name], median[many], "s", 1 / cost, "at least 0.77 (at most 1.3x)"))
    return rows, notes
