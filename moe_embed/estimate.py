"""Arithmetic of one optimiser step: what a config must compute, hold and send on each device. Nothing is compiled for it.

Counts are of one device and one step, in plain FLOPs (a multiplication and an addition are two) and bytes. What is counted is
the least that the mathematics asks for; what XLA makes of it is hlo_count.py's to say.
"""

import math
from typing import NamedTuple

import jax

from moe_embed import config as config_lib
from moe_embed import objectives, sharding
from moe_embed import topology as topology_lib
from moe_embed.config import UserError
from moe_embed.ring_infonce import TILE

FLOAT = 4  # bytes of a number in master parameters, moments, gradients, pooled vectors and scores
TEXT_TOKENS = 128  # of a query or document where nobody says: what the paper's padded batches hold
BYTES = {"float32": 4, "bfloat16": 2}
MFU = (0.4, 0.6)  # of the peak, in model FLOPs: what well-kept training stacks of this size publish


class Step(NamedTuple):
    """The size of a step, on one device."""

    num_devices: int
    items: int  # pairs; for the objective mlm rows
    documents: int  # positives and hard negatives; 0 for mlm
    num_micro: int  # M
    places: int  # tokens that are computed: M * B * L
    tokens: float  # of them those of a text

    @property
    def candidates(self) -> int:
        """Documents of all devices."""
        return self.documents * self.num_devices


def tokens_per_pair(config: config_lib.Config) -> int:
    """What a pair is taken to have where nobody says: TEXT_TOKENS a text, hard negatives included, within the config's caps."""
    c = config.data
    return min(TEXT_TOKENS * (2 + c.num_negatives), c.query_length + (1 + c.num_negatives) * c.document_length)


