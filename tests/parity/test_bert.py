"""transformers' BertModel and XLMRobertaModel against our encoder, layer by layer: values, gradients, heads, and back again.

Small random configurations with the shipped tokenizer's vocabulary, written by transformers, read by hf_folder. "The same"
is 1e-5 for each number in float32, and CONTRIBUTING's rule for gradients. Every equality has a sibling that breaks something.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from flax import nnx

import moe_embed
from moe_embed import export, hf_folder, hf_layout
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import load
from moe_embed.model import encoder as encoder_lib
from moe_embed.model import layers, mlm_head

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
SAMPLE_TOKENIZER = pathlib.Path(moe_embed.__file__).parent / "sample" / "tokenizer.model"
LENGTH, PAD = 40, 1
SHAPE = {
    "vocab_size": 16_064, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": PAD,
}  # fmt: skip
CONFIGS = {
    "bert": transformers.BertConfig(**SHAPE, max_position_embeddings=LENGTH, type_vocab_size=2, layer_norm_eps=1e-12),
    "xlm-roberta": transformers.XLMRobertaConfig(
        **SHAPE, max_position_embeddings=LENGTH + 2, type_vocab_size=1, layer_norm_eps=1e-5
    ),
}
CLASSES = {
    "bert": (transformers.BertModel, transformers.BertForMaskedLM),
    "xlm-roberta": (transformers.XLMRobertaModel, transformers.XLMRobertaForMaskedLM),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model twice."""

    torch_model: torch.nn.Module
    ours: hf_folder.Folder
    path: pathlib.Path


def make(kind: str, path: pathlib.Path, *, with_head: bool) -> Pair:
    """A random model, its norms and biases away from their first values, written by transformers and read by us."""
    torch.manual_seed(0)
    torch_model = CLASSES[kind][with_head](CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch_model.save_pretrained(path)
    (path / "sentencepiece.bpe.model").write_bytes(SAMPLE_TOKENIZER.read_bytes())
    return Pair(torch_model, hf_folder.read_folder(path), path)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    return make(request.param, tmp_path_factory.mktemp("hf"), with_head=False)


@pytest.fixture(scope="module", params=CONFIGS)
def pair_with_head(request, tmp_path_factory) -> Pair:
    return make(request.param, tmp_path_factory.mktemp("hf"), with_head=True)


@pytest.fixture(scope="module")
def rows():
    """Padded rows: real texts in 30 languages through the shipped tokenizer, then random ids; the longest fills its row."""
    tokenizer, rng = tokenizer_lib.read(SAMPLE_TOKENIZER), np.random.default_rng(0)
    texts = tokenizer.encode([*export.TEXTS, " ".join(export.TEXTS)], max_length=LENGTH)[0]
    texts += [rng.integers(4, tokenizer.num_ids - 1, n).astype(np.int32) for n in (LENGTH, 1, 17)]
    assert max(map(len, texts)) == LENGTH
    return padded(texts)


def padded(texts):
    """(tokens_BL, segments_BL, positions_BL), each text a row."""
    tokens_BL = np.full((len(texts), LENGTH), PAD, np.int32)
    for row, text in zip(tokens_BL, texts, strict=True):
        row[: len(text)] = text
    segments_BL = (np.arange(LENGTH) < np.array([len(text) for text in texts])[:, None]).astype(np.int32)
    return tokens_BL, segments_BL, np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BL.shape)


@pytest.fixture(scope="module")
def packed():
    """Two rows of three and two texts: ([texts of each row], (tokens_BL, segments_BL, positions_BL))."""
    rng, rows = np.random.default_rng(1), []
    arrays = tuple(np.zeros((2, LENGTH), np.int32) for _ in range(3))
    arrays[0][:] = PAD
    for row, lengths in enumerate(((9, 3, 21), (30, 10))):
        rows.append([rng.integers(4, 16_000, length).astype(np.int32) for length in lengths])
        start = 0
        for segment, text in enumerate(rows[-1]):
            place = slice(start, start + len(text))
            for array, values in zip(arrays, (text, segment + 1, np.arange(len(text))), strict=True):
                array[row, place] = values
            start += len(text)
    return rows, arrays


def torch_layers(torch_model, tokens_BL, mask_BL=None) -> list[np.ndarray]:
    """Hidden states after the embedding and after each layer."""
    mask = None if mask_BL is None else torch.tensor(mask_BL)
    with torch.no_grad():
        found = torch_model(torch.tensor(tokens_BL), attention_mask=mask, output_hidden_states=True)
    return [state.numpy() for state in found.hidden_states]


