"""README.md of an exported folder: how to load it, what it is, what measured parity says, and who else can read it."""

import json

from moe_embed import card_facts, hf_layout
from moe_embed.config import Encoder, Moe

NATIVE = {"bert": "BertModel", "xlm-roberta": "XLMRobertaModel"}
CONVERTER_ROWS = 250_002  # llama.cpp's converter puts <mask> at 250,001, where XLM-R has it
UNREADABLE = """
TEI, vLLM and llama.cpp cannot read this folder (model_type moe_embed): experts with learned positions are in none of the
layouts they know. With rotary positions the model has the NomicBert-MoE layout. Changing them takes training again, first of
masked language modelling, then of pairs:

```bash
{fetch}python -m moe_embed.import_hf --model={name} --position=rotary --output={name}_rotary
python -m moe_embed.train --config=configs/nomic_v2/mlm.py --init_from={name}_rotary --workdir=...
```
"""


def model_card(
    encoder: Encoder,
    moe: Moe,
    prompts: dict[str, str],
    *,
    name: str,
    report: dict,
    facts: card_facts.Facts = card_facts.Facts(),  # noqa: B008, it is a constant
    calibrated: bool = False,
) -> str:
    """The card of a model with the parity report `report` (export.py); `calibrated`: it has calibration.json.

    `name` is a folder's, or OWNER/NAME of the hub: with it the card is for who loads the model from there.
    """
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
{_front_matter(facts)}---
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
{_readers(kind, moe, report, vocab_size=encoder.vocab_size).format(fetch=_fetch(name), name=name.rpartition("/")[2])}{_small(name, encoder.dim) if calibrated else ""}{_more(facts)}"""


def _front_matter(facts: card_facts.Facts) -> str:
    """Lines of YAML, of what is known; json's strings are YAML's ("no" is a language, not a falsehood)."""
    lines = {"license": facts.license, "base_model": facts.base_model, "language": list(facts.languages)}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items() if value)


def _more(facts: card_facts.Facts) -> str:
    section = card_facts.section(facts)
    return f"\n{section}" if section else ""


def _fetch(name: str) -> str:
    """The command that makes OWNER/NAME of the hub the folder NAME; none for a folder."""
    return f"hf download {name} --local-dir={name.rpartition('/')[2]}\n" if "/" in name else ""


def _small(name: str, dim: int) -> str:
    on_hub = "/" in name
    path = f'hf_hub_download("{name}", "calibration.json")' if on_hub else f'"{name}/calibration.json"'
    return f"""
int8 and binary vectors, with the ranges of calibration.json (whole vectors of {dim} numbers; a prefix has others). For int8 take
sentence-transformers 6 or newer: older ones wrap around outside of the ranges.

```python
import json, numpy as np
{"from huggingface_hub import hf_hub_download" + chr(10) if on_hub else ""}from sentence_transformers.util.quantization import quantize_embeddings

ranges = np.array(json.load(open({path}))["ranges"], np.float32)
int8 = quantize_embeddings(documents, precision="int8", ranges=ranges)
bits = quantize_embeddings(documents, precision="ubinary")
```
"""


def _layout(kind: str) -> str:
    if kind in NATIVE:
        return f"a {NATIVE[kind]} of transformers. It loads without remote code"
    layout = "NomicBert-MoE layout" if kind == "nomic_bert" else "names of NomicBert-MoE, with learned positions"
    return f"in the {layout}. Load it with its own model file"


def _readers(kind: str, moe: Moe, report: dict, *, vocab_size: int) -> str:
    if kind in NATIVE:
        return (
            "There is no pooler: none has a part in the vectors. `AutoModel.from_pretrained(..., add_pooling_layer=False)` loads "
            "the\nencoder alone; without that argument transformers adds a pooler of random numbers, which it says.\n"
        )
    if kind == "moe_embed":
        return UNREADABLE
    other = "transformers' own `nomic_bert` is another architecture and refuses this folder. "
    if not moe.num_experts or moe.every != 2:
        return (
            other
            + "Servers with their own code for this family expect experts in every second layer: use the file here.\n"
        )
    said = f"{other}TEI, vLLM and llama.cpp know this layout.\n"
    if "shared_bias" in report and report["shared_bias"] == "folded":
        said += "The experts' shared bias is folded into other weights (the same function), because llama.cpp's converter drops it.\n"
    else:
        said += "llama.cpp's converter drops the experts' shared bias: a GGUF that it makes differs a little.\n"
    if vocab_size < CONVERTER_ROWS:
        said += f"That converter takes no vocabulary below {CONVERTER_ROWS:,} rows; `moe_embed.export --gguf` does.\n"
    if "gguf" in report:
        measured = "not run" if report["gguf"] == "not run" else f"{report['gguf']:.5f}"
        said += (
            "`model-f16.gguf` is for llama.cpp (mean pooling; put the prompt in front yourself), the shared bias folded in. Least "
            f"cosine\nto this model: {measured}. llama.cpp has GELU in its tanh form and half precision.\n"
        )
    return said
