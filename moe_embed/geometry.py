"""How vectors lie on the sphere: alignment and uniformity (arXiv 2005.10242), and effective rank.

All vectors are float [N, D] of unit norm.
"""

import numpy as np


def alignment(query_ND: np.ndarray, document_ND: np.ndarray) -> float:
    """Mean squared distance of pairs, row by row: 0 where they coincide, 2 where they have nothing to do with each other."""
    return float(np.square(query_ND - document_ND).sum(1).mean())


def uniformity(x_ND: np.ndarray) -> float:
    """log mean exp(-2 |x - y|^2) over two different rows: 0 where all coincide, towards -4 where they fill the sphere."""
    if len(x_ND) < 2:
        raise ValueError(f"uniformity needs two vectors or more, not {len(x_ND)}.")
    square_NN = np.maximum(2 - 2 * x_ND.astype(np.float64) @ x_ND.T.astype(np.float64), 0)
    return float(np.log(np.exp(-2 * square_NN[np.triu_indices(len(x_ND), 1)]).mean()))


def spectrum(x_ND: np.ndarray) -> np.ndarray:
    """Singular values, falling, as shares of their sum: float64 [min(N, D)]."""
    values = np.linalg.svd(x_ND.astype(np.float64), compute_uv=False)
    return values / values.sum()


def effective_rank(x_ND: np.ndarray) -> float:
    """exp of the entropy of `spectrum` (Roy and Vetterli, EUSIPCO 2007): between 1 and min(N, D)."""
    share = spectrum(x_ND)
    return float(np.exp(-(share * np.log(np.maximum(share, 1e-300))).sum()))
