"""Rows without gradients of weights: passes that stop short of them, and one product a weight at the end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import WeakIdKeyDictionary

from ..capture.batched import Frontier
from ..capture.factors import Factor, Shares, is_multiplied, is_recomputed, make_factor, pays
from ..capture.grads import Row, RowKey, add_grads, grad_dtype, put_grads, take_grads
from ..capture.passes import hooked, run_backward
from ..capture.products import Use, most_rows, uses_of
from ..capture.reach import Reach
from ..distributed.ranks import Ranks
from ..monitor.report import Factoring
from .parameters import Parameters
from .pending import Pending

_FEW_ROWS = 64
"""The most rows of a product for which one pass over all tasks beats one by one on a CPU: their passes then wait for
the weights to be read, which it reads once."""


_AT_ONCE = 8
"""Tasks of one batched pass: their products fill the machine, and what goes through the graph takes as much memory."""


class Candidate(NamedTuple):
    """A weight that may be factored.

    Attributes:
        sizes: the rows of its inputs, and the tasks that reach it.
    """

    uses: list[Use]
    sizes: tuple[int, int]


class UnseenUseError(Exception):
    """Factored weights, its arguments, have received gradients that the graph did not show."""


class BatchingError(Exception):
    """One pass for all tasks cannot run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The passes of a step, of which rows of some weights are coordinates (`mtl_optim.capture.factors`).

    Attributes:
        frontier: where batched passes begin; None for a pass a task.
        parameters: those that rows are over. dense: those of them whose rows are gradients, at ``places``.
        outside: leaves that are in no optimizer and receive the plain sum.
        factors: by the place of a parameter in ``parameters``, with its uses. ranks: whose rows add up.
        report: for `Report`. proven: whether a step has been taken this way before.
        taken: the dense part of the rows.
    """

    reach: Reach
    frontier: Frontier | None
    parameters: Parameters
    dense: Parameters
    places: list[int]
    outside: list[Tensor]
    factors: dict[int, Factor]
    uses: dict[int, list[Use]]
    report: Factoring
    proven: bool
    ranks: Ranks
    taken: dict[RowKey, Row] = dataclasses.field(default_factory=dict)

    def rows(self, named: Mapping[str, Tensor], pending: Pending, retain_graph: bool) -> dict[RowKey, Row]:
        """One row a loss.

        Raises:
            UnseenUseError, BatchingError: see there. Unless ``proven``, the graph is still there.
        """
        keep = retain_graph or (not self.proven and (self.frontier is not None or self.reach.custom))
        factored = self._agreed(
            functools.partial(self._looped, named, pending, keep)
            if self.frontier is None
            else functools.partial(self._batched, self.frontier, named, pending, keep)
        )
        pending.check_rows(self.taken)
        rows: dict[RowKey, Row] = {}
        for name, parts in zip(named, factored, strict=True):
            rows[name] = row = [parts.get(p) for p in range(len(self.parameters.managed))]
            for p, grad in zip(self.places, self.taken[name], strict=True):
                row[p] = grad
        return rows

    def likes(self) -> list[Tensor]:
        """What the rows hold for every parameter, by shape and dtype."""
        return [self.factors[p].like if p in self.factors else param for p, param in enumerate(self.parameters.managed)]

    def _agreed(self, passes: Callable[[], list[dict[int, Tensor]]]) -> list[dict[int, Tensor]]:
        """What some passes return, unless they have to be run another way on any rank."""
        found: list[dict[int, Tensor]] = []
        failure: UnseenUseError | BatchingError | None = None
        said: tuple[str, Any] | None = None
        try:
            found = passes()
        except UnseenUseError as error:
            places = {id(param): p for p, param in enumerate(self.parameters.managed)}
            failure, said = error, ("unseen", [places[id(param)] for param in error.args])
        except BatchingError as error:
            failure, said = error, ("batched", str(error))
        everywhere = self.ranks.agree("passes for factored rows", said)
        if failure is not None:
            raise failure
        for rank, there in enumerate(everywhere):
            if there is not None and there[0] == "unseen":
                raise UnseenUseError(*(self.parameters.managed[p] for p in there[1]))
            if there is not None:
                raise BatchingError(f"on rank {rank}, {there[1]}")
        return found

    def gradient(self, p: int, combined: Tensor) -> Tensor:
        """That of a parameter, from what its rows combine to."""
        if p not in self.factors:
            # One of several in a buffer would hold the memory of all.
            return combined if self.frontier is None else combined.clone()
        param = self.parameters.managed[p]
        grad = self.factors[p].expand(combined).to(grad_dtype(param))
        return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)

    def _looped(self, named: Mapping[str, Tensor], pending: Pending, retain_graph: bool) -> list[dict[int, Tensor]]:
        """A pass a task, in which the nodes of the products hand over what reaches them."""
        inputs = [*self._leaves(), *self._edges()]
        rows: list[dict[int, Tensor]] = []
        slots: dict[Node, list[tuple[int, int]]] = {}
        for p, uses in self.uses.items():
            for u, use in enumerate(uses):
                slots.setdefault(use.node, []).append((p, u))
        with hooked((node.register_prehook, functools.partial(self._settle, rows, at)) for node, at in slots.items()):
            for k, (name, loss) in enumerate(named.items()):
                rows.append({})
                pending.open(name, self.dense.managed, None)
                keep = retain_graph or k < len(named) - 1
                run_backward(functools.partial(loss.backward, retain_graph=keep, inputs=inputs))
                self._take(name, pending, bool(rows[-1]))
        return rows

    def _settle(
        self, rows: Sequence[dict[int, Tensor]], slots: Sequence[tuple[int, int]], grads: Sequence[Tensor | None]
    ) -> None:
        """Adds to the last row what has reached a node."""
        row, grad = rows[-1], grads[0]
        if grad is not None:
            for p, u in slots:
                part = self.factors[p].coordinates(u, grad)
                row[p] = row[p].add_(part) if p in row else part

    def _batched(
        self, frontier: Frontier, named: Mapping[str, Tensor], pending: Pending, retain_graph: bool
    ) -> list[dict[int, Tensor]]:
        """A pass a task through what it has for itself, and one for all of them from there on."""
        tasks, reach, place = len(named), self.reach, {id(param): p for p, param in enumerate(self.dense.managed)}
        if frontier.mixed:
            shapes = ", ".join(str(list(leaf.shape)) for leaf in frontier.mixed)
            raise BatchingError(f"losses use parameters of shapes {shapes} both by themselves and in what they share")
        wanted = set(map(id, self._leaves()))
        own = [[leaf for leaf in leaves if id(leaf) in wanted] for leaves in frontier.leaves]
        common: list[tuple[Node, Tensor]] = []
        for node, leaf in reach.leaves.items():
            if id(leaf) in wanted and reach.shared(node):
                common.append((node, leaf))
            elif id(leaf) in wanted:
                own[reach.tasks[node].bit_length() - 1].append(leaf)
        dense: list[Row] = []
        for k, loss in enumerate(named.values()):
            frontier.run(k, loss, own[k])
            dense.append(take_grads(self.dense.managed))
        factored: list[dict[int, Tensor]] = [{} for _ in named]
        edges = self._edges()
        targets: list[Tensor | GradientEdge] = [*edges, *(leaf for _, leaf in common)]
        for begin in range(0, tasks, _AT_ONCE):
            some = range(begin, min(begin + _AT_ONCE, tasks))
            found = self._through(frontier, targets, some, retain_graph or some.stop < tasks)
            arrived = dict(zip((edge.node for edge in edges), found, strict=False))
            for p, uses in self.uses.items():
                for u, use in enumerate(uses):
                    if (grads := arrived[use.node]) is None:
                        continue
                    parts = self.factors[p].coordinates(u, grads)
                    for k in reach.tasks_at(use.node, some):
                        part = parts[k - begin]
                        factored[k][p] = factored[k][p] + part if p in factored[k] else part
            for (node, leaf), grads in zip(common, found[len(edges) :], strict=True):
                if grads is not None and id(leaf) not in place:
                    add_grads([leaf], [grads.sum(0)])
                elif grads is not None:
                    for k in reach.tasks_at(node, some):
                        before = dense[k][place[id(leaf)]]
                        dense[k][place[id(leaf)]] = grads[k - begin] if before is None else before + grads[k - begin]
        for k, name in enumerate(named):
            pending.open(name, self.dense.managed, None)
            put_grads(self.dense.managed, dense[k])
            self._take(name, pending, bool(factored[k]))
        return factored

    def _through(
        self, frontier: Frontier, targets: Sequence[Tensor | GradientEdge], tasks: Sequence[int], retain_graph: bool
    ) -> Sequence[Tensor | None]:
        leaves = [*self.parameters.managed, *self.dense.others, *self.outside]
        before = take_grads(leaves)
        try:
            found = frontier.through(targets, tasks, retain_graph)
        except RuntimeError as error:
            raise BatchingError(str(error).split("\n", 1)[0]) from error
        if any(grad is not None for grad in take_grads(leaves)):
            raise BatchingError("a custom function has run a backward pass of its own")
        put_grads(leaves, before)
        return found

    def _take(self, name: str, pending: Pending, reached: bool) -> None:
        """Takes the dense part of a task's row."""
        if unseen := [param for p in self.factors if (param := self.parameters.managed[p]).grad is not None]:
            raise UnseenUseError(*unseen)
        self.taken[name] = pending.take(name, self.dense, None, self.outside, any_will_do=reached)

    def _leaves(self) -> list[Tensor]:
        return [*self.dense.managed, *self.dense.others, *self.outside]

    def _edges(self) -> list[GradientEdge]:
        return [
            GradientEdge(node, 0) for node in dict.fromkeys(use.node for uses in self.uses.values() for use in uses)
        ]


