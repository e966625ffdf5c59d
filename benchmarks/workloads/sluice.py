"""Sluice networks (Ruder et al. 2019, arXiv 1705.08142): towers of two subspaces, mixed and read by layers.

For two tasks and layers of two halves each: alpha mixes the four halves after every layer, beta mixes the layers that
a head reads, and the auxiliary loss keeps the two subspaces of every layer orthogonal (equations 2 to 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import tables
from .parts import Heads
from .tasks import Task
from .workload import Outputs, Supervised

APART = 1e-3
HALVES = 2


class Network(nn.Module):
    """Of vectors ``[N, inputs]``."""

    def __init__(self, tasks: Sequence[Task], inputs: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        number = len(tasks)
        widths = [inputs, *[width] * layers]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(before, after) for _ in tasks) for before, after in itertools.pairwise(widths)
        )
        mixed = number * HALVES
        start = torch.full((layers, mixed, mixed), 0.2 / (mixed - 1)) + (0.8 - 0.2 / (mixed - 1)) * torch.eye(mixed)
        self.alpha = nn.Parameter(start)
        self.beta = nn.ParameterList(nn.Parameter(torch.full((layers,), 1 / layers)) for _ in tasks)
        self.heads = Heads(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        number = len(self.layers[0])
        states = [inputs] * number
        read: list[list[Tensor]] = [[] for _ in range(number)]
        for towers, alpha in zip(self.layers, self.alpha, strict=True):
            halves = [
                half for tower, z in zip(towers, states, strict=True) for half in tower(z).relu().chunk(HALVES, 1)
            ]
            mixed = torch.einsum("ij,jnc->inc", alpha, torch.stack(halves))
            states = [torch.cat(tuple(mixed[HALVES * k : HALVES * (k + 1)]), 1) for k in range(number)]
            for own, state in zip(read, states, strict=True):
                own.append(state)
        chosen = [torch.einsum("l,lnc->nc", beta, torch.stack(own)) for beta, own in zip(self.beta, read, strict=True)]
        return Outputs(self.heads(chosen), auxiliary=APART * self.overlap())

    def overlap(self) -> Tensor:
        """The squared products of the weights of the two subspaces, summed over all layers."""
        found = []
        for layer in (layer for towers in self.layers for layer in towers):
            first, second = layer.weight.chunk(HALVES, 0)
            found.append((first @ second.T).square().sum())
        return torch.stack(found).sum()


def build(seed: int) -> Supervised:
    """Which digit it is, and whether it is odd."""
    tasks = (Task("digit", "classes", 10), Task("odd", "binary"))
    workload = Supervised(tasks, tables.digit_properties(seed), Network, seed, inputs=64)
    workload.learning_rate, workload.quick_steps = 2e-3, 150
    return workload
