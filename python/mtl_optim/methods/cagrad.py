"""CAGrad: the mean of the gradients, bent towards the task that gains least."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.cagrad import cagrad_options

from .base import About, Method, check_choice


@dataclasses.dataclass(frozen=True, eq=False)
class CAGrad(Method):
    """Conflict-averse gradient descent, Algorithm 1 of Liu et al. 2021 (arXiv 2110.14048).

    With g0 the mean of the gradients, d maximises min_i g_i . d within ||d - g0|| <= c ||g0||. By its dual problem:
    with u = 1 / K and p = c ||g0||, w_in minimises w^T G u + p sqrt(w^T G w) over the simplex, exactly, and then
    w = u + p w_in / ||J^T w_in||.

    Args:
        c: how far d may be from g0, a finite number >= 0; 0 is `Mean`. With c < 1, as in the paper, a d that is not 0
            descends the mean loss, g0 . d >= (1 - c) ||g0||^2, though maybe not every loss. With c >= 1 it descends
            every loss, g_i . d > 0, and is 0 wherever that cannot be, at all Pareto-stationary points. The paper has
            0.4 most of the time.
        rescale: "none"; "paper" divides by 1 + c^2, "max" by 1 + c, the most that ||d|| / ||g0|| can be. The authors'
            code takes "paper".
        scale: "mean" (the paper), or "sum", which multiplies by the number of active tasks, as the authors' code does
            to match a sum of losses.

    Where ||J^T w_in|| = 0, up to the rounding of G, no d within reach descends every loss, and w = 0. That takes a
    Pareto-stationary point, but with c < 1 the mean may go on from one. A task whose gradient is zero makes such a
    point: leave it out of the step.

    Raises:
        TypeError, ValueError: an unknown option, or c out of range.
    """

    name: ClassVar[str] = "cagrad"
    about: ClassVar[About] = About(
        "Gram", "none", "most for the worst task, within c ||mean|| of the mean", "O(K^3), about K steps"
    )

    c: float = 0.4
    rescale: Literal["none", "paper", "max"] = "none"
    scale: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.c, bool) or not isinstance(self.c, (int, float)):
            raise TypeError(f"CAGrad: expected c as a number, found {self.c!r}")
        if not math.isfinite(self.c) or self.c < 0:
            raise ValueError(f"CAGrad: expected a finite c >= 0, found {self.c}")
        check_choice("CAGrad", "rescale", self.rescale, ("none", "paper", "max"))
        check_choice("CAGrad", "scale", self.scale, ("mean", "sum"))

    @property
    def weighs_alone(self) -> bool:
        """True where d of one task is longer than its gradient: by 1 + c, before it is rescaled."""
        return self.c > 0 and self.rescale != "max"

    @property
    def stops_at_zero_rows(self) -> bool:
        """True but for c = 0."""
        return self.c > 0

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "cagrad": an active set over the tasks that hold the weight, exact."""
        return SolverCall("cagrad", cagrad_options(self.c, self.rescale, self.scale))
