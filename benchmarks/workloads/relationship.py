"""Multilinear relationship networks (Long et al. 2017, arXiv 1506.02117): a tensor-normal prior on all heads.

The heads' weights are a tensor W of features x classes x tasks with covariances S1, S2, S3 along its sides. Their
negative log density, 1/2 vec(W)^T (S1 x S2 x S3)^-1 vec(W), is the auxiliary loss (equation 6); from time to time the
covariances are set to their estimates by the flip-flop algorithm (equation 8). Every task has inputs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_optim import ConflictMonitor

from .data import domains
from .parts import perceptron
from .tasks import Task
from .workload import Outputs, Supervised

STRENGTH = 1e-4
FLOOR = 1e-3
"""Added to the diagonal of an estimate."""


class Network(nn.Module):
    """Of inputs ``[N, K, 64]``, one for every task.

    Attributes:
        weights: W, ``[features, classes, K]``. side_0, side_1, side_2: the inverse covariances along its sides.
    """

    side_0: Tensor
    side_1: Tensor
    side_2: Tensor

    def __init__(self, tasks: Sequence[Task], inputs: int = 64, width: int = 64) -> None:
        super().__init__()
        self.names = [task.name for task in tasks]
        shape = (width, tasks[0].outputs, len(tasks))
        self.trunk = perceptron(inputs, width, width)
        # A parameter a task, or the heads would count as shared.
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape[:2]) / width**0.5) for _ in tasks)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[1])) for _ in tasks)
        for side, size in enumerate(shape):
            self.register_buffer(f"side_{side}", torch.eye(size))

    def forward(self, inputs: Tensor) -> Outputs:
        found = {}
        for k, name in enumerate(self.names):
            found[name] = self.trunk(inputs[:, k]) @ self.weights[k] + self.biases[k]
        return Outputs(found, auxiliary=STRENGTH * self.prior())

    def prior(self) -> Tensor:
        """1/2 vec(W)^T (S1 x S2 x S3)^-1 vec(W)."""
        tensor = torch.stack(tuple(self.weights), -1)
        scaled = torch.einsum("abc,ai,bj,ck->ijk", tensor, self.side_0, self.side_1, self.side_2)
        return 0.5 * (tensor * scaled).sum()

    @torch.no_grad()
    def estimate(self) -> None:
        """One flip-flop over the three sides; every covariance is scaled to a mean variance of 1."""
        tensor = torch.stack(tuple(self.weights), -1)
        for side, size in enumerate(tensor.shape):
            others = [self.side_0, self.side_1, self.side_2]
            others[side] = torch.eye(size)
            scaled = torch.einsum("abc,ai,bj,ck->ijk", tensor, *others).movedim(side, 0).flatten(1)
            covariance = tensor.movedim(side, 0).flatten(1) @ scaled.T
            covariance = covariance / covariance.diagonal().mean().clamp(min=1e-12) + FLOOR * torch.eye(size)
            getattr(self, f"side_{side}").copy_(torch.linalg.inv(covariance))


class Related(Supervised):
    """Estimates the covariances after every round."""

    model: Network

    def after_round(self, optimizer: Optimizer, monitor: ConflictMonitor | None) -> None:
        self.model.estimate()


def build(seed: int, **options: Any) -> Related:
    """Ten digits as four instruments would see them."""
    tasks = tuple(Task(name, "classes", 10) for name in domains.DOMAINS)
    workload = Related(tasks, domains.load(seed), Network, seed, **options)
    workload.learning_rate, workload.batch_size, workload.quick_steps = 2e-3, 32, 150
    return workload
