"""torch's best assembly of the same model, for tests/bench/gpu.py: SDPA, grouped_mm, torch.compile, bfloat16, fused AdamW.

The model is our own torch file (moe_embed/torch_files/modeling_moe_embed.py), equal to ours by tests/parity, without attention
masks where all texts are of one length, and in bfloat16 throughout, AdamW's moments too: faster than what we train. Imports no jax.
"""

import pathlib
import statistics
import sys
import time

import torch
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "moe_embed" / "torch_files"))
import modeling_moe_embed as modeling


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(f, *, device: str, calls: int, repeats: int, warmup: int = 3) -> float:
    """The median time of a call, several in a row without waiting for each."""
    for _ in range(warmup):
        f()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronise(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def model_of(hf_config: dict, *, device: str, compiled: bool):
    """A model of random weights in bfloat16; `compiled`: each block by torch.compile, blocks of a kind together."""
    torch.manual_seed(0)
    config = modeling.NomicBertConfig(**hf_config)
    with torch.device(device):
        model = modeling.NomicBertModel(config).to(torch.bfloat16)
    if compiled:
        for block in model.encoder.layers:
            block.compile()
    return model


def hidden(model, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of texts of one length: no mask, so SDPA may take its fastest kernel."""
    config = model.config
    x = model.emb_ln(model.embeddings(tokens, None))
    cos, sin = modeling.rotary_tables(tokens.shape[1], config.n_embd // config.n_head, config.rotary_emb_base, x.device)
    return model.encoder(x, None, cos, sin)


def layer_row(hf_config: dict, *, tokens: int, device: str, compiled: bool, calls: int, repeats: int) -> dict:
    """The mixture forwards and backwards."""
    torch.manual_seed(0)
    config = modeling.NomicBertConfig(**hf_config)
    with torch.device(device):
        layer = modeling.MixtureMlp(config).to(torch.bfloat16)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(tokens // 64, 64, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)
    if compiled:
        layer.compile()

    def both():
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    duration = seconds(both, device=device, calls=calls, repeats=repeats)
    flops = 3.0 * tokens * config.moe_top_k * 4 * config.n_embd * config.n_inner
    return {"what": "torch: mixture with grouped_mm, compiled", "ms": duration * 1e3, "tflops": flops / duration / 1e12}


def train_row(hf_config: dict, *, pairs: int, length: int, flops_per_token: float, device: str, compiled: bool,
              repeats: int) -> dict:  # fmt: skip
    """A train step on `pairs` pairs of full-length texts, everything kept for the backward pass, one micro-batch."""
    model = model_of(hf_config, device=device, compiled=compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(4, hf_config["vocab_size"], (2 * pairs, length), device=device)

    def step():
        vectors = functional.normalize(hidden(model, tokens).float().mean(1), dim=1)
        scores = vectors[:pairs] @ vectors[pairs:].T / 0.02
        functional.cross_entropy(scores, torch.arange(pairs, device=device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    what = f"torch: {pairs} pairs, keep all"
    try:
        duration = seconds(step, device=device, calls=1, repeats=repeats)
    except torch.OutOfMemoryError:
        return {"what": what, "fault": "out of memory"}
    rate = 2 * pairs * length / duration
    row = {"what": what, "ms": duration * 1e3, "tokens_per_second": rate, "tflops": 3 * flops_per_token * rate / 1e12}
    return row | ({"gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


@torch.inference_mode()
def encode_row(hf_config: dict, *, lengths: list[int], device: str, batch_tokens: int, repeats: int) -> dict:
    """Texts of mixed lengths, sorted, in batches padded to their longest, as sentence-transformers does; not compiled:
    every length would be a compilation."""
    model = model_of(hf_config, device=device, compiled=False).eval()
    order = sorted(lengths, reverse=True)
    batches, start = [], 0
    while start < len(order):
        count = max(batch_tokens // order[start], 1)
        part = torch.tensor(order[start : start + count])
        mask = (torch.arange(int(part[0])) < part[:, None]).long()
        batches.append((torch.randint(4, hf_config["vocab_size"], mask.shape), mask))
        start += count

    def encode():
        out = []
        for tokens, mask in batches:
            mask = mask.to(device, non_blocking=True)
            x = model(tokens.to(device, non_blocking=True), mask).last_hidden_state.float() * mask[..., None]
            out.append(functional.normalize(x.sum(1) / mask.sum(1, keepdim=True), dim=1))
        return torch.cat(out).cpu()

    duration = seconds(encode, device=device, calls=1, repeats=repeats, warmup=1)
    return {"what": f"torch: encode {len(lengths)} texts, sorted and padded", "ms": duration * 1e3,
            "tokens_per_second": sum(lengths) / duration, "texts_per_second": len(lengths) / duration}  # fmt: skip
