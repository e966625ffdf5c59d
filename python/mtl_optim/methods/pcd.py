"""PCD: one task before the others."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from mtl_kernels import Solution, SolverCall, ops
from mtl_kernels.solvers.dual_cone import pcd_options

from .base import About, Method, check_active, check_gram, check_number


@dataclasses.dataclass(frozen=True, eq=False)
class PCD(Method):
    """Priority-constrained descent: as near to the first task's gradient as the progress of the others allows.

    Varam & AlHajri 2026 (arXiv 2606.29521). With a_k = g_k / sqrt(vhat_k + eps), vhat_k the running average of
    ||g_k||^2 corrected for its start as in Adam: the d nearest to a_1 with a_k'd >= tau ||a_k||^2 for all k >= 2, then
    scaled to the length of g_1. Exact, by an active set.

    The first active task is the primary one: the first loss that was seen, or the first row of a Gram matrix. No
    gradient of the others is in conflict with d, except where no d meets the conditions because a convex combination
    of these gradients is zero: then d = g_1. d = 0 where g_1 = 0.

    Args:
        tau: the least part of its own gradient that every other task gets, a finite number >= 0; 0 asks for no conflict
            only.
        beta: how much of the average stays, in [0, 1).
        eps: a finite number >= 0, absolute as in Adam.

    ``state["averages"]`` is, float64 ``[..., 2 K]``, the averages before correction, and how many steps each task was
    there. A Gram matrix that is not finite leaves them as they were; so does every step for tasks that are not active.
    Their shape must not change: with one problem per parameter or param group, the same ones have to be reached in
    every step. Averages of gradients that a GradScaler has scaled differently say nothing: it refuses to run with one.

    The certificate is how far the conditions are from being met, or what shows that they cannot be; see
    `mtl_kernels.pcd_weights`.

    Raises:
        TypeError, ValueError: an option that is no number, or out of range.
    """

    name: ClassVar[str] = "pcd"
    about: ClassVar[About] = About("Gram", "averages of norms", "no conflict with the others", "O(K^3), few steps")
    scales_with_gradient: ClassVar[bool] = False

    tau: float = 0.02
    beta: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("PCD", "tau", self.tau, ">= 0", lambda tau: tau >= 0)
        check_number("PCD", "beta", self.beta, "in [0, 1)", lambda beta: 0 <= beta < 1)
        check_number("PCD", "eps", self.eps, ">= 0", lambda eps: eps >= 0)

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The weights, and one step of the averages; see `Method.solve`.

        Raises:
            ValueError: K, or the number of problems, is not that of the state.
        """
        check_gram("PCD", gram)
        check_active("PCD", gram, active)
        shape = (*gram.shape[:-2], 2 * gram.shape[-1])
        new = functools.partial(torch.zeros, shape, dtype=torch.float64, device=gram.device)
        averages = self._kept("averages", gram.device, new, shape, per_task=2)
        call = SolverCall("pcd", pcd_options(self.tau, self.beta, self.eps), active, state=averages)
        return Solution.of(*ops.solve(gram, call))
