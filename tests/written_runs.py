"""Workdirs as a run leaves them, written in a moment: the files that the report reads, and a small model of random weights."""

import json
import math
import pathlib

import jax
import numpy as np

import moe_embed
from moe_embed import checkpoint, sharding
from moe_embed import config as config_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import prompts_of, write_description
from moe_embed.model import encoder as encoder_lib

SAMPLE = pathlib.Path(moe_embed.__file__).parent / "sample"
LANGS = {"de": "Seite {} der Tabelle", "en": "page {} of the table", "ru": "страница {} таблицы"}


def write(
    workdir: pathlib.Path, *, seed: int = 0, experts: int = 4, steps: int = 50, objective: str = "contrastive"
) -> None:
    """A run that began, skipped step 7, was evaluated every 10 steps and saved every 20, and resumed after 20."""
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    config = _config(workdir, experts=experts, steps=steps, objective=objective)
    mlm = objective == "mlm"
    shapes = jax.eval_shape(lambda: encoder_lib.init(config.encoder, config.moe, key=jax.random.key(0), with_head=mlm))
    params = jax.tree_util.tree_map_with_path(lambda path, x: _draw(rng, path[-1].key, x), shapes)
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    checkpoint.save(workdir / "checkpoints", {"step": steps, "params": params}, facts={}, keep=1)
    tokenizer = tokenizer_lib.read(config.data.tokenizer)
    write_description(workdir, config, tokenizer, prompts=prompts_of(config))
    rows = []
    for step in range(steps):
        loss = math.nan if step == 7 else 3 / (1 + step) + rng.uniform(0, 0.1)
        row = {"step": step, "loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0, "skipped": float(step == 7),
               "tokens": 100.0, "seconds": 0.5, "tokens_per_second": 200.0}  # fmt: skip
        if not mlm:
            row["accuracy"] = step / steps
        if experts:
            load_RE = rng.dirichlet(np.ones(experts), 2) * experts
            row |= {f"router_load/{r}/{e}": float(load_RE[r, e]) for r in range(2) for e in range(experts)}
            row |= {"dead_expert_frac": 0.0, "expert_utilisation": 0.8}
        rows.append(row)
    _lines(workdir / "metrics.jsonl", rows)
    if not mlm:
        dev = [{"step": s, "ndcg": s / 100, "ndcg/a": s / 90, "ndcg/b": s / 110} for s in range(0, steps + 1, 10)]
        _lines(workdir / "evaluations.jsonl", dev)
    saves = [{"step": s, "event": "save", "time": 1000.0 + s} for s in range(20, steps + 1, 20)]
    begin, resume = ({"step": s, "event": name, "time": 1000.0 + s} for s, name in ((0, "begin"), (20, "resume")))
    _lines(workdir / "events.jsonl", [begin, *saves[:1], *([resume] if saves else []), *saves[1:]])


def _draw(rng: np.random.Generator, name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
    """A norm does nothing: with random ones all tokens would choose the same experts."""
    values = {"scale_D": 1.0, "scale_RD": 1.0, "bias_D": 0.0, "bias_RD": 0.0}
    return np.full(x.shape, values[name], x.dtype) if name in values else rng.normal(0, 0.3, x.shape).astype(x.dtype)


def _config(workdir: pathlib.Path, *, experts: int, steps: int, objective: str) -> config_lib.Config:
    if objective == "mlm":
        _lines(
            workdir / "one.jsonl",
            [{"text": said.format(i), "lang": lang} for i in range(9) for lang, said in LANGS.items()],
        )
        sources = (str(workdir / "one.jsonl"),)
    else:
        one = [
            {"query": f"{lang} {i}?", "document": said.format(i), "lang": lang}
            for i in range(9)
            for lang, said in LANGS.items()
        ]
        two = [{"query": LANGS["de"].format(i), "document": LANGS["en"].format(i), "lang": "de-en"} for i in range(40)]
        _lines(workdir / "one.jsonl", one)
        _lines(workdir / "two.jsonl", two)
        sources = (str(workdir / "one.jsonl"), str(workdir / "two.jsonl"))
    return config_lib.from_dict({
        "encoder": {"vocab_size": 16_064, "num_layers": 4, "dim": 16, "num_heads": 2, "ffn_dim": 16, "max_seq_length": 32},
        "moe": {"num_experts": experts, "top_k": 2, "every": 2},
        "data": {"sources": sources, "tokenizer": str(SAMPLE / "tokenizer.model"), "batch_size": 8, "row_length": 32, "rows": 4,
                 "query_length": 16, "document_length": 24} | ({"document": "text"} if objective == "mlm" else {}),
        "loss": {"objective": objective}, "optim": {"learning_rate": 1e-3}, "mesh": {}, "run": {"steps": steps},
    })  # fmt: skip


def evaluation(path: pathlib.Path, *, dims: bool = True) -> None:
    """An output of evaluate for a model of 16 numbers."""
    figures = {"ndcg@10": 0.5, "recall@10": 0.6, "mrr@10": 0.4}
    task = figures | {"interval": [0.45, 0.55], "queries": {}, "seconds": 1.0}
    if dims:
        task |= {"dims": {"8": figures | {"ndcg@10": 0.4}, "4": figures | {"ndcg@10": 0.3}}}
        task |= {"precisions": {"int8": figures | {"ndcg@10": 0.49}, "binary": figures | {"ndcg@10": 0.35}}}
    path.write_text(json.dumps({"a": task, "xling-b & c": task | {"ndcg@10": 0.25}}))


def plan(path: pathlib.Path) -> None:
    """What the report reads of plan's output."""
    hbm = {"peak": 8e9, "limit": 16e9, "source": "arithmetic", "bars": {"parameters": 2e9, "activations": 6e9}}
    path.write_text(
        json.dumps({"config": "c.py", "topology": {"name": "8xH100"}, "verdict": "fits: 7.5 of 14.9 GiB", "hbm": hbm})
    )


def _lines(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
