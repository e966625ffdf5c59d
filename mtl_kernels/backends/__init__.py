"""The implementations behind the operations, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from ..rows import RowTable


class Backend(Protocol):
    """What an implementation offers; tensors arrive validated, outputs allocated by the caller."""

    name: str
    fused: bool
    """Whether it is a `FusedBackend`."""

    def automatic_on(self, device: torch.device) -> bool:
        """Whether the automatic choice may pick it for a device of this type; asks no driver."""

    def missing(self) -> str | None:
        """None if usable, else what is missing and how to get it; may start a driver."""

    def refusal(self, device: torch.device) -> str | None:
        """None if it takes tensors of the device, else why not and what would; asked where nothing is missing."""

    def gram_into(self, table: RowTable, groups: Sequence[int], out: Tensor) -> None:
        """Writes the Gram matrix of each group to ``out``, zeroed float64 ``[S, K, K]``."""

    def combine_into(
        self,
        table: RowTable,
        weights: Tensor,
        groups: Sequence[int],
        out: Sequence[Tensor | None],
        accumulate: bool = False,
    ) -> None:
        """Writes sum_k weights[group, k] * rows[k][p] to ``out[p]``; weights contiguous float64 ``[S, K]``.

        Summed in float64, with ``accumulate`` also with what ``out[p]`` held, and rounded once to its dtype.
        """

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


class FusedBackend(Backend, Protocol):
    """A backend that does in one launch what others do in several."""

    def statistics_into(
        self, table: RowTable, groups: Sequence[int], gram: Tensor, norms: Tensor, cosines: Tensor
    ) -> None:
        """Writes Gram ``[S, K, K]``, norms ``[S, K]`` and cosines ``[S, K, K]`` of each group."""

    def gram_solve_into(
        self,
        table: RowTable,
        groups: Sequence[int],
        gram: Tensor,
        solver: str,
        active: Tensor | None,
        rng: Tensor | None,
        advance_rng: bool,
        options: Sequence[float],
        inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Writes ``gram`` ``[S, K, K]`` and solves it: weights ``[S, K]``, certificate ``[S, 2]``, float64."""

    def combine_into(
        self,
        table: RowTable,
        weights: Tensor,
        groups: Sequence[int],
        out: Sequence[Tensor | None],
        accumulate: bool = False,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """As `Backend.combine_into`, with all epilogues of `mtl_kernels.combine`; ``scale`` is float64 ``[1]``."""


def is_fused(backend: Backend) -> TypeGuard[FusedBackend]:
    """Whether a backend does the whole of a step in two launches."""
    return backend.fused


from .cpu import CpuBackend  # noqa: E402  (needs Backend's module to exist)
from .cuda import CudaBackend  # noqa: E402
from .reference import ReferenceBackend  # noqa: E402
from .triton import TritonBackend  # noqa: E402

BACKENDS: dict[str, Backend] = {b.name: b for b in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())}
"""In the order in which the automatic choice tries them."""
