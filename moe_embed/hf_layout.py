"""The one map of names and shapes between our parameters and Hugging Face tensors.

Ours is a nested dict of float32 arrays whose names end in their dims; theirs is a flat file of tensors: 148 at full size
in nomic-ai/nomic-embed-text-v2-moe, transformers' BertModel, XLMRobertaModel. A row of the tables below says how the dims
of one of our arrays are laid out in their tensor: "EF D" is a matrix whose rows run over E, then F, and whose columns
are D. Shape, transposition and the way back all follow from that one string. Strict both ways: what is unknown,
missing or mis-shaped is named in a UserError and never dropped, because a wrong layout that still fits
gives plausible noise (w2 read as [E, D, F] does).
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from moe_embed.config import Encoder, Moe, UserError

# ours, theirs, layout of theirs in the letters of ours. R, the repeats of the unit, is the layer number in theirs.
WORD = ("embedding/word_VD", "embeddings.word_embeddings.weight", "V D")
TYPE = ("embedding/type_YD", "embeddings.token_type_embeddings.weight", "Y D")
POSITION = ("embedding/position_PD", "embeddings.position_embeddings.weight", "P D")
NOMIC_EMBEDDING = (
    WORD,
    TYPE,
    ("embedding/norm/scale_D", "emb_ln.weight", "D"),
    ("embedding/norm/bias_D", "emb_ln.bias", "D"),
)
NOMIC_BLOCK = (
    ("attention/w_qkv_RDGHK", "attn.Wqkv.weight", "GHK D"),  # rows: all of q, then k, then v; heads contiguous
    ("attention/b_qkv_RGHK", "attn.Wqkv.bias", "GHK"),
    ("attention/w_out_RHKD", "attn.out_proj.weight", "D HK"),
    ("attention/b_out_RD", "attn.out_proj.bias", "D"),
    ("norm1/scale_RD", "norm1.weight", "D"),
    ("norm1/bias_RD", "norm1.bias", "D"),
    ("norm2/scale_RD", "norm2.weight", "D"),
    ("norm2/bias_RD", "norm2.bias", "D"),
)
NOMIC_DENSE = (
    ("mlp/w_up_RDF", "mlp.fc1.weight", "F D"),
    ("mlp/b_up_RF", "mlp.fc1.bias", "F"),
    ("mlp/w_down_RFD", "mlp.fc2.weight", "D F"),
    ("mlp/b_down_RD", "mlp.fc2.bias", "D"),
)
NOMIC_MIXTURE = (
    ("moe/w_router_RED", "mlp.router.layer.weight", "E D"),
    ("moe/w_up_REDF", "mlp.experts.mlp.w1", "EF D"),  # used transposed: x @ w1[e].T
    ("moe/w_down_REFD", "mlp.experts.mlp.w2", "EF D"),  # used as it is: h @ w2[e]
    ("moe/b_out_RD", "mlp.experts.bias", "D"),  # one bias, shared by the experts, added once
)
BERT_EMBEDDING = (
    WORD,
    POSITION,
    TYPE,
    ("embedding/norm/scale_D", "embeddings.LayerNorm.weight", "D"),
    ("embedding/norm/bias_D", "embeddings.LayerNorm.bias", "D"),
)
BERT_BLOCK = (  # {} is one of QKV: a tensor for each index of G
    ("attention/w_qkv_RDGHK", "attention.self.{}.weight", "HK D"),
    ("attention/b_qkv_RGHK", "attention.self.{}.bias", "HK"),
    ("attention/w_out_RHKD", "attention.output.dense.weight", "D HK"),
    ("attention/b_out_RD", "attention.output.dense.bias", "D"),
    ("norm1/scale_RD", "attention.output.LayerNorm.weight", "D"),
    ("norm1/bias_RD", "attention.output.LayerNorm.bias", "D"),
    ("mlp/w_up_RDF", "intermediate.dense.weight", "F D"),
    ("mlp/b_up_RF", "intermediate.dense.bias", "F"),
    ("mlp/w_down_RFD", "output.dense.weight", "D F"),
    ("mlp/b_down_RD", "output.dense.bias", "D"),
    ("norm2/scale_RD", "output.LayerNorm.weight", "D"),
    ("norm2/bias_RD", "output.LayerNorm.bias", "D"),
)
QKV = ("query", "key", "value")
HEAD_PREFIX = {"bert": "cls.predictions.", "xlm-roberta": "lm_head."}
HEAD = {  # of masked language modelling; the decoder is the word table, so there is no row for it
    "bert": (
        ("head/w_DU", "cls.predictions.transform.dense.weight", "U D"),
        ("head/b_U", "cls.predictions.transform.dense.bias", "U"),
        ("head/scale_U", "cls.predictions.transform.LayerNorm.weight", "U"),
        ("head/bias_U", "cls.predictions.transform.LayerNorm.bias", "U"),
        ("head/b_V", "cls.predictions.bias", "V"),
    ),
    "xlm-roberta": (
        ("head/w_DU", "lm_head.dense.weight", "U D"),
        ("head/b_U", "lm_head.dense.bias", "U"),
        ("head/scale_U", "lm_head.layer_norm.weight", "U"),
        ("head/bias_U", "lm_head.layer_norm.bias", "U"),
        ("head/b_V", "lm_head.bias", "V"),
    ),
}


def model_type(encoder: Encoder, moe: Moe) -> str:
    """Which layout holds this model, by the name config.json has for it.

    nomic_bert: rotary positions, dense or with experts. bert, xlm-roberta: dense with learned positions, the first in row
    0 of the table or behind the row of <pad>. moe_embed: learned positions and experts, which no released layout has.
    """
    if encoder.position == "rotary":
        return "nomic_bert"
    if moe.num_experts:
        return "moe_embed"
    return "xlm-roberta" if encoder.position_offset else "bert"


def to_tensors(params: Mapping, *, encoder: Encoder, moe: Moe) -> dict[str, np.ndarray]:
    """Our nested params -> their flat tensors, float32. UserError names what is unknown, missing or mis-shaped."""
    with_head = "head" in params
    sizes, flat = _sizes(encoder, moe), dict(flatten(params))
    found = {name: np.shape(array) for name, array in flat.items()}
    _check(found, param_shapes(encoder, moe, with_head=with_head), kind="parameter")
    tensors = {}
    for ours, theirs, layout in _rows(encoder, moe, with_head=with_head):
        array, order = np.asarray(flat[ours], np.float32), layout.replace(" ", "")
        for name, where in theirs.items():
            part, dims = _part(array, _dims(ours), where)
            transposed = part.transpose([dims.index(dim) for dim in order])
            # Contiguous, because safetensors.numpy writes the memory of a transposed view as it lies (measured, 0.8.0).
            tensors[name] = np.ascontiguousarray(transposed.reshape(_shape(layout, sizes)))
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], *, encoder: Encoder, moe: Moe, with_head: bool = False) -> dict:
    """Their flat tensors -> our nested params, float32; half precision is widened, which is exact."""
    if encoder.num_layers > len(tensors):  # before a name is made for each
        raise UserError(f"the config asks for {encoder.num_layers} layers; there are {len(tensors)} tensors.")
    sizes, expected = _sizes(encoder, moe), tensor_shapes(encoder, moe, with_head=with_head)
    _check({name: np.shape(tensor) for name, tensor in tensors.items()}, expected, kind="tensor")
    params: dict = {}
    for ours, theirs, layout in _rows(encoder, moe, with_head=with_head):
        array, order = np.empty([sizes[dim] for dim in _dims(ours)], np.float32), layout.replace(" ", "")
        for name, where in theirs.items():
            part, dims = _part(array, _dims(ours), where)
            split = np.asarray(tensors[name]).reshape([sizes[dim] for dim in order])
            part[...] = split.transpose([order.index(dim) for dim in dims])
        *path, leaf = ours.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return params


def param_shapes(encoder: Encoder, moe: Moe, *, with_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Path ("unit/0/mlp/w_up_RDF") -> shape of every parameter of ours at this size."""
    sizes = _sizes(encoder, moe)
    rows = _rows(encoder, moe, with_head=with_head)
    return {ours: tuple(sizes[dim] for dim in _dims(ours)) for ours, _, _ in rows}


