"""Mixtures of experts: MMoE (Ma et al. 2018) and PLE, layers of customized gate control (Tang et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import tables
from .parts import Heads, perceptron
from .tasks import Task
from .workload import Outputs, Supervised


class Gate(nn.Module):
    """A mixture of what experts ``[N, E, width]`` say, with weights from inputs ``[N, inputs]``."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, experts)

    def forward(self, inputs: Tensor, said: Tensor) -> Tensor:
        return torch.einsum("ne,new->nw", self.layer(inputs).softmax(1), said)


class MMoE(nn.Module):
    """Experts that all tasks share, and a gate for each: equations 5 to 8. Of vectors ``[N, inputs]``."""

    def __init__(self, tasks: Sequence[Task], inputs: int, experts: int = 4, width: int = 48) -> None:
        super().__init__()
        self.experts = nn.ModuleList(perceptron(inputs, width, width) for _ in range(experts))
        self.gates = nn.ModuleList(Gate(inputs, experts) for _ in tasks)
        self.towers = nn.ModuleList(perceptron(width, width) for _ in tasks)
        self.heads = Heads(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        said = torch.stack([expert(inputs) for expert in self.experts], 1)
        chosen = [tower(gate(inputs, said)) for gate, tower in zip(self.gates, self.towers, strict=True)]
        return Outputs(self.heads(chosen))


class Level(nn.Module):
    """Experts of every task and shared ones. A task's gate reads its own and the shared, the shared gate reads all."""

    def __init__(self, num_tasks: int, inputs: int, width: int, own: int, shared: int, last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(perceptron(inputs, width) for _ in range(own)) for _ in range(num_tasks))
        self.shared = nn.ModuleList(perceptron(inputs, width) for _ in range(shared))
        self.gates = nn.ModuleList(Gate(inputs, own + shared) for _ in range(num_tasks))
        self.shared_gate = None if last else Gate(inputs, num_tasks * own + shared)

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        """Of the states of the tasks and, last, the shared one; the same, without the shared one at the last level."""
        *of_tasks, shared = states
        common = [expert(shared) for expert in self.shared]
        said = [[expert(z) for expert in experts] for experts, z in zip(self.own, of_tasks, strict=True)]
        found = [
            gate(z, torch.stack([*own, *common], 1)) for gate, z, own in zip(self.gates, of_tasks, said, strict=True)
        ]
        if self.shared_gate is not None:
            found.append(self.shared_gate(shared, torch.stack([one for own in said for one in own] + common, 1)))
        return found


class PLE(nn.Module):
    """Two levels of customized gate control. Of vectors ``[N, inputs]``."""

    def __init__(self, tasks: Sequence[Task], inputs: int, own: int = 1, shared: int = 2, width: int = 48) -> None:
        super().__init__()
        number = len(tasks)
        self.first = Level(number, inputs, width, own, shared, last=False)
        self.second = Level(number, width, width, own, shared, last=True)
        self.heads = Heads(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        states = self.first([inputs] * (len(self.heads.layers) + 1))
        return Outputs(self.heads(self.second(states)))


def mmoe(seed: int) -> Supervised:
    """Four properties of a digit."""
    return _workload(seed, MMoE)


def ple(seed: int) -> Supervised:
    """The same."""
    return _workload(seed, PLE)


def _workload(seed: int, network: type[nn.Module]) -> Supervised:
    tasks = (Task("digit", "classes", 10), *(Task(name, "binary") for name in ("odd", "above four", "loop")))
    workload = Supervised(tasks, tables.digit_properties(seed), network, seed, inputs=64)
    workload.learning_rate, workload.quick_steps = 2e-3, 80
    return workload
