"""IMTL-G: impartial multi-task learning on gradients (Liu et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.imtl_g import imtl_g_options

from .base import About, Method, check_rtol


@dataclasses.dataclass(frozen=True, eq=False)
class IMTLG(Method):
    """Equal projections on all unit gradients (Liu et al. 2021, "Towards Impartial Multi-task Learning", ICLR).

    With u_k = g_k / n_k and C the cosines of the gradients: a_k = (C^+ 1)_k / n_k, w = a / sum a. On independent rows
    a = G^-1 n, and d = J'w has u_k . d = 1 / sum a for all k. Weights may be negative; where sum a is, the step
    climbs all losses. Zero rows have weight 0; where sum a is zero up to rounding, as for opposite rows, w = 0. An
    eigenvalue of C up to 2.2e-16 K of the largest one counts as zero.

    The paper leaves dependent rows open. Here the projections are as near to equal as can be, in the sum of squares
    over all tasks alike, and where they can be equal the weights are those that independent rows have on their way
    there.

    Args:
        rtol: a larger cut for the eigenvalues of C, as a share of the largest one, in (0, 1).

    The gap is the residual of the eigen-decomposition, relative to C; iterations are sweeps.

    Raises:
        TypeError, ValueError: an rtol that is not a number in (0, 1).
    """

    name: ClassVar[str] = "imtlg"
    about: ClassVar[About] = About("Gram", "none", "independent rows: equal projections", "O(K^3)")

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("IMTLG", self.rtol)

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "imtl_g"."""
        return SolverCall("imtl_g", imtl_g_options(self.rtol))
