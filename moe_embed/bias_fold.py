"""A bias for which an expert has no place, folded into its matrix: a direction v with x . v = 1 for all that a LayerNorm gives.

Then x @ (w_up + outer(v, b_up)) is x @ w_up + b_up. `upcycle` needs it: what comes after LayerNorm is an MLP whose first bias
the released layout of Nomic Embed v2 (arXiv 2502.07972) has no tensor for.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_embed.config import UserError

# Measured on multilingual-e5-small, 8 experts in every second layer, 1 - cosine to the dense model (mean; at most) over texts
# of ten languages, with a bias folded into all six mixtures at an error (rms of x . v - 1; betas shifted to make it large).
# Exact, in bfloat16, 0.045: 1.6e-5; 2.5e-5, of which 6e-6 is bfloat16's own. 0.15: 1e-4; 1.9e-4. 0.5: 9e-4; 2.6e-3. In
# float32 all of these 1e-7. Fitted, in both, 0.012: 3e-6; 1.7e-5. 0.03: 3e-5; 2e-4. No bias at all: 0.03; 0.045.
EXACT_UP_TO = 0.2  # in bfloat16
FITTED_UP_TO = 0.1
RIDGE = 1e-3  # of each dim's rms


class Fold(NamedTuple):
    """A direction v with x . v = 1 for every hidden state x that an MLP reads, and how far off it is on real text."""

    v_D: np.ndarray  # float64
    how: str  # "exact", "fitted" or "exact, for float32 alone"
    error: float  # rms of x . v - 1 in float32
    error_bfloat16: float  # with x and v rounded to bfloat16


def exact_direction(gamma_D: np.ndarray, beta_D: np.ndarray) -> np.ndarray:
    """v with (gamma * n + beta) . v = 1 for every n that sums to zero, as LayerNorm makes them; float64.

    v = (1 / gamma) / sum(beta / gamma): the first part sees the sum of n, which is zero. So w_up + outer(v, b_up) is w_up and
    its bias in one matrix. Infinite or nan where a gamma or the sum is zero.
    """
    gamma_D, beta_D = np.asarray(gamma_D, np.float64), np.asarray(beta_D, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 / gamma_D / (beta_D / gamma_D).sum()


def fitted_direction(x_TD: np.ndarray) -> np.ndarray:
    """The v that minimises mean((x . v - 1)^2) when each number of x is off by a RIDGE of its rms; float64.

    That error of x is what keeps v small: it acts as ridge regression, weighted by the size of each dim.
    """
    x_TD = np.asarray(x_TD, np.float64)
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    scale_D = np.sqrt(np.maximum(np.diag(moment_DD), np.finfo(np.float64).tiny))
    correlation_DD = moment_DD / np.outer(scale_D, scale_D)
    return np.linalg.solve(correlation_DD + RIDGE**2 * np.eye(len(scale_D)), x_TD.mean(0) / scale_D) / scale_D


def direction(gamma_D: np.ndarray, beta_D: np.ndarray, x_TD: np.ndarray, *, layer: int) -> Fold:
    """The direction to fold a bias with, held against the second half of the tokens x_TD.

    The exact one where it serves in bfloat16 too; else one fitted to the first half of the tokens, if that serves; else the
    exact one for float32 alone. UserError where none does: sum(beta / gamma) is next to nothing, or a gamma is.
    """
    half = len(x_TD) // 2
    exact = measured(exact_direction(gamma_D, beta_D), x_TD[half:], how="exact")
    if exact.error_bfloat16 <= EXACT_UP_TO:
        return exact
    fitted = measured(fitted_direction(x_TD[:half]), x_TD[half:], how="fitted")
    if fitted.error <= FITTED_UP_TO:
        return fitted
    if exact.error <= FITTED_UP_TO:
        return exact._replace(how="exact, for float32 alone")
    raise UserError(
        f"layer {layer}'s first MLP bias cannot be folded into its matrix: sum(beta / gamma) of its norm1 is "
        f"{_sum(gamma_D, beta_D):.2g}, and a fit on text is off by {fitted.error:.2g} (at most {FITTED_UP_TO}); "
        f"--preset=contrastors drops the bias."
    )


def measured(v_D: np.ndarray, x_TD: np.ndarray, *, how: str) -> Fold:
    """A Fold of v_D, its errors taken on the hidden states x_TD; they are infinite where v_D is not finite."""
    if not np.isfinite(v_D).all():
        return Fold(v_D, how, np.inf, np.inf)
    errors = []
    for dtype in (np.float32, jnp.bfloat16):
        one_T = x_TD.astype(dtype).astype(np.float32) @ v_D.astype(dtype).astype(np.float32)
        errors.append(float(np.sqrt(np.square(one_T - 1, dtype=np.float64).mean())))
    return Fold(v_D, how, *errors)


def about(fold: Fold, gamma_D: np.ndarray, beta_D: np.ndarray) -> str:
    """A fold in a line, for a person."""
    return (
        f"bias folded, {fold.how}: sum(beta/gamma) {_sum(gamma_D, beta_D):.3g}, |v| "
        f"{np.linalg.norm(fold.v_D):.3g}, off by {fold.error:.0e} in float32, {fold.error_bfloat16:.0e} in bfloat16"
    )


def _sum(gamma_D: np.ndarray, beta_D: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((np.asarray(beta_D, np.float64) / np.asarray(gamma_D, np.float64)).sum())
