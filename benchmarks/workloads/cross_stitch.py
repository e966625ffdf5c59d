"""Cross-stitch networks (Misra et al. 2016, arXiv 1604.03539): towers whose activations are mixed after every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import images
from .parts import Heads
from .tasks import Task
from .workload import Outputs, Supervised

OWN = 0.8
"""The share of its own activations that a tower starts with."""


class Stitch(nn.Module):
    """Learned mixtures of K activations, for every channel: equation 1."""

    def __init__(self, num_tasks: int, channels: int) -> None:
        super().__init__()
        start = torch.full((num_tasks, num_tasks), (1 - OWN) / (num_tasks - 1)).fill_diagonal_(OWN)
        # A parameter a task, for behind the last layer each is of one task alone.
        self.mixtures = nn.ParameterList(nn.Parameter(row.repeat(channels, 1)) for row in start)

    def forward(self, activations: list[Tensor]) -> list[Tensor]:
        stacked = torch.stack(activations, -1)  # [N, C, ..., K]
        shape = [1, stacked.shape[1], *[1] * (stacked.dim() - 3), stacked.shape[-1]]
        return [(stacked * own.view(shape)).sum(-1) for own in self.mixtures]


class Network(nn.Module):
    """Of images ``[N, 1, side, side]``. Through the stitches every task reaches all towers."""

    def __init__(self, tasks: Sequence[Task], side: int, width: int = 8, features: int = 64) -> None:
        super().__init__()
        number = len(tasks)
        flat = 2 * width * (side // 4) ** 2

        def first() -> nn.Module:
            return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

        def second() -> nn.Module:
            return nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

        def third() -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(flat, features), nn.ReLU())

        self.stages = nn.ModuleList(nn.ModuleList(make() for _ in tasks) for make in (first, second, third))
        self.stitches = nn.ModuleList(Stitch(number, channels) for channels in (width, 2 * width, features))
        self.heads = Heads(tasks, features)

    def forward(self, inputs: Tensor) -> Outputs:
        states = [inputs] * len(self.heads.layers)
        for stage, stitch in zip(self.stages, self.stitches, strict=True):
            states = stitch([tower(state) for tower, state in zip(stage, states, strict=True)])
        return Outputs(self.heads(states))


def build(seed: int) -> Supervised:
    """Two digits in an image."""
    tasks = (Task("top-left", "classes", 10), Task("bottom-right", "classes", 10))
    workload = Supervised(tasks, images.digit_pairs(seed), Network, seed, side=12)
    workload.learning_rate, workload.quick_steps = 2e-3, 80
    return workload
