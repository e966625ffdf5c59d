"""What the ways to capture a row have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .grads import Row, RowKey


class Capture(Protocol):
    """Turns what a backward pass leaves in ``.grad`` into rows that share no memory.

    Between `open` and `take` gradients gather in ``.grad`` as ever, None where nothing arrived. A row may be opened
    again in the same step: autograd then adds to its tensors in place.
    """

    def prepare(self, tasks: Sequence[RowKey], params: Sequence[Tensor]) -> None:
        """Makes ready for rows of these tasks; called before a pass, while ``.grad`` is what the user sees."""

    def open(self, task: RowKey, params: Sequence[Tensor], previous: Row | None) -> None:
        """Sets ``.grad`` for a pass: None, or the row that this step has captured for the task before."""

    def take(self, params: Sequence[Tensor], previous: Row | None, others: Sequence[Tensor]) -> Row:
        """The row now in ``.grad``, which is None afterwards; it shares no memory with the ``.grad`` of ``others``."""

    def check(self, rows: Mapping[RowKey, Row]) -> None:
        """Raise RuntimeError if a row is not what was taken, which no combination can mend."""

    def let_go(self, task: RowKey, row: Row, kept: Row) -> None:
        """Some tensors of a row that was taken were copied elsewhere; ``kept`` has None for them."""

    def close(self) -> bool:
        """Drops what was taken since `prepare`, of passes that failed; whether they overwrote rows from before it."""

    def forget(self) -> None:
        """Starts a new step: the rows taken so far are gone."""
