"""Weights that are learned together with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import LossAbout, SumOfTerms
from .checks import Tasks


class LearnedTerms(SumOfTerms):
    """Terms with one learned number s_k each, a parameter of its own that only its task reaches: a head.

    Args:
        tasks: how many tasks there are, or their names.

    Raises:
        TypeError, ValueError: ``tasks`` is neither.
    """

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks)
        self.s = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(self._count()))

    def factors(self, losses: Tensor) -> Sequence[Tensor]:
        """s, one parameter per task."""
        return list(self.s)


class UncertaintyWeighting(LearnedTerms):
    """Homoscedastic uncertainty: sum_k exp(-s_k) L_k / 2 + s_k / 2, with learned s_k = log sigma_k^2.

    Kendall, Gal & Cipolla 2018 (CVPR, arXiv 1705.07115, "Multi-task learning using uncertainty to weigh losses"). Give
    ``parameters()`` to the optimizer; s starts at 0, so that every loss starts with weight 1/2.

    Args:
        tasks: how many tasks there are, or their names.

    Raises:
        TypeError, ValueError: ``tasks`` is neither.
    """

    about: ClassVar[LossAbout] = LossAbout("sum exp(-s) L / 2 + s / 2", "learned s", "none")

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """exp(-s_k) L_k / 2 + s_k / 2; gradients reach L_k and s_k."""
        s = factors.to(losses.dtype)
        return (torch.exp(-s) * losses + s) / 2


class IMTLL(LearnedTerms):
    """Impartial multi-task learning, its loss balance: sum_k exp(s_k) L_k - s_k, with learned s_k.

    Liu et al. 2021 (ICLR, "Towards impartial multi-task learning"). Give ``parameters()`` to the optimizer; s
    starts at 0. For losses <= 0 the sum has no minimum over s.

    Args:
        tasks: how many tasks there are, or their names.

    Raises:
        TypeError, ValueError: ``tasks`` is neither.
    """

    about: ClassVar[LossAbout] = LossAbout("sum exp(s) L - s", "learned s", "none")

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """exp(s_k) L_k - s_k; gradients reach L_k and s_k."""
        s = factors.to(losses.dtype)
        return torch.exp(s) * losses - s
