"""config.json of a Hugging Face folder, both ways: (Encoder, Moe) <-> the keys of NomicBert, BERT, XLM-R and our own form.

Strict: a key of the lists below that asks for what we do not compute, or that says nothing where the reference's default
is not ours, is named in a UserError. Keys that change no number (dropout, labels, dtypes of storage) are not looked at.
"""

from collections.abc import Mapping

from moe_embed import hf_layout
from moe_embed.config import Encoder, Moe, UserError

# What another NomicBert may say that we do not compute: key -> the values we do. The first three have a default in
# the reference's configuration class that is not ours, so they must be written; the others may be absent.
NOMIC_REQUIRED = {"activation_function": ("gelu",), "rotary_emb_fraction": (1.0,), "prenorm": (False,)}
NOMIC_OPTIONAL = {
    "rotary_emb_interleaved": (False,), "rotary_emb_scale_base": (None,), "rotary_scaling_factor": (None,),
    "num_shared_experts": (0,), "moe_normalize_expert_weights": (False,), "expert_choice_router": (False,),
    "ffn_div": (1,), "qkv_proj_bias": (True,), "mlp_fc1_bias": (True,), "mlp_fc2_bias": (True,), "causal": (False,),
    "parallel_block": (False,), "use_rms_norm": (None, False), "scale_attn_weights": (True,),
}  # fmt: skip
# The same for BERT and XLM-R; transformers' defaults are ours, so all may be absent.
BERT_OPTIONAL = {
    "hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False,),
    "add_cross_attention": (False,), "cross_attention_hidden_size": (None,), "pruned_heads": ({},),
}  # fmt: skip
BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings", "type_vocab_size")  # fmt: skip
MOST = 2**31  # of any number in it: no size is larger, and arithmetic on what is overflows
READABLE = ("nomic_bert", "bert", "xlm-roberta", "moe_embed")
# transformers' own `nomic_bert` would load these files without a murmur, its MLPs random.
GUARD = "not transformers' own nomic_bert (gated, no biases, no experts): load this model with trust_remote_code=True"


def hf_config(encoder: Encoder, moe: Moe, *, pad_id: int = 1) -> dict:
    """config.json of an export: what transformers, our torch file, TEI, vLLM and llama.cpp read.

    UserError where XLM-R's layout cannot say it: it counts positions from the id of <pad>, plus one.
    """
    kind = hf_layout.model_type(encoder, moe)
    if kind == "xlm-roberta" and pad_id != encoder.position_offset - 1:
        raise UserError(
            f"XLM-R's positions start in row <pad> + 1 of the table; this tokenizer's <pad> is {pad_id}, and "
            f"config.encoder.position_offset is {encoder.position_offset}: the model cannot be written as XLM-R."
        )
    if kind in ("bert", "xlm-roberta"):
        return _bert_config(encoder, kind, pad_id)
    return _nomic_config(encoder, moe, kind, pad_id)


def read_hf_config(theirs: Mapping) -> tuple[Encoder, Moe]:
    """A config.json -> (Encoder, Moe). UserError names each key that asks for what we do not compute.

    max_seq_length is a guess for rotary positions (max_position_embeddings - 2, else n_positions), and all that a learned
    table has room for; read_folder knows better.
    """
    kind = theirs.get("model_type")
    if kind not in READABLE:
        raise UserError(f"config.json has model_type {kind!r}; only {', '.join(READABLE)} can be read.")
    return _read_bert(theirs, kind) if kind in ("bert", "xlm-roberta") else _read_nomic(theirs, kind)


def number(theirs: Mapping, key: str, faults: list[str], *, kind: type, file: str = "config.json") -> None:
    """Add a sentence to `faults` unless theirs[key] is a positive number of this kind."""
    value = theirs.get(key)
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < MOST:
        what = "integer" if kind is int else "number"
        faults.append(f"{file} has {key} = {value!r:.40}; a positive {what} below 2**31 is needed.")


def _nomic_config(encoder: Encoder, moe: Moe, kind: str, pad_id: int) -> dict:
    """NomicBert's keys; with learned positions under a name of our own, which no server mistakes for NomicBert.

    llama.cpp asserts (n_positions, max_trained_positions) == (2048, 2048) for this family, whatever was trained;
    rotary positions have no table, so the number binds nothing here.
    """
    learned = kind == "moe_embed"
    positions = encoder.num_positions if learned else max(2048, encoder.max_seq_length)
    classes = ("MoeEmbedConfig", "MoeEmbedModel") if learned else ("NomicBertConfig", "NomicBertModel")
    ours = {
        "architectures": [classes[1]],
        "model_type": kind,
        "auto_map": {"AutoConfig": f"modeling_moe_embed.{classes[0]}", "AutoModel": f"modeling_moe_embed.{classes[1]}"},
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
        **{key: values[0] for key, values in (NOMIC_REQUIRED | NOMIC_OPTIONAL).items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "moe_resid_pdrop"), 0.0),
        "initializer_range": 0.02,
        "pad_vocab_size_multiple": 64,
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
        # Native-safe: converters that read the file through transformers' own class would else get its defaults
        # (theta 1000, epsilon 1e-12, 2046 positions). 514 - 2 is how XLM-R writes 512.
        "layer_norm_eps": encoder.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": encoder.rotary_base},
        "max_position_embeddings": encoder.num_positions if learned else encoder.max_seq_length + 2,
        # The one key that transformers' own class alone reads: as it is no number, that class refuses and shows it.
        "classifier_dropout": GUARD,
    }
    if learned:
        ours = {key: value for key, value in ours.items() if not key.startswith(("rotary", "rope", "classifier"))}
        ours |= {"position_embedding_type": "absolute", "position_offset": encoder.position_offset}
    return ours


