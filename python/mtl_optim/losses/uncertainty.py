"""Weights that are learned together with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import LossCombination, Losses


class UncertaintyWeighting(LossCombination):
    """Homoscedastic uncertainty: sum_k exp(-s_k) L_k / 2 + s_k / 2, with learned s_k = log sigma_k^2.

    Kendall, Gal & Cipolla 2018 (CVPR, "Multi-task learning using uncertainty to weigh losses"). Give
    ``parameters()`` to the optimizer; s starts at 0, so that every loss starts with weight 1/2.

    Args:
        num_tasks: K >= 1.

    Raises:
        TypeError, ValueError: ``num_tasks`` is no integer >= 1.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.s = nn.Parameter(torch.zeros(num_tasks))

    def weights(self, losses: Losses) -> Tensor:
        """exp(-s_k) / 2, ``[K]``, without gradient."""
        self.gather(losses)
        return torch.exp(-self.s.detach()) / 2

    def combine(self, losses: Tensor) -> Tensor:
        """The definition; gradients reach the losses and s."""
        s = self.s.to(losses.dtype)
        return (torch.exp(-s) * losses + s).sum() / 2


class IMTLL(LossCombination):
    """Impartial multi-task learning, its loss balance: sum_k exp(s_k) L_k - s_k, with learned s_k.

    Liu et al. 2021 (ICLR, "Towards impartial multi-task learning"). Give ``parameters()`` to the optimizer; s
    starts at 0. For losses <= 0 the sum has no minimum over s.

    Args:
        num_tasks: K >= 1.

    Raises:
        TypeError, ValueError: ``num_tasks`` is no integer >= 1.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.s = nn.Parameter(torch.zeros(num_tasks))

    def weights(self, losses: Losses) -> Tensor:
        """exp(s_k), ``[K]``, without gradient."""
        self.gather(losses)
        return torch.exp(self.s.detach())

    def combine(self, losses: Tensor) -> Tensor:
        """The definition; gradients reach the losses and s."""
        s = self.s.to(losses.dtype)
        return (torch.exp(s) * losses - s).sum()
