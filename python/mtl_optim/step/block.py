"""The ``with opt.task(name)`` block."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from torch import Tensor

from ..capture.passes import autograd_hint


class TaskBlock:
    """Captures what ``.backward()`` leaves in ``.grad`` inside the block as the row of one task.

    Attributes:
        name: of the task. accumulate: whether to add to a row that is there. batch: which of the step's batches it is.
        loss: the value of the loss, for methods that need it (``MGDA(normalize="loss")``); set it inside the
            block. With several micro-batches the values add up, as the gradients do. Where the optimizer has a
            ``transform``, the block is to call ``backward()`` on what it makes of the loss, and this is its value.
    """

    def __init__(self, step: Blocks, name: str, accumulate: bool, batch: int = 0) -> None:
        self._step = step
        self.name = name
        self.accumulate = accumulate
        self.batch = batch
        self.loss: Tensor | None = None

    def __enter__(self) -> TaskBlock:
        self.loss = None
        self._step.open_block(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.close_block(self, failed=error is not None)
        if isinstance(error, RuntimeError) and (hint := autograd_hint(error)) is not None:
            raise RuntimeError(f"task {self.name!r}: {hint}") from error


class Blocks(Protocol):
    """Who captures what happens between the two."""

    def open_block(self, block: TaskBlock) -> None:
        """Hides the gradients that are there."""

    def close_block(self, block: TaskBlock, failed: bool) -> None:
        """Takes the row, unless the block ``failed``, and puts the gradients back."""
