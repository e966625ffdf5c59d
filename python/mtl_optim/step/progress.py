"""Where a `MultiTaskOptimizer` stands."""

from __future__ import annotations

import dataclasses

from ..monitor.report import Report
from .refresh import Reusable


@dataclasses.dataclass(eq=False)
class Progress:
    """What changes from step to step, and goes along with a copy of the optimizer.

    Attributes:
        tasks: the names known so far, in the order of the rows.
        has_gradient: whether ``.grad`` holds a combination that was not stepped with.
        read_early: whether somebody looked at ``.grad`` before all was captured, so that the rows were combined.
    """

    tasks: tuple[str, ...]
    reusable: Reusable | None = None
    report: Report | None = None
    has_gradient: bool = False
    read_early: bool = False
