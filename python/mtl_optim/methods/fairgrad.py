"""FairGrad: the step of largest alpha-fair utility (Ban & Ji 2024)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.fair import fairgrad_options

from .base import About, Method


@dataclasses.dataclass(frozen=True, eq=False)
class FairGrad(Method):
    """FairGrad: w > 0 with G w = w^(-1/alpha), that is w_i = (g_i . d)^-alpha for the step d = J^T w.

    Ban & Ji 2024 (arXiv 2402.15638, eq. 7). d is the direction of largest utility, the sum of
    (g_i . d)^(1-alpha) / (1-alpha).

    Args:
        alpha: how much the least progress of a task counts; 0.1 to 1000, or 0. 1 is `NashMTL` without its clip,
            proportional fairness; more comes near the largest least progress; 0 is the `Mean`.

    Zero rows are left out. At a Pareto-stationary point of the others, where a convex combination of the gradients is
    zero, no step improves every task: d = 0.

    With alpha > 0, gradients c times as long give a step c^((1-alpha)/(1+alpha)) times as long; it therefore refuses
    to run with GradScaler.

    Raises:
        TypeError, ValueError: alpha is not a number, or out of range.
    """

    name: ClassVar[str] = "fairgrad"
    about: ClassVar[About] = About("Gram", "none", "no conflict; 0 where Pareto-stationary", "O(K^3), a few steps")

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"FairGrad: expected alpha as a number, found {self.alpha!r}")
        try:
            fairgrad_options(self.alpha)
        except ValueError as error:
            raise ValueError(f"FairGrad: {error}") from None

    @property
    def scales_with_gradient(self) -> bool:
        """True for alpha=0."""
        return self.alpha == 0

    @property
    def weighs_alone(self) -> bool:
        """True for alpha > 0."""
        return self.alpha > 0

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "fairgrad", by Newton's method."""
        return SolverCall("fairgrad", fairgrad_options(self.alpha))
