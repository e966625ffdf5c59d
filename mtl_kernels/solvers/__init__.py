"""The solvers, one file each: a public function, and its form in pure PyTorch."""

from . import min_norm, pcgrad
from .common import Reference, Solution
from .min_norm import min_norm_weights
from .pcgrad import pcgrad_weights

__all__ = ["Solution", "min_norm_weights", "pcgrad_weights"]

REFERENCE: dict[str, Reference] = {"min_norm": min_norm.REFERENCE, "pcgrad": pcgrad.REFERENCE}
"""The PyTorch form of every solver, by name."""
