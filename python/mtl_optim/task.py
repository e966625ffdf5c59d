"""The ``with opt.task(name)`` block."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from .capture import autograd_hint

if TYPE_CHECKING:
    from .optimizer import MultiTaskOptimizer


class TaskBlock:
    """Captures what ``.backward()`` leaves in ``.grad`` inside the block as the row of one task.

    Attributes:
        loss: the value of the loss, for methods that need it (``MGDA(normalize="loss")``); set it inside the
            block. With several micro-batches the values add up, as the gradients do.
    """

    def __init__(self, optimizer: MultiTaskOptimizer, name: str, accumulate: bool) -> None:
        self._optimizer = optimizer
        self._name = name
        self._accumulate = accumulate
        self.loss: Tensor | None = None

    def __enter__(self) -> TaskBlock:
        self.loss = None
        self._optimizer._open_block(self, self._name, self._accumulate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._optimizer._close_block(self, failed=error is not None)
        if isinstance(error, RuntimeError) and (hint := autograd_hint(error)) is not None:
            raise RuntimeError(f"task {self._name!r}: {hint}") from error
