"""A model as one GGUF file, llama.cpp's format, exactly: also the bias that experts share, for which llama.cpp has no place.

llama.cpp's own converter drops that bias, and takes no vocabulary smaller than XLM-R's (it puts <mask> at 250,001). Here the
bias is folded away first. What an expert and its router read is h = gamma n + beta with sum(n) = 0 (a LayerNorm), so
v = (1 / gamma) / c gives h . v = 1 for every token. Let h carry the bias along (beta + b: the block's output is the norm of
h + experts(h)), and take it out of what reads h, by W - outer(v, b W): the same function, without a bias. The norm behind
also ignores an equal number t on all dims, which keeps c away from zero. Names, keys and types are those of llama.cpp's
converter (conversion/bert.py, read on 2026-11-24), which a test runs beside this.

llama.cpp computes GELU by its tanh form from a table in half precision, where the model has the exact one: its vectors
differ a little for that, and for the half precision of the matrices.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from moe_embed import hf_layout
from moe_embed.config import Encoder, Moe, UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model

FILE = "model-f16.gguf"
ARCHITECTURE = "nomic-bert-moe"
ONCE = {
    "embeddings.word_embeddings": "token_embd", "embeddings.token_type_embeddings": "token_types",
    "emb_ln": "token_embd_norm",
}  # fmt: skip
IN_BLOCK = {
    "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "norm1": "attn_output_norm", "norm2": "layer_output_norm",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "mlp.router.layer": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = {"mlp.experts.mlp.w1": "ffn_up_exps.weight", "mlp.experts.mlp.w2": "ffn_down_exps.weight"}
COSINE = 0.999  # the least, of llama.cpp's vectors
FOLD = 1e-5  # the largest difference of a number of a unit vector, float32
IN_FLOAT32 = ("token_types.weight", "ffn_gate_inp.weight")  # of the matrices


def check(encoder: Encoder, moe: Moe, tokenizer, *, flag: str = "--gguf") -> None:
    """UserError unless llama.cpp's graph of this family computes such a model, and the package that writes it is here."""
    if hf_layout.model_type(encoder, moe) != "nomic_bert" or not moe.num_experts or moe.every != 2:
        has = f"experts in every {moe.every} layers" if moe.num_experts else "no experts"
        raise UserError(
            f"{flag}: llama.cpp knows this family with rotary positions and experts in every second layer; this model has "
            f"{encoder.position} positions and {has}."
        )
    if flag != "--gguf":
        return
    if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
        raise UserError("--gguf writes SentencePiece tokenizers; this model's is a tokenizer.json of word pieces.")
    if importlib.util.find_spec("gguf") is None:
        raise UserError('--gguf needs gguf: pip install -e ".[deploy]"')


def fold_shared_bias(params: Mapping, *, moe: Moe) -> dict:
    """Our nested params -> the same function with moe/b_out_RD zero: in norm1's bias, the experts' w_up and the router.

    UserError where a gamma of norm1 is zero: 1 / gamma has no number then.
    """
    block = f"{moe.every - 1}"
    unit = dict(params["unit"][block])
    norm, mixture = ({k: np.asarray(x, np.float64) for k, x in unit[name].items()} for name in ("norm1", "moe"))
    for r, bias_D in enumerate(mixture["b_out_RD"]):
        gamma_D, beta_D = norm["scale_RD"][r], norm["bias_RD"][r]
        if not bias_D.any():
            continue
        if not gamma_D.all():
            raise UserError(
                f"layer {moe.every * (r + 1) - 1}: a scale of norm1 is 0; the experts' shared bias cannot be folded."
            )
        inverse_D = 1 / gamma_D
        c = inverse_D @ (beta_D + bias_D)
        # t of the size of h's numbers, with the sign that moves c away from zero.
        t = np.copysign(np.sqrt((gamma_D**2 + beta_D**2).mean()), c * inverse_D.sum())
        moved_D = bias_D + t
        v_D = inverse_D / (c + t * inverse_D.sum())
        norm["bias_RD"][r] += moved_D
        mixture["w_up_REDF"][r] -= v_D[:, None] * np.einsum("d,edf->ef", moved_D, mixture["w_up_REDF"][r])[:, None, :]
        mixture["w_router_RED"][r] -= np.outer(mixture["w_router_RED"][r] @ moved_D, v_D)
    mixture["b_out_RD"] *= 0
    unit |= {name: {k: np.float32(x) for k, x in part.items()} for name, part in (("norm1", norm), ("moe", mixture))}
    return {**params, "unit": {**params["unit"], block: unit}}


