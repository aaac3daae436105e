"""The main job: a small multilingual MoE embedding model, trained on a plain CPU from the text that ships here.

    python -m moe_embed.train --config=configs/demo.py --workdir=runs/demo

Expect a dev nDCG@10 of 0.53 to 0.54 at the end (0.22 after 100 steps), in five minutes on two cores. Learning rate, temperature and
both directions were chosen on the dev pages in runs of 300 steps: 4e-3 over 2e-3 and 8e-3 (45.1, 43.7, 36.7), 0.05 level with
0.1 and 0.02 (45.1, 45.5, 44.1), both directions over one (45.1, 43.0).
"""

import pathlib

from ml_collections import ConfigDict

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "moe_embed" / "sample"


def get_config(variant: str = "") -> ConfigDict:
    """Variants: "" the demo; "dense" a dense model of equal active size; "small" half as wide and 100 steps, for
    colab/: it learns a little, in a minute; "tiny" a few steps in seconds, for tests."""
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
    c.optim = ConfigDict(dict(learning_rate=4e-3, schedule="cosine", warmup_steps=100, weight_decay=0.01))
    c.mesh = ConfigDict(dict(data=-1, expert=1))
    c.run = ConfigDict(dict(steps=600, eval_every=100, save_every=200, recompute=False))
    if variant == "tiny":
        c.encoder.update(dim=32, num_heads=2, ffn_dim=64)
        c.data.update(batch_size=32, rows=16, dev=())
        c.optim.update(warmup_steps=5)
        c.run.update(steps=20, save_every=10)
    elif variant == "small":  # without the titles a batch has one size, so one program is compiled
        c.encoder.update(dim=64, num_heads=2, ffn_dim=128)
        c.data.update(sources=c.data.sources[:2], weights=(0.6, 0.4), dev=())
        c.optim.update(warmup_steps=20)
        c.run.update(steps=100, eval_every=0, save_every=50)
    elif (
        variant == "dense"
    ):  # a token meets as many parameters: one MLP of 1 and one of 2 experts' width, on average 1.5
        c.encoder.ffn_dim = 384
        c.moe.num_experts = 0
    elif variant:
        raise ValueError(f"configs/demo.py has no variant {variant!r}; it has dense, small and tiny.")
    return c
