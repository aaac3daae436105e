"""A dense encoder becomes a mixture of experts: each expert starts as its layer's MLP (sparse upcycling, arXiv 2212.05055).

    python -m moe_embed.upcycle --model=runs/mlm --output=runs/moe0
    python -m moe_embed.upcycle --model=runs/mlm --output=runs/moe0 --num_experts=8 --top_k=2 --every=2 --noise=0
    python -m moe_embed.upcycle --model=runs/mlm --output=runs/moe0 --preset=contrastors

--preset=ours starts as the dense model. The router is nearly flat, so the top_k softmax weights sum to top_k / num_experts,
and w_down is scaled up by the inverse; its rows are orthogonal to the mean hidden state, or most tokens would begin at the
same experts. b_down becomes the bias that experts share; b_up, for which an expert has no place, is folded into w_up
(`bias_fold`). Then every expert gets noise of its own, with a sum of zero over the experts of a layer.

--preset=contrastors is the public code of Nomic Embed v2 (arXiv 2502.07972): copies, a router drawn from N(0, 0.02), both
biases lost. It does not start as the dense model. Both presets end with the cosine to the dense model on texts of the sample.
"""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from moe_embed import bias_fold, hf_layout, sharding, verb
from moe_embed.config import Moe, UserError
from moe_embed.data import sources
from moe_embed.load import Model, check_model_output, load, save
from moe_embed.model import layers

# Measured on multilingual-e5-small, 8 experts in every second layer, 1 - cosine to the dense model (mean; at most) over
# texts of ten languages. Noise 0.01: 8e-6; 1.3e-5. 0.02: 3e-5; 5e-5. 0.03: 7e-5; 1.2e-4. It grows with the square.
NOISE = 0.02  # the largest that leaves every text above 0.9999
# A router of std 1e-3: 9e-6; 2.4e-5. Of 1e-4: 9e-8; 2.4e-7. Which experts are chosen does not depend on it.
ROUTER_STD = {"ours": 1e-4, "contrastors": 0.02}
SAMPLE = pathlib.Path(__file__).parent / "sample" / "pairs" / "monolingual.jsonl.gz"
NUM_TEXTS, TEXT_TOKENS = 200, 64  # 8,200 tokens in the sample's pieces, 9,200 in XLM-R's; half of them fit a direction


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("upcycle", __doc__)
    parser.add_argument("--model", required=True, help="a dense workdir, model folder or Hugging Face folder")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the model folder to write")
    parser.add_argument("--num_experts", type=int, default=8, help="experts of a mixture (default: 8)")
    parser.add_argument("--top_k", type=int, default=2, help="experts that a token visits (default: 2)")
    parser.add_argument("--every", type=int, default=2, help="every how many layers one is a mixture (default: 2)")
    parser.add_argument("--preset", choices=tuple(ROUTER_STD), default="ours")
    parser.add_argument(
        "--noise",
        type=float,
        help=f"std of the experts' noise, of their matrix's rms (ours: {NOISE}, contrastors: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of router and noise (default: 0)")
    a = parser.parse_args(argv)
    if a.preset == "contrastors" and a.noise is not None:
        raise UserError("--noise belongs to --preset=ours; the public code's experts start as equal copies.")
    check_model_output(a.output, read=[a.model])
    dense, moe = load(a.model), Moe(num_experts=a.num_experts, top_k=a.top_k, every=a.every)
    texts = sample_texts()
    noise = NOISE if a.noise is None else a.noise
    sparse = upcycle(dense, moe, preset=a.preset, noise=noise, seed=a.seed, texts=texts[::2], say=print)
    for name, model in (("before", dense), ("after", sparse)):
        total, active = hf_layout.num_parameters(model.encoder, model.moe)
        print(f"{name:6}  {total:,} parameters, of which a token meets {active:,}")
    mean, least = cosines(dense, sparse, texts[1::2])
    kept = "" if a.preset == "ours" else ": this preset does not keep the dense model's function"
    print(f"cosine to the dense model on {len(texts[1::2])} texts, float32: mean {mean:.7f}, least {least:.7f}{kept}")
    save(sparse, a.output, made_by=f"upcycle {' '.join(argv)}")
    print(f"wrote {a.output}")


