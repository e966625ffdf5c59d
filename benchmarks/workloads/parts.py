"""Pieces that several networks are built of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from .tasks import Task
from .workload import Outputs


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def convolutions(side: int, width: int, features: int, channels: int = 1) -> nn.Sequential:
    """Features ``[N, features]`` of images ``[N, channels, side, side]``: three convolutions, two poolings, a layer."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, features), nn.ReLU(),
    )  # fmt: skip


class Heads(nn.Module):
    """A linear layer for every task."""

    def __init__(self, tasks: Sequence[Task], width: int) -> None:
        super().__init__()
        self.names = [task.name for task in tasks]
        self.layers = nn.ModuleList(nn.Linear(width, task.outputs) for task in tasks)

    def forward(self, features: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Outputs of the same features for all tasks, or of those of each."""
        own = [features] * len(self.names) if isinstance(features, Tensor) else features
        return {name: layer(z) for name, layer, z in zip(self.names, self.layers, own, strict=True)}


class HardSharing(nn.Module):
    """A trunk that all tasks share, and a linear head for each (Caruana 1997)."""

    def __init__(self, tasks: Sequence[Task], trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, Heads(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        features = self.trunk(inputs)
        return Outputs(self.heads(features), features)
