"""Multi-task training: the gradients of several losses, combined by a method, for any PyTorch optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import losses, methods
from .catalog import LossInfo, MethodInfo, get_loss, get_method, list_losses, list_methods
from .methods import *  # noqa: F403
from .monitor.conflicts import ConflictMonitor
from .monitor.report import Report
from .optimizer import MultiTaskOptimizer
from .step.partial import gram_groups

__all__ = [
    "ConflictMonitor",
    "LossInfo",
    "MethodInfo",
    "MultiTaskOptimizer",
    "Report",
    "get_loss",
    "get_method",
    "gram_groups",
    "list_losses",
    "list_methods",
    "losses",
    "methods",
    *(name for name in methods.__all__ if name[0].isupper()),
]

if TYPE_CHECKING:  # the methods, which type checkers do not find

    def __getattr__(name: str) -> Any: ...
