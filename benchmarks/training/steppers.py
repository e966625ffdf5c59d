"""Ways to take a training step, each timed in its parts."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_optim import ConflictMonitor, MultiTaskOptimizer

from ..workloads.workload import Objective, Workload
from .jobs import Recipe


class Seconds(NamedTuple):
    """What a step took.

    Attributes:
        forward: the losses. passes: from them to the gradients of the tasks, and of an auxiliary loss. combination:
        from these
            to ``.grad``. optimizer: the step of the wrapped one.
    """

    forward: float
    passes: float
    combination: float
    optimizer: float


class Stepper(Protocol):
    """What a training is carried out by."""

    optimizer: Optimizer

    def step(self, number: int) -> Seconds:
        """Takes a step, from 0."""
        ...

    def monitor(self, steps: int) -> ConflictMonitor | None:
        """A new watcher of the next steps; None where this library does not combine."""
        ...


def add_auxiliary(objective: Objective) -> None:
    """Adds the gradient of the loss that is of no task to ``.grad``; the graph stays."""
    if objective.auxiliary is not None:
        objective.auxiliary.backward(retain_graph=True)  # type: ignore[no-untyped-call]


class Combined:
    """`MultiTaskOptimizer` around Adam."""

    def __init__(self, workload: Workload, recipe: Recipe) -> None:
        self._workload = workload
        self._batches = recipe.method.num_batches
        groups = workload.param_groups()
        if recipe.transform is not None and (learned := list(recipe.transform.parameters())):
            groups.append({"params": learned})
        adam = torch.optim.Adam(groups, lr=workload.learning_rate)
        names = [task.name for task in workload.tasks]
        self.optimizer = MultiTaskOptimizer(adam, recipe.method, tasks=names, transform=recipe.transform)

    def step(self, number: int) -> Seconds:
        forward = passes = 0.0
        batches = [self._workload.batch(number * self._batches + b) for b in range(self._batches)]
        self.optimizer.zero_grad()
        for b, batch in enumerate(batches):
            begin = perf_counter()
            objective = self._workload.objective(batch)
            computed = perf_counter()
            if b == self._batches - 1:
                add_auxiliary(objective)
            self.optimizer.backward(objective.losses, accumulate=self._batches == 1, batch=b)
            forward, passes = forward + computed - begin, passes + perf_counter() - computed
        captured = perf_counter()
        self.optimizer.combine()
        combined = perf_counter()
        self.optimizer.step()
        return Seconds(forward, passes, combined - captured, perf_counter() - combined)

    def monitor(self, steps: int) -> ConflictMonitor:
        return ConflictMonitor(self.optimizer, every=steps + 1)


class Plain:
    """The sum of the losses, or one of them, and one backward pass: what does not combine at all.

    Args:
        only: of all tasks the one that is trained; empty for all.
    """

    def __init__(self, workload: Workload, only: str = "") -> None:
        self._workload, self._only = workload, only
        self.optimizer: Optimizer = torch.optim.Adam(workload.param_groups(), lr=workload.learning_rate)

    def step(self, number: int) -> Seconds:
        batch = self._workload.batch(number)
        self.optimizer.zero_grad()
        begin = perf_counter()
        objective = self._workload.objective(batch)
        computed = perf_counter()
        losses = [loss for name, loss in objective.losses.items() if self._only in ("", name)]
        terms = losses if objective.auxiliary is None else [*losses, objective.auxiliary]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        passed = perf_counter()
        self.optimizer.step()
        return Seconds(computed - begin, passed - computed, 0.0, perf_counter() - passed)

    def monitor(self, steps: int) -> None:
        return None


def set_rate(optimizer: Optimizer, rate: float, step: int, steps: int) -> None:
    """Of a cosine from ``rate`` to 0."""
    for group in optimizer.param_groups:
        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def shared_of(workload: Workload, batch: Any) -> tuple[list[Tensor], list[Tensor], Objective]:
    """The parameters that several tasks reach, those that one does, and the losses that tell, with their graph."""
    objective = workload.objective(batch)
    params = [p for group in workload.param_groups() for p in group["params"] if p.requires_grad]
    reached = [0] * len(params)
    for loss in objective.losses.values():
        for p, grad in enumerate(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)):
            reached[p] += grad is not None
    shared = [param for param, count in zip(params, reached, strict=True) if count > 1]
    return shared, [param for param, count in zip(params, reached, strict=True) if count == 1], objective
