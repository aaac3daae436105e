"""The one map of names and shapes between our parameters and the released NomicBert-MoE tensors, and its file readers.

Ours is a nested dict of float32 arrays whose names end in their dims; theirs is a flat file of 148 tensors at full
size (nomic-ai/nomic-embed-text-v2-moe: its names and shapes). A row of the tables below says how the dims
of one of our arrays are laid out in their tensor: "EF D" is a matrix whose rows run over E, then F, and whose columns
are D. Shape, transposition and the way back all follow from that one string. Strict both ways: what is unknown,
missing or mis-shaped is named in a UserError and never dropped, because a wrong layout that still fits
gives plausible noise (w2 read as [E, D, F] does).
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors

from moe_embed.config import Encoder, Moe, UserError

# ours, theirs, layout of theirs in the letters of ours. R, the repeats of the unit, is the layer number in theirs.
EMBEDDING = (
    ("embedding/word_VD", "embeddings.word_embeddings.weight", "V D"),
    ("embedding/type_YD", "embeddings.token_type_embeddings.weight", "Y D"),
    ("embedding/norm/scale_D", "emb_ln.weight", "D"),
    ("embedding/norm/bias_D", "emb_ln.bias", "D"),
)
BLOCK = (
    ("attention/w_qkv_RDGHK", "attn.Wqkv.weight", "GHK D"),  # rows: all of q, then k, then v; heads contiguous
    ("attention/b_qkv_RGHK", "attn.Wqkv.bias", "GHK"),
    ("attention/w_out_RHKD", "attn.out_proj.weight", "D HK"),
    ("attention/b_out_RD", "attn.out_proj.bias", "D"),
    ("norm1/scale_RD", "norm1.weight", "D"),
    ("norm1/bias_RD", "norm1.bias", "D"),
    ("norm2/scale_RD", "norm2.weight", "D"),
    ("norm2/bias_RD", "norm2.bias", "D"),
)
DENSE = (
    ("mlp/w_up_RDF", "mlp.fc1.weight", "F D"),
    ("mlp/b_up_RF", "mlp.fc1.bias", "F"),
    ("mlp/w_down_RFD", "mlp.fc2.weight", "D F"),
    ("mlp/b_down_RD", "mlp.fc2.bias", "D"),
)
MIXTURE = (
    ("moe/w_router_RED", "mlp.router.layer.weight", "E D"),
    ("moe/w_up_REDF", "mlp.experts.mlp.w1", "EF D"),  # used transposed: x @ w1[e].T
    ("moe/w_down_REFD", "mlp.experts.mlp.w2", "EF D"),  # used as it is: h @ w2[e]
    ("moe/b_out_RD", "mlp.experts.bias", "D"),  # one bias, shared by the experts, added once
)

# What another NomicBert may say that we do not compute: key -> the values we do. The first three have a default in
# the reference's configuration class that is not ours, so they must be written; the others may be absent.
REQUIRED = {"activation_function": ("gelu",), "rotary_emb_fraction": (1.0,), "prenorm": (False,)}
OPTIONAL = {
    "rotary_emb_interleaved": (False,), "rotary_emb_scale_base": (None,), "rotary_scaling_factor": (None,),
    "num_shared_experts": (0,), "moe_normalize_expert_weights": (False,), "expert_choice_router": (False,),
    "ffn_div": (1,), "qkv_proj_bias": (True,), "mlp_fc1_bias": (True,), "mlp_fc2_bias": (True,), "causal": (False,),
    "parallel_block": (False,), "use_rms_norm": (None, False), "scale_attn_weights": (True,),
}  # fmt: skip
MAX_HEADER = 100 * 2**20  # bytes of a safetensors header; the released file's is 17 kB
# transformers' own `nomic_bert` would load these files without a murmur, its MLPs random.
GUARD = "not transformers' own nomic_bert (gated, no biases, no experts): load this model with trust_remote_code=True"


def to_tensors(params: Mapping, *, encoder: Encoder, moe: Moe) -> dict[str, np.ndarray]:
    """Our nested params -> their flat tensors, float32. UserError names what is unknown, missing or mis-shaped."""
    sizes, flat = _sizes(encoder, moe), dict(_flatten(params))
    found = {name: np.shape(array) for name, array in flat.items()}
    _check(found, param_shapes(encoder, moe), kind="parameter")
    tensors = {}
    for ours, theirs, layout in _rows(encoder, moe):
        dims, array = _dims(ours), np.asarray(flat[ours], np.float32)
        for name, layer in zip(theirs, array if dims[0] == "R" else [array], strict=True):
            dims_of_layer, order = dims.removeprefix("R"), layout.replace(" ", "")
            transposed = layer.transpose([dims_of_layer.index(dim) for dim in order])
            # Contiguous, because safetensors.numpy writes the memory of a transposed view as it lies (measured, 0.8.0).
            tensors[name] = np.ascontiguousarray(transposed.reshape(_shape(layout, sizes)))
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], *, encoder: Encoder, moe: Moe) -> dict:
    """Their flat tensors -> our nested params, float32; half precision is widened, which is exact."""
    sizes, expected = _sizes(encoder, moe), tensor_shapes(encoder, moe)
    _check({name: np.shape(tensor) for name, tensor in tensors.items()}, expected, kind="tensor")
    params: dict = {}
    for ours, theirs, layout in _rows(encoder, moe):
        dims, order = _dims(ours), layout.replace(" ", "")
        array = np.empty([sizes[dim] for dim in dims], np.float32)
        for layer, name in enumerate(theirs):
            split = np.asarray(tensors[name]).reshape([sizes[dim] for dim in order])
            where = array[layer] if dims[0] == "R" else array
            where[...] = split.transpose([order.index(dim) for dim in dims.removeprefix("R")])
        *path, leaf = ours.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return params


def param_shapes(encoder: Encoder, moe: Moe) -> dict[str, tuple[int, ...]]:
    """Path ("unit/0/mlp/w_up_RDF") -> shape of every parameter of ours at this size."""
    sizes = _sizes(encoder, moe)
    return {ours: tuple(sizes[dim] for dim in _dims(ours)) for ours, _, _ in _rows(encoder, moe)}


def tensor_shapes(encoder: Encoder, moe: Moe) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the released layout at this size, in file order."""
    sizes = _sizes(encoder, moe)
    return {name: _shape(layout, sizes) for _, theirs, layout in _rows(encoder, moe) for name in theirs}


