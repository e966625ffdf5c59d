"""The rows that a step has captured so far and not combined yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..capture.grads import BatchOfTask, Row, RowKey, same_tensors
from ..capture.protocol import Capture
from ..distributed.sending import Sender, Sent
from ..warn import warn_user
from .lazy import LazyGrad, stand_aside, stand_in
from .losses import reaches_nothing
from .parameters import Parameters


class Pending:
    """Rows by task name, or task and batch, over one list of parameters.

    Args:
        capture: how a backward pass becomes a row.
        combine: what somebody who looks at a gradient before its combination calls.

    Attributes:
        rows: one per task and batch. losses: the values of their losses, for methods that need them.
        accumulating: whether `backward` may add to the rows without being asked to.
    """

    def __init__(self, capture: Capture, combine: Callable[[], None]) -> None:
        self.rows: dict[RowKey, Row] = {}
        self.losses: dict[str, Tensor] = {}
        self.accumulating = False
        self._params: list[Tensor] = []
        self._lazy: list[LazyGrad | None] = []
        self._capture = capture
        self._combine = combine

    def clear(self) -> None:
        """Forgets everything, so that the memory of the rows is free."""
        stand_aside(self._params)
        self.rows, self.losses, self.accumulating, self._params, self._lazy = {}, {}, False, [], []
        self._capture.forget()

    def keep(self, rows: dict[RowKey, Row], losses: dict[str, Tensor], params: list[Tensor]) -> None:
        """Replaces what is kept; ``.grad`` then stands for the combination to come."""
        self.rows, self.losses, self._params = rows, losses, params
        self._lazy = stand_in(params, list(rows.values()), self._combine)

    def check_new(self, key: RowKey) -> None:
        """Raise RuntimeError if there is such a row already."""
        if key in self.rows:
            another = "batch= of another one" if isinstance(key, BatchOfTask) else "combine() first"
            raise RuntimeError(
                f"task {key!r} was already captured in this step; pass accumulate=True to add to it, or {another}"
            )

    def check_params(self, params: Sequence[Tensor]) -> None:
        """Looks whether the rows still belong to this step and these parameters.

        Where all gradients were cleared or replaced since they were captured, without `zero_grad` of this optimizer,
        the step was abandoned: the rows are dropped, with a warning.

        Raises:
            RuntimeError: they were captured over other parameters, or some of the gradients were cleared or replaced.
        """
        if not self.rows:
            return
        if not same_tensors(self._params, params):
            raise RuntimeError(
                "the parameters that require grad changed since tasks were captured; call zero_grad() and capture again"
            )
        there = [param.grad is lazy for param, lazy in zip(params, self._lazy, strict=True) if lazy is not None]
        if all(there):
            return
        if any(there):
            raise RuntimeError(
                f"the gradients of {there.count(False)} of {len(there)} parameters were cleared or replaced "
                "(model.zero_grad(), .grad = ...) while captured rows wait to be combined. To abandon the step call "
                "opt.zero_grad(); to drop or replace single gradients call opt.combine() before you do"
            )
        captured = ", ".join(map(repr, self.rows))
        warn_user(
            f"the gradients were cleared or replaced without opt.zero_grad() after {captured} had been captured: the "
            "step counts as abandoned, and its rows were dropped. Call opt.zero_grad() instead of model.zero_grad() or "
            "opt.optimizer.zero_grad(), and opt.combine() before you set gradients yourself"
        )
        self.clear()

    def prepare(self, tasks: Sequence[RowKey], params: Sequence[Tensor]) -> None:
        """Makes ready for rows of these tasks; see `Capture.prepare`."""
        self._capture.prepare(tasks, params)

    def open(self, key: RowKey, params: Sequence[Tensor], previous: Row | None) -> None:
        """Sets ``.grad`` for a pass of the task, on top of its row so far."""
        self._capture.open(key, params, previous)

    def take(
        self,
        key: RowKey,
        parameters: Parameters,
        previous: Row | None,
        outside: Sequence[Tensor],
        any_will_do: bool = False,
    ) -> Row:
        """The row now in ``.grad``; see `Capture.take`.

        Raises:
            ValueError: nothing at all was reached, unless ``any_will_do``.
        """
        others = [*parameters.others, *outside]
        row = self._capture.take(parameters.managed, previous, others)
        if (
            not any_will_do
            and all(grad is None for grad in row)
            and all(param.grad is None for param in parameters.others)
        ):
            raise reaches_nothing(key)
        return row

    def send(self, key: RowKey, row: Row, sender: Sender) -> Row:
        """What stands for a complete row that is on its way to the other ranks; its own memory is free again."""
        with torch.no_grad():
            sent = sender.send(row)
        self._capture.let_go(key, row, sent.kept)
        return sent

    def check_rows(self, rows: Mapping[RowKey, Row]) -> None:
        """Raise RuntimeError if one is not what was captured; see `Capture.check`."""
        self._capture.check({key: row.kept if isinstance(row, Sent) else row for key, row in rows.items()})

    def losses_with(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss values of the step with those of ``named`` added."""
        values = dict(self.losses)
        for name, loss in named.items():
            value = loss.detach().reshape(()).double()
            values[name] = values[name] + value if name in values else value
        return values

    def versions(self) -> dict[int, int]:
        """The version counters of the rows, by which a change in place shows."""
        return {id(grad): grad._version for row in self.rows.values() for grad in row if grad is not None}

    def after_failure(self, versions: Mapping[int, int]) -> None:
        """Drops rows that a failed pass has changed: half a micro-batch must not be stepped with."""
        if self._capture.close() or versions != self.versions():
            self.clear()
            warn_user("a pass that failed has changed rows captured before: all rows of this step were dropped")
        elif not self.rows:
            self._capture.forget()
