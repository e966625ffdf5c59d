"""What methods share that can be told how much each task counts."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cuda_graphs import refuse_capture
from .base import Method

_P = TypeVar("_P", bound="Preferring")


@dataclasses.dataclass(frozen=True, eq=False)
class Preferring(Method):
    """A method with a preference vector: one number >= 0 for each task. It is an option, not part of the state.

    Args:
        pref: finite numbers >= 0, not all 0, by the names of the tasks, ``{"depth": 1.0, "normals": 0.01}``; or a
            sequence of K, for the tasks in the order in which they are first seen, which is safe where all come in
            every step. None: all tasks alike, in the way the method says.

    Raises:
        TypeError, ValueError: it is neither of these, or holds something else than finite numbers >= 0 of which one
            is positive.
    """

    pref: Sequence[float] | Mapping[str, float] | None = None
    _on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _bound: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pref", check_preference(type(self).__name__, self.pref))

    def __getstate__(self) -> dict[str, Any]:
        # Loaded with another map_location, a copy on a device would be found under the name of the old one.
        return {**self.__dict__, "_on_device": {}, "_bound": {}}

    def bound_to(self: _P, tasks: tuple[str, ...]) -> _P:
        """The method, with this one's state, for these tasks in their order; see `Method.bound_to`."""
        if not isinstance(self.pref, Mapping):
            return self
        if tasks not in self._bound:
            if missing := [task for task in tasks if task not in self.pref]:
                raise ValueError(
                    f"{type(self).__name__} has preferences for {list(self.pref)} and none for task {missing[0]!r}; "
                    "add it, or name the losses so: opt.backward({name: loss, ...})"
                )
            bound = copy.copy(self)  # with the same state
            object.__setattr__(bound, "pref", tuple(self.pref[task] for task in tasks))
            self._bound[tasks] = bound
        return self._bound[tasks]  # type: ignore[no-any-return]

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError unless the preferences are those of K tasks, in their order."""
        if self.pref is None:
            return
        if isinstance(self.pref, Mapping):
            raise ValueError(
                f"{type(self).__name__} was given preferences by the names {list(self.pref)}, which a Gram matrix does "
                "not tell; call .bound_to(tasks) with the names of its rows first"
            )
        if num_tasks != len(self.pref):
            raise ValueError(
                f"{type(self).__name__} has {len(self.pref)} preferences for {num_tasks} tasks; pass one for each task"
            )

    def _preference(self, device: torch.device) -> Tensor | None:
        """The preferences, float64 ``[K]``, copied to a device once: a copy at every step would make the host wait."""
        if self.pref is None or isinstance(self.pref, Mapping):
            return None
        if device not in self._on_device:
            refuse_capture(f"the preferences of {type(self).__name__} would be copied to the device")
            with torch.inference_mode(False):
                self._on_device[device] = torch.tensor(self.pref, dtype=torch.float64, device=device)
        return self._on_device[device]


def check_preference(owner: str, values: object) -> tuple[float, ...] | dict[str, float] | None:
    """The preferences as a tuple, or a dict by the names of tasks; None as it is. Raise for what `Preferring` does."""
    if values is None:
        return None
    if isinstance(values, Mapping):
        if not all(isinstance(name, str) for name in values):
            raise TypeError(f"{owner}: expected the names of tasks in pref as strings, found {list(values)}")
        return dict(zip(values, _numbers(owner, list(values.values())), strict=True))
    return _numbers(owner, values.detach().tolist() if isinstance(values, Tensor) else values)


def _numbers(owner: str, values: object) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{owner}: expected pref as a sequence of numbers, one per task, found {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{owner}: expected numbers in pref, found {value!r}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{owner}: expected finite numbers >= 0 in pref, found {value!r}")
    if not any(values):
        raise ValueError(f"{owner}: expected a number > 0 in pref, found {list(values)}")
    return tuple(float(value) for value in values)
