"""An exported folder's model as ONNX, and ONNX Runtime's vectors beside the expected ones. Run by moe_embed.export --onnx.

    python to_onnx.py FOLDER EXPECTED.json        writes FOLDER/onnx, prints one line of JSON, the last of its output

Inputs: input_ids and attention_mask, int64 [B, L], any B and L. Outputs: last_hidden_state [B, L, D] and sentence_embedding
[B, D], the mean over real tokens at unit norm. An ONNX graph has no grouped product, so experts are in dense form: each
computed for each token, unchosen ones times zero. "onnx_flops" is what that costs in products with weights, in times of
the routed form. EXPECTED and what is left out near a tie: as in check_export.py.
"""

import json
import os
import sys

import numpy as np
import onnxruntime
import torch
import transformers
from check_export import NEAR_TIE, smallest_router_gaps


class WithPooling(torch.nn.Module):
    """The encoder, the mean over real tokens, and unit norm."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        real = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * real).sum(1) / real.sum(1)
        return hidden, torch.nn.functional.normalize(pooled, dim=-1)


def flops_ratio(encoder) -> float:
    """Multiplications with weights for a token in dense form, over those of the experts that it visits."""
    linear = sum(module.weight.numel() for module in encoder.modules() if isinstance(module, torch.nn.Linear))
    experts = sum(module.w1.numel() + module.w2.numel() for module in encoder.modules() if hasattr(module, "w1"))
    chosen = experts * encoder.config.moe_top_k / max(encoder.config.num_experts, 1)
    return (linear + experts) / (linear + chosen)


def write(encoder, path: str) -> None:
    """`path` and its weights in `path`.data."""
    ids = torch.arange(4, 37).reshape(3, 11)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        WithPooling(encoder).eval(), (ids, torch.ones_like(ids)), path, dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["last_hidden_state", "sentence_embedding"],
        dynamic_shapes={"input_ids": dims, "attention_mask": dims},
    )  # fmt: skip


def main(folder: str, expected: str) -> None:
    with open(expected, encoding="utf-8") as file:
        passes = json.load(file)
    encoder = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    path = os.path.join(folder, "onnx", "model.onnx")
    os.makedirs(os.path.dirname(path))
    write(encoder, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    gaps = smallest_router_gaps(encoder)
    report = {"onnx": 0.0, "onnx_near_ties": 0, "onnx_flops": round(flops_ratio(encoder), 2)}
    for one in passes:
        for start in range(0, len(one["ids"]), one["batch"]):
            rows = one["ids"][start : start + one["batch"]]
            ids = np.full((len(rows), max(map(len, rows))), encoder.config.pad_token_id, np.int64)
            mask = np.zeros_like(ids)
            kept = []
            for i, row in enumerate(rows):
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
                gaps.clear()
                with torch.no_grad():
                    encoder(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))
                if min(gaps, default=1.0) < NEAR_TIE:
                    report["onnx_near_ties"] += 1
                else:
                    kept.append(i)
            _, found = session.run(None, {"input_ids": ids, "attention_mask": mask})
            if kept:
                wanted = np.asarray(one["vectors"][start : start + one["batch"]], np.float32)
                report["onnx"] = max(report["onnx"], float(np.abs(found - wanted)[kept].max()))
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