def upcycle(
    dense: Model,
    moe: Moe,
    *,
    preset: str = "ours",
    noise: float = NOISE,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Model:
    """A dense model -> the same with mixtures of `moe`'s experts; everything but their MLPs is carried over as it is.

    Args:
      preset: "ours" or "contrastors" (the module's docstring). noise: for "ours", see `experts_of`.
      seed: of the router and the noise; each layer draws from its own stream.
      texts: real texts, for the mean hidden state, for directions that must be fitted, and for what is said.
      say: told a line for each mixture.

    UserError: the model is a mixture already, its layers do not divide by moe.every, top_k is no number of experts, a weight
    is not finite, or a layer's b_up cannot be folded.
    """
    arrays = {name: np.asarray(array) for name, array in hf_layout.flatten(dense.params)}
    _check(dense, arrays, moe, noise=noise, seed=seed)
    mixtures = []
    for i, x_TD in hidden_states(dense, sample_texts()[::2] if texts is None else texts):
        if i % moe.every != moe.every - 1:
            continue
        layer, rng = layer_of(arrays, i), np.random.default_rng([seed, i])
        if preset == "contrastors":
            mixture, about = copies_of(layer, moe, rng=rng), "both biases dropped"
        else:
            if layer["mlp/b_up_F"].any():
                fold = bias_fold.direction(layer["norm1/scale_D"], layer["norm1/bias_D"], x_TD, layer=i)
                v_D, about = fold.v_D, bias_fold.about(fold, layer["norm1/scale_D"], layer["norm1/bias_D"])
            else:
                v_D, about = np.zeros(dense.encoder.dim), "no bias to fold"
            mixture = experts_of(layer, moe, v_D=v_D, mean_D=x_TD.mean(0, dtype=np.float64), noise=noise, rng=rng)
        mass, load_E = routing(x_TD, mixture["w_router_ED"], top_k=moe.top_k)
        router = f"top-{moe.top_k} mass {mass:.3f}, load {load_E.min():.2f} to {load_E.max():.2f}"
        say(f"layer {i:2}: {about}; router: {router}")
        mixtures.append(mixture)
    params = _nest(expand(arrays, mixtures, every=moe.every))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=dense.mesh))
    return dataclasses.replace(dense, params=params, moe=moe, origin=f"{dense.origin}, upcycled")


def expand(
    arrays: Mapping[str, np.ndarray], mixtures: Sequence[Mapping[str, np.ndarray]], *, every: int
) -> dict[str, np.ndarray]:
    """The rules over flat names: a dense model's arrays and one dict of a mixture's arrays for each repeat -> a model's.

    Layer i of the dense model, place i of R in unit/0, becomes block i % every, repeat i // every. The last block's MLP gives
    way to the mixture; what stands outside of the unit (embedding, head) keeps its name.
    """
    out = {}
    for name, array in arrays.items():
        if not name.startswith("unit/0/"):
            out[name] = array
            continue
        name = name.removeprefix("unit/0/")
        for block in range(every - 1 if name.startswith("mlp/") else every):
            out[f"unit/{block}/{name}"] = array[block::every]
    for name in mixtures[0]:
        stem, dims = name.rsplit("_", 1)
        out[f"unit/{every - 1}/moe/{stem}_R{dims}"] = np.stack([mixture[name] for mixture in mixtures])
    return out


