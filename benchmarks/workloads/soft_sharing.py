"""Soft sharing: a tower for every task, tied by an L2 term (Duong et al. 2015). No parameter is shared.

The tie is of no task, so it stays outside the combination; and with nothing to combine a step is a plain sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import images
from .parts import Heads, convolutions
from .tasks import Task
from .workload import Outputs, Supervised

TIE = 1e-3


class Network(nn.Module):
    """Towers of images ``[N, 1, side, side]``, and their squared distances from the mean as auxiliary loss."""

    def __init__(self, tasks: Sequence[Task], side: int, width: int = 8, features: int = 64) -> None:
        super().__init__()
        self.towers = nn.ModuleList(convolutions(side, width, features) for _ in tasks)
        self.heads = Heads(tasks, features)

    def forward(self, inputs: Tensor) -> Outputs:
        return Outputs(self.heads([tower(inputs) for tower in self.towers]), auxiliary=TIE * self.tie())

    def tie(self) -> Tensor:
        """Summed over towers and parameters."""
        terms = []
        for same in zip(*(tower.parameters() for tower in self.towers), strict=True):
            stacked = torch.stack(same)
            terms.append((stacked - stacked.mean(0)).square().sum())
        return torch.stack(terms).sum()


def build(seed: int) -> Supervised:
    """Two digits in an image."""
    tasks = (Task("top-left", "classes", 10), Task("bottom-right", "classes", 10))
    workload = Supervised(tasks, images.digit_pairs(seed), Network, seed, side=12)
    workload.learning_rate, workload.quick_steps = 2e-3, 80
    return workload
