"""Krum: the gradients that have the nearest neighbours (Blanchard et al. 2017)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from mtl_kernels import Solution

from .base import About, Method, check_active, check_gram
from .shares import equal_shares, finite_among


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
        for option, least in (("n_byzantine", 0), ("n_selected", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Krum: expected {option} as an integer, found {value!r}")
            if value < least:
                raise ValueError(f"Krum: expected {option} >= {least}, found {value}")

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """1 / n_selected on the selected rows; see `Method.solve`.

        Raises:
            ValueError: K < n_byzantine + 3, or K < n_selected.
        """
        check_gram("Krum", gram)
        check_active("Krum", gram, active)
        num_tasks = gram.shape[-1]
        if num_tasks < self.n_byzantine + 3:
            raise ValueError(
                f"Krum(n_byzantine={self.n_byzantine}) needs at least n_byzantine + 3 = {self.n_byzantine + 3} tasks, "
                f"found K = {num_tasks}; lower n_byzantine to at most {num_tasks - 3}"
                if num_tasks >= 3
                else f"Krum needs at least n_byzantine + 3 = {self.n_byzantine + 3} tasks, found K = {num_tasks}; use "
                "another method for so few"
            )
        if num_tasks < self.n_selected:
            raise ValueError(
                f"Krum(n_selected={self.n_selected}) selects more rows than there are, K = {num_tasks}; lower "
                f"n_selected to at most {num_tasks}"
            )
        equal = equal_shares(gram, active)
        there = equal > 0
        among = there.unsqueeze(-1) & there.unsqueeze(-2)
        finite = finite_among(gram, active)
        count = there.sum(-1, keepdim=True)

        problem = _at_unit_scale(torch.where(finite.unsqueeze(-1) & among, gram.double(), 0.0))
        squares = problem.diagonal(dim1=-2, dim2=-1)
        distance = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * problem).clamp(min=0)
        others = among & ~torch.eye(num_tasks, dtype=torch.bool, device=gram.device)
        nearest = torch.where(others, distance, torch.inf).sort(-1).values
        place = torch.arange(num_tasks, device=gram.device)
        counted = torch.minimum((count - self.n_byzantine - 2).clamp(min=1), count - 1)
        score = torch.where(place < counted.unsqueeze(-1), nearest, 0.0).sum(-1)

        order = torch.where(there, score, torch.inf).sort(dim=-1, stable=True).indices
        selected = count.clamp(min=1, max=self.n_selected)
        weights = torch.zeros_like(score).scatter(
            -1, order, torch.where(place < selected, selected.double().reciprocal(), 0.0)
        )
        return Solution(torch.where(finite, torch.where(there, weights, 0.0), equal))


def _at_unit_scale(gram: Tensor) -> Tensor:
    """``gram`` divided by a power of two, exactly, so that its largest square is near 1 and distances stay finite."""
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    mantissa = torch.frexp(largest).mantissa
    scale = torch.where(largest > 0, largest / (2 * mantissa), 1.0)
    return gram / scale.unsqueeze(-1).unsqueeze(-1)
