"""AlignedMTL: independent component alignment (Senushkin et al. 2023, arXiv 2305.19000)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.aligned_mtl import aligned_mtl_options

from .base import About, check_choice, check_rtol
from .preference import Preferring


@dataclasses.dataclass(frozen=True, eq=False)
class AlignedMTL(Preferring):
    """Combines gradients made orthogonal and equally long, Algorithm 1 of Senushkin et al. 2023 (arXiv 2305.19000).

    G = V S V', of which the eigenvalues s above rtol * max s count; w = sqrt(scale) V S^(-1/2) V' pref. The rows of
    sqrt(scale) V S^(-1/2) V' J are those nearest to J whose singular values are all equal, sqrt(scale): a system of
    condition number 1. On dependent rows that holds in the space they span. w jumps where an eigenvalue passes the cut.

    Args:
        pref: see `Preferring`; used as it is. Default 1 / (number of active tasks) for each.
        scale_mode: which eigenvalue becomes the square of the common length: "min" (the paper), the "median", of two
            the lower one, or "rmse", their mean.
        rtol: an eigenvalue up to rtol times the largest one counts as zero, a number in (0, 1). Default, and least:
            2.2e-16 times the number of active tasks. For float32 gradients that depend on each other 1e-7 times that
            number, as in the published code, keeps their rounding from becoming the scale.

    All rows zero: w = pref. The gap is the residual of the eigen-decomposition, relative to G; iterations are sweeps.

    Raises:
        TypeError, ValueError: an unknown option, or a number out of range.
    """

    name: ClassVar[str] = "alignedmtl"
    about: ClassVar[About] = About("Gram", "none", "what is combined is orthogonal and equally long", "O(K^3)")

    scale_mode: Literal["min", "median", "rmse"] = "min"
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("AlignedMTL", "scale_mode", self.scale_mode, ("min", "median", "rmse"))
        check_rtol("AlignedMTL", self.rtol)

    @property
    def weighs_alone(self) -> bool:
        """Whether there are preferences: one task alone has its own as its weight."""
        return self.pref is not None

    def solver_call(self, device: torch.device) -> SolverCall:
        """Solver "aligned_mtl"."""
        options = aligned_mtl_options(self.scale_mode, self.rtol)
        return SolverCall("aligned_mtl", options, inputs=self._preference(device))
