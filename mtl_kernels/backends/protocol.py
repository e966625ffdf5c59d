"""What the implementations behind the operations offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from ..call import ColumnCall, SolverCall, StateCall
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

    def reduce_columns_into(self, table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
        """Writes what ``call`` makes of the K values of an element to ``out[p]``, which has the dtype of the rows."""

    def update_state(
        self, table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor
    ) -> None:
        """Updates ``state``, laid out as the rows, and writes what comes of it to ``sums``, zeroed float64 ``[S, K]``.

        The state says how many elements a parameter has; rows are None where it is there for more.
        """

    def solve(self, call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        """Solves ``gram`` float64 ``[..., K, K]`` contiguous: weights ``[..., K]``, certificate ``[..., 2]``, float64.

        The certificate may be None unless ``call.certified``. Leaves ``advance_rng`` to its caller.
        """


class FusedBackend(Backend, Protocol):
    """A backend that does in one launch what others do in several."""

    def statistics_into(
        self, table: RowTable, groups: Sequence[int], gram: Tensor, norms: Tensor, cosines: Tensor
    ) -> None:
        """Writes Gram ``[S, K, K]``, norms ``[S, K]`` and cosines ``[S, K, K]`` of each group."""

    def fuses(self, solver: str) -> bool:
        """Whether `gram_solve_into` runs the solver; others are a launch of their own."""

    def gram_solve_into(
        self, table: RowTable, groups: Sequence[int], gram: Tensor, call: SolverCall
    ) -> tuple[Tensor, Tensor]:
        """Writes ``gram`` ``[S, K, K]`` and solves it: weights ``[S, K]``, certificate ``[S, 2]``, float64.

        All without S where ``gram`` is ``[K, K]``, of one group.
        """

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
