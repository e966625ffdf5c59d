"""GradVac: gradient surgery towards cosines that the tasks have had so far."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl_kernels import Solution, ops
from mtl_kernels.solvers.gradvac import gradvac_call, gradvac_options

from .base import About, Method, check_active, check_choice, check_gram, check_number, check_seed


@dataclasses.dataclass(frozen=True, eq=False)
class GradVac(Method):
    """Gradient vaccine, Algorithm 1 of Wang et al. 2021 (arXiv 2010.05874): PCGrad with a target for every cosine.

    Every gradient g_i meets the original g_j of each other task in turn. Where c = cos(g_i, g_j) is below the target
    r_ij, so much of g_j is added that the cosine becomes r_ij::

        g_i <- g_i + ||g_i|| (r_ij sqrt(1 - c^2) - c sqrt(1 - r_ij^2)) / (||g_j|| sqrt(1 - r_ij^2)) g_j

    and, in any case, r_ij <- (1 - beta) r_ij + beta c: a running average of the cosines, as they are met. The results
    are added. r_ij belongs to g_i on its way past the others; r_ji is another. Zero rows, and a g_i that has cancelled
    to rounding, have no cosine: nothing is added, and the target stays. A target of 1, which no finite multiple of g_j
    reaches, adds nothing; one just below adds very much, if tasks that had the same gradient until now differ.

    Args:
        beta: how much of a target a step replaces, in [0, 1]. 0.5 is LibMTL's; the paper has 0.01.
        target: what all targets are at first, in [-1, 1). With 0, as published, and beta = 0 it is `PCGrad`.
        order: "random" (the paper) visits the other tasks in a fresh order for every task, "fixed" in ascending order.
        reduction: "sum" (the paper) or "mean", which divides by the number of active tasks.
        seed: of the random order. The order of a step is a function of (seed, step) alone, on every device.

    ``state["targets"]`` is r, float64 ``[..., K, K]``, one for each problem; its diagonal says nothing. A Gram matrix
    that is not finite leaves it as it was, and so do the rows and columns of tasks that are not active. Its shape must
    not change: with one problem per parameter or param group, the same ones have to be reached in every step.
    ``state["rng"]`` is (seed, step), as of `PCGrad`.

    Raises:
        TypeError, ValueError: an unknown option, or one out of range.
    """

    name: ClassVar[str] = "gradvac"
    about: ClassVar[About] = About("Gram", "target cosines, random order", "none; cosines as they were", "O(K^3)")

    beta: float = 0.5
    target: float = 0.0
    order: Literal["random", "fixed"] = "random"
    reduction: Literal["sum", "mean"] = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("GradVac", "beta", self.beta, "in [0, 1]", lambda beta: 0 <= beta <= 1)
        check_number("GradVac", "target", self.target, "in [-1, 1)", lambda target: -1 <= target < 1)
        check_choice("GradVac", "order", self.order, ("random", "fixed"))
        check_choice("GradVac", "reduction", self.reduction, ("sum", "mean"))
        check_seed("GradVac", self.seed)

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The summed coefficients of the gradients after surgery, and one step of the targets; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        check_gram("GradVac", gram)
        check_active("GradVac", gram, active)
        new = functools.partial(torch.full, gram.shape, self.target, dtype=torch.float64, device=gram.device)
        targets = self._kept("targets", gram.device, new, gram.shape)
        rng = self._rng(self.seed, gram.device) if self.order == "random" else None
        options = gradvac_options(self.order, self.reduction, self.beta)
        return Solution(ops.solve(gram, gradvac_call(options, targets, rng, active, rng is not None))[0])
