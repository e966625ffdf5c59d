"""The checks of what a combination of losses is built with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tasks = int | Sequence[str]
"""How many tasks there are, or what they are called."""

Vector = Tensor | Sequence[float] | Mapping[str, float]
"""One number per task, in the order of the tasks or by their names."""


def task_names(owner: str, tasks: Tasks | None) -> tuple[tuple[str, ...] | None, int | None]:
    """The names of the tasks and how many there are, each None where it was not said.

    Raises:
        TypeError, ValueError: neither an integer >= 1 nor distinct names.
    """
    if tasks is None:
        return None, None
    if isinstance(tasks, (list, tuple)):
        names = tuple(tasks)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"{owner}: expected the names of the tasks as strings, found {tasks!r}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{owner}: expected at least one name, all of them distinct, found {tasks!r}")
        return names, len(names)
    if isinstance(tasks, bool) or not isinstance(tasks, int):
        raise TypeError(f"{owner}: expected the number of tasks or a list of their names, found {tasks!r}")
    if tasks < 1:
        raise ValueError(f"{owner}: expected at least one task, found {tasks}")
    return None, tasks


def number(owner: str, name: str, value: float, allowed: Callable[[float], bool], range_: str) -> float:
    """A finite hyper-parameter within its range.

    Raises:
        TypeError, ValueError: it is no number, not finite, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: expected {name} as a number, found {value!r}")
    if not math.isfinite(value) or not allowed(value):
        raise ValueError(f"{owner}: expected a finite {name} {range_}, found {value}")
    return float(value)


def positive(owner: str, name: str, value: float) -> float:
    """A finite number > 0; see `number`."""
    return number(owner, name, value, lambda v: v > 0, "> 0")


def non_negative(owner: str, name: str, value: float) -> float:
    """A finite number >= 0; see `number`."""
    return number(owner, name, value, lambda v: v >= 0, ">= 0")


def vector(owner: str, name: str, values: Vector, tasks: Tasks | None = None) -> Tensor:
    """K finite numbers as a float32 tensor (float64 stays so), in the order of ``tasks``; may wait for the device.

    Raises:
        TypeError, ValueError: no numbers, another number of them or other names, or some that are not finite.
    """
    if isinstance(values, Mapping):
        names = list(values) if tasks is None else tasks
        if isinstance(names, int) or set(names) != set(values):
            expected = (
                "a sequence, as the tasks have no names" if isinstance(names, int) else f"one for each of {names}"
            )
            raise ValueError(f"{owner}: expected {name} as {expected}, found {dict(values)}")
        values = [values[task] for task in names]
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor([float(value) for value in values], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{owner}: expected {name} as numbers, found {values!r}") from error
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{owner}: expected {name} of numbers, found {values.dtype}")
    count = tasks if tasks is None or isinstance(tasks, int) else len(tasks)
    if values.dim() != 1 or values.shape[0] == 0 or (count is not None and values.shape[0] != count):
        raise ValueError(
            f"{owner}: expected {name} with one number per task ({count or 'K'}), found shape {list(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{owner}: expected finite numbers in {name}, found {values.tolist()}")
    return values.detach().clone() if values.dtype == torch.float64 else values.detach().float().clone()


def tasks_of(values: Vector) -> Tasks:
    """The tasks that a vector is for: their names where it has them, else how many there are."""
    return tuple(values) if isinstance(values, Mapping) else len(values)


def preference_vector(owner: str, values: Vector, tasks: Tasks | None = None) -> Tensor:
    """A preference: K numbers >= 0, not all of them 0; see `vector`.

    Raises:
        TypeError, ValueError: it is none.
    """
    preference = vector(owner, "preference", values, tasks)
    if bool((preference < 0).any()) or not bool((preference > 0).any()):
        raise ValueError(
            f"{owner}: expected a preference of numbers >= 0, some of them > 0; found {preference.tolist()}"
        )
    return preference
