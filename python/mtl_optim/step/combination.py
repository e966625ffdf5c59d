"""From the rows of a step to the gradient of every parameter: which are shared, one solve, one combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import Part, RowTable

from ..capture.grads import Row, as_real
from ..cuda_graphs import capturing, refuse_capture
from ..monitor.report import GramShare, Report
from ..options import Options
from .heads import Heads
from .parameters import Parameters
from .transform import learned_parameters

_MASKS_KEPT = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Combined:
    """The outcome of one step.

    Attributes:
        grads: the gradient of every managed parameter, None where no task reaches it.
        owner: per parameter, the only task (index) that reaches it; None where several or none do.
        report: see `Report`.
    """

    grads: Row
    owner: list[int | None]
    report: Report

    @property
    def anything_shared(self) -> bool:
        """Whether several tasks reach some parameter."""
        return any(k is None and grad is not None for k, grad in zip(self.owner, self.grads, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """What becomes of each parameter, by which tasks reach it.

    Attributes:
        reached_by: per parameter the tasks (indices) that reach it.
        shared: the parameters that are combined with the weights they are counted in.
        rest: those that are combined with weights of others. owner: see `Combined`.
        groups: the problem of each of ``shared``. problems: see `Report`.
        pattern: ``[S][K]``, whether a task reaches any shared parameter of a problem.
        places: of ``shared``, see `Parameters`.
    """

    reached_by: list[list[int]]
    shared: list[int]
    rest: list[int]
    owner: list[int | None]
    groups: list[int]
    problems: tuple[int, ...]
    pattern: tuple[tuple[bool, ...], ...]
    places: list[int]


class Combiner:
    """Combines rows with a method; see `MultiTaskOptimizer` for the options.

    Attributes:
        heads: those it has seen.
    """

    def __init__(self, options: Options) -> None:
        self.heads = Heads()
        self._options = options
        self._masks: dict[tuple[tuple[tuple[bool, ...], ...], bool], Tensor] = {}
        self._in_graph = False  # a captured graph goes on reading the masks it was captured with
        self._not_heads = set(map(id, learned_parameters(options.transform)))
        self._last: tuple[Any, Roles] | None = None  # without tensors, which would be kept alive

    def __call__(
        self,
        tasks: tuple[str, ...],
        rows: Sequence[Row],
        parameters: Parameters,
        losses: Tensor | None,
        earlier: Sequence[Sequence[Row]] = (),
        share: bool = False,
        total: Callable[[Tensor], Tensor] | None = None,
        counted: Sequence[bool] = (),
    ) -> Combined:
        """Combines K rows over P parameters, writing into the rows.

        Args:
            rows: one per task, all None for an absent task.
            losses: ``[K]`` for methods that need them.
            earlier: rows of the step's other batches, for methods that take several; ``rows`` are those of the last,
                which alone say what is shared.
            share: whether to compare the Gram matrix with that over all parameters, where the rows hold them.
            total, counted: see `mtl_kernels.Part`; None where the rows are whole.
        """

        def table_of(rows: Sequence[Row], places: Sequence[int]) -> RowTable:
            part = None if total is None else Part(total, [counted[p] for p in places])
            return _table(rows, places, has_complex, part)

        has_complex = any(map(torch.is_complex, parameters.managed))
        options, method = self._options, self._options.method.bound_to(tasks)
        roles = self._roles(tasks, rows, parameters, method.weighs_alone)
        shared, rest, owner = roles.shared, roles.rest, roles.owner
        if method.needs_heads and shared:
            method = method.with_heads(self._head_norms(tasks, rows, owner, parameters.managed, table_of))
        grads: Row = [None if k is None else rows[k][p] for p, k in enumerate(owner)]
        if not shared:
            report = self._nothing_shared(tasks, rows)
            if parameters.partial and int(report.mask.sum()) > 1:
                raise ValueError(
                    "no parameter that several tasks reach is in the Gram matrix: their param groups have gram=False; "
                    "leave some of the shared layers in, such as the last ones"
                )
            _weigh_rest(grads, rows, rest, report)
            return Combined(grads, owner, report)
        tables = [table_of(batch, shared) for batch in (*earlier, rows)]
        table = tables[-1]
        active = self._mask(roles.pattern, table.device, options.granularity == "model")
        everyone = all(map(all, roles.pattern))
        found = method.combine(
            tables,
            groups=None if options.granularity == "model" else roles.groups,
            losses=losses,
            active=None if everyone else active,
            out=table.like,
            places=roles.places,
        )
        for p, grad in zip(shared, found.combined, strict=True):
            grads[p] = grad
        if has_complex:
            for p in (p for p in shared if parameters.managed[p].is_complex()):
                grads[p] = torch.view_as_complex(grads[p])  # type: ignore[arg-type]
        problems = roles.problems
        report = Report(tasks, found.gram, found.weights, active, found.certificate, problems)
        if options.head_scaling == "weights" and found.weights is not None:
            problem_of = {problem: s for s, problem in enumerate(problems)} if options.granularity == "group" else {}
            _scale_heads(grads, owner, [problem_of.get(g) for g in parameters.group_of], found.weights, report)
        if share and (several := [p for p in rest if len(roles.reached_by[p]) > 1]):
            others = mtl_kernels.gram(table_of(rows, several))
            partial, present = (found.gram, active) if active.dim() == 1 else (found.gram.sum(0), active.any(0))
            report = dataclasses.replace(report, gram_share=GramShare.of(partial, others, present))
        _weigh_rest(grads, rows, rest, report)
        return Combined(grads, owner, report)

    def _roles(self, tasks: tuple[str, ...], rows: Sequence[Row], parameters: Parameters, weighs_alone: bool) -> Roles:
        """Those of these rows; most steps have those of the one before."""
        present = [[grad is not None for grad in row] for row in rows]
        known = present, parameters.group_of, parameters.in_gram, parameters.places
        if self._last is not None and self._last[0] == known and not weighs_alone:
            return self._last[1]
        managed, in_gram = parameters.managed, parameters.in_gram
        reached_by = [[k for k, row in enumerate(present) if row[p]] for p in range(len(managed))]
        shared = self._shared(tasks, reached_by, managed) if weighs_alone else None
        if shared is None:
            shared = [p for p, task in enumerate(reached_by) if len(task) > 1]
        rest = [p for p, inside in enumerate(in_gram) if not inside and reached_by[p]]
        shared = [p for p in shared if in_gram[p]]
        together = {*shared, *rest}
        owner = [task[0] if len(task) == 1 and p not in together else None for p, task in enumerate(reached_by)]
        groups, problems = self._problems(shared, parameters.group_of)
        roles = Roles(
            reached_by, shared, rest, owner, groups, problems, _pattern(shared, groups, reached_by, len(tasks)),
            [parameters.places[p] for p in shared],
        )  # fmt: skip
        self._last = known, roles
        return roles

    def _shared(
        self, names: tuple[str, ...], reached_by: Sequence[Sequence[int]], params: Sequence[Tensor]
    ) -> list[int] | None:
        """What to weight where one task is there alone: all it reaches but its known heads. None in any other step.

        A parameter is known as a task's head once a step of several tasks had that one alone reach it.
        """
        present = {k for tasks in reached_by for k in tasks}
        if len(present) > 1:
            self.heads.learn(names, reached_by, params)
            return None
        task_of = self.heads.task_of
        found = [p for p, tasks in enumerate(reached_by) if tasks and task_of(params[p]) != names[tasks[0]]]
        if self._options.method.needs_heads and len(found) == sum(map(bool, reached_by)):
            return None  # no head to go by
        return found

    def _head_norms(
        self,
        tasks: tuple[str, ...],
        rows: Sequence[Row],
        owner: Sequence[int | None],
        managed: Sequence[Tensor],
        table_of: Callable[[Sequence[Row], Sequence[int]], RowTable],
    ) -> Tensor:
        """The norm of each task's gradient for the parameters that it alone reaches, float64 ``[K]``.

        Raises:
            ValueError: a task that reaches anything reaches no such parameter.
        """
        heads = [p for p, k in enumerate(owner) if k is not None and id(managed[p]) not in self._not_heads]
        owned = {owner[p] for p in heads}
        for k, row in enumerate(rows):
            if k not in owned and any(grad is not None for grad in row):
                raise ValueError(
                    f"{self._options.method!r} goes by the gradient of each task's head, and task {tasks[k]!r} reaches "
                    "no parameter of its own; heads in param groups with mtl=False are not seen. GradNormBalance() "
                    "takes no heads"
                )
        own: list[Row] = [[grad if owner[p] == k else None for p, grad in enumerate(row)] for k, row in enumerate(rows)]
        return mtl_kernels.norms(mtl_kernels.gram(table_of(own, heads)))

    def _problems(self, shared: Sequence[int], group_of: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """The problem of each shared parameter, and what the problems stand for."""
        if self._options.granularity == "model":
            return [0] * len(shared), ()
        if self._options.granularity == "parameter":
            return list(range(len(shared))), tuple(shared)
        problems = sorted({group_of[p] for p in shared})
        index = {group: s for s, group in enumerate(problems)}
        return [index[group_of[p]] for p in shared], tuple(problems)

    def _nothing_shared(self, tasks: tuple[str, ...], rows: Sequence[Row]) -> Report:
        present = tuple(any(grad is not None for grad in row) for row in rows)
        device = next((grad.device for row in rows for grad in row if grad is not None), torch.device("cpu"))
        active = self._mask((present,), device, True)
        gram = torch.zeros((len(tasks), len(tasks)), dtype=torch.float64, device=device)
        return Report(tasks, gram, active.double(), active)

    def _mask(self, pattern: tuple[tuple[bool, ...], ...], device: torch.device, alone: bool) -> Tensor:
        """``pattern`` on the device, copied there once: a copy at every step would make the host wait.

        Args:
            alone: its first line only.
        """
        self._in_graph = self._in_graph or capturing()
        found = self._masks.get((pattern, alone))
        if found is None or found.device != device:
            refuse_capture("the mask of which task reaches which parameter would be copied to the device")
            if len(self._masks) >= _MASKS_KEPT and not self._in_graph:
                self._masks.clear()
            lines = pattern[0] if alone else pattern
            found = self._masks[pattern, alone] = torch.tensor(lines, dtype=torch.bool, device=device)
        return found


def _pattern(
    shared: Sequence[int], groups: Sequence[int], reached_by: Sequence[Sequence[int]], num_tasks: int
) -> tuple[tuple[bool, ...], ...]:
    """[S][K]: whether a task reaches any shared parameter of a problem."""
    pattern = [[False] * num_tasks for _ in range(max(groups, default=-1) + 1)]
    for p, s in zip(shared, groups, strict=True):
        for k in reached_by[p]:
            pattern[s][k] = True
    return tuple(map(tuple, pattern))


def _table(rows: Sequence[Row], places: Sequence[int], has_complex: bool, part: Part | None = None) -> RowTable:
    """The rows over some parameters, complex ones as pairs of reals."""
    some = [[row[p] for p in places] for row in rows]
    if has_complex:
        some = [[as_real(grad) for grad in row] for row in some]
    return RowTable(some, captured=True, part=part)


def mean_weights(report: Report) -> Tensor:
    """A task's weight, the mean over the problems in which it takes part, float64 ``[K]``; 1 where there are none."""
    weights = report.mask.double() if report.weights is None else report.weights
    weights, active = weights.reshape(-1, weights.shape[-1]), report.mask.reshape(-1, weights.shape[-1])
    count = active.sum(0)
    return torch.where(count > 0, torch.where(active, weights, 0.0).sum(0) / count.clamp(min=1), 1.0)


