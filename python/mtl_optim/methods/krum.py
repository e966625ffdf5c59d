"""Krum: the gradients that have the nearest neighbours (Blanchard et al. 2017)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.krum import check_krum, krum_options

from .base import About, Method


@dataclasses.dataclass(frozen=True, eq=False)
class Krum(Method):
    """Krum, and Multi-Krum for n_selected > 1: the mean of the rows whose neighbours are nearest.

    Blanchard et al. 2017 (arXiv 1703.02757). With f = n_byzantine, the score of row i is the sum of its K - f - 2
    smallest squared distances ||g_i - g_j||^2 = G_ii + G_jj - 2 G_ij to other rows; the n_selected rows of the lowest
    scores get weight 1 / n_selected, ties going to the lower index. The paper's guarantee needs K > 2 f + 2. Some
    public codes add up the distances instead of their squares.

    Distances come from the Gram matrix, whose rounding they carry: of rows that agree to less than about 1e-8 of their
    length the order is arbitrary.

    Args:
        n_byzantine: how many rows may be arbitrary, f >= 0.
        n_selected: how many rows are averaged, 1..K.

    Only active tasks count. How many they are is known on the device alone, so that K is what is checked: of n active
    tasks with n < f + 3, the score is the distance to the nearest other one, and of n < n_selected all are averaged.

    Raises:
        TypeError, ValueError: a number that is not an integer, or out of range.
    """

    name: ClassVar[str] = "krum"
    about: ClassVar[About] = About("Gram", "none", "d is a row, or a mean of rows, near most others", "O(K^2 log K)")

    n_byzantine: int
    n_selected: int = 1

    def __post_init__(self) -> None:
        krum_options(self.n_byzantine, self.n_selected)

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError where K < n_byzantine + 3, or K < n_selected."""
        check_krum(num_tasks, self.n_byzantine, self.n_selected)

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "krum", in closed form: 1 / n_selected on the selected rows."""
        return SolverCall("krum", krum_options(self.n_byzantine, self.n_selected), certified=False)
