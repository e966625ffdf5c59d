"""What a step does about the other ranks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..capture.grads import Row
from .layout import Layout
from .sending import Sender


class RanksDisagreeError(RuntimeError):
    """Raised on all ranks alike: they are not at the same point of a step, or one of them has failed."""


class Reduced(NamedTuple):
    """Rows of the mean over the ranks, of which this rank has a part.

    Attributes:
        rows: K lists of P tensors or None; a parameter's tensor may be a piece of its gradient, flat, also of no
            elements. The pattern of None is the same on all ranks.
        counted: length P, what this rank counts in a Gram matrix.
        layouts: of the parameters that the rows hold pieces of.
    """

    rows: list[Row]
    counted: list[bool]
    layouts: Sequence[Layout] = ()


class Ranks(Protocol):
    """One way in which gradients lie on several ranks.

    All ranks call its methods in the same order.

    Attributes:
        several: whether there are other ranks.
        hides: whether the graphs of losses do not show the parameters of the optimizer.
        rank: the place of this one among them.
    """

    several: bool
    hides: bool
    rank: int

    def check(self, point: str) -> None:
        """Raise where this rank alone would be at this point of a step, or where gradients are not handled."""

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks of an error of this one."""

    def agree(self, what: str, value: Any) -> list[Any]:
        """The values of all ranks, in their order, exchanged on the host."""

    def gather(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors of all ranks, in their order, of these sizes along a dimension."""

    def sender(self, num_rows: int, params: Sequence[Tensor]) -> Sender | None:
        """What takes the complete rows of a call one by one; None where they wait for `reduce`."""

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        """The rows of this rank, of every batch, as rows of the mean over all ranks."""

    def total(self, gram: Tensor) -> Tensor:
        """The Gram matrix of whole rows from that of what this rank counts; the same bits on all ranks."""

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        """The gradients of the parameters, from their pieces."""

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        """Gradients that are not combined: their mean over the ranks."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a value over the ranks."""
