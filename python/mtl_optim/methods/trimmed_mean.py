"""TrimmedMean: the mean without the extremes, element by element (Yin et al. 2018, arXiv 1803.01498)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable

from .base import About, Combination
from .rows import Problem, RowMethod


@dataclasses.dataclass(frozen=True, eq=False)
class TrimmedMean(RowMethod):
    """The coordinate-wise trimmed mean: of every element the mean of the K values without the extremes.

    Yin et al. 2018 (arXiv 1803.01498), Definition 2, with a number of values in place of a share. A task that takes
    part but does not reach a parameter has a gradient of zero there, which counts; one that is absent does not.

    Args:
        trim: how many of the largest, and of the smallest, are left out; an integer >= 0.

    There is no state, and there are no weights. An element of d is NaN where one of the values is; infinite values are
    extremes like others, and when they are left out GradScaler does not come to see them.

    Raises:
        TypeError, ValueError: trim is no integer >= 0.
    """

    name: ClassVar[str] = "trimmedmean"
    about: ClassVar[About] = About(
        "rows", "none", "trim rows, whatever they hold, cannot carry d away", "2 reads of the rows"
    )
    weighs_rows: ClassVar[bool] = False

    trim: int

    def __post_init__(self) -> None:
        if isinstance(self.trim, bool) or not isinstance(self.trim, int):
            raise TypeError(f"TrimmedMean: expected trim as an integer, found {self.trim!r}")
        if self.trim < 0:
            raise ValueError(f"TrimmedMean: expected trim >= 0, found {self.trim}")

    def combine_rows(self, problem: Problem) -> Combination:
        """The trimmed mean over the tasks that take part.

        Raises:
            ValueError: fewer than 2 trim + 1 of them.
        """
        rows, out = problem.rows, problem.out
        parts = _by_tasks(rows, [0] * rows.num_params if problem.groups is None else problem.groups)
        for tasks in parts:
            self.check_tasks(len(tasks))
        everyone = tuple(range(rows.num_tasks))
        if parts.keys() <= {everyone}:
            return Combination(mtl_kernels.trimmed_mean(rows, self.trim, out=out), problem.gram, None, None)
        combined: list[Tensor | None] = [None] * rows.num_params
        for tasks, params in parts.items():
            part = RowTable([[rows.entries[k][p] for p in params] for k in tasks], captured=rows.captured)
            targets = None if out is None else [out[p] for p in params]
            for p, found in zip(params, mtl_kernels.trimmed_mean(part, self.trim, out=targets), strict=True):
                combined[p] = found
        return Combination(combined, problem.gram, None, None)

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError for fewer than 2 trim + 1 tasks."""
        least = 2 * self.trim + 1
        if num_tasks < least:
            raise ValueError(
                f"TrimmedMean(trim={self.trim}) needs at least 2 trim + 1 = {least} tasks, found {num_tasks}; lower "
                f"trim to at most {(num_tasks - 1) // 2}"
            )


def _by_tasks(rows: RowTable, groups: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """The parameters that a task reaches, by the tasks that reach any of their group."""
    present: dict[int, set[int]] = {}
    for k, row in enumerate(rows.entries):
        for p, tensor in enumerate(row):
            if tensor is not None:
                present.setdefault(groups[p], set()).add(k)
    parts: dict[tuple[int, ...], list[int]] = {}
    for p, like in enumerate(rows.like):
        if like is not None:
            parts.setdefault(tuple(sorted(present[groups[p]])), []).append(p)
    return parts
