"""Does an exported folder give the expected vectors in sentence-transformers? Run by moe_embed.export, not imported.

    python check_export.py FOLDER EXPECTED.json        prints one line of JSON, the last of its output

EXPECTED is a list of passes {"task", "batch", "texts", "ids", "vectors"}. A text is left out of the comparison, and
counted, where tokenizer.json cuts it otherwise than SentencePiece does (they break ties between equal scores each in
their own way), or where a router's k-th and next logit lie within 1e-5: top-k is discontinuous there, and rounding
decides. Where a token's logits spread over less than 1, as fresh from upcycling, within 1e-5 of that spread: so does rounding.
"""

import json
import os
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

NEAR_TIE = 1e-5


def smallest_router_gaps(model) -> list[float]:
    """A list that every router call appends to: its smallest distance of k-th and next logit."""
    gaps = []

    def note(module, inputs):
        logits = torch.nn.functional.linear(inputs[0].float(), module.layer.weight.float()).sort(descending=True)[0]
        if module.top_k < logits.shape[1]:
            gap = logits[:, module.top_k - 1] - logits[:, module.top_k]
            spread = (logits[:, 0] - logits[:, -1]).clamp(torch.finfo(torch.float32).tiny, 1)
            gaps.append((gap / spread).min().item())

    for module in model.modules():
        if type(module).__name__ == "Router":
            module.register_forward_pre_hook(note)
    return gaps


def main(folder: str, expected: str) -> None:
    with open(expected, encoding="utf-8") as file:
        passes = json.load(file)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        own_file = "auto_map" in json.load(file)  # else the folder has to load without remote code
    dtype = {"torch_dtype": "float32"}
    model = SentenceTransformer(folder, trust_remote_code=own_file, device="cpu", model_kwargs=dtype)
    gaps = smallest_router_gaps(model)
    report = {"torch": 0.0, "compared": 0, "other_tokens": 0, "near_ties": 0}
    for one in passes:
        texts, prompt = one["texts"], model.prompts[one["task"]] if one["task"] else ""
        kept = []
        for i, text in enumerate(texts):
            ids = model.tokenizer(prompt + text, truncation=True, max_length=model.max_seq_length)["input_ids"]
            gaps.clear()
            model.encode([text], prompt=prompt)
            if ids != one["ids"][i]:
                report["other_tokens"] += 1
            elif min(gaps, default=1.0) < NEAR_TIE:
                report["near_ties"] += 1
            else:
                kept.append(i)
        found = model.encode(texts, prompt=prompt, batch_size=one["batch"])
        if kept:
            difference = np.abs(found - np.asarray(one["vectors"], np.float32))[kept].max()
            report["torch"] = max(report["torch"], float(difference))
        report["compared"] += len(kept)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
