"""A tiny config and batches for it, shared by the tests of the device's wing. No files: texts are made of random ids."""

import jax
import numpy as np

from moe_embed import config as config_lib
from moe_embed.data import batches as batches_lib
from moe_embed.data.mlm_batches import MlmBatches
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import Source, Texts
from moe_embed.model import encoder

WORDS = ("ka", "lo", "mi", "nu", "pe", "ri", "so", "tu", "va", "xe")


class FakeTokenizer:
    """Two letters an id: enough to pack and mask real lengths without a model file."""

    num_ids = 60  # fewer than the rows of the table
    mask_id = 59
    special_ids = np.array([0, 1, 2, 3, 59])
    model_bytes = b""

    def encode(self, texts, *, prompt="", max_length):
        ids = [[0, *(4 + WORDS.index(t[i : i + 2]) for i in range(0, len(t), 2)), 2] for t in texts]
        return [np.array(i[:max_length], np.int32) for i in ids], 0

    def count(self, texts):
        return np.array([2 + -(-len(text) // 2) for text in texts])


def config(**changes) -> config_lib.Config:
    """Every section can be changed: config(data={"batch_size": 8}, run={"recompute": True})."""
    tree = {
        "encoder": {"vocab_size": 64, "num_layers": 4, "dim": 16, "num_heads": 2, "ffn_dim": 32, "max_seq_length": 32},
        "moe": {"num_experts": 8, "top_k": 2, "every": 2},
        "data": {"sources": ("random",), "tokenizer": "none", "batch_size": 16, "row_length": 32, "rows": 2,
                 "query_length": 8, "document_length": 24, "query_prompt": "", "document_prompt": "", "texts_per_row": 4},
        "loss": {"temperature": 0.1, "balance_coefficient": 0.5, "bidirectional": True},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
        "mesh": {},
        "run": {"steps": 10, "recompute": False},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] |= values
    return config_lib.from_dict(tree)


def batches(c: config_lib.Config, *, num_shards: int = 1, seed: int = 0) -> batches_lib.Batches:
    """Of 40 pairs. To distil there are scores, but not of every pair; queries with two answers; and missing negatives."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: "".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    negatives = c.data.num_negatives
    pairs = [Pair(text(1, 6), text(4, 22), tuple(text(4, 22) for _ in range(negatives))) for _ in range(40)]
    if c.loss.distill:
        for i, pair in enumerate(pairs):
            kept = pair.negatives[: negatives - (i % 5 == 0)]
            scores = tuple(rng.normal(size=1 + len(kept)).tolist()) if i % 4 else ()
            pairs[i] = Pair(pair.query, pair.document, kept, id=f"q{i // 2}", scores=scores)
    return batches_lib.Batches([Source("random", pairs, 0)], FakeTokenizer(), c, num_shards=num_shards)


def mlm_batches(c: config_lib.Config, *, num_shards: int = 1, seed: int = 0) -> MlmBatches:
    """Of 120 texts, some of them longer than a row."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(WORDS, rng.integers(1, 50))) for _ in range(120)]
    return MlmBatches([Texts("random", texts, [""] * 120, 0)], FakeTokenizer(), c, num_shards=num_shards)


def params(c: config_lib.Config, *, seed: int = 0) -> dict:
    """Random parameters of a config's encoder, biases too; with the head where the objective needs it."""
    make = lambda key: encoder.init(c.encoder, c.moe, key=key, with_head=c.loss.objective == "mlm")  # noqa: E731
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key.startswith("scale_") else 0.0
        return rng.normal(mean, 0.25, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(make, jax.random.key(0)))


def compiled(f, *arguments):
    """A jitted `f` compiled for `arguments`, without LLVM's optimisations: half the time, and nothing here runs long."""
    return f.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
