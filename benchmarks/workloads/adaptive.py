"""Fully-adaptive feature sharing (Lu et al. 2017, arXiv 1611.05377): a thin network that widens by affinity.

All tasks begin in one column of layers. From the last layer to the first, a round each, the tasks that read one block
are grouped, and every group gets a block of its own, a copy. What goes together is what `ConflictMonitor.groups` says
of the cosines of the round, where the paper correlates which examples are hard; a lower layer joins the groups above
it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_optim import ConflictMonitor

from .data import attributes
from .parts import Heads, perceptron
from .tasks import Task
from .workload import Outputs, Supervised

GROUPS = (4, 2)
"""How many blocks the last layer may get, and how many the one before it; the first layer stays whole."""

Groups = list[list[str]]


class Tree(nn.Module):
    """Layers of blocks, ``blocks[layer][b]`` of the tasks ``groups[layer][b]``. Of images ``[N, 1, side, side]``."""

    def __init__(self, tasks: Sequence[Task], inputs: int, width: int = 64) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        layers = (
            nn.Sequential(nn.Flatten(), *perceptron(inputs, width)),
            perceptron(width, width),
            perceptron(width, width),
        )
        self.blocks = nn.ModuleList(nn.ModuleList([layer]) for layer in layers)
        self.groups: list[Groups] = [[names] for _ in layers]
        self.heads = Heads(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        states = {name: inputs for name in self.heads.names}
        for blocks, groups in zip(self.blocks, self.groups, strict=True):
            states = {
                name: found
                for block, group in zip(blocks, groups, strict=True)
                for found in [block(states[group[0]])]
                for name in group
            }
        return Outputs(self.heads([states[name] for name in self.heads.names]))

    def split(self, layer: int, groups: Groups) -> list[nn.Parameter]:
        """Gives every group a block of the layer, which has one so far; the parameters that are new."""
        block = self.blocks[layer][0]
        added = [copy.deepcopy(block) for _ in groups[1:]]
        self.blocks[layer] = nn.ModuleList([block, *added])
        self.groups[layer] = groups
        return [parameter for one in added for parameter in one.parameters()]


def joined(branches: Groups, groups: Groups) -> Groups:
    """The branches, united where a group has tasks of both: what a lower layer can still tell apart."""
    found: Groups = [list(branch) for branch in branches]
    for group in groups:
        touched = [branch for branch in found if set(branch) & set(group)]
        rest = [branch for branch in found if not set(branch) & set(group)]
        found = [[name for branch in touched for name in branch], *rest]
    return found


class Adaptive(Supervised):
    """Widens its tree after the first rounds.

    Attributes:
        widenings: what was split so far, a layer and its groups each.
    """

    model: Tree

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.widenings: list[tuple[int, Groups]] = []
        self._grown: list[list[nn.Parameter]] = []
        self._first = list(self.model.parameters())

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": self._first}, *({"params": grown} for grown in self._grown)]

    def after_round(self, optimizer: Optimizer, monitor: ConflictMonitor | None) -> None:
        if monitor is None or len(self.widenings) == len(GROUPS) or len(monitor.tasks) < GROUPS[0]:
            return
        layer = len(self.model.blocks) - 1 - len(self.widenings)
        groups = monitor.groups(number=GROUPS[len(self.widenings)])
        if self.widenings:
            groups = joined(self.widenings[-1][1], groups)
        self._widen(layer, groups)
        if self._grown[-1]:
            optimizer.add_param_group({"params": self._grown[-1]})
        else:
            self._grown.pop()

    def _widen(self, layer: int, groups: Groups) -> None:
        self._grown.append(self.model.split(layer, groups))
        self.widenings.append((layer, groups))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"widenings": copy.deepcopy(self.widenings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for layer, groups in state["widenings"]:
            self._widen(layer, groups)
        self._grown = [grown for grown in self._grown if grown]
        super().load_state_dict(state)


def build(seed: int) -> Adaptive:
    """Eight derived attributes."""
    splits = attributes.load(seed, 8)
    example = splits.train[slice(0, 1)]
    tasks = tuple(Task(name, "binary") for name in example.labels)
    workload = Adaptive(tasks, splits, Tree, seed, inputs=example.inputs[0].numel())
    workload.quick_steps = 120
    return workload
