"""What each choice of the recipe is worth, at the demo's size: one variant a question, everything else equal.

    bash launch/ablations.sh                     # every variant with three seeds, then a table of means and spreads
    python -m moe_embed.train --config=configs/ablations/grid.py:top1 --workdir=runs/ablations/top1-seed0

Variants, each the same steps on the same pairs:
  dense        no experts, the parent's shape: what upcycling starts from
  dense_wide   no experts, MLPs 1.5 times as wide: the FLOPs and the active parameters of top2
  top1, top2   8 experts in the second of two layers, 1 or 2 of them a token
  every        8 experts in both layers, top-2
  upcycled     top2 from a dense encoder after MLM (launch/ablations.sh makes it, one for all seeds: the spread is that of the
               contrastive stage alone); dense_mlm is that encoder going on dense
  paper        top2 with the paper's loss: one direction, copies count as negatives, balance 0.125 (see pretrain.py)

top2 is what other configs call ours: both directions, copies masked, balance 0.01. Tables of what was run, with date and
machine, are in tests/bench/results (2026-11-24-ablations.md).
"""

import pathlib

from ml_collections import ConfigDict

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "moe_embed" / "sample"
VARIANTS = ("dense", "dense_wide", "top1", "top2", "every", "upcycled", "dense_mlm", "paper", "tiny")


def get_config(variant: str = "top2") -> ConfigDict:
    """Variants: see above; "tiny" is top2 for a few steps."""
    if variant and variant not in VARIANTS:
        raise ValueError(f"configs/ablations/grid.py has no variant {variant!r}; it has {', '.join(VARIANTS)}.")
    c = ConfigDict()
    c.encoder = ConfigDict(dict(vocab_size=16_064, num_layers=2, dim=128, num_heads=4, ffn_dim=256, max_seq_length=128))
    c.moe = ConfigDict(dict(num_experts=8, top_k=2, every=2))
    c.data = ConfigDict(
        dict(
            sources=tuple(
                str(SAMPLE / "pairs" / f"{name}.jsonl.gz") for name in ("crosslingual", "monolingual", "titles")
            ),
            weights=(0.5, 0.3, 0.2),
            tokenizer=str(SAMPLE / "tokenizer.model"),
            batch_size=256,
            query_length=24,
            document_length=64,
            row_length=64,
            rows=68,
            dev=tuple(str(SAMPLE / "dev" / f"xling-libreoffice-help-{lang}-en") for lang in ("de", "ja", "ru")),
        )
    )
    c.loss = ConfigDict(dict(temperature=0.05, bidirectional=True, balance_coefficient=0.01))
    c.optim = ConfigDict(dict(learning_rate=4e-3, schedule="cosine", warmup_steps=50))
    c.mesh = ConfigDict(dict(data=-1, expert=1))
    c.run = ConfigDict(dict(steps=200, eval_every=200, save_every=200, recompute=False))
    if variant in ("dense", "dense_wide", "dense_mlm"):
        c.moe.num_experts = 0
        c.encoder.ffn_dim = 384 if variant == "dense_wide" else 256
    elif variant == "top1":
        c.moe.top_k = 1
    elif variant == "every":
        c.moe.every = 1
    elif variant == "paper":
        c.loss.update(bidirectional=False, mask_duplicates=False, balance_coefficient=0.125)
    elif variant == "tiny":
        c.data.update(batch_size=32, rows=16)
        c.run.update(steps=4, eval_every=4, save_every=4)
    return c
