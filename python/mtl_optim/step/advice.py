"""What users are told, each thing once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..capture.grads import Row
from ..cuda_graphs import capturing
from ..monitor.report import Report
from ..warn import warn_user
from .supports import packed_parameters

_EVERY = 16
"""Steps from one look at the numbers on a GPU to the next."""


class Advice:
    """Warnings of one optimizer.

    Args:
        told: the kinds of warnings that were given, shared with copies of the optimizer.
    """

    def __init__(self, told: set[str]) -> None:
        self._told = told
        self._tasks_looked_at: set[frozenset[str]] = set()
        self._lone: str | None = None
        self._steps = 0
        self._on_its_way: tuple[torch.cuda.Event, Tensor, tuple[str, ...]] | None = None

    def once(self, kind: str, text: str) -> None:
        """Warns unless this kind was told before."""
        if kind not in self._told:
            self._told.add(kind)
            warn_user(text)

    def findings(self, found: dict[str, str]) -> None:
        """Warns of what `Surroundings` has found."""
        while found:
            self.once(*found.popitem())

    def lone_task(self, name: str, known: Sequence[str], named: bool) -> None:
        """One task alone is a mistake where there never was another: with a name of its own, others may follow."""
        if len(known) > 1:
            return
        if not named or self._lone == name:
            self.once(
                "single",
                f"there is nothing to combine: only task {name!r} is present. Pass the losses one by one, not their "
                "sum",
            )
        self._lone = name

    def packed(self, rows: Mapping[str, Row], params: Sequence[Tensor]) -> None:
        """Looks once for every set of tasks at the supports of their gradients."""
        present = frozenset(rows)
        if "packed" in self._told or len(present) < 2 or present in self._tasks_looked_at or capturing():
            return
        self._tasks_looked_at.add(present)
        if found := packed_parameters(list(rows.values())):
            listed = ", ".join(f"{p} (shape {list(params[p].shape)})" for p in found[:4]) + (
                ", ..." if len(found) > 4 else ""
            )
            self.once(
                "packed",
                f"the tasks use different parts of parameter {listed}: per-task scalars in one vector, or one layer "
                "for all heads? It counts as shared, and enters the Gram matrix with zeros for the other tasks. Make "
                "it one parameter per task, or put it in a param group with mtl=False",
            )

    def zero_rows(self, report: Report) -> None:
        """Warns of a task whose gradient is zero; on a GPU within some steps, without a wait."""
        if "zero" in self._told:
            return
        if report.gram.device.type != "cuda":
            self._tell_zero(_zero_rows(report), report.tasks)
        elif self._on_its_way is not None:
            event, flags, tasks = self._on_its_way
            if not capturing() and event.query():
                self._on_its_way = None
                self._tell_zero(flags, tasks)
        elif self._steps % _EVERY == 0 and not capturing():
            flags = _zero_rows(report)
            host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(flags.device))
            self._on_its_way = event, host, report.tasks
        self._steps += 1

    def _tell_zero(self, flags: Tensor, tasks: Sequence[str]) -> None:
        names = [repr(name) for name, flag in zip(tasks, flags.tolist(), strict=True) if flag]
        if names:
            self.once(
                "zero",
                f"the gradient of task {', '.join(names)} is zero (all targets ignored, or a loss times 0?): no step "
                "descends it, and the shared parameters get no gradient in such a step. Not passing the loss leaves "
                'such a task out, and so does MGDA(zero_rows="skip")',
            )


def _zero_rows(report: Report) -> Tensor:
    """bool ``[K]``: the active tasks whose row is zero in some problem."""
    zero = (report.gram.diagonal(dim1=-2, dim2=-1) == 0) & report.mask
    return zero if zero.dim() == 1 else zero.any(0)