def hf_config(encoder: Encoder, moe: Moe) -> dict:
    """config.json of an export: what the reference code, our torch file, TEI, vLLM and llama.cpp read.

    llama.cpp asserts (n_positions, max_trained_positions) == (2048, 2048) for this family, whatever was trained;
    rotary positions have no table, so the number binds nothing here.
    """
    positions = max(2048, encoder.max_seq_length)
    return {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "auto_map": {
            "AutoConfig": "modeling_moe_embed.NomicBertMoeConfig",
            "AutoModel": "modeling_moe_embed.NomicBertModel",
        },
        "vocab_size": encoder.vocab_size,
        "n_embd": encoder.dim,
        "n_head": encoder.num_heads,
        "n_inner": encoder.ffn_dim,
        "n_layer": encoder.num_layers,
        "n_positions": positions,
        "max_trained_positions": positions,
        "type_vocab_size": encoder.num_token_types,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "rotary_emb_base": encoder.rotary_base,
        "num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "moe_every_n_layers": moe.unit_length if moe.num_experts else 0,
        # The reference has mixtures where i % n == 1, we where i % n == n - 1: the same for n = 2 only.
        "moe_layer_offset": moe.every - 1,
        "moe_impl": "megablocks",
        **{key: values[0] for key, values in (REQUIRED | OPTIONAL).items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "moe_resid_pdrop"), 0.0),
        "initializer_range": 0.02,
        "pad_vocab_size_multiple": 64,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
        # Native-safe: converters that read the file through transformers' own class would else get its defaults
        # (theta 1000, epsilon 1e-12, 2046 positions). 514 - 2 is how XLM-R writes 512.
        "layer_norm_eps": encoder.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": encoder.rotary_base},
        "max_position_embeddings": encoder.max_seq_length + 2,
        # The one key that transformers' own class alone reads: as it is no number, that class refuses and shows it.
        "classifier_dropout": GUARD,
    }


