"""What a solver returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Weights of the original rows, and how good they are.

    Attributes:
        weights: float64 ``[..., K]``.
        gap: float64 ``[...]`` duality gap, nan for a Gram matrix that is not finite; ``None`` where the method has no
            certificate.
        iterations: int64 ``[...]``, or ``None`` likewise.
    """

    weights: Tensor
    gap: Tensor | None = None
    iterations: Tensor | None = None

    @classmethod
    def of(cls, weights: Tensor, certificate: Tensor | None) -> Solution:
        """From the weights ``[..., K]`` and the certificate ``[..., 2]`` of a solver."""
        if certificate is None:
            return cls(weights)
        return cls(weights, certificate[..., 0], certificate[..., 1].to(torch.int64))
