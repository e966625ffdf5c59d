"""Weights from how far each task has come: initial losses, ratios of losses, key performance indicators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import WeightedLosses, first_seen, non_negative, number, or_one


class InverseInitialLoss(WeightedLosses):
    """w_k = 1 / L_k(0), where L_k(0) is the first positive, finite loss of task k; 1 until there is one.

    Args:
        num_tasks: K >= 1.

    Raises:
        TypeError, ValueError: ``num_tasks`` is no integer >= 1.
    """

    initial: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("initial", torch.full((num_tasks,), math.nan))

    def record(self, losses: Tensor) -> None:
        """Keeps the first losses."""
        self.initial.copy_(first_seen(self.initial, losses))

    def weigh(self, losses: Tensor) -> Tensor:
        """1 / L_k(0), ``[K]``."""
        return or_one(1 / first_seen(self.initial, losses))


class LossBalancedTaskWeighting(InverseInitialLoss):
    """w_k = (L_k / L_k(0))^alpha, with L_k(0) read from the first batch after `new_epoch`.

    Liu, Liang & Gitter 2019 (AAAI, "Loss-balanced task weighting to reduce negative transfer"). L_k(0) is the first
    positive, finite loss of the epoch; until there is one, the weight is 1. Losses < 0 raise ValueError on a CPU; on
    other devices and in compiled code their weight is 1 where alpha is fractional.

    Args:
        num_tasks: K >= 1.
        alpha: finite number >= 0; 0 gives equal weights.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    def __init__(self, num_tasks: int, alpha: float = 0.5) -> None:
        super().__init__(num_tasks)
        self.alpha = non_negative("LossBalancedTaskWeighting", "alpha", alpha)

    def new_epoch(self) -> None:
        """Forgets the initial losses; call it before the first batch of every epoch."""
        self.initial.fill_(math.nan)

    def weigh(self, losses: Tensor) -> Tensor:
        """(L_k / L_k(0))^alpha, ``[K]``."""
        self.require_positive(losses, "a power is taken", or_zero=True)
        return or_one((losses / first_seen(self.initial, losses)) ** self.alpha)


class DynamicTaskPriority(WeightedLosses):
    """w_k = -(1 - kbar_k)^gamma log kbar_k, with kbar the moving average of a key performance indicator in (0, 1].

    Guo et al. 2018 (ECCV, "Dynamic task prioritization for multitask learning"). `update` moves the average,
    kbar <- alpha kappa + (1 - alpha) kbar, and the first one sets it; before that the weights are 1.

    Args:
        num_tasks: K >= 1.
        alpha: share of the newest indicator, 0 < alpha <= 1.
        gamma: focus, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    average: Tensor

    def __init__(self, num_tasks: int, alpha: float = 0.9, gamma: float = 1.0) -> None:
        super().__init__(num_tasks)
        self.alpha = number("DynamicTaskPriority", "alpha", alpha, lambda v: 0 < v <= 1, "in (0, 1]")
        self.gamma = non_negative("DynamicTaskPriority", "gamma", gamma)
        self.register_buffer("average", torch.full((num_tasks,), math.nan))

    def update(self, kpis: Tensor | Sequence[float | Tensor]) -> None:
        """Takes new indicators, such as accuracies on a validation set.

        Args:
            kpis: K numbers in (0, 1]; a sequence of numbers or of scalar tensors, or a tensor ``[K]``. Values of
                tensors that are not on a CPU are not looked at; out of range, they make the weight of their task nan.

        Raises:
            TypeError, ValueError: no such numbers, or another number of them.
        """
        if isinstance(kpis, Tensor):
            values = self.gather(kpis, "KPIs").detach()
        else:
            if not isinstance(kpis, (list, tuple)):
                raise TypeError(f"DynamicTaskPriority: expected KPIs as a sequence, found {type(kpis).__name__}")
            for kpi in kpis:
                if isinstance(kpi, bool) or not isinstance(kpi, (int, float, Tensor)):
                    raise TypeError(f"DynamicTaskPriority: expected KPIs as numbers, found {kpi!r}")
            numbers = [torch.as_tensor(kpi, dtype=self.average.dtype) for kpi in kpis]
            values = self.gather(numbers, "KPIs").detach()
        valid = (values > 0) & (values <= 1)
        if values.device.type == "cpu" and not bool(valid.all()):
            raise ValueError(
                f"DynamicTaskPriority: expected KPIs in (0, 1], found {values.tolist()}; scale them, keep them off 0"
            )
        values = torch.where(valid, values, torch.full_like(values, -1.0)).to(self.average)
        moved = self.alpha * values + (1 - self.alpha) * self.average
        self.average.copy_(torch.where((self.average > 0) & valid, moved, values))

    def weigh(self, losses: Tensor) -> Tensor:
        """The focal weights of the averaged indicators, ``[K]``."""
        focal = -((1 - self.average) ** self.gamma) * torch.log(self.average)
        return torch.where(self.average.isnan(), torch.ones_like(focal), focal)
