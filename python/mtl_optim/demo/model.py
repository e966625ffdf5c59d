"""The network of the demo: one convolutional trunk that every task shares, one linear head per task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class SharedTrunk(nn.Module):
    """Logits of every task from images ``[N, 1, 12, 12]``: a dict of ``[N, classes]``."""

    def __init__(self, tasks: Mapping[str, int], width: int = 16, features: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 9, features),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(features, classes) for task, classes in tasks.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}
