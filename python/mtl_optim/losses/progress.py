"""Weights from how far each task has come: initial losses, ratios of losses, key performance indicators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import LossAbout, Losses, WeightedLosses, first_seen, or_one
from .checks import Tasks, non_negative, number


class InverseInitialLoss(WeightedLosses):
    """w_k = 1 / L_k(0), where L_k(0) is the first positive, finite loss of task k; 1 until there is one.

    In evaluation mode before the first call in training mode, L_k(0) is the loss itself, which is not kept.

    Args:
        tasks: how many tasks there are, or their names.

    Raises:
        TypeError, ValueError: ``tasks`` is neither.
    """

    about: ClassVar[LossAbout] = LossAbout("sum L / L(0)", "first losses", "none")

    initial: Tensor

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks)
        self.register_buffer("initial", torch.full((self._count(),), math.nan))

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
        tasks: how many tasks there are, or their names.
        alpha: finite number >= 0; 0 gives equal weights.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("sum (L / L(0))^a L", "first losses of epochs", "new_epoch() before each")

    def __init__(self, tasks: Tasks, alpha: float = 0.5) -> None:
        super().__init__(tasks)
        self.alpha = non_negative("LossBalancedTaskWeighting", "alpha", alpha)

    def new_epoch(self) -> None:
        """Forgets the initial losses; call it before the first batch of every epoch."""
        self.initial.fill_(math.nan)

    def record(self, losses: Tensor) -> None:
        """Keeps the first losses, unless they are refused."""
        self.require_positive(losses, "a power is taken", or_zero=True)
        super().record(losses)

    def weigh(self, losses: Tensor) -> Tensor:
        """(L_k / L_k(0))^alpha, ``[K]``."""
        self.require_positive(losses, "a power is taken", or_zero=True)
        return or_one((losses / first_seen(self.initial, losses)) ** self.alpha)


class DynamicTaskPriority(WeightedLosses):
    """w_k = -(1 - kbar_k)^gamma log kbar_k, with kbar the moving average of a key performance indicator in (0, 1].

    Guo et al. 2018 (ECCV, "Dynamic task prioritization for multitask learning"). `update` moves the average,
    kbar <- alpha kappa + (1 - alpha) kbar, and the first one sets it; before that the weights are 1.

    Args:
        tasks: how many tasks there are, or their names.
        alpha: share of the newest indicator, 0 < alpha <= 1.
        gamma: focus, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("sum -(1 - k)^g log k L", "averages k of the KPIs", "update(kpis)")
    scales_with_losses: ClassVar[bool] = True

    average: Tensor

    def __init__(self, tasks: Tasks, alpha: float = 0.9, gamma: float = 1.0) -> None:
        super().__init__(tasks)
        self.alpha = number("DynamicTaskPriority", "alpha", alpha, lambda v: 0 < v <= 1, "in (0, 1]")
        self.gamma = non_negative("DynamicTaskPriority", "gamma", gamma)
        self.register_buffer("average", torch.full((self._count(),), math.nan))

    def update(self, kpis: Tensor | Sequence[float | Tensor] | Mapping[str, float | Tensor]) -> None:
        """Takes new indicators, such as accuracies on a validation set.

        Args:
            kpis: K numbers in (0, 1]: a tensor ``[K]``, a sequence of numbers or of scalar tensors, or a dict of them
                by the names of the tasks. Values of tensors that are not on a CPU are not looked at; out of range,
                they make the weight of their task nan.

        Raises:
            TypeError, ValueError: no such numbers, or another number of them.
        """
        numbers: Losses
        if isinstance(kpis, Tensor):
            numbers = kpis
        elif isinstance(kpis, Mapping):
            numbers = {task: self._as_tensor(kpi) for task, kpi in kpis.items()}
        elif isinstance(kpis, (list, tuple)):
            numbers = [self._as_tensor(kpi) for kpi in kpis]
        else:
            raise TypeError(f"DynamicTaskPriority: expected KPIs as a sequence or dict, found {type(kpis).__name__}")
        values = self.gather(numbers, "KPIs").detach()
        valid = (values > 0) & (values <= 1)
        if values.device.type == "cpu" and not bool(valid.all()):
            raise ValueError(
                f"DynamicTaskPriority: expected KPIs in (0, 1], found {values.tolist()}; scale them, keep them off 0"
            )
        values = torch.where(valid, values, torch.full_like(values, -1.0)).to(self.average)
        moved = self.alpha * values + (1 - self.alpha) * self.average
        self.average.copy_(torch.where((self.average > 0) & valid, moved, values))

    def _as_tensor(self, kpi: float | Tensor) -> Tensor:
        if isinstance(kpi, bool) or not isinstance(kpi, (int, float, Tensor)):
            raise TypeError(f"DynamicTaskPriority: expected KPIs as numbers, found {kpi!r}")
        return torch.as_tensor(kpi, dtype=self.average.dtype)

    def weigh(self, losses: Tensor) -> Tensor:
        """The focal weights of the averaged indicators, ``[K]``."""
        focal = -((1 - self.average) ** self.gamma) * torch.log(self.average)
        return torch.where(self.average.isnan(), torch.ones_like(focal), focal)
