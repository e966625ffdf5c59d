"""A training step, from losses to ``.grad``: passes become rows, rows weights, and weights the gradient."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..capture import CAPTURES
from ..capture.grads import Isolation, Row, RowKey, add_grads, take_grads
from ..capture.passes import run_backward, run_passes, weighted_passes
from ..cuda_graphs import refuse_capture
from ..distributed.local import check_single_rank
from ..options import Options
from .advice import Advice
from .batches import Batches
from .block import TaskBlock
from .combination import Combined, Combiner, mean_weights
from .factored import BatchingError, Factored, FactoredPlans, UnseenUseError
from .features import Features
from .lazy import held, hold, stand_aside
from .losses import check_loss_value, is_stacked, named_losses, stack_losses
from .names import with_new
from .parameters import Parameters, select_parameters
from .partial import Partial
from .pending import Pending
from .progress import Progress
from .refresh import Reusable
from .surroundings import ADDS_ELSEWHERE, Surroundings
from .transform import tell_norms, transformed

_ALIVE: weakref.WeakSet[TrainingStep] = weakref.WeakSet()
"""All of this process: what one combines, another should not add to."""


class Call(NamedTuple):
    """A call of `MultiTaskOptimizer.backward`, checked.

    Attributes:
        named: the losses, transformed. tasks: all that are known by now.
        names_given: whether the losses came with names.
    """

    named: dict[str, Tensor]
    tasks: tuple[str, ...]
    parameters: Parameters
    retain_graph: bool
    names_given: bool


@dataclasses.dataclass(eq=False)
class OpenBlock:
    """What is to be known when the open block ends."""

    block: TaskBlock
    parameters: Parameters
    outside: list[Tensor]
    isolation: Isolation
    versions: dict[int, int]
    around: list[tuple[Tensor, Tensor | None, int]]
    done: bool = False


class TrainingStep:
    """Carries the steps of one optimizer.

    One object, changed in place: wrappers that stand in for an optimizer (Lightning's) run its methods on
    themselves, where an attribute that a method sets would stay out of sight of the optimizer.

    Args:
        optimizers: whose param groups hold the parameters.
        options: see `MultiTaskOptimizer`.
        progress: where it stands.
        told: see `Advice`.
    """

    def __init__(self, optimizers: Sequence[Optimizer], options: Options, progress: Progress, told: set[str]) -> None:
        self.options = options
        self.progress = progress
        self.pending = Pending(CAPTURES[options.capture](), self._combine_early)
        self._optimizers = optimizers
        self._advice = Advice(told)
        self._combiner = Combiner(options)
        self.batches = Batches.of(options.method)
        self._surroundings = Surroundings()
        self._plans = FactoredPlans(options.passes) if options.capture == "factored" else None
        self._open: OpenBlock | None = None
        _ALIVE.add(self)

    def backward(
        self, losses: object, accumulate: bool, retain_graph: bool, batch: int = 0, features: object = None
    ) -> None:
        """See `MultiTaskOptimizer.backward`."""
        self.check_idle("backward()")
        self.batches.check(batch)
        check_single_rank()
        if (every := self.options.every) > 1:
            refuse_capture(f"refresh_every={every} decides on the host", "use refresh_every=1")
        if self._plans is not None:
            _check_factored("backward(accumulate=True)" if accumulate else None)
        named, stacked = named_losses(losses), is_stacked(losses)
        tasks = self.tasks_with(named)
        parameters = self.parameters()
        self._check_continues("backward()", parameters)
        if not accumulate and not self.pending.accumulating:
            for name in named:
                self.pending.check_new(self.batches.key(name, batch))
        if self.options.transform is not None:
            named, restacked = transformed(self.options.transform, named, tasks, isinstance(losses, Mapping))
            stacked = stacked or restacked
        if stacked:
            self._advice.once(
                "stacked",
                "the losses were stacked into one tensor, through which each task reaches every parameter "
                "(with zeros), so that heads count as shared; pass them as a list or dict",
            )
        self._surroundings.look(named, parameters, self._keeps, _combined_elsewhere(self))
        self._advice.findings(self._surroundings.findings)
        call = Call(named, tasks, parameters, retain_graph, isinstance(losses, Mapping))
        if features is not None:
            self._run_through(call, features, accumulate)
        elif accumulate or not (self._run_weighted(call) or self._run_shortcut(call)):
            self._run_each(call, accumulate, batch)

    def _run_each(self, call: Call, accumulate: bool, batch: int) -> None:
        """One pass a loss, each a row; then the combination, unless more are to come."""
        named, tasks, parameters, retain_graph, names_given = call
        managed, pending, batches = parameters.managed, self.pending, self.batches
        pending.prepare([batches.key(name, batch) for name in tasks], managed)
        outside = self._surroundings.leaves()
        keeps = self._keeps or (outside and not batches.is_last(batch))
        inputs = [*managed, *parameters.others] if keeps else None
        isolation = Isolation(managed, parameters.others)
        rows, versions = dict(pending.rows), pending.versions()
        try:
            for k, (name, loss) in enumerate(named.items()):
                key = batches.key(name, batch)
                previous = rows.get(key)
                pending.open(key, managed, previous)
                keep = retain_graph or k < len(named) - 1
                run_backward(functools.partial(loss.backward, retain_graph=keep, inputs=inputs))
                rows[key] = pending.take(key, parameters, previous, outside)
            values = self._losses_with(named, batch) if self.options.method.needs_losses else {}
            more = accumulate or batches.number > 1
            combined = None
            if not more:
                self._check_rows(rows, managed)
                combined = self._combined(tasks, rows, values, parameters, names_given)
        except BaseException:
            isolation.undo()
            pending.after_failure(versions)
            raise
        isolation.finish(keep_others=not batches.is_last(batch))
        self.progress.tasks = tasks
        if combined is None:
            pending.keep(rows, values, managed)
            pending.accumulating = batches.number == 1
        else:
            self._hand_over(combined, batches.tasks(rows), managed)

    def _run_through(self, call: Call, features: object, accumulate: bool) -> None:
        """One pass a loss down to the features, each a row; and one from there with what the rows combine to."""
        named, tasks, parameters, retain_graph, names_given = call
        pending = self.pending
        if accumulate or pending.rows:
            raise RuntimeError(
                "features= combines the losses of one call: without accumulate=True, and after combine() where rows "
                "were captured; sum micro-batches up by calling backward() for each of them"
            )
        through = Features.of(features, named, parameters, self.options, self._keeps)
        whole = through.in_front(parameters)
        isolation = Isolation(parameters.managed, parameters.others)
        rows: dict[RowKey, Row] = {}
        try:
            for k, (name, loss) in enumerate(named.items()):
                rows[name] = through.row(name, loss, whole, retain_graph or k < len(named) - 1)
            sums = through.sums(list(rows.values()))
            values = self._losses_with(named, 0) if self.options.method.needs_losses else {}
            combined = self._combined(tasks, rows, values, whole, names_given)
            through.run_behind(combined.grads, sums, retain_graph)
            behind = take_grads(parameters.managed)
        except BaseException:
            isolation.undo()
            raise
        isolation.finish()
        self.progress.tasks = tasks
        beside, owner = ([*of][len(through.tensors) :] for of in (combined.grads, combined.owner))
        grads = [a if b is None else b for a, b in zip(beside, behind, strict=True)]
        combined = dataclasses.replace(combined, grads=grads, owner=owner)
        self._hand_over(combined, list(named), parameters.managed)

    def _run_weighted(self, call: Call) -> bool:
        """One weighted backward pass with the last weights; False where new ones are due."""
        named, _, parameters, retain_graph, _ = call
        last, managed, pending = self.progress.reusable, parameters.managed, self.pending
        if last is None or pending.rows or not last.serves(named, managed, self.options.every):
            return False
        if (dtype := last.too_coarse(named)) is not None:
            self._advice.once(
                "coarse",
                f"losses in {str(dtype).removeprefix('torch.')} would round the weights, so that refresh_every has no "
                "effect here; compute them in float32, from outputs.float()",
            )
            return False
        passes = last.passes(named, parameters, self.options.head_scaling == "none", self._keeps)
        if passes is None:
            self._advice.once(
                "hidden",
                "the graph of the losses hides parameters (reentrant checkpointing?), so that refresh_every "
                "has no effect here; call checkpoint(..., use_reentrant=False)",
            )
            return False
        pending.prepare(self.progress.tasks, managed)
        isolation = Isolation(managed, parameters.others)
        try:
            pending.open(last.present[0], managed, None)  # the row of any task will do for the sum over all
            run_passes(passes, retain_graph)
            grads = pending.take(last.present[0], parameters, None, self._surroundings.leaves())
        except BaseException:
            isolation.undo()
            pending.after_failure({})
            raise
        isolation.finish()
        with torch.no_grad():
            add_grads(managed, grads)
        pending.clear()
        progress = self.progress
        progress.reusable = last.older(managed)
        progress.report = None if progress.report is None else progress.report.aged()
        progress.has_gradient = True
        return True

    def _run_shortcut(self, call: Call) -> bool:
        """Rows of cheaper passes, a weighted one for what is not in the Gram matrix; False where there is no way."""
        named, _, parameters, _, _ = call
        partial = self._partial(named, parameters)
        inside = parameters if partial is None else partial.rows
        plans = self._plans
        others = partial is None and not self._keeps
        factored = None if plans is None else plans.make(list(named.values()), inside, others)
        if plans is not None and factored is None:
            self._advice.once(
                "unfactored",
                "the graph of the losses is hidden by reentrant checkpointing, so that rows are captured whole as with "
                'capture="harvest"; call checkpoint(..., use_reentrant=False)',
            )
        if plans is None or factored is None:
            if partial is not None:
                self._run_apart(call, partial, inside, None)
            return partial is not None
        try:
            self._run_apart(call, partial, inside, factored)
        except UnseenUseError as error:
            plans.unseen(error)
            if factored.proven:
                raise RuntimeError(
                    "a custom function has added to the gradients of weights in a pass of its own, and not in earlier "
                    "steps; run the forward pass again: their rows are captured whole from now on"
                ) from error
            return self._run_shortcut(call)
        except BatchingError as error:
            asked_for = not plans.give_up_batching()
            if asked_for or factored.proven:
                advice = 'use passes="auto" or "loop"' if asked_for else "run the forward pass again"
                raise RuntimeError(f"one backward pass for all tasks cannot run: {error}; {advice}") from error
            self._advice.once("loop", f"tasks have a backward pass each, as one for all of them cannot run: {error}")
            return self._run_shortcut(call)
        plans.proven = True
        return True

    def _run_apart(self, call: Call, partial: Partial | None, inside: Parameters, factored: Factored | None) -> None:
        """A step with rows over some parameters, or with coordinates in them, or both."""
        named, tasks, parameters, retain_graph, names_given = call
        managed, pending, losses = parameters.managed, self.pending, list(named.values())
        more = partial is not None and bool(partial.rest or partial.plain)
        pending.prepare(list(tasks), inside.managed)
        isolation = Isolation(managed, [*parameters.others, *([] if factored is None else factored.outside)])
        rows: dict[RowKey, Row] = {}
        try:
            if factored is not None:
                rows = factored.rows(named, pending, retain_graph or more)
                self._advice.packed(self.batches.split(rows)[-1], inside.managed)
            else:
                for k, (name, loss) in enumerate(named.items()):
                    pending.open(name, inside.managed, None)
                    keep = retain_graph or more or k < len(named) - 1
                    run_backward(functools.partial(loss.backward, retain_graph=keep, inputs=inside.managed))
                    rows[name] = pending.take(name, inside, None, [], any_will_do=True)
                self._check_rows(rows, inside.managed)
            values = self._losses_with(named, 0) if self.options.method.needs_losses else {}
            whole = rows if partial is None else {name: partial.whole(row, parameters) for name, row in rows.items()}
            combined = self._combined(tasks, whole, values, parameters, names_given)
            grads, report = list(combined.grads), combined.report
            if factored is not None:
                report = dataclasses.replace(report, factoring=factored.report)
                for p, at in enumerate(range(len(managed)) if partial is None else partial.places):
                    if (grad := grads[at]) is not None:
                        grads[at] = factored.gradient(p, grad)
            if partial is not None:
                weights = mean_weights(report)
                own = [weights[report.tasks.index(name)] for name in named]
                run_passes(weighted_passes(losses, own, partial.rest, partial.plain), retain_graph)
                grads = [a if b is None else b for a, b in zip(grads, take_grads(managed), strict=True)]
        except BaseException:
            isolation.undo()
            pending.after_failure({})
            raise
        isolation.finish()
        self.progress.tasks = tasks
        self._hand_over(dataclasses.replace(combined, grads=grads, report=report), list(named), managed)

    def _partial(self, named: Mapping[str, Tensor], parameters: Parameters) -> Partial | None:
        """How passes end early; None where all parameters are in the Gram matrix, or their rows have to be whole."""
        if not parameters.partial or self.pending.rows or self._share_is_due or self.options.capture == "arena":
            return None
        if any(loss.dtype.itemsize < 4 for loss in named.values()):
            self._advice.once(
                "coarse-gram",
                "losses in 16 bits would round the weights, so that gram=False saves nothing here; compute them in "
                "float32, from outputs.float()",
            )
            return None
        partial = Partial.of(list(named.values()), parameters, self._keeps)
        if partial is None:
            self._advice.once(
                "hidden-gram",
                "the graph of the losses hides parameters (reentrant checkpointing?), so that gram=False saves nothing "
                "here; call checkpoint(..., use_reentrant=False)",
            )
        return partial

    def open_block(self, block: TaskBlock) -> None:
        """Hides the gradients that are there, so that a row can be captured."""
        what = f"task({block.name!r})"
        self.check_idle(what)
        if self._plans is not None:
            _check_factored(what)
        check_single_rank()
        parameters, pending, key = self.parameters(), self.pending, self.batches.key(block.name, block.batch)
        self._check_continues(what, parameters)
        if not block.accumulate:
            pending.check_new(key)
        managed = parameters.managed
        pending.prepare([self.batches.key(name, block.batch) for name in self.tasks_with([block.name])], managed)
        outside, elsewhere = self._surroundings.leaves(), _combined_elsewhere(self)
        versions, isolation = pending.versions(), Isolation(managed, parameters.others)
        try:
            pending.open(key, managed, pending.rows.get(key))
        except BaseException:
            isolation.undo()
            raise
        keeps = self._keeps or not self.batches.is_last(block.batch)
        around = [*outside, *elsewhere] if keeps else elsewhere
        before = [(param, grad := held(param), _version(grad)) for param in around]
        self._open = OpenBlock(block, parameters, outside, isolation, versions, before)
        if keeps:
            for param in around:
                hold(param, None)

    def close_block(self, block: TaskBlock, failed: bool) -> None:
        """Takes the row, unless the block failed, and puts the gradients back."""
        opened = self._open
        if opened is None or opened.block is not block:
            raise RuntimeError("this task block is not the open one")
        self._open = None
        self._look_around(opened)
        pending, name, key = self.pending, block.name, self.batches.key(block.name, block.batch)
        try:
            if failed:
                return
            row = pending.take(key, opened.parameters, pending.rows.get(key), opened.outside)
            tasks = self.tasks_with([name])
            if self.options.method.needs_losses and block.loss is None:
                raise ValueError(
                    f"{self.options.method!r} needs the value of the loss of task {name!r}: with "
                    f"opt.task({name!r}) as task: set task.loss = loss in the block"
                )
            if block.loss is not None:
                check_loss_value(name, block.loss)
            losses = self._losses_with({} if block.loss is None else {name: block.loss}, block.batch)
            opened.isolation.finish(keep_others=not self.batches.is_last(block.batch))
            self.progress.tasks = tasks
            pending.keep({**pending.rows, key: row}, losses, opened.parameters.managed)
            opened.done = True
        finally:
            if not opened.done:
                opened.isolation.undo()
                pending.after_failure(opened.versions)

    def _look_around(self, opened: OpenBlock) -> None:
        """Puts gradients outside the optimizer back, or warns of what was added to those that another one combines."""
        if self._keeps or not self.batches.is_last(opened.block.batch):
            for param, grad, _ in opened.around:
                hold(param, grad)
        elif any(held(param) is not grad or _version(grad) != version for param, grad, version in opened.around):
            self._advice.once("elsewhere", ADDS_ELSEWHERE)

    def combine(self) -> None:
        """Combines the captured rows into ``.grad``.

        Raises:
            RuntimeError: there are none, or a block is open.
        """
        self.check_idle("combine()")
        parameters = self.parameters()
        self.pending.check_params(parameters.managed)
        if not self.pending.rows:
            if self._combined_by_a_look(parameters):
                self.progress.read_early = False
                return
            raise RuntimeError("there is nothing to combine; capture tasks with opt.task(name) or backward() first")
        pending = self.pending
        self._check_rows(pending.rows, parameters.managed)
        combined = self._combined(self.progress.tasks, pending.rows, pending.losses, parameters, True)
        self._hand_over(combined, self.batches.tasks(pending.rows), parameters.managed)

    def _combine_early(self) -> None:
        """Combines because somebody looks at a gradient."""
        with torch.inference_mode(False):
            self.combine()
        self.progress.read_early = True

    def make_gradient(self) -> None:
        """Combines what was captured.

        Raises:
            RuntimeError: nothing was since the last step.
        """
        self.pending.check_params(self.parameters().managed)
        if self.pending.rows:
            self.combine()
        # GradScaler does not call step() when it skips one: then only the gradients tell that they were dealt with.
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        if not (self.progress.has_gradient and any(p.grad is not None for group in groups for p in group["params"])):
            raise RuntimeError(
                "step() with no task captured since the last step or zero_grad(); call opt.backward([...]) or use "
                "opt.task(name) first, or step the wrapped optimizer (opt.optimizer) to use plain gradients"
            )

    def stepped(self) -> None:
        """The gradient was used."""
        self.progress.has_gradient = self.progress.read_early = False

    def clear(self) -> None:
        """Drops rows that were not combined; the gradient no longer counts."""
        self.pending.clear()
        self.stepped()

    def check_idle(self, what: str) -> None:
        """Raise RuntimeError inside a task block."""
        if self._open is not None:
            raise RuntimeError(f"{what} inside the block of opt.task({self._open.block.name!r}); leave the block first")

    def parameters(self) -> Parameters:
        """Those of the param groups, as they are now."""
        return select_parameters(group for optimizer in self._optimizers for group in optimizer.param_groups)

    def tasks_with(self, names: Sequence[str] | Mapping[str, Tensor]) -> tuple[str, ...]:
        """The known task names and those of ``names`` that are new."""
        return with_new(self.progress.tasks, names, self.options.fixed_tasks is not None)

    @property
    def _keeps(self) -> bool:
        """Whether gradients outside the optimizer are left as they are."""
        return self.options.outside == "keep"

    @property
    def _share_is_due(self) -> bool:
        """Whether this step compares its Gram matrix with that over all parameters."""
        every, last = self.options.share_every, self.progress.report
        if every is None:
            return False
        return last is None or last.gram_share is None or last.gram_share.age + 1 >= every

    def _losses_with(self, named: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The loss values of the step's last batch, with those of ``named``."""
        return self.pending.losses_with(named if self.batches.is_last(batch) else {})

    def _combined_by_a_look(self, parameters: Parameters) -> bool:
        """Whether somebody who read a gradient had the rows of this step combined, and the result is still there."""
        return self.progress.read_early and any(param.grad is not None for param in parameters.managed)

    def _check_continues(self, what: str, parameters: Parameters) -> None:
        """Raise RuntimeError where what is captured next would not belong to the rows or gradients that are there."""
        self.pending.check_params(parameters.managed)
        if self._combined_by_a_look(parameters):
            raise RuntimeError(
                f"{what} after the rows of this step were combined, because a gradient was read (clipping, logging, a "
                "scaler) before all tasks were captured. Read gradients after the last task; call opt.combine() first "
                "to add one combination to another, or opt.zero_grad() if that step was abandoned or skipped (by a "
                "scaler) and its gradients were set to zero another way"
            )
        self.progress.read_early = False

    def _check_rows(self, rows: Mapping[RowKey, Row], managed: Sequence[Tensor]) -> None:
        """Raise RuntimeError if some are not what was captured; look for parameters that tasks share in parts."""
        self.pending.check_rows(rows)
        self._advice.packed(self.batches.split(rows)[-1], managed)

    def _combined(
        self,
        tasks: tuple[str, ...],
        rows: Mapping[RowKey, Row],
        losses: Mapping[str, Tensor],
        parameters: Parameters,
        names_given: bool,
    ) -> Combined:
        batches = self.batches.split(rows)
        last = batches[-1]
        if len(last) == 1:
            self._advice.lone_task(next(iter(last)), tasks, names_given)
        method = self.options.method
        absent: Row = [None] * len(parameters.managed)
        values = None
        if method.needs_losses:
            device = next((param.device for param in parameters.managed), torch.device("cpu"))
            values = stack_losses(losses, tasks, device)
        *earlier, found = [[batch.get(name, absent) for name in tasks] for batch in batches]
        with torch.no_grad():
            combined = self._combiner(tasks, found, parameters, values, earlier, self._share_is_due)
        tell_norms(self.options.transform, combined.report, list(last))
        if method.stops_at_zero_rows:
            self._advice.zero_rows(combined.report)
        return combined

    def _hand_over(self, combined: Combined, present: list[str], managed: Sequence[Tensor]) -> None:
        """Puts the gradients where the optimizer reads them, and keeps what later steps may reuse."""
        lazy = stand_aside(managed)
        with torch.no_grad():
            add_grads(managed, combined.grads)
        for param, one in zip(managed, lazy, strict=True):
            if one is not None:
                one.settle(param.grad)
        self.pending.clear()
        progress = self.progress
        report = combined.report
        progress.report = report.with_share_of(progress.report) if report.gram_share is None else report
        progress.has_gradient = True
        progress.reusable = None
        if self.options.every > 1:
            progress.reusable = Reusable.of(combined, present, managed)


def _combined_elsewhere(step: TrainingStep) -> list[Tensor]:
    """The parameters that other optimizers of this kind combine, and this one does not hold."""
    others = [other for other in _ALIVE if other is not step and other._open is None]
    if not others:
        return []
    own = {id(p) for optimizer in step._optimizers for group in optimizer.param_groups for p in group["params"]}
    return [
        param
        for other in others
        for optimizer in other._optimizers
        for group in optimizer.param_groups
        if group.get("mtl", True)
        for param in group["params"]
        if id(param) not in own
    ]


def _check_factored(what: str | None) -> None:
    """Raise where ``capture="factored"`` cannot do what was asked for."""
    if what is not None:
        raise ValueError(
            f'{what} with capture="factored": rows of several passes have other coordinates each, which cannot be '
            'added; pass all losses to one backward(), or use capture="harvest"'
        )
    refuse_capture(
        'capture="factored" would look through the autograd graph on the host', 'use capture="harvest" or "arena"'
    )


def _version(grad: Tensor | None) -> int:
    """What differs when a backward pass has added to it in place."""
    return 0 if grad is None else grad._version
