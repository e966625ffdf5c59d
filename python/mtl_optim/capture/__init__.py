"""From a backward pass to the row of one task, and what the autograd graph tells about it beforehand."""

from __future__ import annotations

from collections.abc import Callable

from .arena import Arena
from .harvest import Harvest
from .protocol import Capture

__all__ = ["CAPTURES", "Capture"]

CAPTURES: dict[str, Callable[[], Capture]] = {"harvest": Harvest, "arena": Arena, "factored": Harvest}
"""By the name that `MultiTaskOptimizer` takes; what holds gradients, where rows are not coordinates."""
