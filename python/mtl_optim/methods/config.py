"""ConFIG: conflict-free inverse gradients (Liu et al. 2025, arXiv 2408.11104)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.config import Length, config_options

from .base import About, check_choice, check_rtol
from .preference import Preferring


@dataclasses.dataclass(frozen=True, eq=False)
class ConFIG(Preferring):
    """The direction at the same angle to all gradients (Liu et al. 2025, arXiv 2408.11104, eq. 2 and 3).

    With U the unit rows u_k = g_k / n_k: b = U^+ pref, d = l b / ||b||, l = sum_k g_k . b / ||b||. From the cosines
    C = UU': y = C^+ pref, ||b||^2 = pref . y, w_k = l y_k / (||b|| n_k). On independent rows the cosines of d with the
    gradients are in the ratio of pref, so there is no conflict. Zero rows are left out. Where b is zero up to rounding,
    as for opposite rows, w = 0. An eigenvalue of C up to 2.2e-16 K of the largest one counts as zero.

    Args:
        pref: see `Preferring`; its size does not matter. Default 1 for each.
        length: "projection" (the paper) as above; or l = m sum_k u_k . b / ||b|| with m the "min", "max", "harmonic",
            "arithmetic" or "geometric" mean of the n_k.
        rtol: a larger cut for the eigenvalues of C, as a share of the largest one, in (0, 1).

    The gap is the residual of the eigen-decomposition, relative to C; iterations are sweeps.

    Raises:
        TypeError, ValueError: an unknown option, or a number out of range.
    """

    name: ClassVar[str] = "config"
    about: ClassVar[About] = About("Gram", "none", "independent rows: equal angles, no conflict", "O(K^3)")

    length: Length = "projection"
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")
        check_choice("ConFIG", "length", self.length, lengths)
        check_rtol("ConFIG", self.rtol)

    @property
    def weighs_alone(self) -> bool:
        """Whether there are preferences, of which one may be 0."""
        return self.pref is not None

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "config"."""
        return SolverCall("config", config_options(self.length, self.rtol), inputs=self._preference(device))
