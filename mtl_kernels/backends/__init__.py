"""The implementations behind the operations, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..rows import RowTable


class Backend(Protocol):
    """What an implementation offers; tensors arrive validated, outputs allocated by the caller."""

    name: str

    def missing(self) -> str | None:
        """None if usable, else what is missing and how to get it."""

    def runs_on(self, device: torch.device) -> bool: ...

    def gram_into(self, table: RowTable, groups: Sequence[int], out: Tensor) -> None:
        """Writes the Gram matrix of each group to ``out``, zeroed float64 ``[S, K, K]``."""

    def combine_into(
        self, table: RowTable, weights: Tensor, groups: Sequence[int], out: Sequence[Tensor | None]
    ) -> None:
        """Writes sum_k weights[group, k] * rows[k][p] to ``out[p]``; weights contiguous float64 ``[S, K]``."""

    def solve(
        self,
        solver: str,
        gram: Tensor,
        active: Tensor | None,
        rng: Tensor | None,
        options: Sequence[float],
        inputs: Tensor | None,
        certified: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Solves ``gram`` float64 ``[..., K, K]`` contiguous: weights ``[..., K]``, certificate ``[..., 2]``, float64.

        The certificate may be None unless ``certified``.
        """


from .cpu import CpuBackend  # noqa: E402  (needs Backend's module to exist)
from .reference import ReferenceBackend  # noqa: E402

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), ReferenceBackend())}
"""In the order in which the automatic choice tries them."""
