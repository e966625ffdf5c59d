"""DB-MTL: gradients of the logarithms of the losses, all as long as the longest (Lin et al. 2023, arXiv 2308.12029)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

import mtl_kernels

from .base import About, Combination, check_number, loss_values
from .rows import KeepingMethod, Problem, place_for

_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True, eq=False)
class DBMTL(KeepingMethod):
    """Dual balancing of losses and gradients, Algorithm 1 of Lin et al. 2023 (arXiv 2308.12029).

    h_k = g_k / (L_k + 1e-8), the gradient of log(L_k + 1e-8); b_k <- h_k + (beta / t^sigma) (b_k - h_k), from 0 and
    with t = 1, 2, ...; d = sum_k (max_j ||b_j|| / (||b_k|| + 1e-8)) b_k.

    The published code steps the heads with the gradients of the logarithms as well; here those of single tasks are
    plain, unless the losses handed in are logarithms themselves.

    Args:
        beta: how much of the average stays, in [0, 1). sigma: its decay, >= 0; 0 is none.
        state_dtype: of b; None for the dtype of the rows.

    Losses must be above -1e-8. On a CPU another one raises; on a GPU, where the host would have to wait for it, it
    counts as not finite.

    ``state``: ``"average.PLACE"`` b, see `KeepingMethod`, and float64 ``"step"``. Of tasks that are not active it stays
    as it was. Rows, losses or b that are not finite leave it as it was, and make d NaN. The reported weights are
    those of b. d does not scale with the gradients, so it refuses to run with GradScaler. Per step the rows are
    read twice, b twice, and b is written.

    Raises:
        TypeError, ValueError: an option of another type or out of range.
    """

    name: ClassVar[str] = "dbmtl"
    about: ClassVar[About] = About(
        "rows and losses", "averages as large as the rows", "every task as long a part of d",
        "2 reads of the rows, 2 of the state",
    )  # fmt: skip
    needs_losses: ClassVar[bool] = True
    scales_with_gradient: ClassVar[bool] = False
    weighs_alone: ClassVar[bool] = True
    weighs_rows: ClassVar[bool] = False
    kept: ClassVar[str] = "average"

    beta: float = 0.9
    sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("DBMTL", "beta", self.beta, "in [0, 1)", lambda beta: 0 <= beta < 1)
        check_number("DBMTL", "sigma", self.sigma, ">= 0", lambda sigma: sigma >= 0)

    def combine_rows(self, problem: Problem) -> Combination:
        """The averaged gradients of the logarithms, all of one length."""
        shifted = loss_values("DBMTL", problem.gram, problem.losses) + _EPSILON
        _check_positive(torch.where(problem.active, shifted, 1.0))
        self._check_kept(problem)
        average, active = self._kept_rows(problem), problem.active
        positive = (shifted > 0) & shifted.isfinite()
        sound = self._holds(problem, torch.where(positive, problem.norms / shifted, torch.nan))
        moves, t = active & sound, self._steps(sound)

        stays = self.beta / t**self.sigma
        keep, gain = torch.where(moves, stays, 1.0), torch.where(moves, (1 - stays) / shifted, 0.0)
        length = mtl_kernels.update_average(average, problem.rows, keep, gain, groups=problem.groups).sqrt()

        longest = torch.where(active, length, 0.0).amax(-1, keepdim=True)
        weights = torch.where(active, longest / (length + _EPSILON), 0.0)
        weights = torch.where(sound, weights, torch.nan)
        combined = mtl_kernels.combine(average, weights, place_for(problem), groups=problem.groups)
        return Combination(combined, problem.gram, weights, None)


def _check_positive(shifted: Tensor) -> None:
    """Raise ValueError for a loss without a logarithm, where reading it costs no wait and nothing records the step."""
    if shifted.device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0 and bool((shifted <= 0).any()):
        found = shifted.min().item() - _EPSILON
        raise ValueError(
            f"DBMTL takes the logarithm of the losses, and found one of {found:.4g}; hand in losses above -1e-8, for "
            "example shifted by a lower bound"
        )
