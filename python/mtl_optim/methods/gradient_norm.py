"""Weights that give every gradient the same length."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import Solution

from .base import About, Method, check_active, check_gram
from .shares import equal_shares, finite_among


@dataclasses.dataclass(frozen=True, eq=False)
class GradNormBalance(Method):
    """w_k = 1 / n_k with n_k = ||g_k||: the sum of the unit gradients. A zero row has weight 0.

    The weights are constants to autograd. The combination does not scale with the gradients, so it refuses to run with
    GradScaler, and a task that comes alone is brought to length 1 as well. Not to be confused with GradNorm (Chen et
    al. 2018, arXiv 1711.02257), which learns weights that balance the norms over time.
    """

    name: ClassVar[str] = "gradnormbalance"
    about: ClassVar[About] = About("Gram", "none", "every task as long a part of d", "O(K)")
    scales_with_gradient: ClassVar[bool] = False
    weighs_alone: ClassVar[bool] = True

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """1 / n_k on every active task; see `Method.solve`."""
        check_gram("GradNormBalance", gram)
        check_active("GradNormBalance", gram, active)
        length = mtl_kernels.norms(gram.double())
        equal = equal_shares(gram, active)
        weights = torch.where((length > 0) & (equal > 0), length.reciprocal(), 0.0)
        return Solution(torch.where(finite_among(gram, active), weights, equal))
