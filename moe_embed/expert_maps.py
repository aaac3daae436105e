"""Which experts read what: the choices of each language or source beside the mean of all."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed.load import Model


def shares(model: Model, texts: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Of each group of texts the share of choices that each expert has: [groups, R, E], the last dim sums to 1."""
    chosen = [model.encode_with_sums(some, model.prompt("document"))[1] for some in texts.values()]
    return np.stack([of_group / of_group.sum(-1, keepdims=True) for of_group in chosen])


def against_mean(share_NE: np.ndarray) -> tuple[np.ndarray, float]:
    """Groups' shares of experts -> (log2 of each over the mean of the groups, normalised mutual information).

    The information is that of expert and group over the entropy of the experts: 0 where all groups choose alike, 1 where the
    expert is known from the group.
    """
    mean_E = share_NE.mean(0)
    ratio_NE = np.log2(np.maximum(share_NE, 1e-6) / np.maximum(mean_E, 1e-6))
    entropy = -(mean_E * np.log2(np.maximum(mean_E, 1e-9))).sum()
    return ratio_NE, float((share_NE * ratio_NE).sum(1).mean() / entropy) if entropy > 0 else 0.0
