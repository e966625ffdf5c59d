"""The rows that a step has captured so far and not combined yet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .capture import Capture
from .grads import Row, same_tensors
from .graph import reaches_nothing


class Pending:
    """Rows by task name, over one list of parameters.

    Args:
        capture: how a backward pass becomes a row.

    Attributes:
        rows: one per task. losses: the values of their losses, for methods that need them.
        accumulating: whether `backward` may add to the rows without being asked to.
    """

    def __init__(self, capture: Capture) -> None:
        self.rows: dict[str, Row] = {}
        self.losses: dict[str, Tensor] = {}
        self.accumulating = False
        self._params: list[Tensor] = []
        self._capture = capture

    def clear(self) -> None:
        """Forgets everything, so that the memory of the rows is free."""
        self.rows, self.losses, self.accumulating, self._params = {}, {}, False, []
        self._capture.forget()

    def keep(self, rows: dict[str, Row], losses: dict[str, Tensor], params: list[Tensor]) -> None:
        """Replaces what is kept."""
        self.rows, self.losses, self._params = rows, losses, params

    def check_new(self, name: str) -> None:
        """Raise RuntimeError if the task has a row already."""
        if name in self.rows:
            raise RuntimeError(
                f"task {name!r} was already captured in this step; pass accumulate=True to add to it, or "
                "combine() first"
            )

    def check_params(self, params: Sequence[Tensor]) -> None:
        """Raise RuntimeError if the rows were captured over other parameters."""
        if self.rows and not same_tensors(self._params, params):
            raise RuntimeError(
                "the parameters that require grad changed since tasks were captured; call zero_grad() and capture again"
            )

    def prepare(self, tasks: Sequence[str], params: Sequence[Tensor]) -> None:
        """Makes ready for rows of these tasks; see `Capture.prepare`."""
        self._capture.prepare(tasks, params)

    def open(self, name: str, params: Sequence[Tensor], previous: Row | None) -> None:
        """Sets ``.grad`` for a pass of the task, on top of its row so far."""
        self._capture.open(name, params, previous)

    def take(self, name: str, params: Sequence[Tensor], previous: Row | None, others: Sequence[Tensor]) -> Row:
        """The row now in ``.grad``; see `Capture.take`. Raise ValueError if it is empty."""
        row = self._capture.take(params, previous, others)
        if all(grad is None for grad in row):
            raise reaches_nothing(name)
        return row

    def check_rows(self, rows: Mapping[str, Row]) -> None:
        """Raise RuntimeError if one is not what was captured; see `Capture.check`."""
        self._capture.check(rows)

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
            warnings.warn(
                "a pass that failed has changed rows captured before: all rows of this step were dropped",
                UserWarning,
                stacklevel=4,
            )
        elif not self.rows:
            self._capture.forget()


def stack_losses(losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device) -> Tensor:
    """Loss values in the order of the tasks, float64 ``[K]``; 1 for an absent task."""
    absent = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([losses[name].to(device) if name in losses else absent for name in tasks])
