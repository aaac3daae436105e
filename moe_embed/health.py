"""What a run's numbers give away: steps that were not finite, a loss that jumps, experts that no token visits.

A step whose loss or gradient is not finite changes no parameter (program.build): it is skipped. Which pairs it had is
written to skipped.jsonl, and a run skips at most config.run.max_skips steps, restarts counted in.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from moe_embed import cluster, metrics
from moe_embed.config import UserError

SKIPPED = "skipped.jsonl"
WINDOW = 100  # steps before this one, with which its loss is compared, and for which a warning is not repeated
ENOUGH = 20  # of them, before anything is said
SIGMAS = 6.0
LEAST_SIGMA = 0.01  # of the mean: a loss that stands still has no spread
DEAD = 0.01  # of an even share: an expert with less is dead
COLLAPSED = 0.5  # of a layer's experts dead, for ENOUGH steps in a row


def of_router(load_RE: np.ndarray) -> dict[str, float]:
    """Of the worst mixture layer: the share of experts that are dead, and how many do the work, as a share of all.

    load_RE: each expert's share of the choices times E. The second is exp(entropy) / E: 1 when even, k / E when a token's k
    choices are the same experts for all.
    """
    share_RE = load_RE / np.maximum(load_RE.sum(-1, keepdims=True), 1e-12)
    entropy_R = -(share_RE * np.log(np.maximum(share_RE, 1e-12))).sum(-1)
    return {
        "dead_expert_frac": float((load_RE < DEAD).mean(-1).max()),
        "expert_utilisation": float(np.exp(entropy_R).min() / load_RE.shape[-1]),
    }


class Health:
    """Looks at the row of every step. Of several processes all count alike, and the one with a workdir writes."""

    def __init__(self, workdir: pathlib.Path | None, *, first_step: int, max_skips: int):
        self.path = workdir / SKIPPED if workdir else pathlib.Path(os.devnull)
        metrics.keep(self.path, first_step - 1)
        self.num_skipped = cluster.on_first(lambda: len(metrics.read(self.path)))
        self.max_skips = max_skips
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._quiet_until = self._collapsed_for = 0

    def look(
        self, step: int, row: dict[str, float], *, source: str, names: Callable[[int], Sequence[str]]
    ) -> list[str]:
        """Warnings about a finished step, one sentence each.

        `names` says which pairs a step had. UserError where the step was skipped and config.run.max_skips had been before it.
        """
        if row["skipped"]:
            return [self._skip(step, row, source, names)]
        return [sentence for sentence in (self._spike(step, row["loss"]), self._collapse(row)) if sentence]

    def _skip(self, step: int, row: dict[str, float], source: str, names: Callable[[int], Sequence[str]]) -> str:
        figures = {name: row[name] for name in ("loss", "gradient_norm")}
        line = {"step": step, **figures, "source": source, "names": list(names(step))}
        unwritten = ""
        try:
            metrics.append(self.path, json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:  # as with metrics.jsonl: a full disk does not end a run
            unwritten = f" {SKIPPED} cannot be written ({error.strerror}): it has no line of this step."
        self.num_skipped += 1
        what = f"the loss of step {step} is {row['loss']} and its gradient's norm {row['gradient_norm']} ({source})"
        if self.num_skipped > self.max_skips:
            raise UserError(
                f"{what}: {self.num_skipped} steps of this run were not finite, more than config.run.max_skips="
                f"{self.max_skips}. Lower the learning rate, or look at the pairs that {SKIPPED} in the workdir names."
            )
        return f"warning: {what}: skipped, the parameters stay ({self.num_skipped} of at most {self.max_skips}).{unwritten}"

    def _spike(self, step: int, loss: float) -> str:
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < ENOUGH or step < self._quiet_until:
            return ""
        mean = math.fsum(before) / len(before)
        sigma = max(float(np.std(before)), LEAST_SIGMA * abs(mean))
        if loss <= mean + SIGMAS * sigma:
            return ""
        self._quiet_until = step + WINDOW
        return (
            f"warning: the loss of step {step} is {loss:.4g}, {(loss - mean) / sigma:.0f} standard deviations above the "
            f"{mean:.4g} of the {len(before)} steps before it."
        )

    def _collapse(self, row: dict[str, float]) -> str:
        if "dead_expert_frac" not in row:  # a dense encoder
            return ""
        self._collapsed_for = self._collapsed_for + 1 if row["dead_expert_frac"] >= COLLAPSED else 0
        if self._collapsed_for != ENOUGH:
            return ""
        return (
            f"warning: the router has collapsed: for {ENOUGH} steps {row['dead_expert_frac']:.0%} of the experts of a layer "
            f"have been dead (expert_utilisation {row['expert_utilisation']:.2f}); raise config.loss.balance_coefficient."
        )
