"""export: a model becomes a folder that PyTorch users load, and proves that it still gives the same vectors.

    python -m moe_embed.export --model=runs/demo --output=runs/demo/export

The folder has the released NomicBert-MoE layout (moe_embed/hf_layout.py), a torch model file of our own, and what
sentence-transformers reads: `SentenceTransformer(folder, trust_remote_code=True)`. It is written beside its place and
renamed into it, after it has been read back and compared: parity.json holds the measured differences.
"""

import argparse
import base64
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence

import jax
import numpy as np
import safetensors.numpy
from sentencepiece import sentencepiece_model_pb2

from moe_embed import hf_layout, sharding
from moe_embed.config import Mesh, UserError, run_verb
from moe_embed.load import Model, load

BLANK = "\u2581"  # how SentencePiece writes a blank inside pieces
TOLERANCE = 1e-5  # largest difference of a number of a unit vector, float32
TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"
MODEL_FILE = "modeling_moe_embed.py"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
           "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
TEXTS = (  # short texts in many scripts, with what normalisation has to deal with: wide forms, ligatures, blanks
    "Where do I change the page margins?", "The quick brown fox jumps over the lazy dog.", "def f(x): return x ** 2",
    "Wie ändere ich die Seitenränder?", "Straße, Übermut und Äpfel", "¿Dónde está la biblioteca más cercana?",
    "Un œuf à la coque, s'il vous plaît.", "L'été dernier, nous sommes allés à Besançon.", "Dove si trova la stazione?",
    "Onde posso comprar um bilhete?", "Waar is het dichtstbijzijnde ziekenhuis?", "Gdzie mogę kupić świeży chleb?",
    "Как изменить поля страницы?", "Де знаходиться найближча аптека?", "Πού είναι ο σταθμός;",
    "Sayfa kenarları nerede?", "كيف أغير هوامش الصفحة؟", "איך משנים את שולי הדף?", "पृष्ठ का हाशिया कैसे बदलें?",
    "หน้ากระดาษนี้กว้างเท่าไร", "ページの余白を変更するには?", "如何更改页边距?", "페이지 여백을 어떻게 바꾸나요?",
    "Lề trang ở đâu?", "Hur ändrar jag sidmarginalerna?", "Missä on lähin apteekki?", "Hol van a legközelebbi patika?",
    "x", "3.14159 ≈ π", "  leading, trailing  and   repeated\tblanks \n", "Ｆｕｌｌ　ｗｉｄｔｈ, ﬁne ﬂow, ½ ①",
    "</s> <mask> 👍🏽 ☃",
)  # fmt: skip


def export(model: Model, output: str | pathlib.Path, *, force: bool = False) -> dict:
    """Write `model` to the folder `output`; returns the parity report, which is also in its parity.json.

    An earlier export at `output` is replaced. Anything else there is refused, or with `force` moved to `output`.bak.
    UserError, and no folder, if the model cannot be written in this layout or the folder gives other vectors.
    """
    output = pathlib.Path(os.path.abspath(output))
    occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    foreign = occupied and not ((output / "parity.json").is_file() and (output / MODEL_FILE).is_file())
    if foreign and not force:
        raise UserError(f"{output} is not empty and is no earlier export; name another folder, or move it by --force.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror} ({error.filename}).") from error
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = pathlib.Path(scratch) / output.name
        folder.mkdir()
        _write(model, folder)
        report = _parity(model, folder)
        _write_json(folder / "parity.json", report)
        (folder / "README.md").write_text(_model_card(model, output.name, report), encoding="utf-8")
        if occupied:
            _out_of_the_way(output, keep=foreign)
        folder.rename(output)
    return report


