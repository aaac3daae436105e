"""The exported torch file against a numpy loop, against our encoder, through transformers and sentence-transformers.

Needs torch, transformers and sentence-transformers. Every equality has a sibling that breaks something and must differ.
"""

import dataclasses
import io
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import sentence_transformers
import sentencepiece
import torch
import transformers

from moe_embed import config, export, hf_folder, sharding, upcycle
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, load
from moe_embed.model import encoder as encoder_lib
from tests import hf_tiny

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module", params=["rotary", "learned"])
def model(request):
    return make_model(request.param)


def make_model(position):
    """Random, with biases, norms and the shared bias away from their first values, so that a lost one shows."""
    learned = {"position": "learned", "num_positions": 66, "position_offset": 2} if position == "learned" else {}
    proto = io.BytesIO()
    settings = {"vocab_size": 400, "hard_vocab_limit": False, "required_chars": "</>", "minloglevel": 2}
    settings["user_defined_symbols"] = ["\u2581search_query:"]  # as the shipped sample tokenizer has it
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(export.TEXTS), model_writer=proto, **settings)
    tokenizer = tokenizer_lib.Tokenizer(proto.getvalue(), origin="a test")
    rows = -(-tokenizer.num_ids // 64) * 64
    encoder = config.Encoder(
        vocab_size=rows, num_layers=4, dim=32, num_heads=4, ffn_dim=48, max_seq_length=64, **learned
    )
    moe = config.Moe(num_experts=4, top_k=2, every=2)
    rng = np.random.default_rng(0)
    params = encoder_lib.init(encoder, moe, key=jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    prompts = {"query": "search_query: ", "document": "search_document: "}
    return Model(encoder, moe, params, tokenizer, prompts, sharding.make_mesh(config.Mesh()), "a test model")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "small"
    export.export(model, output)
    return output


def open_torch(folder):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def run_torch(torch_model, tokens, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return torch_model(input_ids=torch.tensor(tokens), attention_mask=mask).last_hidden_state.numpy()


def random_rows(model, lengths, seed=0):
    """Right-padded tokens [B, L] and their mask."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), max(lengths)), tokenizer_lib.PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(4, model.tokenizer.num_ids - 1, length)
    return tokens, (tokens != tokenizer_lib.PAD).astype(np.int64)


def numpy_encode(t, ids, *, heads, top_k, every, eps=1e-5, base=10_000.0, offset=2):
    """One text through the released tensors `t`, in float64, as slowly as it can be said."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    learned = "embeddings.position_embeddings.weight" in t

    def turn(x):  # [L, K], pairs (i, i + K/2)
        if learned:
            return x
        half = x.shape[1] // 2
        angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.token_type_embeddings.weight"][0]
    if learned:
        x = x + t["embeddings.position_embeddings.weight"][offset : offset + len(ids)]
    x = norm(x, "emb_ln")
    dim, layer = x.shape[1], 0
    while (name := f"encoder.layers.{layer}") + ".norm1.weight" in t:
        size = dim // heads
        qkv = x @ t[f"{name}.attn.Wqkv.weight"].T + t[f"{name}.attn.Wqkv.bias"]
        mixed = np.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, g * dim + h * size : g * dim + (h + 1) * size] for g in range(3))
            mixed[:, h * size : (h + 1) * size] = softmax(turn(q) @ turn(k).T / math.sqrt(size)) @ v
        out = mixed @ t[f"{name}.attn.out_proj.weight"].T + t[f"{name}.attn.out_proj.bias"]
        x = norm(x + out, f"{name}.norm1")
        if layer % every == every - 1:
            weights = softmax(x @ t[f"{name}.mlp.router.layer.weight"].T)
            w1, w2 = t[f"{name}.mlp.experts.mlp.w1"], t[f"{name}.mlp.experts.mlp.w2"]
            ffn, out = len(w1) // weights.shape[1], np.zeros_like(x)
            for token in range(len(x)):
                for e in np.argsort(-weights[token], kind="stable")[:top_k]:
                    rows = slice(e * ffn, (e + 1) * ffn)
                    out[token] += weights[token, e] * (gelu(x[token] @ w1[rows].T) @ w2[rows])
            out += t[f"{name}.mlp.experts.bias"]
        else:
            up = gelu(x @ t[f"{name}.mlp.fc1.weight"].T + t[f"{name}.mlp.fc1.bias"])
            out = up @ t[f"{name}.mlp.fc2.weight"].T + t[f"{name}.mlp.fc2.bias"]
        x, layer = norm(x + out, f"{name}.norm2"), layer + 1
    return x


@pytest.mark.parametrize("grouped", [True, False])
def test_torch_file_equals_a_numpy_loop(model, folder, grouped, monkeypatch):
    if not grouped:  # the way of older torch, and of ONNX
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    tensors = {k: v.astype(np.float64) for k, v in hf_folder.read_safetensors(folder / "model.safetensors").items()}
    lengths = [11, 3, 7]
    tokens, mask = random_rows(model, lengths)
    found = run_torch(open_torch(folder), tokens, mask)
    for i, length in enumerate(lengths):
        wanted = numpy_encode(tensors, tokens[i, :length], heads=4, top_k=2, every=2)
        assert np.abs(found[i, :length] - wanted).max() <= TOLERANCE
        other = numpy_encode(tensors, tokens[i, :length], heads=4, top_k=1, every=2)
        assert np.abs(found[i, :length] - other).max() > 1e-2
        if model.encoder.position == "learned":
            other = numpy_encode(tensors, tokens[i, :length], heads=4, top_k=2, every=2, offset=1)
            assert np.abs(found[i, :length] - other).max() > 1e-2


@pytest.mark.parametrize("lengths", [[64], [5], [1 + i * 2 for i in range(32)]], ids=["1 full", "1 short", "32"])
def test_torch_file_equals_our_encoder(model, folder, lengths):
    tokens, mask = random_rows(model, lengths, seed=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    arguments = [x.astype(np.int32) for x in (tokens, mask, positions)]
    wanted = np.asarray(encoder_lib.apply(model.params, *arguments, c=model.encoder, moe=model.moe)[0])
    found = run_torch(open_torch(folder), tokens, mask)
    assert np.abs(found - wanted)[mask == 1].max() <= TOLERANCE


def test_padding_and_neighbours_do_not_matter(model, folder):
    torch_model = open_torch(folder)
    tokens, mask = random_rows(model, [9, 40, 17], seed=2)
    together = run_torch(torch_model, tokens, mask)
    assert np.abs(together - run_torch(torch_model, tokens))[mask == 1].max() == 0  # no mask: <pad> says it
    other_padding = np.where(mask == 1, tokens, 7)
    # Rounding only: padding is routed like any token, and the experts' products then have other numbers of rows.
    assert np.abs(together - run_torch(torch_model, other_padding, mask))[mask == 1].max() <= TOLERANCE
    alone = run_torch(torch_model, tokens[:1, :9])
    assert np.abs(alone - together[:1, :9]).max() <= TOLERANCE
    unmasked = run_torch(torch_model, other_padding, np.ones_like(mask))
    assert np.abs(together - unmasked)[0, :9].max() > 1e-3  # masking was what did it
    left = run_torch(torch_model, np.roll(tokens[:1], 31, 1), np.roll(mask[:1], 31, 1))  # padding on the left
    assert np.abs(left[0, 31:] - together[0, :9]).max() <= TOLERANCE
    empty = run_torch(torch_model, tokens, mask * np.array([[1], [0], [1]]))
    assert np.isfinite(empty).all()


def misread(tensors, name):
    """[E, D, F] read as [E, F, D]: it fits."""
    return tensors[name].reshape(4, 32, 48).transpose(0, 2, 1).reshape(192, 32)


@pytest.mark.parametrize(("ending", "change"), [
    ("experts.mlp.w1", misread),
    ("experts.mlp.w2", misread),
    ("experts.bias", lambda tensors, name: np.zeros_like(tensors[name])),
    ("attn.Wqkv.bias", lambda tensors, name: np.roll(tensors[name], 32)),
    ("emb_ln.bias", lambda tensors, name: np.zeros_like(tensors[name])),
])  # fmt: skip
def test_a_wrong_tensor_shows(model, folder, ending, change):
    tensors = hf_folder.read_safetensors(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith(ending)]
    assert names
    tokens, mask = random_rows(model, [12], seed=3)
    torch_model = open_torch(folder)
    right = run_torch(torch_model, tokens, mask)
    wrong = {name: torch.tensor(np.ascontiguousarray(change(tensors, name))) for name in names}
    torch_model.load_state_dict(wrong, strict=False)
    assert np.abs(right - run_torch(torch_model, tokens, mask)).max() > 1e-3


def test_ties_go_to_the_lowest_expert(folder):
    router = open_torch(folder).encoder.layers[1].mlp.router
    torch.nn.init.zeros_(router.layer.weight)
    weights, experts = router(torch.randn(5, 32))
    assert experts.tolist() == [[0, 1]] * 5
    np.testing.assert_allclose(weights.detach(), 0.25)  # a quarter each: not renormalised over the two


def test_tokenizer_json_gives_our_ids(model, folder):
    fast = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert fast.model_max_length == 64
    tricky = [" a", "a ", "a  b", "\n\ta\u00a0b", "", " ", "\u200b", "<s></s><pad><unk><mask>", "\uff76\uff9e", "ﬃ…"]
    tricky += ["쀍☂ x쀍", "search_query: a", "a search_query:b xsearch_query:"]  # no pieces; one piece, and when not
    texts = [*export.TEXTS, *tricky, *(" ".join(export.TEXTS[i : i + 4]) for i in range(0, 28, 4))]
    wanted = model.tokenizer.encode(texts, max_length=64)[0]
    for text, ids in zip(texts, wanted, strict=True):
        assert fast(text, truncation=True)["input_ids"] == ids.tolist(), text
    assert fast("Where")["input_ids"] != fast("where")["input_ids"]
    assert [fast.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]


def test_sentence_transformers_loads_it_with_prompts(model, folder):
    st = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert st.max_seq_length == 64
    assert st.prompts == model.prompts | {"passage": "search_document: "}
    texts = [*export.TEXTS, " ".join(export.TEXTS)]
    for task, encode in (("query", st.encode_query), ("document", st.encode_document), (None, st.encode)):
        found = encode(texts)
        assert np.abs(found - model.encode(texts, task=task)).max() <= TOLERANCE
    assert np.abs(st.encode_query(texts) - model.encode(texts, task="document")).max() > 1e-2
    shortened = st.encode(texts, truncate_dim=16, normalize_embeddings=True)
    assert np.abs(shortened - model.encode(texts, dim=16)).max() <= TOLERANCE


def test_it_survives_saving_by_sentence_transformers(model, folder, tmp_path):
    st = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    st.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert np.abs(again.encode(["a", "b"]) - st.encode(["a", "b"])).max() == 0


def test_missing_or_left_over_tensors_raise(folder, tmp_path):
    for change in ("missing", "left over"):
        broken = tmp_path / change.replace(" ", "_")
        broken.mkdir()
        for name in ("config.json", "modeling_moe_embed.py"):
            (broken / name).write_bytes((folder / name).read_bytes())
        tensors = hf_folder.read_safetensors(folder / "model.safetensors")
        if change == "missing":
            del tensors["encoder.layers.1.mlp.experts.bias"]
        else:
            tensors["encoder.layers.9.norm1.bias"] = np.zeros(32, np.float32)
        export.safetensors.numpy.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"do not fit this model.*encoder\.layers"):
            open_torch(broken)


def test_transformers_own_class_refuses_the_folder(folder):
    """Without trust_remote_code its `nomic_bert`, which has no experts, would be filled with random numbers; ours is unknown."""
    with pytest.raises(Exception, match=r"trust_remote_code"):
        transformers.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("moe", [config.Moe(num_experts=4, top_k=1, every=1), config.Moe(num_experts=0)])
def test_export_measures_torch_itself(model, moe, tmp_path):
    params = encoder_lib.init(model.encoder, moe, key=jax.random.key(1))
    report = export.export(dataclasses.replace(model, moe=moe, params=params), tmp_path / "out")
    assert report["torch"] <= TOLERANCE
    assert report["moe_embed"] <= TOLERANCE
    assert report == json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["compared"] + report["near_ties"] == 2 * report["texts"]
    assert load(tmp_path / "out").moe.num_experts == moe.num_experts


def test_an_upcycled_model_exports_before_any_training(model, tmp_path):
    """Its routers are nearly flat, its logits small: no near ties for that."""
    dense = dataclasses.replace(model, moe=config.Moe(num_experts=0), params=None)
    dense = dataclasses.replace(dense, params=encoder_lib.init(dense.encoder, dense.moe, key=jax.random.key(2)))
    upcycled = upcycle.upcycle(dense, config.Moe(num_experts=4, top_k=2, every=2))
    report = export.export(upcycled, tmp_path / "out")
    assert report["torch"] <= TOLERANCE
    assert report["near_ties"] <= report["texts"] / 4


def test_a_model_with_word_pieces_exports(model, tmp_path):
    """In each form, with <pad> as 0: the torch file's own mask, and what sentence-transformers makes of tokenizer.json."""
    tokenizer = tokenizer_lib.JsonTokenizer(hf_tiny.word_pieces(export.TEXTS), origin="a test")
    assert tokenizer.num_ids <= model.encoder.vocab_size
    export.export(dataclasses.replace(model, tokenizer=tokenizer), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["torch"] <= TOLERANCE
    assert report["other_tokens"] == 0
    torch_model = open_torch(tmp_path / "out")
    tokens = np.array([[2, 9, 11, 3, 0, 0]])
    unmasked = run_torch(torch_model, tokens)
    assert np.abs(unmasked - run_torch(torch_model, tokens, (tokens != 0).astype(np.int64)))[:, :4].max() == 0


def test_export_refuses_when_torch_differs(tmp_path, monkeypatch):
    files = tmp_path / "torch_files"
    files.mkdir()
    for path in export.TORCH_FILES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        (files / path.name).write_text(text.replace("functional.gelu(", "functional.relu("), encoding="utf-8")
    monkeypatch.setattr(export, "TORCH_FILES", pathlib.Path(files))
    with pytest.raises(config.UserError, match="torch reads other vectors"):
        export.export(make_model("rotary"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
