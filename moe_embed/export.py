"""export: a model becomes a folder that PyTorch users load, and proves that it still gives the same vectors.

    python -m moe_embed.export --model=runs/demo --output=runs/demo/export
    python -m moe_embed.export --model=runs/demo --output=runs/demo/export --onnx --gguf     # pip install -e ".[deploy]"
    python -m moe_embed.export --model=runs/demo --output=out --calibrate=workdir --evaluation=r.json --license=apache-2.0
    HF_TOKEN=... python -m moe_embed.export --model=runs/demo --output=out --push=OWNER/NAME

Which layout (moe_embed/hf_layout.py) follows from the model and is printed. Rotary positions: the released NomicBert-MoE's,
with a torch model file of our own, `SentenceTransformer(folder, trust_remote_code=True)`. Learned positions without experts:
BertModel or XLMRobertaModel of transformers, no remote code. Learned positions with experts: our own file only.
The folder is written beside its place and renamed into it, after it has been read back and compared: parity.json holds
the measured differences. --onnx adds onnx/model.onnx (moe_embed/torch_files/to_onnx.py), compared in ONNX Runtime, --gguf
model-f16.gguf for llama.cpp (gguf_file.py), compared where llama-cpp-python is installed.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
import safetensors.numpy

from moe_embed import (
    bucket,
    calibrate,
    card_facts,
    gguf_file,
    hf_config,
    hf_layout,
    model_card,
    push,
    sharding,
    stored,
    tokenizer_json,
    verb,
)
from moe_embed.config import Mesh, UserError
from moe_embed.load import Model, load, make_parent, put_in_place

TOLERANCE = 1e-5  # largest difference of a number of a unit vector, float32
TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"
MODEL_FILE = "modeling_moe_embed.py"
FILES = {  # what an export may consist of
    "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", MODEL_FILE,
    "config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "sentencepiece.bpe.model", "parity.json", "README.md", "onnx/model.onnx", "onnx/model.onnx.data", gguf_file.FILE,
    calibrate.FILE,
}  # fmt: skip
FORMS = {
    "nomic_bert": "NomicBert-MoE layout, rotary positions, with its own torch file (trust_remote_code=True)",
    "bert": "BertModel of transformers, no remote code",
    "xlm-roberta": "XLMRobertaModel of transformers, no remote code",
    "moe_embed": "experts with learned positions, its own torch file only (trust_remote_code=True); TEI, vLLM and llama.cpp "
    "cannot read it, its README.md says what makes it readable",
}
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


def export(
    model: Model,
    output: str | pathlib.Path,
    *,
    force: bool = False,
    onnx: bool = False,
    gguf: bool = False,
    fold_shared_bias: bool = False,
    calibration_texts: Sequence[str] = (),
    facts: card_facts.Facts = card_facts.Facts(),  # noqa: B008, it is a constant
    name: str = "",
) -> dict:
    """Write `model` to the folder `output`; returns the parity report, which is also in its parity.json.

    An earlier export at `output` is replaced. Anything else there, and an export whose card or settings were edited or that holds
    files of other makers, is refused, or with `force` moved to `output`.bak.
    A head of masked language modelling stays behind, and that is printed. With `onnx` the folder also has onnx/model.onnx,
    with `gguf` model-f16.gguf, with `calibration_texts` (documents) calibration.json. `fold_shared_bias` writes weights of the
    same function without the experts' shared bias, compared with the model as it is. `facts` go into the card, which calls the
    model `name`: OWNER/NAME where it is to be pushed, by default the folder's name.
    UserError, and no folder, if the model cannot be written in this layout or the folder gives other vectors.
    """
    output = pathlib.Path(output).resolve()
    name = name or output.name
    occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    foreign = _foreign(output) if occupied else ""
    if foreign and not force:
        raise UserError(
            f"{output} is not empty and is no earlier export{foreign}; name another folder, or move it by --force."
        )
    if occupied and not foreign:
        verb.say(f"{output} holds an earlier export; it will be replaced.")
    if onnx:
        _check_onnx(hf_layout.model_type(model.encoder, model.moe))
    if gguf or fold_shared_bias:
        gguf_file.check(model.encoder, model.moe, model.tokenizer, flag="--gguf" if gguf else "--fold_shared_bias")
    make_parent(output)
    if "head" in model.params:
        print("the head of masked language modelling is not exported: an embedding model has none.")
        model = dataclasses.replace(model, params={key: part for key, part in model.params.items() if key != "head"})
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = pathlib.Path(scratch) / output.name
        folder.mkdir()
        written = model
        if fold_shared_bias:
            written = dataclasses.replace(model, params=gguf_file.fold_shared_bias(model.params, moe=model.moe))
        verb.say(f"writing {output.name} ...")
        _write(written, folder)
        plain = _in_float32(model)
        report = _parity(plain, folder, onnx=onnx) | {"shared_bias": "folded" if fold_shared_bias else "as trained"}
        if gguf:
            verb.say(f"writing {gguf_file.FILE}, and comparing where llama-cpp-python is installed ...")
            report |= gguf_file.write_and_compare(plain, folder / gguf_file.FILE, TEXTS, name=name)
        if calibration_texts:
            calibrate.write(model, calibration_texts, folder)
        card = model_card.model_card(
            model.encoder, model.moe, model.prompts, name=name, report=report, facts=facts,
            calibrated=bool(calibration_texts),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        report |= {"files": _digests(folder)}  # whoever writes on in them is noticed
        _write_json(folder / "parity.json", report)
        backup = _free_name(output) if foreign else None
        put_in_place(folder, output, keep=backup)
    if backup:
        print(f"what was in {output} is now in {backup}.")
    return report


def _foreign(output: pathlib.Path) -> str:
    """What there would be lost with an earlier export, in words behind "is no earlier export"; "" where nothing would be."""
    files = (path for path in output.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(output).as_posix() for path in files}
    if not {"parity.json", "config.json"} <= names:
        return " (it lacks parity.json or config.json)"
    if names - FILES:
        return f" (it also holds {', '.join(sorted(names - FILES)[:5])})"
    try:
        written = stored.read_json(output / "parity.json")["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return " that says what its files were (files in parity.json)"
    changed = sorted(name for name, _ in _digests(output).items() - written)
    return f" as export left it ({', '.join(changed)} changed)" if changed else ""


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """Of the files of an export that a person may edit: the card, prompts, lengths, the model file."""
    texts = (path for path in folder.rglob("*") if path.suffix in (".md", ".json", ".py"))
    paths = [path for path in texts if path.name != "parity.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _in_float32(model: Model) -> Model:
    """The model on one CPU device and in float32, whatever it runs on: accelerators round products, torch is compared here."""
    try:
        devices = jax.local_devices(backend="cpu")[:1]
    except RuntimeError as error:
        raise UserError("parity is measured on the CPU; add it to JAX_PLATFORMS (for example cuda,cpu).") from error
    mesh = sharding.make_mesh(Mesh(data=1), devices=devices)
    params = jax.tree.map(np.asarray, model.params)
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    return dataclasses.replace(
        model, encoder=dataclasses.replace(model.encoder, dtype="float32"), params=params, mesh=mesh
    )


def _write(model: Model, folder: pathlib.Path) -> None:
    """All files but parity.json and README.md."""
    encoder, moe, length = model.encoder, model.moe, model.encoder.max_seq_length
    kind, num_ids = hf_layout.model_type(encoder, moe), model.tokenizer.num_ids
    if num_ids > encoder.vocab_size:
        raise UserError(f"the tokenizer has {num_ids} ids; the embedding table has {encoder.vocab_size} rows.")
    _write_json(
        folder / "config.json", hf_config.hf_config(encoder, moe, pad_id=tokenizer_json.pad_id(model.tokenizer))
    )
    tokenizer_json.write(model.tokenizer, folder, max_length=length)
    tensors = hf_layout.to_tensors(model.params, encoder=encoder, moe=moe)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{model.origin} has numbers that are not finite, in {name}; it cannot be exported.")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private
    sentence = {"max_seq_length": length, "do_lower_case": False}
    if kind in ("bert", "xlm-roberta"):  # else transformers makes a random pooler, and says so at each loading
        sentence["model_args"] = {"add_pooling_layer": False}
    else:
        (folder / MODEL_FILE).write_bytes((TORCH_FILES / MODEL_FILE).read_bytes())
    _write_json(folder / "sentence_bert_config.json", sentence)
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
    prompts = dict(model.prompts)
    if "document" in prompts:  # the released folder's name for it, which older scripts ask for
        prompts.setdefault("passage", prompts["document"])
    _write_json(folder / "config_sentence_transformers.json", {
        "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine",
    })  # fmt: skip


def _parity(ours: Model, folder: pathlib.Path, *, onnx: bool) -> dict:
    """Encode TEXTS and four long texts with the model in memory (`_in_float32`), the folder read back, and torch; compare."""
    again, length = load(folder, mesh=ours.mesh), ours.encoder.max_seq_length
    characters = 8 * min(length, 512)
    long_texts = [" ".join(TEXTS[i:] + TEXTS[:i]) * (1 + characters // 900) for i in (0, 8, 16, 24)]
    texts = [*TEXTS, *(text[: characters // (1 + i)] for i, text in enumerate(long_texts))]
    passes, difference = [], 0.0
    verb.say(f"comparing {len(texts)} texts with the folder read back, one by one and together (compiles first) ...")
    for task, batch in ((ours.prompt("query"), 1), (None, 32)):
        vectors = ours.encode(texts, task=task)
        prompt = ours.prompts[task] if task else ""
        ids = ours.tokenizer.encode(texts, prompt=prompt, max_length=length)[0]
        for start in range(0, len(texts), batch):
            found = again.encode(texts[start : start + batch], task=task)
            difference = max(difference, float(np.abs(found - vectors[start : start + batch]).max()))
        ids_and_vectors = {"ids": [row.tolist() for row in ids], "vectors": vectors.tolist()}
        passes.append({"task": task, "batch": batch, "texts": texts} | ids_and_vectors)
    report = {"tolerance": TOLERANCE, "texts": len(texts), "moe_embed": difference, "torch": "not run"}
    if _torch_is_here():
        verb.say("comparing them in torch, a process of its own ...")
        report |= _in_torch("check_export.py", folder, passes)
        left_out = report["other_tokens"] + report["near_ties"]
        if left_out > len(texts) / 2:  # a quarter of both passes
            raise UserError(f"torch could be compared on few texts: {json.dumps(report)}; the export was not kept.")
    if onnx:
        verb.say("writing onnx/model.onnx, and comparing it in ONNX Runtime ...")
        report |= _in_torch("to_onnx.py", folder, passes)
        if report["onnx_near_ties"] > len(texts) / 2:
            raise UserError(f"ONNX could be compared on few texts: {json.dumps(report)}; the export was not kept.")
    for name in ("moe_embed", "torch", "onnx") if onnx else ("moe_embed", "torch"):
        if report[name] != "not run" and not report[name] <= TOLERANCE:  # also catches NaN
            raise UserError(f"{name} reads other vectors from the export: they differ by {report[name]:.2e}, more than "
                            f"{TOLERANCE:.0e}; it was not kept.")  # fmt: skip
    return report


def _torch_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "sentence_transformers"))


def _check_onnx(kind: str) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing or not _torch_is_here():
        missing = ", ".join(missing) or "torch, transformers or sentence-transformers"
        raise UserError(f'--onnx needs {missing}: pip install -e ".[deploy]"')
    if kind in ("bert", "xlm-roberta"):
        raise UserError(
            f"--onnx writes models with their own torch file; this one is {FORMS[kind]}, which optimum writes."
        )


def _in_torch(script: str, folder: pathlib.Path, passes: list[dict]) -> dict:
    """The report of a script of torch_files/, run on `folder` in a process of its own, offline."""
    with tempfile.TemporaryDirectory() as scratch:
        expected = pathlib.Path(scratch) / "expected.json"
        expected.write_text(json.dumps(passes), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": scratch,
                   "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        command = [sys.executable, str(TORCH_FILES / script), str(folder), str(expected)]
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        what = "cannot load the export" if script == "check_export.py" else "cannot write it as ONNX"
        raise UserError(f"torch {what} ({said[-1].strip()}); it was not kept.")
    return json.loads(done.stdout.splitlines()[-1])


def _free_name(output: pathlib.Path) -> pathlib.Path:
    """Where what is at `output` may be moved: OUTPUT.bak, OUTPUT.bak2, ..."""
    backup, count = output.with_name(f"{output.name}.bak"), 1
    while backup.exists():
        count += 1
        backup = output.with_name(f"{output.name}.bak{count}")
    return backup


def _write_json(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """The verb; UserError for what the user can mend."""
    parser = verb.Parser("export", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, or a folder written by export, upcycle, soup")
    parser.add_argument("--output", required=True, type=verb.local_path, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="move what is at --output aside, to OUTPUT.bak")
    parser.add_argument("--onnx", action="store_true", help="also write onnx/model.onnx, every expert on every token")
    parser.add_argument("--gguf", action="store_true", help="also write model-f16.gguf for llama.cpp")
    parser.add_argument(
        "--fold_shared_bias", action="store_true",
        help="weights of the same function without the bias that experts share, which llama.cpp's converter drops",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate",
        help="documents (.jsonl, .csv, ...), or workdir for its own: also write calibration.json, for int8",
    )
    card_facts.add_flags(parser)
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the folder to the hub; the token is in HF_TOKEN"
    )
    parser.add_argument(
        "--public", action="store_true", help="a repository that --push makes is public (default: private)"
    )
    args = parser.parse_args(argv)
    if args.public and not args.push:
        raise UserError("--public says how --push=OWNER/NAME makes a repository; there is no --push.")
    if args.push:
        push.check(args.push)
    make_parent(args.output, read=[args.model])
    root = bucket.path_of(args.model)
    facts = card_facts.from_flags(card_facts.of_workdir(root), args)
    texts = calibrate.texts_of(args.calibrate, model_root=root) if args.calibrate else ()
    verb.say(f"reading {args.model} ...")
    model = load(args.model, step=facts.steps or None)  # the facts' own: the run may be training still
    report = export(
        model, args.output, force=args.force, onnx=args.onnx, gguf=args.gguf, fold_shared_bias=args.fold_shared_bias,
        calibration_texts=texts, facts=facts, name=args.push or "",
    )  # fmt: skip
    print(f"wrote {args.output}: {FORMS[hf_layout.model_type(model.encoder, model.moe)]}")
    torch = "torch not run: it is not installed" if report["torch"] == "not run" else f"torch {report['torch']:.1e}"
    print(f"largest difference: moe_embed {report['moe_embed']:.1e}, {torch} (tolerance {TOLERANCE})")
    if args.onnx:
        print(
            f"onnx/model.onnx: {report['onnx']}, at {report['onnx_flops']} times the routed form's products with weights"
        )
    if args.gguf:
        print(f"{gguf_file.FILE}: least cosine in llama.cpp: {report['gguf']}")
    if args.push:
        address = push.push(args.output, args.push, public=args.public, replaces=FILES)
        print(f"pushed to {address}")


if __name__ == "__main__":
    verb.run(main)