def tokenizer_json(model_bytes: bytes) -> dict:
    """A SentencePiece unigram model as the tokenizers library's JSON, with XLM-R's ids.

    Piece i >= 3 becomes id i + 1 behind <s>, <pad>, </s>, <unk>; <mask> is last. Over 30,000 real texts and XLM-R's own
    model the ids equal SentencePiece's but for 34 texts, in which two cuts score the same.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    trainer, normalizer, piece_type = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.model_type != trainer.UNIGRAM or trainer.treat_whitespace_as_suffix:
        raise UserError("the tokenizer is no plain unigram model; tokenizer.json cannot say what it does.")
    if not (normalizer.add_dummy_prefix and normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces):
        raise UserError("the tokenizer does not treat blanks as XLM-R does; train it with SentencePiece's defaults.")
    for piece in proto.pieces[3:]:
        # A user-defined piece (a prompt) scores 0.0, the best there is, and so is always taken, here as there; but not
        # if Metaspace cuts it at an inner blank or if normalisation, which SentencePiece keeps off it, would change it.
        fixed = not {" ", BLANK} & set(piece.piece[1:]) and unicodedata.normalize("NFKC", piece.piece) == piece.piece
        if piece.type != piece_type.NORMAL and not (piece.type == piece_type.USER_DEFINED and fixed):
            raise UserError(f"the tokenizer has the special piece {piece.piece!r}; tokenizer.json cannot express it.")
    # XLM-R's own file scores these 0.0, the best there is, so that "</s>" typed by a user ends the text. No cut of six
    # characters into pieces scores as low as this, so (where "<", "/" and ">" are pieces) they are cut like other text.
    never = 8 * min(piece.score for piece in proto.pieces)
    vocab = [[special, never] for special in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [[piece.piece, piece.score] for piece in proto.pieces[3:]]
    vocab.append(["<mask>", never])
    steps: list[dict] = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if "nfkc" in normalizer.name:  # Precompiled does not join marks in graphemes of 6 bytes or more (half-width kana)
        steps.append({"type": "NFC"})
    steps += [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    metaspace = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "always", "split": True}
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(vocab) - 1}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": token == "<mask>", "rstrip": False,
         "normalized": False, "special": True}
        for token, i in ids.items()
    ]  # fmt: skip
    bos, eos = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first, eos],
            "pair": [bos, first, eos, eos, second, eos],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("<s>", "</s>")},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
    }


def _write(model: Model, folder: pathlib.Path) -> None:
    """All files but parity.json and README.md."""
    encoder, moe, length = model.encoder, model.moe, model.encoder.max_seq_length
    tokenizer = tokenizer_json(model.tokenizer.model_bytes)
    num_ids = len(tokenizer["model"]["vocab"])
    if num_ids != model.tokenizer.num_ids or num_ids > encoder.vocab_size:
        raise UserError(f"the tokenizer has {num_ids} ids; the embedding table has {encoder.vocab_size} rows.")
    tensors = hf_layout.to_tensors(model.params, encoder=encoder, moe=moe)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{model.origin} has numbers that are not finite, in {name}; it cannot be exported.")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MODEL_FILE).write_bytes((TORCH_FILES / MODEL_FILE).read_bytes())
    (folder / "model.safetensors").chmod((folder / MODEL_FILE).stat().st_mode)  # safetensors makes it private
    (folder / "sentencepiece.bpe.model").write_bytes(model.tokenizer.model_bytes)
    _write_json(folder / "config.json", hf_layout.hf_config(encoder, moe))
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    _write_json(folder / "special_tokens_map.json", SPECIAL)
    _write_json(folder / "tokenizer_config.json", SPECIAL | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" typed by a user is text, as in SentencePiece
    })  # fmt: skip
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    _write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ])  # fmt: skip
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": encoder.dim,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "include_prompt": True,
    })  # fmt: skip
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    prompts = dict(model.prompts)
    if "document" in prompts:  # the released folder's name for it, which older scripts ask for
        prompts.setdefault("passage", prompts["document"])
    _write_json(folder / "config_sentence_transformers.json", {
        "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine",
    })  # fmt: skip


def _parity(model: Model, folder: pathlib.Path) -> dict:
    """Encode TEXTS and four long texts with the model in memory, the folder read back, and torch; compare.

    On the CPU and in float32 whatever the model runs on: accelerators round products, torch is compared here too.
    """
    try:
        devices = jax.local_devices(backend="cpu")[:1]
    except RuntimeError as error:
        raise UserError("parity is measured on the CPU; add it to JAX_PLATFORMS (for example cuda,cpu).") from error
    mesh = sharding.make_mesh(Mesh(data=1), devices=devices)
    params = jax.tree.map(np.asarray, model.params)
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    encoder = dataclasses.replace(model.encoder, dtype="float32")
    ours, again = dataclasses.replace(model, encoder=encoder, params=params, mesh=mesh), load(folder, mesh=mesh)
    characters = 8 * min(encoder.max_seq_length, 512)
    long_texts = [" ".join(TEXTS[i:] + TEXTS[:i]) * (1 + characters // 900) for i in (0, 8, 16, 24)]
    texts = [*TEXTS, *(text[: characters // (1 + i)] for i, text in enumerate(long_texts))]
    passes, difference = [], 0.0
    for task, batch in ((model.prompt("query"), 1), (None, 32)):
        vectors = ours.encode(texts, task=task)
        prompt = model.prompts[task] if task else ""
        ids = model.tokenizer.encode(texts, prompt=prompt, max_length=encoder.max_seq_length)[0]
        for start in range(0, len(texts), batch):
            found = again.encode(texts[start : start + batch], task=task)
            difference = max(difference, float(np.abs(found - vectors[start : start + batch]).max()))
        ids_and_vectors = {"ids": [row.tolist() for row in ids], "vectors": vectors.tolist()}
        passes.append({"task": task, "batch": batch, "texts": texts} | ids_and_vectors)
    report = {"tolerance": TOLERANCE, "texts": len(texts), "moe_embed": difference, "torch": "not run"}
    if _torch_is_here():
        report |= _torch_parity(folder, passes)
        left_out = report["other_tokens"] + report["near_ties"]
        if left_out > len(texts) / 2:
            raise UserError(f"torch could be compared on few texts: {json.dumps(report)}; the export was not kept.")
    for name in ("moe_embed", "torch"):
        if report[name] != "not run" and not report[name] <= TOLERANCE:  # also catches NaN
            raise UserError(f"{name} reads other vectors from the export: they differ by {report[name]:.2e}, more than "
                            f"{TOLERANCE:.0e}; it was not kept.")  # fmt: skip
    return report


def _torch_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "sentence_transformers"))


def _torch_parity(folder: pathlib.Path, passes: list[dict]) -> dict:
    """The report of torch_files/check_export.py, run on `folder` in a process of its own, offline."""
    with tempfile.TemporaryDirectory() as scratch:
        expected = pathlib.Path(scratch) / "expected.json"
        expected.write_text(json.dumps(passes), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": scratch,
                   "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        command = [sys.executable, str(TORCH_FILES / "check_export.py"), str(folder), str(expected)]
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"torch cannot load the export ({said[-1].strip()}); it was not kept.")
    return json.loads(done.stdout.splitlines()[-1])


def _out_of_the_way(output: pathlib.Path, *, keep: bool) -> None:
    """Empty the place: an earlier export is deleted, anything else (`keep`) moved beside under a name that is free."""
    if not keep:
        shutil.rmtree(output)
        return
    backup, count = output.with_name(f"{output.name}.bak"), 1
    while backup.exists():
        count += 1
        backup = output.with_name(f"{output.name}.bak{count}")
    output.rename(backup)
    print(f"what was in {output} is now in {backup}.")


def _model_card(model: Model, name: str, report: dict) -> str:
    encoder, moe = model.encoder, model.moe
    total = sum(int(np.prod(shape)) for shape in hf_layout.tensor_shapes(encoder, moe).values())
    idle = 0
    if moe.num_experts:
        idle = encoder.num_layers // moe.every * (moe.num_experts - moe.top_k) * 2 * encoder.ffn_dim * encoder.dim
    experts = f"{moe.num_experts} experts, {moe.top_k} active, every {moe.every} layers" if moe.num_experts else "none"
    prompts = "\n".join(f"| {t} | `{json.dumps(text, ensure_ascii=False)}` |" for t, text in model.prompts.items())
    query, document = (f', prompt_name="{task}"' if task in model.prompts else "" for task in ("query", "document"))
    torch = report["torch"] if report["torch"] == "not run" else f"{report['torch']:.1e}"
    servers = (
        "TEI, vLLM and llama.cpp know this layout; llama.cpp drops the experts' shared bias: a GGUF differs a little."
        if moe.num_experts and moe.every == 2
        else "Servers with their own code for this family expect experts in every second layer: use the file here."
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, mixture-of-experts, moe_embed]
---
# {name}

A text embedding model trained with moe_embed, in the NomicBert-MoE layout. Load it with its own model file:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
queries = model.encode(["..."]{query})
documents = model.encode(["..."]{document})
similarity = model.similarity(queries, documents)
```

| | |
|---|---|
| parameters | {total:,}, of which {total - idle:,} are active for a token |
| layers, dim, heads, ffn | {encoder.num_layers}, {encoder.dim}, {encoder.num_heads}, {encoder.ffn_dim} |
| experts | {experts} |
| reads at most | {encoder.max_seq_length} tokens |
| vector | mean over tokens, unit length; compare by cosine |

Texts go in with the prompt of their task in front (servers rarely add it by themselves):

| task | prompt |
|---|---|
{prompts or "| (none) | |"}

Parity, largest difference of any number of a vector on {report["texts"]} texts in float32: read back by moe_embed
{report["moe_embed"]:.1e}, in sentence-transformers {torch} (parity.json).
transformers' own `nomic_bert` is another architecture and refuses this folder. {servers}
"""


def _write_json(path: pathlib.Path, value, *, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """The verb; UserError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_embed.export", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--model", required=True, help="a workdir, or a folder written by export, upcycle, soup")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="move what is at --output aside, to OUTPUT.bak")
    args = parser.parse_args(argv)
    report = export(load(args.model), args.output, force=args.force)
    print(f"wrote {args.output}: rotary NomicBert-MoE layout with its own torch file (trust_remote_code=True)")
    print(f"largest difference: moe_embed {report['moe_embed']}, torch {report['torch']} (tolerance {TOLERANCE})")


if __name__ == "__main__":
    run_verb(main)
