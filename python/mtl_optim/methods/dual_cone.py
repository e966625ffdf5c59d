"""UPGrad and DualProj: preferences, projected onto the dual cone of the gradients."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from mtl_kernels import SolverCall
from mtl_kernels.solvers.dual_cone import dual_cone_options

from .base import About, check_number
from .preference import Preferring


@dataclasses.dataclass(frozen=True, eq=False)
class _Projecting(Preferring):
    """Solvers that differ in nothing but what they project.

    Args:
        reg: a finite number >= 0; how much of trace(G) is added to the diagonal of G.
    """

    reg: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(type(self).__name__, "reg", self.reg, ">= 0", lambda reg: reg >= 0)

    @property
    def weighs_alone(self) -> bool:
        """True for preferences of its own: a task that comes alone has its own as its weight."""
        return self.pref is not None

    def solver_call(self, device: torch.device) -> SolverCall:
        """The solver of the method's name."""
        return SolverCall(type(self).name, dual_cone_options(self.reg), inputs=self._preference(device))


@dataclasses.dataclass(frozen=True, eq=False)
class UPGrad(_Projecting):
    """w = sum_i w_i with w_i = argmin of v'Hv over v >= p_i e_i, H = G + reg trace(G) I.

    Quinton & Rey 2024 (Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232, section 3): every
    gradient p_i g_i is projected onto the dual cone of the gradients, the directions in which no loss rises, and the
    projections are added. Exact, by an active set.

    The combination d is in conflict with no gradient but for the regularisation: g_j'd >= -reg trace(G) w_j. The larger
    reg, the smaller the weights where gradients nearly cancel; with reg = 0 they have no bound.

    Args:
        pref: p, one number >= 0 for each task; see `Preferring`. None: 1 / (number of active tasks).
        reg: a finite number >= 0.

    The certificate is how far its conditions are from being met, see `mtl_kernels.upgrad_weights`. A zero row has
    nothing to conflict with, and gets weight p_i.

    Raises:
        TypeError, ValueError: preferences or a reg that are none.
    """

    name: ClassVar[str] = "upgrad"
    about: ClassVar[About] = About("Gram", "none", "no conflict beyond reg", "O(K^4), K problems of O(K^3)")


@dataclasses.dataclass(frozen=True, eq=False)
class DualProj(_Projecting):
    """w = argmin of v'Hv over v >= p, H = G + reg trace(G) I: J'p, projected onto the dual cone of the gradients.

    Among others Gradient Episodic Memory (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eq. 11) steps so. Compared with
    UPGrad (Quinton & Rey 2024, arXiv 2406.16232) the gradients are first added and then projected, once.

    The combination d is in conflict with no gradient but for the regularisation: g_j'd >= -reg trace(G) w_j.

    Args:
        pref: p, one number >= 0 for each task; see `Preferring`. None: 1 / (number of active tasks).
        reg: a finite number >= 0.

    The certificate is how far its conditions are from being met, see `mtl_kernels.dualproj_weights`. A zero row gets
    weight p_i.

    Raises:
        TypeError, ValueError: preferences or a reg that are none.
    """

    name: ClassVar[str] = "dualproj"
    about: ClassVar[About] = About("Gram", "none", "no conflict beyond reg", "O(K^3), few steps")