def _weigh_rest(grads: Row, rows: Sequence[Row], rest: Sequence[int], report: Report) -> None:
    """Combines what is not in the Gram matrix, of rows that were captured whole."""
    if not rest:
        return
    table = _table(rows, rest, has_complex=True)
    found = mtl_kernels.combine(table, mean_weights(report), out=table.like)
    for p, grad in zip(rest, found, strict=True):
        is_complex = any(one is not None and one.is_complex() for one in (row[p] for row in rows))
        grads[p] = torch.view_as_complex(grad) if is_complex else grad


def _scale_heads(
    grads: Row, owner: Sequence[int | None], problem_of: Sequence[int | None], weights: Tensor, report: Report
) -> None:
    """Multiplies every single-task gradient by a weight of its task.

    That is the weight in the problem the parameter belongs to, if the task takes part there; else the mean
    of the task's weights over the problems in which it does; else 1.
    """
    mean = mean_weights(report)
    weights, active = weights.reshape(-1, weights.shape[-1]), report.mask.reshape(-1, weights.shape[-1])
    own = torch.where(active, weights, mean)
    for p, k in enumerate(owner):
        grad, problem = grads[p], problem_of[p]
        if k is not None and grad is not None:
            grad.mul_(mean[k] if problem is None else own[problem, k])
