"""Multi-task training: the gradients of several losses, combined by a method, for any PyTorch optimizer."""

from __future__ import annotations

from . import methods
from .methods import MGDA, Constant, Mean, Method, PCGrad, Solution, Sum
from .optimizer import MultiTaskOptimizer
from .report import Report

__all__ = [
    "MGDA",
    "Constant",
    "Mean",
    "Method",
    "MultiTaskOptimizer",
    "PCGrad",
    "Report",
    "Solution",
    "Sum",
    "methods",
]
