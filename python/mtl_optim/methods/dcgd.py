"""DCGD: dual cone gradient descent for two losses."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl_kernels import Solution

from .base import About, Method, check_active, check_choice, check_gram
from .shares import equal_shares, finite_among


@dataclasses.dataclass(frozen=True, eq=False)
class DCGD(Method):
    """Dual cone gradient descent, for two losses such as a residual and a boundary condition.

    Hwang & Lim 2024 (arXiv 2409.18426, Algorithms 1 to 3). The dual cone is where g_1'd >= 0 and g_2'd >= 0; let
    s = g_1 + g_2.

    - "center": s projected onto the bisector g_1 / n_1 + g_2 / n_2, in every step. That is
      w_k = (n_1 + n_2) / (2 n_k).
    - "projection": s where it is in the dual cone, else g_i projected onto the normal plane of g_k, for the k with
      g_k's < 0: the nearest point of the cone.
    - "average": s where it is in the dual cone, else the mean of both projections, of g_1 onto the normal plane of g_2
      and of g_2 onto that of g_1: w_k = (1 - G_12 / n_k^2) / 2.

    A zero gradient takes no part, whatever the variant; d is then the other one. Where gradients are opposite d = 0, as
    such a point is stationary. A task that is not active counts as if its gradient were zero, with weight 0.

    Args:
        variant: "center" (the default of the authors' code), "projection" or "average".

    Raises:
        ValueError: an unknown variant; or, at a step, another number of tasks than two.
    """

    name: ClassVar[str] = "dcgd"
    about: ClassVar[About] = About("Gram", "none", "no conflict", "O(1), two tasks only")

    variant: Literal["center", "average", "projection"] = "center"

    def __post_init__(self) -> None:
        check_choice("DCGD", "variant", self.variant, ("center", "average", "projection"))

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError unless there are two."""
        if num_tasks != 2:
            raise ValueError(
                f"DCGD combines two tasks, found K = {num_tasks}; add up losses until there are two, or use UPGrad or "
                "DualProj, which project onto the dual cone of any number of gradients"
            )

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights of the two rows; see `Method.solve`.

        Raises:
            ValueError: K is not 2.
        """
        check_gram("DCGD", gram)
        check_active("DCGD", gram, active)
        self.check_tasks(gram.shape[-1])
        gram, equal = gram.double(), equal_shares(gram, active)
        there = equal > 0
        square, product = gram.diagonal(dim1=-2, dim2=-1), gram[..., 0, 1].unsqueeze(-1)
        if self.variant == "center":
            norm = square.sqrt()
            weights = 0.5 + 0.5 * norm.flip(-1) / norm
        else:
            outside = square + product < 0
            onto_plane = -product / square  # the weight of g_k in the projection of the other onto its normal plane
            if self.variant == "average":
                weights = torch.where(outside.any(-1, keepdim=True), 0.5 + 0.5 * onto_plane, 1.0)
            else:
                weights = torch.where(outside, onto_plane, 1.0)
        alone = ((square == 0) | ~there).any(-1, keepdim=True)
        weights = torch.where(there, torch.where(alone, 1.0, weights), 0.0)
        return Solution(torch.where(finite_among(gram, active), weights, equal))
