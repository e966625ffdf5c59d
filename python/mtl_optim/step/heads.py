"""Which parameters were seen to be a task's own, for the steps in which that task comes alone."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Heads:
    """The task that alone reached a parameter, when several tasks last came together; without keeping it alive."""

    def __init__(self) -> None:
        self._tasks: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def learn(self, names: Sequence[str], reached_by: Sequence[Sequence[int]], params: Sequence[Tensor]) -> None:
        """From a step of several tasks. What none of them reached stays what it was."""
        for param, tasks in zip(params, reached_by, strict=True):
            if len(tasks) == 1:
                self._tasks[param] = names[tasks[0]]
            elif tasks:
                self._tasks.pop(param, None)

    def task_of(self, param: Tensor) -> str | None:
        """Whose head it is, as far as that is known."""
        return self._tasks.get(param)

    def named(self, params: Sequence[Tensor]) -> list[str | None]:
        """`task_of` of each, for `restore`."""
        return [self.task_of(param) for param in params]

    def restore(self, params: Sequence[Tensor], named: Sequence[str | None]) -> None:
        """What `named` returned for these parameters, or for their copies."""
        self._tasks.clear()
        for param, name in zip(params, named, strict=True):
            if name is not None:
                self._tasks[param] = name
