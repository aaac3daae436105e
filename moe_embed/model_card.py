"""README.md of an exported folder: how to load it, what it is, what measured parity says, and who else can read it."""

import json

from moe_embed import hf_layout
from moe_embed.config import Encoder, Moe

NATIVE = {"bert": "BertModel", "xlm-roberta": "XLMRobertaModel"}
UNREADABLE = """
TEI, vLLM and llama.cpp cannot read this folder (model_type moe_embed): experts with learned positions are in none of the
layouts they know. With rotary positions the model has the NomicBert-MoE layout. Changing them takes training again, first of
masked language modelling, then of pairs:

```bash
python -m moe_embed.import_hf --model={name} --position=rotary --output={name}_rotary
python -m moe_embed.train --config=configs/nomic_v2/mlm.py --init_from={name}_rotary --workdir=...
```
"""


def model_card(encoder: Encoder, moe: Moe, prompts: dict[str, str], *, name: str, report: dict) -> str:
    """The card of a folder called `name` with the parity report `report` (export.py)."""
    kind = hf_layout.model_type(encoder, moe)
    total, active = hf_layout.num_parameters(encoder, moe)
    experts = f"{moe.num_experts} experts, {moe.top_k} active, every {moe.every} layers" if moe.num_experts else "none"
    positions = "rotary" if encoder.position == "rotary" else f"learned, {encoder.num_positions} rows"
    table = "\n".join(f"| {t} | `{json.dumps(text, ensure_ascii=False)}` |" for t, text in prompts.items())
    query, document = (f', prompt_name="{task}"' if task in prompts else "" for task in ("query", "document"))
    torch = report["torch"] if report["torch"] == "not run" else f"{report['torch']:.1e}"
    remote = "" if kind in NATIVE else ", trust_remote_code=True"
    tags = [
        "sentence-transformers",
        "feature-extraction",
        *(["mixture-of-experts"] if moe.num_experts else []),
        "moe_embed",
    ]
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [{", ".join(tags)}]
---
# {name}

A text embedding model trained with moe_embed, {_layout(kind)}:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{remote})
queries = model.encode(["..."]{query})
documents = model.encode(["..."]{document})
similarity = model.similarity(queries, documents)
```

| | |
|---|---|
| parameters | {total:,}, of which {active:,} are active for a token |
| layers, dim, heads, ffn | {encoder.num_layers}, {encoder.dim}, {encoder.num_heads}, {encoder.ffn_dim} |
| experts | {experts} |
| positions | {positions} |
| reads at most | {encoder.max_seq_length} tokens |
| vector | mean over tokens, unit length; compare by cosine |

Texts go in with the prompt of their task in front (servers rarely add it by themselves):

| task | prompt |
|---|---|
{table or "| (none) | |"}

Parity, largest difference of any number of a vector on {report["texts"]} texts in float32: read back by moe_embed
{report["moe_embed"]:.1e}, in sentence-transformers {torch} (parity.json).
{_readers(kind, moe).format(name=name)}"""


def _layout(kind: str) -> str:
    if kind in NATIVE:
        return f"a {NATIVE[kind]} of transformers. It loads without remote code"
    layout = "NomicBert-MoE layout" if kind == "nomic_bert" else "names of NomicBert-MoE, with learned positions"
    return f"in the {layout}. Load it with its own model file"


def _readers(kind: str, moe: Moe) -> str:
    if kind in NATIVE:
        return (
            "There is no pooler: none has a part in the vectors. `AutoModel.from_pretrained(..., add_pooling_layer=False)` loads "
            "the\nencoder alone; without that argument transformers adds a pooler of random numbers, which it says.\n"
        )
    if kind == "moe_embed":
        return UNREADABLE
    servers = (
        "TEI, vLLM and llama.cpp know this layout; llama.cpp drops the experts' shared bias: a GGUF differs a little."
        if moe.num_experts and moe.every == 2
        else "Servers with their own code for this family expect experts in every second layer: use the file here."
    )
    return f"transformers' own `nomic_bert` is another architecture and refuses this folder. {servers}\n"
