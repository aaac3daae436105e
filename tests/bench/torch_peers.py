"""The peers in torch: our own exported file as it is, and the same weights with a loop over the experts.

They get token ids, not texts, and everything that is free for them: no tokeniser's time, inference_mode, fused AdamW, grouped
products where torch has them. Right-padded batches and scaled_dot_product_attention, as sentence-transformers feeds them.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from moe_embed import config as config_lib
from moe_embed.data.tokenizer import PAD


class ExpertLoop(nn.Module):
    """Takes the place of the exported file's Experts: one expert after the other, as the released model's code does it.

    Which tokens an expert has is found by torch.where, so each expert waits for a count; results are added by index.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.num_experts, self.mlp, self.bias = experts.num_experts, experts.mlp, experts.bias

    def forward(self, x, weights, experts):
        """x [T, D], weights and experts [T, A] -> [T, D]."""
        w1 = self.mlp.w1.unflatten(0, (self.num_experts, -1))
        w2 = self.mlp.w2.unflatten(0, (self.num_experts, -1))
        out = torch.zeros_like(x)
        chosen = functional.one_hot(experts, self.num_experts).permute(2, 1, 0)  # [E, A, T]
        for e in range(self.num_experts):
            place, token = torch.where(chosen[e])
            if not len(token):
                continue
            hidden = functional.gelu(x[token] @ w1[e].t())
            out.index_add_(0, token, (hidden @ w2[e]) * weights[token, place, None])
        return out + self.bias


def open_model(folder, *, num_threads: int) -> nn.Module:
    """The exported folder through transformers, with its own file; torch uses `num_threads` threads from now on."""
    torch.set_num_threads(num_threads)
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def with_expert_loop(model: nn.Module) -> nn.Module:
    """A copy of `model`, its weights too, whose mixtures are ExpertLoops."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Experts":
                setattr(module, name, ExpertLoop(child))
    return model


def copied(model: nn.Module) -> nn.Module:
    """The same weights, apart: to be trained."""
    return copy.deepcopy(model)


def pooled(model: nn.Module, ids: Sequence[np.ndarray]) -> torch.Tensor:
    """One right-padded batch -> the mean over each text's tokens [N, D], not normalised."""
    length = max(map(len, ids))
    tokens = np.full((len(ids), length), PAD, np.int64)
    for row, text in zip(tokens, ids, strict=True):
        row[: len(text)] = text
    mask = np.arange(length) < np.array([len(text) for text in ids])[:, None]
    mask = torch.from_numpy(mask.astype(np.int64))
    hidden = model(input_ids=torch.from_numpy(tokens), attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def encode(model: nn.Module, ids: Sequence[np.ndarray], *, batch: int) -> np.ndarray:
    """Unit vectors [N, D], row i for text i; the longest texts first, `batch` of them at once."""
    out = None
    with torch.inference_mode():
        for members in sorted_chunks(ids, batch):
            vectors = functional.normalize(pooled(model, [ids[i] for i in members])).numpy()
            out = np.empty((len(ids), vectors.shape[1]), np.float32) if out is None else out
            out[members] = vectors
    return out


def sorted_chunks(ids: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Indices of texts, the longest first, `size` at a time."""
    order = np.argsort([-len(text) for text in ids], kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def train_step(model: nn.Module, c: config_lib.Config) -> Callable[..., float]:
    """step(queries, documents, chunk=None) -> the InfoNCE loss before the update, as objectives.contrastive has it.

    Queries are one padded batch and documents another; with `chunk`, all texts of the step are sorted by length and encoded so
    many at a time. AdamW and clipping by c.optim, its learning rate constant.
    """
    model.train()  # there is no dropout
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "token_type" not in name]
    known = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": c.optim.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]
    betas = (c.optim.beta1, c.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=c.optim.learning_rate, betas=betas, eps=c.optim.epsilon, fused=True)

    def vectors(queries, documents, chunk):
        if chunk is None:
            return pooled(model, queries), pooled(model, documents)
        texts = [*queries, *documents]
        members = sorted_chunks(texts, chunk)
        found = torch.cat([pooled(model, [texts[i] for i in some]) for some in members])
        place = torch.from_numpy(np.argsort(np.concatenate(members)))
        return found[place].split(len(queries))

    def step(queries, documents, chunk=None) -> float:
        query, document = vectors(queries, documents, chunk)
        scores = functional.normalize(query) @ functional.normalize(document).t() / c.loss.temperature
        loss = functional.cross_entropy(scores, torch.arange(len(queries)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def infonce(query: np.ndarray, document: np.ndarray, *, temperature: float) -> Callable[[], float]:
    """A call of the plain loss with its gradients of queries and documents."""
    query = torch.from_numpy(query).requires_grad_()
    document = torch.from_numpy(document).requires_grad_()

    def call() -> float:
        query.grad = document.grad = None
        scores = functional.normalize(query) @ functional.normalize(document).t() / temperature
        loss = functional.cross_entropy(scores, torch.arange(len(query)))
        loss.backward()
        return loss.item()

    return call
