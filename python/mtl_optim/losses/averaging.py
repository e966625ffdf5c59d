"""Dynamic weight average: weights from how the mean losses of the last two epochs compare."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import LossAbout, WeightedLosses
from .checks import Tasks, positive


class DynamicWeightAverage(WeightedLosses):
    """w = K softmax(r / T), with r_k the mean loss of the last epoch over that of the one before.

    Liu, Johns & Davison 2019 (CVPR, "End-to-end multi-task learning with attention", arXiv 1803.10704). Call `step`
    at the end of every epoch; the weights are 1 in the first two. Means are over the finite losses seen in
    training mode; a task without a loss in an epoch keeps its means, and r_k = 1 where a mean is not positive.

    Args:
        tasks: how many tasks there are, or their names.
        temperature: T, a finite number > 0.
        warn_after: a RuntimeWarning is given when this many calls came without a `step`; None gives none. Calls are
            counted in Python, so those of compiled code are not.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    about: ClassVar[LossAbout] = LossAbout("sum K softmax(r / T) L", "mean losses of epochs", "step() after each epoch")

    mean: Tensor
    count: Tensor
    means: Tensor
    epochs: Tensor

    def __init__(self, tasks: Tasks, temperature: float = 2.0, warn_after: int | None = 10_000) -> None:
        super().__init__(tasks)
        num_tasks = self._count()
        self.temperature = positive("DynamicWeightAverage", "temperature", temperature)
        if warn_after is not None:
            positive("DynamicWeightAverage", "warn_after", warn_after)
        self.warn_after = warn_after
        self.register_buffer("mean", torch.zeros(num_tasks))
        self.register_buffer("count", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("means", torch.full((2, num_tasks), math.nan))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """Ends an epoch: its mean losses become the last ones. Without a loss since the last step it does nothing."""
        seen = self.count > 0
        moved = torch.stack(
            (torch.where(seen, self.mean, self.means[0]), torch.where(seen, self.means[0], self.means[1]))
        )
        self.means.copy_(moved)
        self.epochs.add_(seen.any().to(torch.int64))
        self.mean.zero_()
        self.count.zero_()
        self._calls = 0

    def record(self, losses: Tensor) -> None:
        """Adds the losses to the running mean of the epoch."""
        finite = losses.isfinite()
        self.count.add_(finite.to(torch.int64))
        change = (losses.to(self.mean.dtype) - self.mean) / self.count.clamp(min=1)
        self.mean.add_(torch.where(finite, change, torch.zeros_like(change)))
        self.remind(self.warn_after, "step()", "at the end of every epoch, or pass warn_after=None for longer ones")

    def weigh(self, losses: Tensor) -> Tensor:
        """K softmax(r / T), or 1 in the first two epochs, ``[K]``."""
        last, before = self.means[0], self.means[1]
        ratio = torch.where((last > 0) & (before > 0), last / before, torch.ones_like(last))
        weights = ratio.shape[0] * torch.softmax(ratio / self.temperature, 0)
        return torch.where(self.epochs < 2, torch.ones_like(weights), weights)
