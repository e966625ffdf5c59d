"""MoCo: MGDA's weights and direction from tracked gradients (Fernando et al. 2023, arXiv 2210.12624)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

import mtl_kernels

from .base import About, Combination, check_number, loss_values
from .rows import KeepingMethod, Problem, place_for


@dataclasses.dataclass(frozen=True, eq=False)
class MoCo(KeepingMethod):
    """Multi-objective gradient correction, Algorithm 1 of Fernando et al. 2023 (arXiv 2210.12624).

    y_k <- y_k - beta_t (y_k - g_k L_k / n_k), from 0; w <- softmax(w - gamma_t (Y Y^T + rho I) w), from 1 / K;
    d = Y^T w, with beta_t = beta / t^beta_sigma, gamma_t = gamma / t^gamma_sigma and t = 1, 2, ... A zero row has
    g_k L_k / n_k = 0.

    The paper projects w onto the simplex, and its authors' first code tracks g_k as it is. The softmax and the division
    by the norm are those of the code that they shared with LibMTL, which adds 1e-8 to the norm.

    Args:
        beta: the first step size of the average, in (0, 1]. beta_sigma: its decay, >= 0.
        gamma: the first step size of the weights, >= 0. gamma_sigma: its decay, >= 0.
        rho: regularisation of the weights, >= 0.
        state_dtype: of Y; None for the dtype of the rows.

    ``state``: ``"average.PLACE"`` Y, see `KeepingMethod`; float64 ``"weights"`` and ``"step"``. Of tasks that are not
    active it stays as it was, and the others share the weight. Rows, losses or Y that are not finite leave it as it
    was, and make d NaN. The reported weights are those of Y. d does not scale with the gradients, so it refuses to
    run with GradScaler. Per step the rows are read twice, Y three times, and Y is written.

    Raises:
        TypeError, ValueError: an option of another type or out of range.
    """

    name: ClassVar[str] = "moco"
    about: ClassVar[About] = About(
        "rows and losses", "averages as large as the rows, weights", "converges to Pareto-stationary points",
        "2 reads of the rows, 3 of the state",
    )  # fmt: skip
    needs_losses: ClassVar[bool] = True
    scales_with_gradient: ClassVar[bool] = False
    weighs_alone: ClassVar[bool] = True
    weighs_rows: ClassVar[bool] = False
    kept: ClassVar[str] = "average"

    beta: float = 0.5
    gamma: float = 0.1
    rho: float = 0.0
    beta_sigma: float = 0.5
    gamma_sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("MoCo", "beta", self.beta, "in (0, 1]", lambda beta: 0 < beta <= 1)
        for option in ("gamma", "rho", "beta_sigma", "gamma_sigma"):
            check_number("MoCo", option, getattr(self, option), ">= 0", lambda value: value >= 0)

    def combine_rows(self, problem: Problem) -> Combination:
        """The tracked gradients, weighted."""
        losses = loss_values("MoCo", problem.gram, problem.losses)
        self._check_kept(problem)
        average, length, active = self._kept_rows(problem), problem.norms, problem.active
        weights = self._kept_numbers("weights", length, 1 / length.shape[-1])
        scale = torch.where(length > 0, losses / length, 0.0)
        sound = self._holds(problem, torch.where(losses.isfinite(), (scale * length).abs(), torch.nan))
        moves, t = active & sound, self._steps(sound)

        rate = self.beta / t**self.beta_sigma
        keep, gain = torch.where(moves, 1 - rate, 1.0), torch.where(moves, rate * scale, 0.0)
        mtl_kernels.update_average(average, problem.rows, keep, gain, groups=problem.groups)

        present = torch.where(active, weights, 0.0).unsqueeze(-1)
        slope = (mtl_kernels.gram(average, groups=problem.groups) @ present + self.rho * present).squeeze(-1)
        lower = weights - self.gamma / t**self.gamma_sigma * slope
        found = torch.where(active, lower, -torch.inf).softmax(-1)
        weights.copy_(torch.where(moves, found, weights))
        found = torch.where(sound, found, torch.nan)
        combined = mtl_kernels.combine(average, found, place_for(problem), groups=problem.groups)
        return Combination(combined, problem.gram, found, None)
