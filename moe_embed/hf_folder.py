"""A folder in Hugging Face layout -> (Encoder, Moe, parameters, tokenizer, prompts): nothing of it is run, unpickled or guessed.

What transformers and sentence-transformers would compute from the folder is what we compute, or the folder is refused
with the reason: other pooling, other modules, other keys (hf_config.py), unknown or missing tensors (hf_layout.py).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moe_embed import hf_config, hf_layout, stored, tokenizer_json
from moe_embed.config import Encoder, Moe, UserError
from moe_embed.data import tokenizer as tokenizer_lib

MAX_HEADER = 2**24  # bytes of a safetensors header; the released file's is 17 kB
PREFIX = {"bert": "bert.", "xlm-roberta": "roberta."}  # in front of the encoder's tensors where a head was saved too
LEFT_OUT = re.compile(  # parts of transformers' classes that no vector depends on, and buffers of older versions
    r"pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)|embeddings\.(position|token_type)_ids"
)
SENTENCE = "sentence_bert_config.json"
NORMALIZER = {  # tokenizer_config.json's names for what tokenizer.json's normalizer does
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip
MAKE_JSON = """python -c "from tokenizers import BertWordPieceTokenizer as T; T('vocab.txt', lowercase=True).save('tokenizer.json')\""""


class Folder(NamedTuple):
    """What a folder holds."""

    model_type: str  # as config.json says: bert, xlm-roberta, nomic_bert, moe_embed
    encoder: Encoder
    moe: Moe
    params: dict  # float32 numpy arrays; with "head" where the folder has the head of masked language modelling
    prompts: dict[str, str]  # {} where the folder has none
    tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer
    left_out: list[str]  # names of its tensors that are known and not used: a pooler, buffers


def read_folder(path: str | pathlib.Path) -> Folder:
    """Read a folder. UserError: no such file, pickled or sharded weights, another architecture, another pooling."""
    folder = pathlib.Path(path)
    encoder, moe = hf_config.read_hf_config(read_json(folder / "config.json"))
    weights = _find_weights(folder)
    tokenizer, tokenizer_path = _read_tokenizer(folder)
    _check_sentence_files(folder)
    encoder = _with_length(encoder, folder)
    if tokenizer.num_ids > encoder.vocab_size:
        raise UserError(
            f"{tokenizer_path} has {tokenizer.num_ids} ids; the embedding table has {encoder.vocab_size} rows."
        )
    kind = hf_layout.model_type(encoder, moe)
    if kind == "xlm-roberta" and encoder.position_offset - 1 != (pad := tokenizer_json.pad_id(tokenizer)):
        raise UserError(
            f"{folder / 'config.json'} counts positions from pad_token_id = {encoder.position_offset - 1}; the <pad> of "
            f"{tokenizer_path.name} is {pad}."
        )
    prompts = {}
    if (folder / "config_sentence_transformers.json").is_file():
        prompts = _prompts(read_json(folder / "config_sentence_transformers.json"), folder)
    _check_special_tokens(folder, tokenizer, prompts)
    tensors, left_out = _rename(read_safetensors(weights), kind)
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise UserError(f"{weights} stores {name} as {tensor.dtype}; float32, float16 or bfloat16 is needed.")
        if not np.isfinite(tensor).all():
            raise UserError(f"{weights} has numbers in {name} that are not finite.")
    with_head = kind in hf_layout.HEAD and any(name.startswith(hf_layout.HEAD_PREFIX[kind]) for name in tensors)
    params = hf_layout.from_tensors(tensors, encoder=encoder, moe=moe, with_head=with_head)
    return Folder(kind, encoder, moe, params, prompts, tokenizer, left_out)


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from a file; UserError if it is missing or something else."""
    value = _load_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; it must be a JSON object.")
    return value


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of one file, dtypes as stored. The header is bounded here before anything is allocated for it.

    The safetensors package then checks that offsets, shapes and dtypes agree and leave no hole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 2 <= header_size <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file: {size} bytes, of which {header_size} would be header.")
        try:
            header = json.loads(file.read(header_size))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has a damaged safetensors header ({type(error).__name__}).") from error
    for name, end in ends.items():
        if not isinstance(end, int) or not 0 <= end <= size - 8 - header_size:
            raise UserError(f"{path} is cut short: {name} would end at byte {end} of {size - 8 - header_size}.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:  # the last: float8
        raise UserError(f"{path} cannot be read: {error}.") from error


def _find_weights(folder: pathlib.Path) -> pathlib.Path:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise UserError(f"{folder} holds pickled weights, which can run code; convert them to model.safetensors.")
        if list(folder.glob("*.safetensors*")):
            raise UserError(f"{folder} holds weights in shards; merge them into one model.safetensors.")
        raise UserError(f"{folder} has no model.safetensors.")
    return weights


def _read_tokenizer(folder: pathlib.Path):
    """(tokenizer, its path): the SentencePiece model, else a tokenizer.json; XLM-R's JSON is a translation of the first."""
    pieces, fast = folder / "sentencepiece.bpe.model", folder / "tokenizer.json"
    if pieces.is_file():
        return tokenizer_lib.read(pieces), pieces
    if fast.is_file():
        try:
            tokenizer = tokenizer_lib.read(fast)
        except UserError as error:
            raise UserError(
                f"{error} If the tokenizer is XLM-R's, put its sentencepiece.bpe.model beside it."
            ) from error
        tokenizer_json.check_ends(tokenizer)
        _check_normalizer(folder)
        return tokenizer, fast
    if (folder / "vocab.txt").is_file():
        raise UserError(
            f"{folder} has a vocab.txt and no tokenizer.json; make one in that folder (lowercase=False for a cased model): "
            f"{MAKE_JSON}"
        )
    raise UserError(f"{folder} has no sentencepiece.bpe.model and no tokenizer.json, the tokenizer.")