def write(
    path: pathlib.Path, params: Mapping, *, encoder: Encoder, moe: Moe, tokenizer: tokenizer_lib.Tokenizer, name: str
) -> None:
    """Write `params`, folded, to `path`: matrices in float16, vectors, token types and routers in float32.

    UserError where a matrix has a number beyond float16's.
    """
    import gguf  # here: an extra

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(encoder.num_layers)
    writer.add_context_length(encoder.max_seq_length)
    writer.add_embedding_length(encoder.dim)
    writer.add_feed_forward_length(encoder.ffn_dim)
    writer.add_head_count(encoder.num_heads)
    writer.add_rope_freq_base(encoder.rotary_base)
    writer.add_layer_norm_eps(encoder.norm_epsilon)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_moe_every_n_layers(moe.every)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer, encoder=encoder)
    for theirs, tensor in _tensors(fold_shared_bias(params, moe=moe), encoder=encoder, moe=moe):
        if tensor.ndim > 1 and not theirs.endswith(IN_FLOAT32):
            if np.abs(tensor).max() > np.finfo(np.float16).max:
                raise UserError(
                    f"{theirs} has numbers that float16 does not hold; the model cannot be written as GGUF."
                )
            tensor = tensor.astype(np.float16)
        writer.add_tensor(theirs, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_and_compare(model: Model, path: pathlib.Path, texts: Sequence[str], *, name: str) -> dict:
    """`write`, then {"gguf": the least cosine of llama.cpp's vectors to the model's, or "not run" without llama-cpp-python}.

    `model` computes in float32, as llama.cpp does. Texts that llama.cpp cuts into other tokens are left out, and counted. Also
    "fold": the largest difference of a number of a vector that folding the shared bias makes. UserError where the cosine is
    below COSINE or the fold is no identity.
    """
    encoder, moe = model.encoder, model.moe
    write(path, model.params, encoder=encoder, moe=moe, tokenizer=model.tokenizer, name=name)
    expected_ND = model.encode(texts)
    folded = dataclasses.replace(model, params=fold_shared_bias(model.params, moe=moe))
    report = {"fold": float(np.abs(folded.encode(texts) - expected_ND).max()), "gguf": "not run"}
    if not report["fold"] <= FOLD:
        raise UserError(
            f"without the experts' shared bias, folded, the vectors differ by {report['fold']:.2e}, more than {FOLD:.0e}; "
            "no GGUF file was kept."
        )
    if importlib.util.find_spec("llama_cpp") is not None:
        found_ND, same_N = vectors(path, texts, model=model)
        report |= {
            "gguf": float((found_ND * expected_ND).sum(1)[same_N].min(initial=1)),
            "gguf_other_tokens": int((~same_N).sum()),
        }
        if report["gguf_other_tokens"] > len(texts) / 4:
            raise UserError(
                f"llama.cpp cuts {report['gguf_other_tokens']} of {len(texts)} texts otherwise; it was not kept."
            )
        if not report["gguf"] >= COSINE:
            raise UserError(
                f"llama.cpp's vectors have a cosine of {report['gguf']:.5f}, below {COSINE}; it was not kept."
            )
    return report


def vectors(path: pathlib.Path, texts: Sequence[str], *, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """llama.cpp's vectors of a GGUF file, float32 [N, D], unit norm, and which texts it cuts into the model's tokens, bool [N].

    One text after the other; of one that is too long llama.cpp would drop </s>: it counts as cut otherwise.
    """
    import llama_cpp  # here: an extra

    length = model.encoder.max_seq_length
    ids = model.tokenizer.encode(texts, max_length=length)[0]
    opened = llama_cpp.Llama(str(path), embedding=True, verbose=False, n_ctx=length, n_batch=length, n_ubatch=length)
    vector_ND = np.array([opened.embed(text, normalize=True, truncate=True) for text in texts], np.float32)
    tokens = [opened.tokenize(text.encode("utf-8")) for text in texts]
    opened.close()
    return vector_ND, np.array([a == b.tolist() for a, b in zip(tokens, ids, strict=True)])


def _tensors(params: Mapping, *, encoder: Encoder, moe: Moe):
    """(llama.cpp's name, array), in its order of dims read backwards."""
    for name, tensor in hf_layout.to_tensors(params, encoder=encoder, moe=moe).items():
        stem, kind = name.rsplit(".", 1)
        if stem in ONCE:
            yield f"{ONCE[stem]}.{kind}", tensor
            continue
        _, _, layer, inside = name.split(".", 3)
        if inside in EXPERTS:
            tensor_EFD = tensor.reshape(moe.num_experts, encoder.ffn_dim, encoder.dim)
            down = inside.endswith("w2")
            yield (
                f"blk.{layer}.{EXPERTS[inside]}",
                np.ascontiguousarray(tensor_EFD.transpose(0, 2, 1) if down else tensor_EFD),
            )
        elif inside != "mlp.experts.bias":  # zero, folded
            yield f"blk.{layer}.{IN_BLOCK[inside.rsplit('.', 1)[0]]}.{kind}", tensor


def _add_tokenizer(writer, tokenizer: tokenizer_lib.Tokenizer, *, encoder: Encoder) -> None:
    """XLM-R's ids, padded to the rows of the table. What users type is text: special tokens are of the kind "control"."""
    import gguf

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    kind = gguf.TokenType
    control = int(kind.CONTROL)
    rows = [
        ("<s>", 0.0, control),
        ("<pad>", 0.0, control),
        ("</s>", 0.0, control),
        ("<unk>", 0.0, int(kind.UNKNOWN)),
    ]
    # Prompts as pieces too, which score 0, the best: of the kind "user defined" they break llama.cpp's normalisation of every
    # character that begins with the byte of their blank (measured: "…" became <unk>).
    rows += [(piece.piece, piece.score, int(kind.NORMAL)) for piece in proto.pieces[3:]]
    rows.append(("<mask>", 0.0, control))
    rows += [(f"[PAD{i}]", -10000.0, int(kind.UNUSED)) for i in range(len(rows), encoder.vocab_size)]
    tokens, scores, kinds = zip(*rows, strict=True)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_token_type_count(encoder.num_token_types)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    if proto.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    mask = len(proto.pieces) + 1
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_sep_token_id(2)
    writer.add_pad_token_id(1)
    writer.add_mask_token_id(mask)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