def read_hf_config(theirs: Mapping) -> tuple[Encoder, Moe]:
    """A NomicBert config.json -> (Encoder, Moe). UserError names each key that asks for what we do not compute.

    max_seq_length is a guess here (max_position_embeddings - 2, else n_positions); read_folder knows better.
    """
    faults = []
    if "model_type" not in theirs or theirs["model_type"] != "nomic_bert":
        raise UserError(f"config.json has model_type {theirs.get('model_type')!r}; only nomic_bert can be read.")
    for key, allowed in (REQUIRED | OPTIONAL).items():
        if key not in theirs and key in REQUIRED:
            faults.append(f"config.json has no {key}; it must say {allowed[0]!r}.")
        elif key in theirs and theirs[key] not in allowed:
            computed = " or ".join(map(repr, allowed))
            faults.append(f"config.json has {key} = {theirs[key]!r}; only {computed} is computed here.")
    for key in ("vocab_size", "n_embd", "n_head", "n_inner", "n_layer", "type_vocab_size"):
        _number(theirs, key, faults, kind=int)
    for key in ("rotary_emb_base", "layer_norm_epsilon"):
        _number(theirs, key, faults, kind=float)
    sparse = all(key in theirs and theirs[key] for key in ("num_experts", "moe_every_n_layers"))
    if sparse:
        for key in ("num_experts", "moe_every_n_layers", "moe_top_k"):
            _number(theirs, key, faults, kind=int)
    length_key = "max_position_embeddings" if "max_position_embeddings" in theirs else "n_positions"
    _number(theirs, length_key, faults, kind=int)
    if faults:
        raise UserError(*faults)
    moe = Moe(num_experts=0)
    if sparse:
        moe = Moe(num_experts=theirs["num_experts"], top_k=theirs["moe_top_k"], every=theirs["moe_every_n_layers"])
        offset = theirs["moe_layer_offset"] if "moe_layer_offset" in theirs else 1  # the released rule, unwritten
        if offset != moe.every - 1 or theirs["n_layer"] % moe.every or moe.top_k > moe.num_experts:
            raise UserError(
                f"config.json puts experts in layers i % {moe.every} == {offset} of {theirs['n_layer']}, "
                f"{moe.top_k} of {moe.num_experts} active; it must be i % n == n - 1, n a divisor of n_layer."
            )
    if theirs["n_embd"] % (2 * theirs["n_head"]):
        raise UserError(f"config.json has n_embd = {theirs['n_embd']}, no multiple of 2 * n_head ({theirs['n_head']}).")
    encoder = Encoder(
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["n_layer"],
        dim=theirs["n_embd"],
        num_heads=theirs["n_head"],
        ffn_dim=theirs["n_inner"],
        max_seq_length=theirs[length_key] - (2 if length_key == "max_position_embeddings" else 0),
        num_token_types=theirs["type_vocab_size"],
        rotary_base=float(theirs["rotary_emb_base"]),
        norm_epsilon=float(theirs["layer_norm_epsilon"]),
    )
    return encoder, moe