class FactoredPlans:
    """How the steps of one optimizer take their rows.

    Args:
        passes: see `MultiTaskOptimizer`.

    Attributes:
        proven: whether a step has been taken since something did not work.
    """

    def __init__(self, passes: str) -> None:
        self.proven = False
        self._passes = passes
        self._recomputed: dict[tuple[Any, ...], bool] = {}
        self._unseen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._one_by_one = False

    def make(self, losses: Sequence[Tensor], parameters: Parameters, others: bool, ranks: Ranks) -> Factored | None:
        """For a step; None where the graph hides parameters from all passes but ordinary ones.

        Args:
            parameters: those that rows are over.
            others: whether leaves outside them receive the plain sum; else nothing.
            ranks: of the run, whose rows have the same coordinates.

        Raises:
            ValueError: one pass for all tasks was asked for, and hooks forbid it.
        """
        reach = Reach(losses)
        own = None if reach.reentrant else self._candidates(parameters.managed, reach)
        told = None if own is None else [one if isinstance(one, str) else one.sizes for one in own]
        everywhere = ranks.agree("factored rows", told)
        if own is None or None in everywhere:
            return None
        factors: dict[int, Factor] = {}
        uses: dict[int, list[Use]] = {}
        how = []
        for p, (param, one, *there) in enumerate(zip(parameters.managed, own, *everywhere, strict=True)):
            found = one if isinstance(one, str) else _on_all_ranks(param, one, there)
            if isinstance(found, str) or isinstance(one, str):
                how.append(str(found))
                continue
            factors[p] = make_factor(param, one.uses, Shares(found, ranks.rank, ranks.gather))
            uses[p] = one.uses
            how.append(f"factored: {sum(found)} rows")
        places = [p for p in range(len(parameters.managed)) if p not in factors]
        known = set(map(id, (*parameters.managed, *parameters.others)))
        outside = [leaf for leaf in reach.leaves.values() if id(leaf) not in known] if others else []
        dense = parameters.at(places)
        frontier = self._frontier([*dense.managed, *dense.others, *outside], reach, parameters)
        report = Factoring("loop" if frontier is None else "batched", tuple(how))
        return Factored(reach, frontier, parameters, dense, places, outside, factors, uses, report, self.proven, ranks)

    def unseen(self, error: UnseenUseError) -> None:
        """Takes dense rows of some weights from now on."""
        self.proven = False
        for param in error.args:
            self._unseen[param] = True

    def give_up_batching(self) -> bool:
        """Whether one pass for all tasks was not asked for, and is not tried again."""
        self._one_by_one, self.proven = True, False
        return self._passes == "auto"

    def _candidates(self, params: Sequence[Tensor], reach: Reach) -> list[Candidate | str]:
        nodes = {id(leaf): node for node, leaf in reach.leaves.items()}
        return [self._candidate(nodes.get(id(param)), p, param, reach) for p, param in enumerate(params)]

    def _candidate(self, node: Node | None, p: int, param: Tensor, reach: Reach) -> Candidate | str:
        """A weight that may be factored, or why it is not."""
        if node is None or not reach.shared(node):
            return "not reached" if node is None else "one task"
        uses, num_tasks = self._uses(node, p, param, reach), reach.tasks[node].bit_count()
        if isinstance(uses, str):
            return f"dense: {uses}"
        return Candidate(uses, (sum(use.rows for use in uses), num_tasks))

    def _uses(self, node: Node, p: int, param: Tensor, reach: Reach) -> list[Use] | str:
        """The uses of a weight, or why its rows are dense."""
        if not param.is_floating_point() or param.dim() < 2 or param.layout is not torch.strided:
            return "no matrix"
        if param in self._unseen:
            return "a custom function has used it unseen"
        if _has_hooks(param):
            return "it has hooks"
        uses = uses_of(node, param, reach)
        if isinstance(uses, str):
            return uses
        rows = sum(use.rows for use in uses)
        if not pays(reach.tasks[node].bit_count(), param, uses, rows, 1):
            return f"{rows} rows are too many"
        key = (p, *((use.node.name(), use.rows) for use in uses))
        if key not in self._recomputed:
            self._recomputed[key] = any(map(is_recomputed, uses))
        if self._recomputed[key]:
            return "its inputs are recomputed at every look"
        return uses if all(map(is_multiplied, uses)) else "inputs that are not dense and real"

    def _frontier(self, leaves: Sequence[Tensor], reach: Reach, parameters: Parameters) -> Frontier | None:
        """Where passes that serve several tasks begin; None where every task has its own."""
        hooked = [list(leaf.shape) for leaf in leaves if _has_hooks(leaf)]
        if self._passes == "batched":
            if hooked:
                raise ValueError(
                    f'passes="batched" gives no task a backward pass of its own, which the hooks of parameters of '
                    f'shapes {", ".join(map(str, hooked))} wait for; use passes="auto"'
                )
            if reach.splits:
                raise ValueError(
                    'passes="batched" would hand zeros, not "absent", through a custom function with several outputs '
                    "(that of DistributedDataParallel with find_unused_parameters=True is one), so that heads behind "
                    'it counted as shared; use passes="auto"'
                )
            return Frontier(reach)
        if self._passes == "loop" or self._one_by_one or hooked or reach.custom:
            return None
        rows = most_rows(reach)
        if rows == 0 or (parameters.managed[0].device.type == "cpu" and rows > _FEW_ROWS):
            return None
        frontier = Frontier(reach)
        return None if frontier.nested or frontier.mixed else frontier


def _on_all_ranks(param: Tensor, own: Candidate, told: Sequence[str | tuple[int, int]]) -> list[int] | str:
    """The rows of a weight's inputs on all ranks, or why it is not factored."""
    sizes = []
    for rank, one in enumerate(told):
        if isinstance(one, str):
            return f"{one} on rank {rank}"
        sizes.append(one[0])
    num_tasks = max(one[1] for one in told if not isinstance(one, str))
    if not pays(num_tasks, param, own.uses, sum(sizes), len(sizes)):
        return f"dense: {sum(sizes)} rows on {len(sizes)} ranks are too many"
    return sizes


def _has_hooks(leaf: Tensor) -> bool:
    return bool(leaf._backward_hooks) or bool(getattr(leaf, "_post_accumulate_grad_hooks", None))
