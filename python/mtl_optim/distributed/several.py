"""What ranks do alike, whether they hold all parameters or shards of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .agreement import Agreement


class Several:
    """The part of `Ranks` that goes by an agreement alone.

    Args:
        agreement: of the ranks.
    """

    several = True

    def __init__(self, agreement: Agreement) -> None:
        self._agreement, self.rank = agreement, agreement.rank

    def check(self, point: str) -> None:
        self._agreement.exchange(point)

    def fail(self, error: BaseException) -> None:
        self._agreement.fail(error)

    def agree(self, what: str, value: Any) -> list[Any]:
        return self._agreement.exchange(what, value)

    def gather(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        return self._agreement.gather(tensor, dim, sizes)

    def total(self, gram: Tensor) -> Tensor:
        return self._agreement.sum(gram)

    def mean(self, values: Tensor) -> Tensor:
        return self._agreement.sum(values) / self._agreement.size