def _check_normalizer(folder: pathlib.Path) -> None:
    """UserError where tokenizer_config.json asks for other lower-casing than tokenizer.json does: transformers obeys it."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    asked, done = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json").get("normalizer")
    if not isinstance(done, dict) or done.get("type") != "BertNormalizer":
        return
    for theirs, ours in NORMALIZER.items():
        if theirs in asked and asked[theirs] != done.get(ours):
            raise UserError(
                f"{folder / 'tokenizer_config.json'} has {theirs} = {asked[theirs]!r}, tokenizer.json {ours} = "
                f"{done.get(ours)!r}: transformers does what the first says; make them agree."
            )


def _check_special_tokens(folder: pathlib.Path, tokenizer, prompts: Mapping[str, str]) -> None:
    """UserError for tokens that were added to a SentencePiece model, and for special tokens in a prompt: text to us."""
    special = {*tokenizer_json.XLM_R.values()}
    added = set()
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        entries = read_json(folder / name).get(key) if (folder / name).is_file() else None
        entries = entries.values() if isinstance(entries, dict) else [] if entries is None else entries
        if not isinstance(entries, Iterable):
            raise UserError(f"{folder / name} has {key} = {entries!r:.60}; it must list tokens.")
        added |= {str(entry["content"]) for entry in entries if isinstance(entry, dict) and "content" in entry}
    if (folder / "added_tokens.json").is_file():
        added |= set(read_json(folder / "added_tokens.json"))
    if isinstance(tokenizer, tokenizer_lib.Tokenizer) and added - special:
        raise UserError(
            f"{folder} adds the tokens {', '.join(sorted(added - special)[:5])} to those of sentencepiece.bpe.model; "
            "only what the model file itself has is read here."
        )
    for task, prompt in prompts.items():
        found = sorted(token for token in added if token and token in prompt)
        if found:
            raise UserError(
                f"{folder} has the special token {found[0]} in its {task} prompt; it would be read as text here."
            )


def _with_length(encoder: Encoder, folder: pathlib.Path) -> Encoder:
    """The length sentence-transformers reads of a text; a learned table's rows are the most there can be."""
    places = ((SENTENCE, "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
    for name, key in places:
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if key in settings and settings[key] is not None:
            break
    else:
        return encoder
    if key == "model_max_length" and isinstance(settings[key], int | float) and settings[key] > 2**30:
        return encoder  # transformers' way to say: any
    faults: list[str] = []
    hf_config.number(settings, key, faults, kind=int, file=name)
    if faults:
        raise UserError(*faults)
    cap = settings[key]
    return dataclasses.replace(
        encoder, max_seq_length=cap if encoder.position == "rotary" else min(cap, encoder.max_seq_length)
    )


def _check_sentence_files(folder: pathlib.Path) -> None:
    """UserError unless sentence-transformers would take the mean over all tokens here, and nothing after it but a norm."""
    known, modules, pooling = {"Transformer", "Pooling", "Normalize"}, folder / "modules.json", "1_Pooling"
    found = _load_json(modules) if modules.is_file() else []
    try:
        kinds_and_places = [(module["type"].rsplit(".", 1)[-1], str(module["path"])) for module in found]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{modules} cannot be read; sentence-transformers writes a list of types and paths.") from error
    for kind, place in kinds_and_places:
        if kind not in known:
            raise UserError(
                f"{modules} has a {kind} after the encoder; only {', '.join(sorted(known))} are computed here."
            )
        pooling = place if kind == "Pooling" else pooling
        if place and not _is_within(folder, place):
            raise UserError(f"{modules} names {place!r:.60}, which is not in {folder}.")
    if found and "Pooling" not in dict(kinds_and_places):
        raise UserError(f"{modules} has no Pooling; only the mean over all tokens is computed here.")
    if (folder / pooling / "config.json").is_file():
        settings = read_json(folder / pooling / "config.json")
        modes = {
            key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
        }
        if "pooling_mode" in settings:
            modes = {f"{settings['pooling_mode']}_tokens"}
        if modes != {"mean_tokens"} or ("include_prompt" in settings and not settings["include_prompt"]):
            raise UserError(
                f"{folder / pooling / 'config.json'} asks for other vectors than the mean over all tokens; only that is "
                "computed here. To train from this encoder all the same, remove that file."
            )
    older = [path.name for path in folder.glob("sentence_*_config.json") if path.name != SENTENCE]
    if older:
        raise UserError(f"{folder} has a {older[0]}, as old sentence-transformers wrote it; rename it to {SENTENCE}.")
    if (folder / SENTENCE).is_file():
        settings = read_json(folder / SENTENCE)
        if settings.get("do_lower_case"):
            raise UserError(
                f"{folder / SENTENCE} has do_lower_case; texts are not changed here before the tokenizer, "
                "which lower-cases by itself where its file says so."
            )


def _is_within(folder: pathlib.Path, place: str) -> bool:
    try:
        (folder / place).is_file()  # also what no file system takes: a NUL, a name of thousands of letters
        return (folder / place).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def _rename(tensors: Mapping[str, np.ndarray], kind: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors under the names of hf_layout.py, and the names of those left out.

    Without the prefix that classes with a head put in front, with TensorFlow's gamma and beta by their later names, and
    without tied copies, which must be the same bit for bit.
    """
    if kind not in PREFIX:
        return dict(tensors), []
    renamed, left_out = {}, []
    for name, tensor in tensors.items():
        plain = name.removeprefix(PREFIX[kind])
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain))
        if LEFT_OUT.fullmatch(plain):
            left_out.append(name)
        elif plain in renamed:
            raise UserError(f"tensor {plain} is there twice, once as {name}.")
        else:
            renamed[plain] = tensor
    head = hf_layout.HEAD_PREFIX[kind]
    ties = {f"{head}decoder.bias": f"{head}bias", f"{head}decoder.weight": "embeddings.word_embeddings.weight"}
    for copy, original in ties.items():
        if copy not in renamed:
            continue
        tensor = renamed.pop(copy)
        if original not in renamed:  # stored under one of its names
            renamed[original] = tensor
        elif not np.array_equal(tensor, renamed[original]):
            raise UserError(f"tensor {copy} is not {original}; only a head tied to it is computed here.")
    return renamed, sorted(left_out)


def _load_json(path: pathlib.Path):
    try:
        return stored.read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error


def _prompts(config: Mapping, folder: pathlib.Path) -> dict[str, str]:
    """Prompts by task name. Released folders say "passage" where sentence-transformers now asks for "document"."""
    prompts = config["prompts"] if "prompts" in config and config["prompts"] is not None else {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{folder / 'config_sentence_transformers.json'} has prompts that are not names and texts.")
    default = config["default_prompt_name"] if "default_prompt_name" in config else None
    if default is not None and (not isinstance(default, str) or prompts.get(default) != ""):
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'} puts the prompt {default!r:.60} in front of every text that is "
            "given without one, which is not done here; make default_prompt_name null there, and name the prompt in use."
        )
    if "passage" in prompts and "document" not in prompts:
        return {**prompts, "document": prompts["passage"]}
    return dict(prompts)
