"""The independent batches that a step takes of every task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..capture.grads import BatchOfTask, Row, RowKey
from ..methods import Method


@dataclasses.dataclass(frozen=True)
class Batches:
    """How many there are, 1 but for a few methods, and whose rows are whose.

    Rows go by the name of their task where there is one batch, else by task and batch.
    """

    method: str
    number: int

    @classmethod
    def of(cls, method: Method) -> Batches:
        """Those that a method takes."""
        return cls(type(method).__name__, method.num_batches)

    def check(self, batch: object) -> None:
        """Raise TypeError or ValueError unless ``batch`` is the number of one."""
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"expected batch as an integer, found {batch!r}")
        if not 0 <= batch < self.number:
            raise ValueError(
                f"batch={batch}: {self.method} takes {self.number} independent batches a step, 0 to {self.number - 1}"
                if self.number > 1
                else f"batch={batch}: {self.method} takes one batch a step; leave batch= out, and pass accumulate=True "
                "for micro-batches"
            )

    def key(self, task: str, batch: int) -> RowKey:
        """What the row of a task goes by."""
        return task if self.number == 1 else BatchOfTask(task, batch)

    def is_last(self, batch: int) -> bool:
        """Whether the rows of this batch are those that are combined."""
        return batch == self.number - 1

    def tasks(self, rows: Mapping[RowKey, Row]) -> list[str]:
        """The tasks that have rows."""
        return list(dict.fromkeys(key.task if isinstance(key, BatchOfTask) else key for key in rows))

    def split(self, rows: Mapping[RowKey, Row]) -> list[dict[str, Row]]:
        """The rows of each batch, by task.

        Raises:
            RuntimeError: a task lacks some.
        """
        tasks, numbers = self.tasks(rows), range(self.number)
        missing = [BatchOfTask(task, b) for task in tasks for b in numbers if self.key(task, b) not in rows]
        if missing:
            first, listed = missing[0], ", ".join(map(repr, missing))
            raise RuntimeError(
                f"{self.method} takes {self.number} independent batches of every task in a step; missing: {listed}. "
                f"Capture them first, with opt.backward(losses, batch={first.batch}) or "
                f"opt.task({first.task!r}, batch={first.batch}); to read a gradient, too, all of them are needed"
            )
        return [{task: rows[self.key(task, b)] for task in tasks} for b in numbers]