def our_layers(ours, params, tokens_BL, segments_BL, positions_BL) -> list[np.ndarray]:
    """The same of ours: an encoder of the first n layers, for each n."""
    embedding = layers.Embedding(ours.encoder, rngs=nnx.Rngs(0))
    nnx.update(embedding, nnx.State(jax.tree.map(jnp.asarray, params["embedding"])))
    states = [np.asarray(embedding(tokens_BL, positions_BL))]
    for n in range(1, ours.encoder.num_layers + 1):
        c = dataclasses.replace(ours.encoder, num_layers=n)
        first = {"embedding": params["embedding"], "unit": jax.tree.map(lambda x: x[:n], params["unit"])}  # noqa: B023
        found, _ = encoder_lib.apply(first, tokens_BL, segments_BL, positions_BL, c=c, moe=ours.moe)
        states.append(np.asarray(found))
    return states


def largest(a: list[np.ndarray], b: list[np.ndarray], where_BL) -> list[float]:
    """The largest difference after the embedding and after each layer, over the real tokens."""
    assert len(a) == len(b) == 4
    return [float(np.abs(x - y)[where_BL > 0].max()) for x, y in zip(a, b, strict=True)]


def test_every_layer_is_the_same_on_padded_rows(pair, rows):
    tokens_BL, segments_BL, _ = rows
    theirs = torch_layers(pair.torch_model, tokens_BL, segments_BL)
    ours = our_layers(pair.ours, pair.ours.params, *rows)
    assert max(largest(ours, theirs, segments_BL)) <= TOLERANCE
    for n in range(3):  # another layer is another
        assert np.abs(ours[n] - theirs[n + 1])[segments_BL > 0].max() > 0.1
    unmasked = our_layers(pair.ours, pair.ours.params, tokens_BL, np.ones_like(segments_BL), rows[2])
    differences = largest(unmasked, theirs, segments_BL)
    assert differences[0] <= TOLERANCE < 1e-2 < min(differences[1:])  # masking is what did it
    shifted = our_layers(pair.ours, pair.ours.params, tokens_BL, segments_BL, np.maximum(rows[2] - 1, 0))
    assert min(largest(shifted, theirs, segments_BL)) > 1e-2  # and so are positions


def test_packed_texts_are_each_the_same_as_alone(pair, packed):
    texts, arrays = packed
    ours = our_layers(pair.ours, pair.ours.params, *arrays)
    tokens_BL, segments_BL, positions_BL = arrays
    one_text = our_layers(pair.ours, pair.ours.params, tokens_BL, np.minimum(segments_BL, 1), positions_BL)
    not_restarted = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BL.shape)
    run_on = our_layers(pair.ours, pair.ours.params, tokens_BL, segments_BL, not_restarted)
    for row, members in enumerate(texts):
        for segment, text in enumerate(members, start=1):
            theirs = torch_layers(pair.torch_model, text[None])
            of = lambda states: [state[row][segments_BL[row] == segment][None] for state in states]  # noqa: B023, E731
            everywhere = np.ones((1, len(text)))
            assert max(largest(of(ours), theirs, everywhere)) <= TOLERANCE
            assert min(largest(of(one_text), theirs, everywhere)[1:]) > 1e-2
            if segment > 1:
                assert min(largest(of(run_on), theirs, everywhere)) > 1e-2


def paths(encoder, moe, *, with_head=False):
    return list(hf_layout.param_shapes(encoder, moe, with_head=with_head))


def changed(tree, path, change):
    """A copy of `tree` with the leaf at `path` changed."""
    key, _, rest = path.partition("/")
    return {**tree, key: changed(tree[key], rest, change) if rest else change(np.asarray(tree[key]))}


def test_a_change_of_any_parameter_shows(pair, rows):
    """Numbers in another order: what a mistake in the layout would do."""
    rows = tuple(array[-4:] for array in rows)
    theirs = torch_layers(pair.torch_model, rows[0], rows[1])[-1]
    for path in paths(pair.ours.encoder, pair.ours.moe):
        params = changed(pair.ours.params, path, lambda x: np.roll(x, 1, axis=-1))
        found, _ = encoder_lib.apply(params, *rows, c=pair.ours.encoder, moe=pair.ours.moe)
        assert np.abs(np.asarray(found) - theirs)[rows[1] > 0].max() > 1e-3, path


