"""Where a `MultiTaskOptimizer` stands."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .grads import Isolation
from .refresh import Reusable
from .report import Report
from .task import TaskBlock


@dataclasses.dataclass(eq=False)
class OpenBlock:
    """The `task` block now open."""

    block: TaskBlock
    name: str
    managed: list[Tensor]
    others: list[Tensor]
    isolation: Isolation
    versions: dict[int, int]
    done: bool = False


@dataclasses.dataclass(eq=False)
class Progress:
    """What changes from step to step.

    One object, changed in place: wrappers that stand in for an optimizer (Lightning's) run its methods on
    themselves, where an attribute that a method sets would stay out of sight of the optimizer.
    """

    tasks: tuple[str, ...]
    reusable: Reusable | None = None
    report: Report | None = None
    has_gradient: bool = False
    block: OpenBlock | None = None