def _read_nomic(theirs: Mapping, kind: str) -> tuple[Encoder, Moe]:
    learned, faults = kind == "moe_embed", []
    required, optional = NOMIC_REQUIRED, NOMIC_OPTIONAL
    if learned:
        required = {key: values for key, values in required.items() if not key.startswith("rotary")}
        required |= {"position_embedding_type": ("absolute",)}
    for key, allowed in required.items():
        if key not in theirs:
            faults.append(f"config.json has no {key}; it must say {allowed[0]!r}.")
    _check_values(theirs, required | optional, faults)
    for key in ("vocab_size", "n_embd", "n_head", "n_inner", "n_layer", "type_vocab_size"):
        number(theirs, key, faults, kind=int)
    for key in ("layer_norm_epsilon",) if learned else ("rotary_emb_base", "layer_norm_epsilon"):
        number(theirs, key, faults, kind=float)
    sparse = all(key in theirs and theirs[key] for key in ("num_experts", "moe_every_n_layers"))
    if sparse:
        for key in ("num_experts", "moe_every_n_layers", "moe_top_k"):
            number(theirs, key, faults, kind=int)
    length_key = "max_position_embeddings" if learned or "max_position_embeddings" in theirs else "n_positions"
    number(theirs, length_key, faults, kind=int)
    if learned:
        _row(theirs, "position_offset", faults)
        if not sparse:
            faults.append("config.json has model_type moe_embed and no experts; such a model is written as bert.")
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
    _check_heads(theirs, "n_embd", "n_head")
    if learned:
        positions = _learned(theirs, theirs["position_offset"])
    else:
        length = theirs[length_key] - (2 if length_key == "max_position_embeddings" else 0)
        if length < 3:
            raise UserError(f"config.json has {length_key} = {theirs[length_key]}: no room for a text.")
        ours = {"rope_type": "default", "rope_theta": theirs["rotary_emb_base"]}
        given = theirs.get("rope_parameters") or {}
        rope = ours | given if isinstance(given, dict) else given
        if rope is given or (rope["rope_type"], rope["rope_theta"]) != ("default", theirs["rotary_emb_base"]):
            raise UserError(
                f"config.json has rope_parameters = {rope!r:.200}; only rope_type 'default' with rotary_emb_base "
                f"({theirs['rotary_emb_base']}) as its rope_theta is computed here."
            )
        positions = {"rotary_base": float(theirs["rotary_emb_base"]), "max_seq_length": length}
    encoder = Encoder(
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["n_layer"],
        dim=theirs["n_embd"],
        num_heads=theirs["n_head"],
        ffn_dim=theirs["n_inner"],
        num_token_types=theirs["type_vocab_size"],
        norm_epsilon=float(theirs["layer_norm_epsilon"]),
        **positions,
    )
    return encoder, moe


def _bert_config(encoder: Encoder, kind: str, pad_id: int) -> dict:
    """What transformers' BertModel and XLMRobertaModel read, without remote code."""
    return {
        "architectures": ["BertModel" if kind == "bert" else "XLMRobertaModel"],
        "model_type": kind,
        "vocab_size": encoder.vocab_size,
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.ffn_dim,
        "max_position_embeddings": encoder.num_positions,
        "type_vocab_size": encoder.num_token_types,
        "layer_norm_eps": encoder.norm_epsilon,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "pad_token_id": pad_id,
        **({"bos_token_id": 0, "eos_token_id": 2} if kind == "xlm-roberta" else {}),
        "torch_dtype": "float32",
    }


def _read_bert(theirs: Mapping, kind: str) -> tuple[Encoder, Moe]:
    faults: list[str] = []
    _check_values(theirs, BERT_OPTIONAL, faults)
    for key in BERT_SIZES:
        number(theirs, key, faults, kind=int)
    number(theirs, "layer_norm_eps", faults, kind=float)
    if kind == "xlm-roberta":
        _row(theirs, "pad_token_id", faults)
    if faults:
        raise UserError(*faults)
    _check_heads(theirs, "hidden_size", "num_attention_heads")
    encoder = Encoder(
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["num_hidden_layers"],
        dim=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        ffn_dim=theirs["intermediate_size"],
        num_token_types=theirs["type_vocab_size"],
        norm_epsilon=float(theirs["layer_norm_eps"]),
        **_learned(theirs, theirs["pad_token_id"] + 1 if kind == "xlm-roberta" else 0),
    )
    return encoder, Moe(num_experts=0)


def _learned(theirs: Mapping, offset: int) -> dict:
    """The fields of an Encoder with learned positions. UserError if the table has no room for a text."""
    rows = theirs["max_position_embeddings"]
    if rows - offset < 3:
        raise UserError(f"config.json has max_position_embeddings = {rows}, of which {offset} come before any text.")
    return {"position": "learned", "num_positions": rows, "position_offset": offset, "max_seq_length": rows - offset}


def _check_values(theirs: Mapping, allowed: Mapping[str, tuple], faults: list[str]) -> None:
    for key, values in allowed.items():
        if key in theirs and theirs[key] not in values:
            computed = " or ".join(map(repr, values))
            faults.append(f"config.json has {key} = {theirs[key]!r}; only {computed} is computed here.")


def _check_heads(theirs: Mapping, dim: str, heads: str) -> None:
    if theirs[dim] % (2 * theirs[heads]):
        raise UserError(f"config.json has {dim} = {theirs[dim]}, no multiple of 2 * {heads} ({theirs[heads]}).")


def _row(theirs: Mapping, key: str, faults: list[str]) -> None:
    """As `number`, but 0 is one."""
    value = theirs.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        faults.append(f"config.json has {key} = {value!r}; an integer from 0 on is needed.")