def rule(ours, theirs) -> dict[str, float]:
    """CONTRIBUTING's rule for gradients: ||a - b|| / max(||b||, 1e-3 ||all||) of each leaf; 1e-5 is the same."""
    theirs = dict(hf_layout.flatten(theirs))
    everything = np.sqrt(sum(np.sum(np.square(b, dtype=np.float64)) for b in theirs.values()))
    return {
        path: float(np.linalg.norm(a - theirs[path]) / max(np.linalg.norm(theirs[path]), 1e-3 * everything))
        for path, a in hf_layout.flatten(ours)
    }


def torch_gradients(pair, loss, *, with_head=False) -> dict:
    """d loss / d parameters of torch, in our names: the map of hf_layout is linear, so it maps gradients too."""
    pair.torch_model.zero_grad()
    loss.backward()
    found = {n: p.grad.numpy() for n, p in pair.torch_model.named_parameters() if not n.startswith("pooler")}
    tensors, _ = hf_folder._rename(found, pair.ours.model_type)
    return hf_layout.from_tensors(tensors, encoder=pair.ours.encoder, moe=pair.ours.moe, with_head=with_head)


def our_gradients(pair, arrays, weight_BLD) -> dict:
    def loss(params):
        found, _ = encoder_lib.apply(params, *arrays, c=pair.ours.encoder, moe=pair.ours.moe)
        return (found * weight_BLD * (arrays[1] > 0)[..., None]).sum()

    return jax.device_get(jax.grad(loss)(pair.ours.params))


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_every_gradient_is_the_same(pair, rows, packed, how):
    rng, total = np.random.default_rng(2), 0.0
    texts, arrays = (None, rows) if how == "padded" else packed
    weight_BLD = rng.normal(size=(*arrays[0].shape, 32)).astype(np.float32)
    if how == "padded":
        found = pair.torch_model(torch.tensor(arrays[0]), attention_mask=torch.tensor(arrays[1])).last_hidden_state
        total = (found * torch.tensor(weight_BLD) * torch.tensor(arrays[1])[..., None]).sum()
    else:
        for row, members in enumerate(texts):
            for segment, text in enumerate(members, start=1):
                weight = torch.tensor(weight_BLD[row][arrays[1][row] == segment])
                total = total + (pair.torch_model(torch.tensor(text[None])).last_hidden_state[0] * weight).sum()
    theirs = torch_gradients(pair, total)
    ours = our_gradients(pair, arrays, weight_BLD)
    assert set(rule(ours, theirs)) == set(paths(pair.ours.encoder, pair.ours.moe))
    assert max(rule(ours, theirs).values()) <= TOLERANCE
    for path in rule(ours, theirs):  # 1e-4 more of any leaf would show
        assert rule(changed(ours, path, lambda x: x * 1.0001), theirs)[path] > TOLERANCE, path
    other = our_gradients(dataclasses.replace(pair, ours=pair.ours._replace(params=changed(
        pair.ours.params, "unit/0/norm1/scale_RD", lambda x: x * 1.001))), arrays, weight_BLD)  # fmt: skip
    assert max(rule(other, theirs).values()) > 10 * TOLERANCE


def our_scores(pair, params, rows):
    hidden_BLD, _ = encoder_lib.apply(params, *rows, c=pair.ours.encoder, moe=pair.ours.moe)
    c, hidden_TD = pair.ours.encoder, hidden_BLD.reshape(-1, 32)
    word_VD = params["embedding"]["word_VD"]
    return mlm_head.scores(params["head"], word_VD, hidden_TD, num_ids=c.vocab_size, epsilon=c.norm_epsilon)


def test_the_head_of_masked_language_modelling_is_the_same(pair_with_head, rows):
    pair, rows = pair_with_head, tuple(array[-6:] for array in rows)
    real_T = rows[1].reshape(-1) > 0
    logits = pair.torch_model(torch.tensor(rows[0]), attention_mask=torch.tensor(rows[1])).logits
    theirs_TV = logits.detach().numpy().reshape(-1, 16_064)[real_T]
    ours_TV = np.asarray(our_scores(pair, pair.ours.params, rows))[real_T]
    assert np.abs(ours_TV - theirs_TV).max() <= TOLERANCE
    for name in pair.ours.params["head"]:
        params = changed(pair.ours.params, f"head/{name}", lambda x: np.roll(x, 1, axis=-1))
        other_TV = np.asarray(our_scores(pair, params, rows))[real_T]
        assert np.abs(other_TV - theirs_TV).max() > 1e-3, name


