"""NomicBert with experts, for PyTorch: the file that an exported model carries along (trust_remote_code=True).

Tensor names are those of nomic-ai/nomic-embed-text-v2-moe. The maths (arXiv 2502.07972): post-LN blocks, rotary
positions on half-split head dims (or learned ones, added to the embedding), exact-erf GELU; the router's softmax is taken in float32 over all experts, the
top-k weights are used as they are, ties go to the lowest index, no token is ever dropped; experts have no inner biases
and share one output bias. The residual stream's size is [B, L, D]; T is B * L, A the experts a token visits.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class NomicBertConfig(PretrainedConfig):
    """config.json of an exported folder; every key becomes an attribute, under the released model's names.

    The class has the released class's name too: vLLM asserts it.
    """

    model_type = "nomic_bert"
    attribute_map = {  # noqa: RUF012, the name and form transformers asks for
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
    }


class MoeEmbedConfig(NomicBertConfig):
    """The same with learned positions, under a name that no server knows: none can take it for the released layout."""

    model_type = "moe_embed"


def rotary_tables(length: int, head_dim: int, base: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [L, K] in float32, both halves of a head alike."""
    inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + K/2) of x [B, H, L, K]."""
    a, b = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.n_embd)
        if config.model_type == "moe_embed":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.n_embd)
            self.position_offset = config.position_offset

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        if hasattr(self, "position_embeddings"):  # counted over real tokens, so that padding may stand on the left
            positions = ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)
            x = x + self.position_embeddings(positions + self.position_offset)
        return x


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.n_head
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # rows: q, then k, then v
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cos, sin):
        """x [B, L, D], mask [B, 1, 1, L] additive -> [B, L, D]."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_inner)
        self.fc2 = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.moe_top_k
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)

    def forward(self, x):
        """x [T, D] -> weights [T, A] float32 and experts [T, A], best first."""
        logits = functional.linear(x.float(), self.layer.weight.float())
        if torch.onnx.is_in_onnx_export():  # it knows no stable sort; its own TopK gives ties to the lowest index
            return logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        weights, experts = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # topk breaks ties anyhow
        return weights[:, : self.top_k], experts[:, : self.top_k]


class ExpertWeights(nn.Module):
    def __init__(self, config):
        super().__init__()
        rows = config.num_experts * config.n_inner  # expert e owns rows e * F to (e + 1) * F of both
        self.w1 = nn.Parameter(torch.empty(rows, config.n_embd))
        self.w2 = nn.Parameter(torch.empty(rows, config.n_embd))


class Experts(nn.Module):
    """The experts' two products, dropless, with shapes that do not depend on the routing: no host sync, no token loop.

    Measured on 2 CPU cores, float32, 8 experts, top 2, [32, 128] tokens, dim 768 (128): rows sorted by expert and
    grouped_mm 464 (22) ms; sorted into padded blocks of 256 and bmm 889 (33) ms, it copies a block's weights; all
    experts on all tokens 2187 (109) ms; a loop over the experts that waits for each one's count, 412 (15) ms.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.mlp = ExpertWeights(config)
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x, weights, experts):
        """x [T, D], weights and experts [T, A] -> [T, D]."""
        w1 = self.mlp.w1.unflatten(0, (self.num_experts, -1))  # [E, F, D]
        w2 = self.mlp.w2.unflatten(0, (self.num_experts, -1))  # [E, F, D]
        # grouped_mm (torch 2.10) wants rows of a multiple of 16 bytes, one dtype, and has these two backends.
        aligned = all(size * x.element_size() % 16 == 0 for size in w1.shape[1:])
        grouped = hasattr(functional, "grouped_mm") and x.device.type in ("cpu", "cuda") and x.dtype == w1.dtype
        if grouped and aligned and not torch.onnx.is_in_onnx_export():
            out = self._sorted(x, experts, w1, w2) * weights[..., None].to(x.dtype)
            return out.sum(1) + self.bias
        return self._everywhere(x, weights, experts, w1, w2) + self.bias

    def _sorted(self, x, experts, w1, w2):
        """Each token's A expert outputs, [T, A, D]: rows sorted by expert, two grouped products, sorted back."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        ends = functional.one_hot(flat, self.num_experts).sum(0).cumsum(0).to(torch.int32)
        rows = x[order // experts.shape[1]]
        hidden = functional.gelu(functional.grouped_mm(rows, w1.transpose(1, 2), offs=ends))
        out = functional.grouped_mm(hidden, w2, offs=ends)
        return out[order.argsort()].unflatten(0, experts.shape)

    def _everywhere(self, x, weights, experts, w1, w2):
        """The same sum with every expert on every token, unchosen ones times zero: for older torch and for ONNX."""
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=weights.dtype, device=x.device)
        gates = gates.scatter(1, experts, weights).to(x.dtype)
        hidden = functional.gelu(x @ w1.flatten(0, 1).t()).unflatten(-1, w1.shape[:2]) * gates[..., None]
        return hidden.flatten(1) @ w2.flatten(0, 1)


class MixtureMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x):
        return self.experts(x.flatten(0, 1), *self.router(x.flatten(0, 1))).view_as(x)


class Block(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        every = config.moe_every_n_layers
        mixture = config.num_experts and every and layer % every == config.moe_layer_offset
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MixtureMlp(config) if mixture else Mlp(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x, mask, cos, sin):
        x = self.norm1(x + self.attn(x, mask, cos, sin))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))

    def forward(self, x, mask, cos, sin):
        for layer in self.layers:
            x = layer(x, mask, cos, sin)
        return x


class NomicBertModel(PreTrainedModel):
    config_class = NomicBertConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Encoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', but a tensor that is missing or left over is an error: elsewhere it is a log line."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if wrong:
            raise ValueError(f"the weights do not fit this model: {wrong}")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def _init_weights(self, module):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, return_dict=None):
        """input_ids [B, L] -> BaseModelOutput with last_hidden_state [B, L, D]. No mask: <pad> is padding."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        x = self.emb_ln(self.embeddings(input_ids, attention_mask, token_type_ids))
        # The smallest finite number, not -inf: a row that is all padding then averages instead of giving NaN.
        mask = torch.zeros(attention_mask.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)[:, None, None]
        cos, sin = None, None
        if self.config.model_type == "nomic_bert":
            head_dim = self.config.n_embd // self.config.n_head
            cos, sin = rotary_tables(input_ids.shape[1], head_dim, self.config.rotary_emb_base, x.device)
        x = self.encoder(x, mask, cos, sin)
        return (x,) if return_dict is False else BaseModelOutput(last_hidden_state=x)


class MoeEmbedModel(NomicBertModel):
    """NomicBertModel with learned positions instead of rotary ones."""

    config_class = MoeEmbedConfig
