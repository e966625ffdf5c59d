"""Shared and private features that a term keeps apart (Bousmalis et al. 2016, arXiv 1608.06019, equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .data import images
from .parts import Heads, convolutions
from .tasks import Task
from .workload import Outputs, Supervised

APART = 0.05


class Network(nn.Module):
    """Of images ``[N, 1, side, side]``; the auxiliary loss is the mean over tasks of |S^T P_k|_F^2 of unit columns."""

    def __init__(self, tasks: Sequence[Task], side: int, width: int = 6, features: int = 32) -> None:
        super().__init__()
        self.shared = convolutions(side, 2 * width, features)
        self.private = nn.ModuleList(convolutions(side, width, features) for _ in tasks)
        self.heads = Heads(tasks, 2 * features)

    def forward(self, inputs: Tensor) -> Outputs:
        shared, private = self.shared(inputs), [own(inputs) for own in self.private]
        columns = normalize(shared, dim=0)
        products = [(columns.T @ normalize(own, dim=0)).square().mean() for own in private]
        heads = self.heads([torch.cat((shared, own), 1) for own in private])
        return Outputs(heads, auxiliary=APART * torch.stack(products).mean())


def build(seed: int) -> Supervised:
    """Two digits in an image."""
    tasks = (Task("top-left", "classes", 10), Task("bottom-right", "classes", 10))
    workload = Supervised(tasks, images.digit_pairs(seed), Network, seed, side=12)
    workload.learning_rate, workload.quick_steps = 2e-3, 80
    return workload
