"""ExcessMTL: weights that grow with how far a task is from convergence (He et al. 2024, arXiv 2402.02009)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

import mtl_kernels

from .base import About, Combination, check_number
from .rows import KeepingMethod, Problem
from .shares import equal_shares


@dataclasses.dataclass(frozen=True, eq=False)
class ExcessMTL(KeepingMethod):
    """Excess risks by a Taylor expansion with AdaGrad's diagonal: He et al. 2024 (arXiv 2402.02009, eqs. 6, 7 and 9).

    S_k <- S_k + g_k^2, element by element; e_k = sum g_k^2 / sqrt(S_k + 1e-7), divided by its baseline;
    w <- softmax(log w + eta e), from w = 1 / K; d = J^T w.

    The baseline of a task is its mean e_k over the first ``warmup`` steps, in which w stays as it is. With ``warmup=0``
    it is its first e_k, and that step goes by e_k itself, about the sum of |g_k|: on large models it may leave one task
    with nearly all weight. The authors' and LibMTL's codes leave the weights alone in the first step, as ``warmup=1``
    does; their weights add up to K. TorchJD adds 1e-7 to the baseline. A step in which e_k is 0 is no baseline.

    Args:
        eta: the step size of the weights, > 0; LibMTL has 0.01.
        warmup: steps before the weights change; the paper has 3 epochs.
        state_dtype: of S; None for the dtype of the rows. 16-bit sums stop growing early: for such rows take
            torch.float32.

    ``state``: ``"squares.PLACE"`` S, see `KeepingMethod`; float64 ``"log_weights"``, ``"excess"`` (the sum of e_k that
    makes the baseline), ``"counted"`` (its terms), ``"step"``. Of tasks that are not active it stays as it was; the
    others divide among them the weight that they had together, and w is scaled to sum 1. Rows that are not finite leave
    it as it was, and w is 1 / K. Per step the rows are read three times, S once, and S is written; with
    ``refresh_every`` S knows of the steps alone that compute weights.

    Raises:
        TypeError, ValueError: an option of another type or out of range.
    """

    name: ClassVar[str] = "excessmtl"
    about: ClassVar[About] = About(
        "rows", "squares as large as the rows, weights", "weights in the simplex", "3 reads of the rows, 1 of the state"
    )
    scales_with_gradient: ClassVar[bool] = False
    kept: ClassVar[str] = "squares"

    eta: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ExcessMTL", "eta", self.eta, "> 0", lambda eta: eta > 0)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            raise TypeError(f"ExcessMTL: expected warmup as an integer, found {self.warmup!r}")
        if self.warmup < 0:
            raise ValueError(f"ExcessMTL: expected warmup >= 0, found {self.warmup}")

    def combine_rows(self, problem: Problem) -> Combination:
        """The rows weighted by excess risk."""
        self._check_kept(problem)
        gain = (problem.active & problem.finite).double()
        kept = self._kept_rows(problem)
        risk = mtl_kernels.accumulate_squares(kept, problem.rows, gain, eps=1e-7, groups=problem.groups)
        weights = torch.where(problem.finite, self._weights(problem, risk), equal_shares(problem.gram, problem.active))
        combined = mtl_kernels.combine(problem.rows, weights, problem.out, groups=problem.groups)
        return Combination(combined, problem.gram, weights, None)

    def _weights(self, problem: Problem, risk: Tensor) -> Tensor:
        active, finite = problem.active, problem.finite
        log_weights = self._kept_numbers("log_weights", risk, -math.log(risk.shape[-1]))
        excess, counted = self._kept_numbers("excess", risk), self._kept_numbers("counted", risk)
        step = self._kept_numbers("step", finite)
        warm, moves = step < self.warmup, active & finite
        first = moves & (risk > 0) & (warm | (counted == 0))
        excess.add_(torch.where(first, risk, 0.0))
        counted.add_(first)
        relative = torch.where(counted > 0, risk * counted / excess, 0.0)
        if self.warmup == 0:
            relative = torch.where(first, risk, relative)
        moves = moves & ~warm
        raised = torch.where(moves, log_weights + self.eta * relative, log_weights)
        # What the active tasks weigh together stays the same, so that absence makes a task neither lighter nor heavier.
        drift = _log_sum(raised, active) - _log_sum(log_weights, active)
        log_weights.copy_(torch.where(moves, raised - drift, log_weights))
        step.add_(finite)
        return torch.where(active, log_weights, -torch.inf).softmax(-1)


def _log_sum(values: Tensor, active: Tensor) -> Tensor:
    return torch.where(active, values, -torch.inf).logsumexp(-1, keepdim=True)
