"""A physics-informed network in float64 (Raissi et al. 2019): the heat equation on a bar, with three losses.

u_t = a u_xx for x and t in [0, 1], u(x, 0) = sin(pi x), u = 0 at both ends, so u = exp(-a pi^2 t) sin(pi x). The
losses are the squared residual inside, at the ends, and at the beginning, at new points in every step; what counts is
how far the network is from the solution in these three places. They are parts of one problem: without one of them the
others have no answer.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .workload import Objective, Workload, seeded

DIFFUSIVITY = 0.3
POINTS = 128


class Place(NamedTuple):
    """One of the losses."""

    name: str
    metric: str = "error of the solution"
    higher: bool = False


class Network(nn.Module):
    """u at points ``[N, 2]``, (x, t): ``[N, 1]``."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [2, *[width] * layers]
        hidden = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1)).double()

    def forward(self, points: Tensor) -> Tensor:
        found: Tensor = self.layers(points)
        return found


def solution(points: Tensor) -> Tensor:
    """u at ``[N, 2]``: ``[N, 1]``."""
    x, t = points[:, :1], points[:, 1:]
    return torch.exp(-DIFFUSIVITY * math.pi**2 * t) * torch.sin(math.pi * x)


class Heat(Workload):
    """The three losses share all parameters."""

    tasks = (Place("inside"), Place("ends"), Place("beginning"))
    source = "the heat equation, points drawn"
    batch_size = POINTS
    quick_steps = 120
    single_task: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self.model = seeded(Network, seed)
        self._seed = seed

    def batch(self, step: int) -> dict[str, Tensor]:
        return self._points(torch.Generator().manual_seed(1_000_003 * self._seed + step), self.batch_size)

    @staticmethod
    def _points(generator: torch.Generator, number: int) -> dict[str, Tensor]:
        inside, ends, beginning = torch.rand(3, number, 2, generator=generator, dtype=torch.float64)
        ends[:, 0] = ends[:, 0].round()
        beginning[:, 1] = 0
        return {"inside": inside, "ends": ends, "beginning": beginning}

    def objective(self, batch: dict[str, Tensor]) -> Objective:
        inside = batch["inside"].clone().requires_grad_()
        u = self.model(inside)
        slopes = torch.autograd.grad(u.sum(), inside, create_graph=True)[0]
        curvature = torch.autograd.grad(slopes[:, 0].sum(), inside, create_graph=True)[0][:, 0]
        losses = {"inside": (slopes[:, 1] - DIFFUSIVITY * curvature).square().mean()}
        for name in ("ends", "beginning"):
            losses[name] = (self.model(batch[name]) - solution(batch[name])).square().mean()
        return Objective(losses)

    @torch.no_grad()
    def metrics(self, part: str = "test") -> dict[str, float]:
        points = self._points(torch.Generator().manual_seed({"test": 1, "valid": 2}[part]), 2000)
        return {
            name: float((self.model(where) - solution(where)).square().mean().sqrt()) for name, where in points.items()
        }


def build(seed: int) -> Heat:
    """The heat equation."""
    return Heat(seed)
