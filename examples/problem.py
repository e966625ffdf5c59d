"""What all examples train: a small trunk with three heads, on data made up on the spot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


class Net(nn.Module):
    """A trunk and a head a task; called with a batch by name, it returns the loss of every task by name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.heads = nn.ModuleDict({"depth": nn.Linear(16, 1), "normals": nn.Linear(16, 3), "edges": nn.Linear(16, 1)})

    def forward(self, x: Tensor, depth: Tensor, normals: Tensor, edges: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {
            "depth": F.mse_loss(self.heads["depth"](z), depth),
            "normals": 1 - F.cosine_similarity(self.heads["normals"](z), normals).mean(),
            "edges": F.binary_cross_entropy_with_logits(self.heads["edges"](z), edges),
        }


class Points(Dataset[dict[str, Tensor]]):
    """256 points, the same in every process."""

    def __init__(self) -> None:
        x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        depth, normals = torch.sin(x[:, :2].sum(1, keepdim=True)), torch.tanh(x[:, 2:5] + x[:, :1])
        self.columns = {"x": x, "depth": depth, "normals": normals, "edges": (x[:, :1] > x[:, 5:6]).to(x.dtype)}

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}
