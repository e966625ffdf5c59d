"""Nash-MTL: the step that the tasks would agree on as bargainers (Navon et al. 2022)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl_kernels import Solution
from mtl_kernels.solvers.fair import nash_mtl_weights

from .base import About, Method, check_active, check_choice, check_gram


@dataclasses.dataclass(frozen=True, eq=False)
class NashMTL(Method):
    """Nash-MTL: w > 0 with G w = 1 / w, so that every task's share w_i (g_i . d) of the step d = J^T w is the same.

    Navon et al. 2022 (arXiv 2202.01017, claim 3.1, algorithm 1). The weights undo the lengths of the gradients: scaling
    one row changes nothing of d, and ||d|| = sqrt(K) before the clip.

    At a Pareto-stationary point, where a convex combination of the gradients is zero, there are no such weights: those
    of the last step that had some are taken, 1 for each before there was one, as the authors' code does. One task with
    a zero gradient suffices for that.

    Args:
        max_norm: d is scaled down to this length where it is longer; 0 for any length. With 1 (the authors' default)
            d has length 1 in every step that has a solution.
        refresh_every: what a `MultiTaskOptimizer` without a ``refresh_every`` of its own goes by: weights are computed
            at every n-th call of `backward`. In between they are used as they are, clip included.
        zero_rows: "last" (the definition) takes the last weights as long as a gradient is zero; "skip" leaves such
            tasks out of the step.

    ``state["weights"]`` is float64 ``[..., K]``: the last weights of each task, before the clip. A Gram matrix that is
    not finite, or that has no solution, leaves it as it was. Its shape must not change: with one problem per parameter
    or param group, the same ones have to be reached in every step. Weights are a function of the Gram matrix alone
    wherever there is a solution.

    The gap is that of `mtl_kernels.nash_mtl_weights`, 1 where the last weights were taken. The step does not scale with
    the gradients; it therefore refuses to run with GradScaler.

    Raises:
        TypeError, ValueError: an unknown option, or a number out of range.
    """

    name: ClassVar[str] = "nashmtl"
    about: ClassVar[About] = About(
        "Gram", "last weights", "no conflict, equal shares; last weights where Pareto-stationary", "O(K^3), a few steps"
    )
    scales_with_gradient: ClassVar[bool] = False
    weighs_alone: ClassVar[bool] = True

    max_norm: float = 1.0
    refresh_every: int = 1
    zero_rows: Literal["last", "skip"] = "last"

    def __post_init__(self) -> None:
        if isinstance(self.max_norm, bool) or not isinstance(self.max_norm, (int, float)):
            raise TypeError(f"NashMTL: expected max_norm as a number, found {self.max_norm!r}")
        if not math.isfinite(self.max_norm) or self.max_norm < 0:
            raise ValueError(f"NashMTL: expected a finite max_norm >= 0, found {self.max_norm}")
        if isinstance(self.refresh_every, bool) or not isinstance(self.refresh_every, int):
            raise TypeError(f"NashMTL: expected refresh_every as an integer, found {self.refresh_every!r}")
        if self.refresh_every < 1:
            raise ValueError(f"NashMTL: expected refresh_every >= 1, found {self.refresh_every}")
        check_choice("NashMTL", "zero_rows", self.zero_rows, ("last", "skip"))

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The bargaining solution; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        check_gram("NashMTL", gram)
        check_active("NashMTL", gram, active)
        return nash_mtl_weights(
            gram, max_norm=self.max_norm, zero_rows=self.zero_rows, last=self._last(gram), active=active
        )

    def _last(self, gram: Tensor) -> Tensor:
        shape = gram.shape[:-1]
        new = functools.partial(torch.ones, shape, dtype=torch.float64, device=gram.device)
        return self._kept("weights", gram.device, new, shape)