def step_of(config: config_lib.Config, *, num_devices: int, tokens_a_pair: float) -> Step:
    """The micro-batches that hold a device's pairs, packed without a gap."""
    c = config.data
    if not (c.rows and c.row_length):
        raise UserError(
            f"config.data.rows={c.rows} and config.data.row_length={c.row_length}: train sets what is 0 by the texts; here "
            "nothing is read, give both."
        )
    items = c.batch_size // num_devices
    if config.loss.objective == "mlm":
        num_micro = -(-items // c.rows)
        return Step(num_devices, items, 0, num_micro, num_micro * c.rows * c.row_length, items * c.row_length)
    tokens = items * tokens_a_pair
    num_micro = max(math.ceil(tokens / (c.rows * c.row_length)), 1)
    return Step(num_devices, items, items * (1 + c.num_negatives), num_micro, num_micro * c.rows * c.row_length, tokens)


def num_mixtures(config: config_lib.Config) -> int:
    """Layers that are mixtures of experts."""
    return config.encoder.num_layers // config.moe.every if config.moe.num_experts else 0


def forward_flops(config: config_lib.Config) -> dict[str, float]:
    """Of one token through the encoder. Scores are over a whole row: attention is masked, not shortened."""
    c, moe = config.encoder, config.moe
    mixtures, mlp = num_mixtures(config), 4 * c.dim * c.ffn_dim
    return {
        "projections": c.num_layers * 8 * c.dim**2,
        "scores": c.num_layers * 4 * config.data.row_length * c.dim,
        "dense mlp": (c.num_layers - mixtures) * mlp,
        "experts": mixtures * moe.top_k * mlp,
        "router": mixtures * 2 * c.dim * moe.num_experts,
    }


def model_flops(config: config_lib.Config, step: Step) -> dict[str, float]:
    """Forwards and backwards (three times the forward pass), without recomputation, of the tokens that belong to texts.

    The pieces' lookup and the pooling are not counted: they are no products of the model.
    """
    c = config.encoder
    total = {name: 3 * flops * step.tokens for name, flops in forward_flops(config).items()}
    if config.loss.objective == "mlm":
        places = math.ceil(config.loss.mask_fraction * config.data.row_length) * step.items
        return total | {"mlm head": 3 * places * (2 * c.dim**2 + 2 * c.dim * c.vocab_size)}
    return total | {"loss": 6 * step.items * step.candidates * c.dim}


def bytes_on_device(tree) -> int:
    """Of a tree of abstract arrays with shardings: what one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _working(params: dict, mesh) -> dict:
    """Parameters as a device computes with them: split over experts alone."""
    laid_out = sharding.shardings(params, column="parameter", mesh=mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, laid_out)


def activation_bytes(config: config_lib.Config) -> float:
    """Kept for the backward pass of one token of a micro-batch, if scores are not: what products and norms took in.

    With recomputation what a layer took in and its products' results alone (encoder.apply).
    """
    c, moe = config.encoder, config.moe
    d, f, k, mixtures = c.dim, c.ffn_dim, moe.top_k, num_mixtures(config)
    dense, mixture = (
        (7 * d + f, 6 * d + k * (d + f)) if config.run.recompute else (8 * d + 2 * f, 6 * d + 2 * k * (d + f))
    )
    return BYTES[c.dtype] * ((c.num_layers - mixtures) * dense + mixtures * mixture)


def memory(config: config_lib.Config, step: Step, *, abstract_state: dict, mesh) -> dict[str, float]:
    """Bytes by what they are for. `abstract_state` is program.build's.

    Parameters: masters and, where those are split, the copy that the step gathers. Activations: of one micro-batch, or of all
    where nothing is recomputed. Embeddings: pooled vectors and their gradient, and what travels for the loss.
    """
    c, params = config.encoder, abstract_state["params"]
    held, working = bytes_on_device(params), bytes_on_device(_working(params, mesh))
    bars = {
        "parameters": held + (working if held < working else 0),
        "optimizer": bytes_on_device(abstract_state["optimizer"]),
        "gradients": working,
    }
    kept = config.data.rows * config.data.row_length if config.run.recompute else step.places
    bars["activations"] = activation_bytes(config) * kept
    if config.loss.objective == "mlm":
        places = math.ceil(config.loss.mask_fraction * config.data.row_length) * config.data.rows
        return bars | {"embeddings": 0.0, "loss": 2.0 * FLOAT * places * c.vocab_size}
    slots = step.num_micro * config.data.rows * config.data.texts_per_row
    form = loss_form(config, step)
    loss, gathered = loss_forms(config, step)[form]["bytes"], step.candidates if form == "gathered" else 0
    return bars | {"embeddings": 2.0 * FLOAT * c.dim * (slots + gathered), "loss": loss}


def loss_form(config: config_lib.Config, step: Step) -> str:
    """ "gathered" or "ring"."""
    return objectives.with_form(config, num_devices=step.num_devices).loss.form


def loss_forms(config: config_lib.Config, step: Step) -> dict[str, dict[str, float]]:
    """Bytes and FLOPs of the two forms of the contrastive loss (research: six products' worth of N C d, eight for the ring).

    Gathered: the scores of all pairs and their gradient. Ring: queries, documents and documents in flight in the encoder's
    dtype, and the gradient of each in float32; log-sums; one tile a prefix.
    """
    c = config.encoder
    n, product = step.items, step.items * step.candidates * c.dim
    tile = min(n, TILE) * min(step.documents, TILE)
    ring = (BYTES[c.dtype] + FLOAT) * c.dim * (n + 2 * step.documents) + 3 * FLOAT * (n + tile)
    return {
        "gathered": {"bytes": float(objectives.score_bytes(n, step.candidates, c=config.loss)), "flops": 6.0 * product},
        "ring": {"bytes": float(ring), "flops": 8.0 * product},
    }


def ring_from(config: config_lib.Config, step: Step) -> int:
    """Pairs in a global batch from which config.loss.form="auto" is the ring."""
    pairs = step.items * step.num_devices
    return round(pairs * math.sqrt(objectives.SCORES / loss_forms(config, step)["gathered"]["bytes"]))


def passes(config: config_lib.Config) -> int:
    """Forwards, backwards, and forwards again where nothing is kept; the backward pass is two in FLOPs, one in bytes sent."""
    return 2 + config.run.recompute


def wires(config: config_lib.Config, step: Step, *, abstract_state: dict, mesh) -> dict[str, float]:
    """Bytes that one device sends: gradients summed and masters gathered once a step, documents, tokens for other experts."""
    working = _working(abstract_state["params"], mesh)
    gradients = 0.0
    for leaf in jax.tree.leaves(working):
        local = math.prod(leaf.sharding.shard_shape(leaf.shape))
        copies = step.num_devices * local / leaf.size  # devices that hold the same
        gradients += 2 * (copies - 1) / copies * local * FLOAT
    numbers = (step.num_devices - 1) * step.documents * config.encoder.dim
    ring = 2 * BYTES[config.encoder.dtype] + FLOAT  # documents forwards, and backwards with their gradient
    tokens = moved_tokens(config, num_parts=expert_parts(mesh)) * step.places
    return {
        "gradients": gradients,
        "documents": float(numbers * (ring if loss_form(config, step) == "ring" else 2 * FLOAT)),
        "experts": tokens,
    }


def expert_parts(mesh) -> int:
    """Over how many devices experts are split."""
    one_each = jax.ShapeDtypeStruct((mesh.size,), "float32")
    laid_out = sharding.shardings({"w_E": one_each}, column="parameter", mesh=mesh)
    return mesh.size // laid_out["w_E"].shard_shape(one_each.shape)[0]


def moved_tokens(config: config_lib.Config, *, num_parts: int) -> float:
    """Bytes that a token costs its device where experts are split over `num_parts`: a gather and a scatter a mixture and pass."""
    c = config.encoder
    return passes(config) * num_mixtures(config) * 2 * (num_parts - 1) * c.dim * BYTES[c.dtype]


def expert_crossover(config: config_lib.Config, step: Step) -> dict[str, float] | None:
    """Splitting experts over all devices (as many as divide them): bytes it saves and costs, and below how many tokens it pays."""
    c, moe = config.encoder, config.moe
    parts = math.gcd(moe.num_experts, step.num_devices) if moe.num_experts else 1
    if parts == 1:
        return None
    size = num_mixtures(config) * moe.num_experts * 2 * c.dim * c.ffn_dim * FLOAT
    summed = lambda devices, held: 2 * (devices - 1) / devices * held  # noqa: E731
    saved = summed(step.num_devices, size) - summed(step.num_devices // parts, size / parts)
    per_token = moved_tokens(config, num_parts=parts)
    return {
        "parts": parts, "gradient_bytes_saved": saved, "token_bytes": per_token * step.places,
        "tokens_per_device": step.places, "pays_below_tokens_per_device": saved / per_token,
    }  # fmt: skip


def traffic(config: config_lib.Config, step: Step, *, abstract_state: dict, mesh) -> float:
    """Bytes from and to HBM if element-wise work is fused into its neighbours: activations, weights of each micro-batch, AdamW.

    A token in one layer: 13 d in the attention and its norm, 5 d + 4 F in a dense MLP, 5 d + 4 k (d + F) in a mixture.
    """
    c, moe = config.encoder, config.moe
    mixtures = num_mixtures(config)
    width = (c.num_layers - mixtures) * (18 * c.dim + 4 * c.ffn_dim)
    width += mixtures * (18 * c.dim + 4 * moe.top_k * (c.dim + c.ffn_dim))
    times = 3 + config.run.recompute
    params = bytes_on_device(_working(abstract_state["params"], mesh))
    table = c.vocab_size * c.dim * FLOAT
    weights = step.num_micro * times * (params - table) / FLOAT * BYTES[c.dtype]
    update = 3.5 * bytes_on_device(abstract_state["optimizer"]) + 3 * params  # 28 bytes for 8 of moments
    return times * width * BYTES[c.dtype] * step.places + weights + update


def seconds(
    topology: topology_lib.Topology, *, model: float, computed: float, moved: float, sent: float
) -> dict[str, float]:
    """A step between two roofs: not a measurement, and not a promise.

    Low: the model's FLOPs at MFU[1] of the peak, or what is computed at the whole of it, or HBM, or all wires at once: whichever
    takes longest, the others hidden behind it. High: the model's FLOPs at MFU[0], or what is computed at the whole of the peak,
    or HBM, and after it all that is sent, over half of the wires.
    """
    chip = topology.chip
    roofs = {"compute": computed / chip.flops, "hbm": moved / chip.bandwidth, "wires": sent / topology.wires}
    low = max(model / (MFU[1] * chip.flops), *roofs.values())
    high = max(model / (MFU[0] * chip.flops), roofs["compute"], roofs["hbm"]) + 2 * roofs["wires"]
    return {"low": low, "high": high, **{f"roof_{name}": value for name, value in roofs.items()}}