def test_every_gradient_through_the_head_is_the_same(pair_with_head, rows):
    """The word table's has two parts: what went in as an embedding and what was scored."""
    pair, rows = pair_with_head, tuple(array[-6:] for array in rows)
    real_T, target_T = rows[1].reshape(-1) > 0, np.roll(rows[0], 1, axis=1).reshape(-1)
    logits = pair.torch_model(torch.tensor(rows[0]), attention_mask=torch.tensor(rows[1])).logits
    picked = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 16_064)[real_T], torch.tensor(target_T[real_T], dtype=torch.long), reduction="sum"
    )
    theirs = torch_gradients(pair, picked, with_head=True)

    def loss(params, shift):
        score_TV = our_scores(pair, params, rows)
        loss_T = (
            jax.nn.logsumexp(score_TV, axis=1) - jnp.take_along_axis(score_TV, target_T[:, None] + shift, axis=1)[:, 0]
        )
        return (loss_T * real_T).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    ours = jax.device_get(gradient(pair.ours.params, 0))
    assert set(rule(ours, theirs)) == set(paths(pair.ours.encoder, pair.ours.moe, with_head=True))
    assert max(rule(ours, theirs).values()) <= TOLERANCE
    assert min(rule(jax.device_get(gradient(pair.ours.params, 1)), theirs).values()) > 100 * TOLERANCE


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_import_and_export_give_the_same_bytes(kind, with_head, tmp_path, capsys):
    source = make(kind, tmp_path / "hf", with_head=with_head)
    model = load(source.path)
    report = export.export(model, tmp_path / "out")
    assert report["torch"] <= TOLERANCE
    assert report["compared"] == 2 * report["texts"] - report["other_tokens"]
    before = hf_folder.read_safetensors(source.path / "model.safetensors")
    after = hf_folder.read_safetensors(tmp_path / "out" / "model.safetensors")
    head, prefix = hf_layout.HEAD_PREFIX[source.ours.model_type], hf_folder.PREFIX[source.ours.model_type]
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in before.items()
        if name not in source.ours.left_out and not name.startswith(head)
    }
    assert {name: tensor.tobytes() for name, tensor in after.items()} == {n: t.tobytes() for n, t in kept.items()}
    assert source.ours.left_out == ([] if with_head else ["pooler.dense.bias", "pooler.dense.weight"])
    assert ("head of masked language modelling is not exported" in capsys.readouterr().out) == with_head
    again = hf_folder.read_folder(tmp_path / "out")
    assert again.encoder == model.encoder
    ours = {name: model.params[name] for name in ("embedding", "unit")}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours))
    other = changed(ours, "embedding/position_PD", lambda x: np.nextafter(x, 9))
    assert not jax.tree.all(jax.tree.map(np.array_equal, again.params, other))


def test_the_native_export_loads_without_remote_code(pair, rows, tmp_path):
    model = load(pair.path)
    out = tmp_path / "out"
    export.export(model, out)
    assert not list(out.glob("*.py"))
    auto, info = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert type(auto) is CLASSES[pair.ours.model_type][0]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = torch_layers(pair.torch_model, rows[0], rows[1])
    assert max(largest(torch_layers(auto.eval(), rows[0], rows[1]), theirs, rows[1])) == 0
    st = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert st[0].auto_model.pooler is None  # not a random one
    assert st.max_seq_length == LENGTH
    texts = [*export.TEXTS[:28], " ".join(export.TEXTS)]
    assert np.abs(st.encode(texts) - model.encode(texts)).max() <= TOLERANCE
    assert np.abs(st.encode(texts) - model.encode(texts[::-1])).max() > 1e-2
    st.save_pretrained(str(tmp_path / "saved"))  # and what sentence-transformers writes of it, we read
    (tmp_path / "saved" / "sentencepiece.bpe.model").write_bytes(
        SAMPLE_TOKENIZER.read_bytes()
    )  # it writes the JSON only
    again = hf_folder.read_folder(tmp_path / "saved").params
    assert jax.tree.all(jax.tree.map(np.array_equal, again, model.params))


def test_what_transformers_may_be_told_otherwise_is_refused(tmp_path):
    for kind, change, words in (
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act"),
        ("xlm-roberta", {"is_decoder": True}, "is_decoder"),
        ("bert", {"tie_word_embeddings": False}, "not embeddings"),
    ):
        settings = CONFIGS[kind].to_dict() | change
        torch_model = CLASSES[kind][1](type(CONFIGS[kind])(**settings))
        torch_model.save_pretrained(tmp_path)
        (tmp_path / "sentencepiece.bpe.model").write_bytes(SAMPLE_TOKENIZER.read_bytes())
        with pytest.raises(UserError, match=words):
            hf_folder.read_folder(tmp_path)
