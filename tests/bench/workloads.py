"""What the benchmarks run: a slice of the full model with random weights, and the shipped texts in ten languages."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

import moe_embed
from moe_embed import config as config_lib
from moe_embed import export, sharding
from moe_embed.data import batches, sources
from moe_embed.data import pairs as pairs_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib

SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"
PROMPTS = {"query": "search_query: ", "document": "search_document: "}
SHIPPED = {"titles": 0.2, "crosslingual": 0.5, "monolingual": 0.3}  # the demo's shares; the shortest first


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured. The mix's rows hold a titles batch in one micro-batch, sections in three."""

    encoder: config_lib.Encoder
    texts: int = 256
    single: int = 24  # texts encoded one by one
    full_pairs: int = 16
    length: int = 128  # tokens of a text in full-length training, and the most of one in the mix
    mix_pairs: int = 64
    mix_rows: tuple[int, int] = (8, 136)  # B, L of a micro-batch
    losses: tuple[int, ...] = (2048, 4096, 8192)
    rounds: int = 3


FULL = Size(
    config_lib.Encoder(vocab_size=16_064, num_layers=4, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=160)
)
QUICK = Size(
    config_lib.Encoder(vocab_size=16_064, num_layers=4, dim=32, num_heads=2, ffn_dim=64, max_seq_length=64),
    texts=24, single=3, full_pairs=4, length=32, mix_pairs=8, mix_rows=(4, 40), losses=(64, 128), rounds=1,
)  # fmt: skip
MOE = config_lib.Moe(num_experts=8, top_k=2, every=2)


def write_model(size: Size, folder: pathlib.Path) -> None:
    """A random model of this size with the shipped tokenizer, through our exporter (which compares it with torch)."""
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    params = encoder_lib.init(size.encoder, MOE, key=jax.random.key(0))
    tokenizer = tokenizer_lib.read(SAMPLE / "tokenizer.model")
    export.export(Model(size.encoder, MOE, params, tokenizer, PROMPTS, mesh, "the benchmark's model"), folder)


@functools.cache
def shipped_pairs(name: str) -> list[pairs_lib.Pair]:
    """One of the shipped files of pairs, in an order of no meaning (they are sorted by language)."""
    pairs = sources.read_source(str(SAMPLE / "pairs" / f"{name}.jsonl.gz")).pairs
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def mixed_texts(count: int) -> list[str]:
    """Queries and sections of the shipped pairs in ten languages, half and half, each behind its prompt."""
    texts = []
    for pair in shipped_pairs("monolingual")[: -(-count // 2)]:
        texts += [PROMPTS["query"] + pair.query, PROMPTS["document"] + pair.document]
    return texts[:count]


def train_config(size: Size, *, pairs: int, rows: int, row_length: int, texts_per_row: int) -> config_lib.Config:
    """A step of contrastive training with a constant rate, no balance loss (the peers have none) and no recomputation."""
    data = {"sources": ("shipped",), "tokenizer": "shipped", "batch_size": pairs, "rows": rows, "row_length": row_length,
            "texts_per_row": texts_per_row, "query_length": size.length, "document_length": size.length}  # fmt: skip
    return config_lib.from_dict({
        "encoder": dataclasses.asdict(size.encoder), "moe": dataclasses.asdict(MOE), "data": data,
        "loss": {"temperature": 0.05, "balance_coefficient": 0.0}, "mesh": {"data": 1},
        "optim": {"learning_rate": 1e-5, "schedule": "constant"}, "run": {"steps": 1, "recompute": False},
    })  # fmt: skip


def make_batch(c: config_lib.Config, pairs: Sequence[pairs_lib.Pair]) -> tuple[dict, list, list]:
    """One packed batch of these pairs, and the token ids in it: of its queries, of its documents."""
    tokenizer = tokenizer_lib.read(SAMPLE / "tokenizer.model")
    arrays = batches.Batches([sources.Source("shipped", list(pairs), 0)], tokenizer, c, num_shards=1).batch_at(0).arrays

    def read(slot_N) -> list[np.ndarray]:
        tokens_BL, segments_BL = (
            arrays[f"{name}_MBL"].reshape(-1, c.data.row_length) for name in ("tokens", "segments")
        )
        places = [divmod(int(slot), c.data.texts_per_row) for slot in slot_N]
        return [tokens_BL[row][segments_BL[row] == segment + 1] for row, segment in places]

    return arrays, read(arrays["query_slot_N"]), read(arrays["document_slot_N"])


def distinct(pairs: Sequence[pairs_lib.Pair], count: int) -> list[pairs_lib.Pair]:
    """The first pairs no two of which share a text or an id: the loss then masks no candidate, and the peers need no masks."""
    seen, chosen = set(), []
    for pair in pairs:
        names = {pair.query, pair.document, pair.id or pair.query}
        if not names & seen:
            seen |= names
            chosen.append(pair)
    if len(chosen) < count:
        raise SystemExit(f"of {len(pairs)} pairs {len(chosen)} are distinct; {count} are needed.")
    return chosen[:count]


def long_pairs(size: Size) -> list[pairs_lib.Pair]:
    """Pairs whose texts both fill `length` tokens: shipped sections, end to end."""
    texts = [pair.document for pair in distinct(shipped_pairs("monolingual"), 40 * size.full_pairs)]
    joined = [" ".join(texts[i : i + 20]) for i in range(0, len(texts), 20)]
    return [pairs_lib.Pair(query, document) for query, document in zip(joined[::2], joined[1::2], strict=True)]
