"""The solvers, one file each: a public function, and its form in pure PyTorch."""

from collections.abc import Callable, Sequence

from torch import Tensor

from . import min_norm, pcgrad
from .common import Solution
from .min_norm import min_norm_weights
from .pcgrad import pcgrad_weights

__all__ = ["Solution", "min_norm_weights", "pcgrad_weights"]

Reference = Callable[[Tensor, Tensor, Tensor | None, Sequence[float], Tensor | None], tuple[Tensor, Tensor]]

REFERENCE: dict[str, Reference] = {"min_norm": min_norm.reference, "pcgrad": pcgrad.reference}
"""By name: (gram [B, K, K], active [B, K], rng, options, inputs) -> (weights [B, K], certificate [B, 2])."""