def tensor_shapes(encoder: Encoder, moe: Moe, *, with_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of this model's layout at this size."""
    sizes = _sizes(encoder, moe)
    rows = _rows(encoder, moe, with_head=with_head)
    return {name: _shape(layout, sizes) for _, theirs, layout in rows for name in theirs}


def num_parameters(encoder: Encoder, moe: Moe) -> tuple[int, int]:
    """How many numbers the model has, without a head, and how many of them a token meets: all but the experts it skips."""
    total = sum(map(math.prod, tensor_shapes(encoder, moe).values()))
    if not moe.num_experts:
        return total, total
    mixtures, per_expert = encoder.num_layers // moe.every, 2 * encoder.ffn_dim * encoder.dim
    return total, total - mixtures * (moe.num_experts - moe.top_k) * per_expert


def flatten(tree: Mapping, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """A nested dict of arrays as (path, array), the keys joined by "/"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _rows(encoder: Encoder, moe: Moe, *, with_head: bool) -> Iterator[tuple[str, dict[str, dict[str, int]], str]]:
    """(our path, their names -> where each lies in ours: letter -> index, layout).

    Block i of the unit in repeat r is their layer r * unit + i.
    """
    kind, unit = model_type(encoder, moe), moe.unit_length
    native = kind in ("bert", "xlm-roberta")
    once = BERT_EMBEDDING if native else NOMIC_EMBEDDING + ((POSITION,) if kind == "moe_embed" else ())
    if with_head and kind in HEAD:
        once += HEAD[kind]
    for ours, theirs, layout in once:
        yield ours, {theirs: {}}, layout
    for block in range(unit):
        mixture = moe.num_experts and block == unit - 1
        rows = BERT_BLOCK if native else NOMIC_BLOCK + (NOMIC_MIXTURE if mixture else NOMIC_DENSE)
        for ours, theirs, layout in rows:
            names = {}
            for repeat, layer in enumerate(range(block, encoder.num_layers, unit)):
                name = f"encoder.{'layer' if native else 'layers'}.{layer}.{theirs}"
                if "{}" in theirs:
                    names |= {name.format(part): {"R": repeat, "G": g} for g, part in enumerate(QKV)}
                else:
                    names[name] = {"R": repeat}
            yield f"unit/{block}/{ours}", names, layout


def _part(array: np.ndarray, dims: str, where: Mapping[str, int]) -> tuple[np.ndarray, str]:
    """The part of an array at these indices of some of its dims, a view, and the letters that are left."""
    index = tuple(where[dim] if dim in where else slice(None) for dim in dims)
    return array[index], "".join(dim for dim in dims if dim not in where)


def _sizes(encoder: Encoder, moe: Moe) -> dict[str, int]:
    return {
        "V": encoder.vocab_size, "Y": encoder.num_token_types, "P": encoder.num_positions, "D": encoder.dim,
        "U": encoder.dim, "F": encoder.ffn_dim, "G": len(QKV), "H": encoder.num_heads,
        "K": encoder.dim // encoder.num_heads, "E": moe.num_experts, "R": encoder.num_layers // moe.unit_length,
    }  # fmt: skip


def _dims(ours: str) -> str:
    return ours.rsplit("_", 1)[1]


def _shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[dim] for dim in group) for group in layout.split())


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