def read_folder(path: str | pathlib.Path) -> tuple[Encoder, Moe, dict, dict[str, str], pathlib.Path]:
    """A Hugging Face folder -> (encoder, moe, params, prompts, max_seq_length, path of the SentencePiece model).

    prompts is {} where the folder has none. UserError: no such file, pickled or sharded weights, another architecture.
    """
    folder = pathlib.Path(path)
    weights, tokenizer = folder / "model.safetensors", folder / "sentencepiece.bpe.model"
    encoder, moe = read_hf_config(read_json(folder / "config.json"))
    if not weights.is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise UserError(f"{folder} holds pickled weights, which can run code; convert them to model.safetensors.")
        if list(folder.glob("*.safetensors*")):
            raise UserError(f"{folder} holds weights in shards; merge them into one model.safetensors.")
        raise UserError(f"{folder} has no model.safetensors.")
    if not tokenizer.is_file():
        raise UserError(f"{folder} has no sentencepiece.bpe.model, the tokenizer.")
    prompts, sentence = {}, folder / "sentence_bert_config.json"
    if sentence.is_file():
        length = read_json(sentence)
        if "max_seq_length" in length and length["max_seq_length"] is not None:
            faults: list[str] = []
            _number(length, "max_seq_length", faults, kind=int, file=sentence.name)
            if faults:
                raise UserError(*faults)
            encoder = dataclasses.replace(encoder, max_seq_length=length["max_seq_length"])
    if (folder / "config_sentence_transformers.json").is_file():
        prompts = _prompts(read_json(folder / "config_sentence_transformers.json"), folder)
    params = from_tensors(read_safetensors(weights), encoder=encoder, moe=moe)
    return encoder, moe, params, prompts, tokenizer


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from a file; UserError if it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise UserError(f"{path} stores {name} as {tensor.dtype}; float32, float16 or bfloat16 is needed.")
    return tensors


def _rows(encoder: Encoder, moe: Moe) -> Iterator[tuple[str, list[str], str]]:
    """(our path, their name for every layer, layout). Block i of the unit in repeat r is their layer r * unit + i."""
    for ours, theirs, layout in EMBEDDING:
        yield ours, [theirs], layout
    unit = moe.unit_length
    for block in range(unit):
        mixture = moe.num_experts and block == unit - 1
        for ours, theirs, layout in BLOCK + (MIXTURE if mixture else DENSE):
            layers = range(block, encoder.num_layers, unit)
            yield f"unit/{block}/{ours}", [f"encoder.layers.{layer}.{theirs}" for layer in layers], layout


def _sizes(encoder: Encoder, moe: Moe) -> dict[str, int]:
    return {
        "V": encoder.vocab_size, "Y": encoder.num_token_types, "D": encoder.dim, "F": encoder.ffn_dim, "G": 3,
        "H": encoder.num_heads, "K": encoder.dim // encoder.num_heads, "E": moe.num_experts,
        "R": encoder.num_layers // moe.unit_length,
    }  # fmt: skip


def _dims(ours: str) -> str:
    return ours.rsplit("_", 1)[1]


def _shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[dim] for dim in group) for group in layout.split())


def _flatten(tree: Mapping, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _check(found: Mapping[str, tuple], expected: Mapping[str, tuple], *, kind: str) -> None:
    faults = [f"{kind} {name} is missing." for name in expected if name not in found]
    faults += [f"{kind} {name} is unknown to this architecture." for name in found if name not in expected]
    for name in found:
        if name in expected and tuple(found[name]) != expected[name]:
            faults.append(f"{kind} {name} has shape {list(found[name])}; the config asks for {list(expected[name])}.")
    if len(faults) > 12:
        faults = [*faults[:12], f"... and {len(faults) - 12} more such faults."]
    if faults:
        raise UserError(*faults)


def _number(theirs: Mapping, key: str, faults: list[str], *, kind: type, file: str = "config.json") -> None:
    value = theirs.get(key)
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
        what = "integer" if kind is int else "number"
        faults.append(f"{file} has {key} = {value!r}; a positive {what} is needed.")


def _prompts(config: Mapping, folder: pathlib.Path) -> dict[str, str]:
    """Prompts by task name. Released folders say "passage" where sentence-transformers now asks for "document"."""
    prompts = config["prompts"] if "prompts" in config and config["prompts"] is not None else {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{folder / 'config_sentence_transformers.json'} has prompts that are not names and texts.")
    if "passage" in prompts and "document" not in prompts:
        return {**prompts, "document": prompts["passage"]}
    return dict(prompts)
