"""PCGrad: project conflicting gradients (Yu et al. 2020, arXiv 2001.06782)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.pcgrad import pcgrad_options

from .base import About, Method, check_choice, check_seed


@dataclasses.dataclass(frozen=True, eq=False)
class PCGrad(Method):
    """Gradient surgery, Algorithm 1 of Yu et al. 2020 (arXiv 2001.06782).

    Every gradient g_i is projected, task by task, onto the normal plane of each original g_j it conflicts
    with (g_i . g_j < 0: g_i <- g_i - (g_i . g_j) / ||g_j||^2 g_j), and the results are added. Carried out on
    coefficients: with c_i = e_i and s = (G c_i)_j, s < 0 means c_i[j] -= s / G_jj; w = sum_i c_i. Zero rows
    are skipped.

    Args:
        order: "random" (the paper) visits the other tasks in a fresh order for every task, "fixed" in
            ascending order.
        reduction: "sum" (the paper) or "mean", which divides by the number of active tasks.
        seed: of the random order. The order of a step is a function of (seed, step) alone, on every device.

    ``state["rng"]`` is (seed, step), int64 on the device of the Gram matrix; the step advances with every
    solve, whether or not the Gram matrix was finite.

    Raises:
        TypeError, ValueError: an unknown option, or a seed that is not an integer in 0..2**63-1.
    """

    name: ClassVar[str] = "pcgrad"
    about: ClassVar[About] = About("Gram", "random order", "two tasks: no conflict", "O(K^3)")

    order: Literal["random", "fixed"] = "random"
    reduction: Literal["sum", "mean"] = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("PCGrad", "order", self.order, ("random", "fixed"))
        check_choice("PCGrad", "reduction", self.reduction, ("sum", "mean"))
        check_seed("PCGrad", self.seed)

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "pcgrad", in closed form: the summed coefficients of the projected gradients."""
        rng = self._rng(self.seed, device) if self.order == "random" else None
        return SolverCall(
            "pcgrad",
            pcgrad_options(self.order, self.reduction),
            rng=rng,
            advance_rng=rng is not None,
            certified=False,
        )
