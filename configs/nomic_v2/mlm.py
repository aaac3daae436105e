"""Stage 1, masked language modelling: a pretrained encoder gets used to rotary positions and long rows.

    python -m moe_embed.import_hf --model=XLM_ROBERTA_BASE --position=rotary --max_seq_length=2048 --output=runs/xlmr
        (for contrastors also --rotary_base=100000: with --init_from the model's own counts)
    python -m moe_embed.train --config=configs/nomic_v2/mlm.py:paper --init_from=runs/xlmr --workdir=runs/mlm \\
        --config.data.sources=cc100/de.jsonl.gz,cc100/en.jsonl.gz,...

Presets (arXiv 2502.07972; the README lists every difference):
  paper        Table 2 as reported: 10,000 steps of 4,096 rows x 2,048 tokens, 4e-4, clipped at 1
  contrastors  the public code's mmlm.yaml: 25,000 steps, warm-up 1,000, no clipping, rotary base 100,000
  ours         the paper's
  tiny         a small encoder from scratch on the text that ships here, for a laptop: minutes

Source files are JSONL with "text" and "lang" (or pairs, of which the documents are read). One language a batch, drawn in
proportion to size ** 0.3. Expect `mlm_loss` to end far below the unigram entropy that the run prints at its start.

Hardware, estimated by moe_embed.plan and not measured here: 10,000 steps are 84 billion tokens, 9.1e19 FLOPs with the head
at the masked places only; on 8 H100, at 60 to 40 % of peak, that is 5.3 to 8.0 hours.
"""

import pathlib

from ml_collections import ConfigDict

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "moe_embed" / "sample"


def get_config(variant: str = "paper") -> ConfigDict:
    """Variants: "paper", "contrastors", "ours", "tiny"."""
    c = ConfigDict()
    c.encoder = ConfigDict(
        dict(vocab_size=250_048, num_layers=12, dim=768, num_heads=12, ffn_dim=3072, max_seq_length=2048)
    )
    c.encoder.dtype = "bfloat16"
    c.moe = ConfigDict(dict(num_experts=0))
    c.data = ConfigDict(
        dict(
            sources=(),
            tokenizer="sentencepiece.bpe.model",
            batch_size=4096,
            by_language=True,
            smoothing=0.3,
            row_length=2048,
            rows=4,
        )
    )
    c.loss = ConfigDict(dict(objective="mlm", mask_fraction=0.3))
    c.optim = ConfigDict(
        dict(learning_rate=4e-4, schedule="linear", warmup_steps=500, weight_decay=0.0, beta2=0.98, epsilon=1e-6)
    )
    c.mesh = ConfigDict(dict(data=-1, expert=1))
    c.run = ConfigDict(dict(steps=10_000, save_every=500))
    if variant == "contrastors":
        c.encoder.rotary_base = 100_000.0
        c.optim.update(warmup_steps=1000, clip_norm=float("inf"))
        c.run.steps = 25_000
    elif variant == "tiny":
        c.encoder = ConfigDict(
            dict(vocab_size=16_064, num_layers=2, dim=128, num_heads=4, ffn_dim=256, max_seq_length=128)
        )
        c.data.update(
            sources=(str(SAMPLE / "pairs" / "monolingual.jsonl.gz"),),
            tokenizer=str(SAMPLE / "tokenizer.model"),
            batch_size=16,
            row_length=128,
            rows=16,
            query_length=24,
            document_length=64,
        )
        c.optim.update(learning_rate=2e-3, warmup_steps=50, epsilon=1e-8)
        c.run.update(steps=300, save_every=150, recompute=False)
    elif variant not in ("", "paper", "ours"):
        raise ValueError(
            f"configs/nomic_v2/mlm.py has no preset {variant!r}; it has paper, contrastors, ours and tiny."
        )
    return c
