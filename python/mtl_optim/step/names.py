"""The names of tasks."""

from __future__ import annotations

from collections.abc import Iterable

from mtl_kernels import MAX_TASKS


def check_task_name(name: object) -> None:
    """Raise TypeError unless ``name`` is a string."""
    if not isinstance(name, str):
        raise TypeError(f"expected a task name as a string, found {name!r}")


def fixed_tasks(tasks: Iterable[str] | None) -> tuple[str, ...] | None:
    """The task names given to the constructor, checked."""
    if tasks is None:
        return None
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Iterable):
        raise TypeError(f"expected tasks as a sequence of names, found {tasks!r}")
    names = tuple(tasks)
    for name in names:
        check_task_name(name)
    if not names:
        raise ValueError("expected at least one name in tasks, found none; tasks=None takes names as they appear")
    if len(set(names)) != len(names):
        raise ValueError(f"expected distinct names in tasks, found {list(names)}")
    if len(names) > MAX_TASKS:
        raise ValueError(f"expected at most {MAX_TASKS} tasks, found {len(names)}")
    return names


def with_new(known: tuple[str, ...], names: Iterable[str], fixed: bool) -> tuple[str, ...]:
    """The known task names, then those of ``names`` that are new.

    Raises:
        ValueError: there are new ones although the names are fixed, or too many.
    """
    new = [name for name in names if name not in known]
    if new and fixed:
        raise ValueError(f"unknown task {new[0]!r}; this optimizer was built with tasks={list(known)}")
    tasks = (*known, *new)
    if len(tasks) > MAX_TASKS:
        raise ValueError(f"{len(tasks)} task names seen, at most {MAX_TASKS} are supported; are names made anew?")
    return tasks
