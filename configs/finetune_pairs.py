"""Your own pairs: finetune a model on (query, document) rows, and learn whether that made it better.

    python -m moe_embed.train --config=configs/finetune_pairs.py --config.data.sources=pairs.csv --init_from=MODEL --workdir=W
    python -m moe_embed.export --model=W --output=H

MODEL is a folder in Hugging Face layout, or a workdir. pairs.csv (or .tsv, .jsonl, .parquet) has the columns "query" and
"document"; others are named by --config.data.query=title --config.data.document=body. Rows may also have sentence-transformers'
columns (anchor, positive, negative) or FlagEmbedding's (query, pos, neg). Hard negatives are used with
--config.data.num_negatives=N, N the most of a row; a row may have fewer.

A tenth of the pairs is kept out, with all that share a text with them, and searched for before and after: the run ends with one
sentence and a 95 % interval. Batch size, steps and warm-up follow from the number of pairs (three epochs). A smoke run:
--config.run.steps=1. Shape, tokenizer and prompts are MODEL's.

Rows follow from the pairs' tokens (rows and row_length are 0): before the first step up to 64 of the run's batches are measured, and
rows chosen that hold them with little padding and at most three counts of micro-batches (longer runs have a fourth, for the worst
batch), 4,096 tokens each at most. Where memory is short, set fewer: --config.data.rows=2 --config.data.row_length=256.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """One variant, ""."""
    if variant:
        raise ValueError(f"configs/finetune_pairs.py has no variant {variant!r}.")
    c = ConfigDict()
    # Of the model that is named by --init_from; these stand in until it is read.
    c.encoder = ConfigDict(dict(vocab_size=16_064, num_layers=2, dim=128, num_heads=4, ffn_dim=256, max_seq_length=128))
    c.moe = ConfigDict(dict(num_experts=8, top_k=2, every=2))
    c.data = ConfigDict(
        dict(
            sources=(),
            tokenizer="",
            held_out=0.1,
            batch_size=0,
            query_length=128,
            document_length=256,
            row_length=0,
            rows=0,
        )
    )
    c.loss = ConfigDict(dict(temperature=0.02, bidirectional=True, false_negative_margin=0.1, balance_coefficient=0.01))
    c.optim = ConfigDict(dict(learning_rate=2e-5, schedule="linear", weight_decay=0.01))
    c.mesh = ConfigDict(dict(data=-1, expert=1))
    c.run = ConfigDict(dict(steps=0, save_every=500))
    return c