def layer_of(arrays: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """The arrays of layer i of a dense model by their names in a block: "mlp/w_up_DF"."""
    inside = {name.removeprefix("unit/0/"): array for name, array in arrays.items() if name.startswith("unit/0/")}
    return {"_".join([name.rsplit("_R", 1)[0], name.rsplit("_R", 1)[1]]): array[i] for name, array in inside.items()}


def copies_of(layer: Mapping[str, np.ndarray], moe: Moe, *, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The mixture as the public code makes it: equal experts without the dense biases, a router of N(0, 0.02)."""
    up_DF, down_FD = layer["mlp/w_up_DF"], layer["mlp/w_down_FD"]
    w_router_ED = rng.standard_normal((moe.num_experts, up_DF.shape[0])) * ROUTER_STD["contrastors"]
    return {
        "w_router_ED": np.float32(w_router_ED),
        "w_up_EDF": np.stack([up_DF] * moe.num_experts),
        "w_down_EFD": np.stack([down_FD] * moe.num_experts),
        "b_out_D": np.zeros_like(layer["mlp/b_down_D"]),
    }


def experts_of(
    layer: Mapping[str, np.ndarray], moe: Moe, *, v_D, mean_D, noise: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The mixture that starts as the dense layer, float32, from float64.

    Args:
      layer: "mlp/..." of a dense layer. v_D: x . v = 1 for all of its inputs. mean_D: the mean of those.
      noise: std of what is added to each expert's matrices, of the rms of the dense one. It sums to zero over experts:
        where a text's tokens visit many of them it cancels, to first order. 0 leaves the experts equal.
    """
    num = moe.num_experts
    up_DF, down_FD = (layer[name].astype(np.float64) for name in ("mlp/w_up_DF", "mlp/w_down_FD"))
    router_ED = rng.standard_normal((num, len(mean_D)))
    router_ED -= np.outer(router_ED @ mean_D, mean_D) / max(mean_D @ mean_D, np.finfo(np.float64).tiny)

    def with_noise(w: np.ndarray) -> np.ndarray:
        delta_E = rng.standard_normal((num, *w.shape), np.float32)
        delta_E -= delta_E.mean(0)
        return w + delta_E * (noise * np.sqrt((w * w).mean()))

    # The bias last: the noise is measured by the matrix, not by what the bias adds to it.
    return {
        "w_router_ED": np.float32(router_ED * ROUTER_STD["ours"]),
        "w_up_EDF": np.float32(with_noise(up_DF) + np.outer(v_D, layer["mlp/b_up_F"].astype(np.float64))),
        "w_down_EFD": np.float32(with_noise(down_FD) * (num / moe.top_k)),
        "b_out_D": layer["mlp/b_down_D"],
    }


def routing(x_TD: np.ndarray, w_router_ED: np.ndarray, *, top_k: int) -> tuple[float, np.ndarray]:
    """(mean sum of the chosen experts' softmax weights, load_E: each expert's share of the choices times E)."""
    logits_TE = np.asarray(x_TD, np.float64) @ np.asarray(w_router_ED, np.float64).T
    weight_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
    weight_TE /= weight_TE.sum(1, keepdims=True)
    chosen_TA = np.argsort(-weight_TE, axis=1, kind="stable")[:, :top_k]
    num_experts = w_router_ED.shape[0]
    load_E = np.bincount(chosen_TA.ravel(), minlength=num_experts) * num_experts / chosen_TA.size
    return float(np.take_along_axis(weight_TE, chosen_TA, axis=1).sum(1).mean()), load_E


def hidden_states(dense: Model, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """(layer, x_TD): what the MLP of each layer reads, norm1's output, for every token of `texts`; in float32.

    A text a row, cut at TEXT_TOKENS. The maths is the modules' own: they are called on a namespace of one layer's arrays.
    """
    c = dataclasses.replace(dense.encoder, dtype="float32")
    prompt = dense.prompts["document"] if "document" in dense.prompts else ""
    ids = dense.tokenizer.encode(texts, prompt=prompt, max_length=min(TEXT_TOKENS, c.max_seq_length))[0]
    length_B = np.array([len(text) for text in ids])
    positions_BL = np.broadcast_to(np.arange(length_B.max(), dtype=np.int32), (len(ids), length_B.max()))
    segments_BL = (positions_BL < length_B[:, None]).astype(np.int32)
    tokens_BL = np.zeros_like(segments_BL)
    tokens_BL[segments_BL > 0] = np.concatenate(ids)
    angles = None
    if c.position == "rotary":
        angles = layers.rotary_angles(positions_BL, head_dim=c.dim // c.num_heads, base=c.rotary_base)

    def call(module, params: dict, *inputs, **more):
        return module.__call__(types.SimpleNamespace(**params, **more), *inputs)

    norm = functools.partial(call, layers.Norm, epsilon=c.norm_epsilon)

    @jax.jit
    def embed(p: dict):
        p = dict(p)
        norm_of = functools.partial(norm, p.pop("norm"))
        more = {"norm": norm_of, "dtype": c.dtype, "position_offset": c.position_offset}
        return call(layers.Embedding, p, tokens_BL, positions_BL, **more)

    @jax.jit
    def block(p: dict, x_BLD):
        h_BLD = norm(p["norm1"], x_BLD + call(layers.Attention, p["attention"], x_BLD, segments_BL, angles))
        return h_BLD, norm(p["norm2"], h_BLD + call(layers.Mlp, p["mlp"], h_BLD))

    arrays = {name: np.asarray(array) for name, array in hf_layout.flatten(dense.params)}
    x_BLD = embed(jax.tree.map(np.asarray, dense.params["embedding"]))
    for i in range(c.num_layers):
        h_BLD, x_BLD = block(_nest(layer_of(arrays, i)), x_BLD)
        yield i, np.asarray(h_BLD)[segments_BL > 0]


def sample_texts() -> list[str]:
    """2 * NUM_TEXTS sections of the shipped sample, spread over its ten languages."""
    pairs = sources.read_source(str(SAMPLE)).pairs
    return [pairs[i].document for i in np.linspace(0, len(pairs) - 1, 2 * NUM_TEXTS).astype(int)]


def cosines(a: Model, b: Model, texts: Sequence[str]) -> tuple[float, float]:
    """Mean and least cosine of two models' vectors of the same texts, both in float32."""
    vectors = []
    for model in (a, b):
        in_float32 = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, dtype="float32"))
        vector_ND = in_float32.encode(texts, model.prompt("document")).astype(np.float64)
        vectors.append(vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True))
    cosine_N = (vectors[0] * vectors[1]).sum(1)
    return float(cosine_N.mean()), float(cosine_N.min())


def _check(dense: Model, arrays: Mapping[str, np.ndarray], moe: Moe, *, noise: float, seed: int) -> None:
    if dense.moe.num_experts:
        raise UserError(
            f"{dense.origin} is a mixture of {dense.moe.num_experts} experts already; upcycle starts from a dense model."
        )
    if not 1 <= moe.top_k <= moe.num_experts:
        raise UserError(f"--top_k={moe.top_k} must be between 1 and --num_experts={moe.num_experts}.")
    if moe.every < 1 or dense.encoder.num_layers % moe.every:
        raise UserError(f"--every={moe.every} does not divide the {dense.encoder.num_layers} layers of {dense.origin}.")
    if not 0 <= noise < np.inf:
        raise UserError(f"--noise={noise} must be a number of 0 or more.")
    if seed < 0:
        raise UserError(f"--seed={seed} must not be negative.")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{dense.origin} has numbers in {name} that are not finite; nothing can start from it.")


def _nest(arrays: Mapping[str, np.ndarray]) -> dict:
    nested: dict = {}
    for path, array in arrays.items():
        *keys, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), keys, nested)[last] = array
    return nested


if __name__ == "__main__":
    verb.run(main)
