"""Small models for the tests of everything Hugging Face: one Encoder for each layout, random parameters, a folder of them."""

import json

import numpy as np
import safetensors.numpy
import tokenizers

from moe_embed import hf_config, hf_layout
from moe_embed.config import Encoder, Moe

SIZES = {"vocab_size": 96, "num_layers": 4, "dim": 8, "num_heads": 2, "ffn_dim": 6}
NOMIC = Encoder(**SIZES, max_seq_length=16)
BERT = Encoder(**SIZES, max_seq_length=16, num_token_types=2, position="learned", num_positions=16, norm_epsilon=1e-12)
XLM_R = Encoder(**SIZES, max_seq_length=16, position="learned", num_positions=18, position_offset=2)
DENSE, MOE = Moe(num_experts=0), Moe(num_experts=3, top_k=2, every=2)
ALL = {  # a case of each layout, and every way to repeat the unit
    "nomic": (NOMIC, MOE),
    "every layer": (NOMIC, Moe(num_experts=3, every=1)),
    "one layer": (NOMIC, Moe(num_experts=3, every=4)),
    "nomic dense": (NOMIC, DENSE),
    "bert": (BERT, DENSE),
    "xlm-roberta": (XLM_R, DENSE),
    "moe_embed": (XLM_R, MOE),
    "moe_embed from row 0": (BERT, Moe(num_experts=3, every=1)),
}


def random_params(encoder: Encoder, moe: Moe, *, with_head: bool = False, seed: int = 0) -> dict:
    """Normal numbers for every parameter, so that none is at a value that hides a mistake."""
    rng, params = np.random.default_rng(seed), {}
    for path, shape in hf_layout.param_shapes(encoder, moe, with_head=with_head).items():
        *keys, leaf = path.split("/")
        node = params
        for key in keys:
            node = node.setdefault(key, {})
        node[leaf] = rng.normal(size=shape).astype(np.float32)
    return params


def word_pieces(texts=("what is it", "the page margins"), *, pad_id: int = 0) -> bytes:
    """BERT's tokenizer.json: its special tokens first, then single letters and the words of `texts`."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad_id, "[PAD]")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = sorted({word for text in texts for word in text.lower().split() if word.isalpha() and len(word) > 1})
    vocab = {piece: i for i, piece in enumerate([*special, *letters, *words])}
    return tokenizers.BertWordPieceTokenizer(vocab, lowercase=True).to_str().encode()


def write_folder(folder, encoder: Encoder, moe: Moe, *, tokenizer: bytes | None = None, rename=None, **config) -> dict:
    """A folder with random parameters, which it returns; `rename` changes its tensors, `config` its config.json."""
    folder.mkdir(exist_ok=True)
    params = random_params(encoder, moe)
    tensors = hf_layout.to_tensors(params, encoder=encoder, moe=moe)
    save(folder, rename(tensors) if rename else tensors)
    (folder / "config.json").write_text(json.dumps(hf_config.hf_config(encoder, moe) | config))
    pad_id = max(encoder.position_offset - 1, 0)
    (folder / "tokenizer.json").write_bytes(word_pieces(pad_id=pad_id) if tokenizer is None else tokenizer)
    return params


def save(folder, tensors: dict) -> None:
    """model.safetensors of `folder`."""
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
