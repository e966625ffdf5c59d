"""A training step on one network, and the ways to get its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtl_optim import Method, MultiTaskOptimizer

from . import device
from .device import Device, Host


class Network(nn.Module):
    """A trunk of four convolutions and a wide layer, and K heads."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 256))
        self.heads = nn.ModuleList(nn.Linear(256, 10) for _ in range(num_tasks))

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        features = self.trunk(images).relu()
        return [nn.functional.cross_entropy(head(features), labels[k]) for k, head in enumerate(self.heads)]


class Workload:
    """One network with its batch, and the ways to get its gradients."""

    def __init__(self, num_tasks: int, method: Method, where: Device | None = None) -> None:
        self.where = where or Host()
        self.num_tasks = num_tasks
        generator = torch.Generator().manual_seed(num_tasks)
        torch.manual_seed(num_tasks)
        self.network = Network(num_tasks).to(self.where.device)
        self.images = torch.randn(64, 3, 32, 32, generator=generator).to(self.where.device)
        self.labels = torch.randint(10, (num_tasks, 64), generator=generator).to(self.where.device)
        self.method = method
        self.optimizer = MultiTaskOptimizer(torch.optim.SGD(self.network.parameters(), lr=0.0), method)
        self.combination: list[Callable[[], float]] = []

    def losses(self) -> list[Tensor]:
        self.network.zero_grad()
        return self.network.losses(self.images, self.labels)

    def plain_sum(self) -> None:
        torch.stack(self.losses()).sum().backward()  # type: ignore[no-untyped-call]

    def backwards(self) -> list[list[Tensor | None]]:
        losses, rows = self.losses(), []
        parameters = list(self.network.parameters())
        for k, loss in enumerate(losses):
            for parameter in parameters:
                parameter.grad = None
            loss.backward(retain_graph=k < len(losses) - 1)  # type: ignore[no-untyped-call]
            rows.append([parameter.grad for parameter in parameters])
        return rows

    def capture(self) -> None:
        self.optimizer.zero_grad()
        losses = self.network.losses(self.images, self.labels)
        self.optimizer.backward(losses, accumulate=True)

    def ours(self) -> None:
        self.capture()
        stop = self.where.stopwatch()
        self.optimizer.combine()
        self.combination.append(stop())

    def counts(self) -> device.Counts | None:
        """What the combination launches, copies and waits for."""

        def counted() -> None:
            self.optimizer.combine()

        return self.where.count(counted, before=self.capture)

    def torchjd(self) -> Callable[[], None] | None:
        try:
            from torchjd import aggregation, autojac
        except ImportError:
            return None
        aggregator = {"pcgrad": aggregation.PCGrad, "mgda": aggregation.MGDA}[self.method.name]()

        def step() -> None:
            features = self.network.trunk(self.images).relu()
            self.network.zero_grad()
            losses = [
                nn.functional.cross_entropy(head(features), self.labels[k]) for k, head in enumerate(self.network.heads)
            ]
            autojac.mtl_backward(losses, features=features)
            autojac.jac_to_grad(self.network.trunk.parameters(), aggregator)

        return step

    def error(self) -> float:
        """Relative error of the trunk's gradient against a float64 combination with the weights of the report."""
        self.ours()
        trunk = list(self.network.trunk.parameters())
        found = torch.cat([parameter.grad.flatten() for parameter in trunk if parameter.grad is not None]).double()
        losses = self.network.losses(self.images, self.labels)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, trunk, retain_graph=True)]) for loss in losses
        ]
        report = self.optimizer.report
        if report is None:
            raise RuntimeError("no report after a step")
        expected = torch.stack([row.double() for row in rows]).T @ report.weights
        return float((found - expected).norm() / expected.norm())


def until_done(call: Callable[[], object], where: Device) -> Callable[[], None]:
    """The call and the wait for its work."""

    def run() -> None:
        call()
        where.synchronize()

    return run
