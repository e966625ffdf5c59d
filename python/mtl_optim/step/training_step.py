"""A training step, from losses to ``.grad``: passes become rows, rows weights, and weights the gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..capture import CAPTURES
from ..capture.grads import Isolation
from ..capture.passes import run_backward
from ..cuda_graphs import refuse_capture
from ..distributed.ranks import Ranks, RanksDisagreeError
from ..options import Options
from .advice import Advice
from .block import TaskBlock
from .call import Call
from .lazy import held, hold
from .losses import check_loss_value, is_stacked, named_losses
from .names import with_new
from .parameters import Parameters, Selection
from .pending import Pending
from .progress import Progress
from .settlement import Settlement
from .shortcuts import Shortcuts
from .surroundings import ADDS_ELSEWHERE, HIDDEN, Kept, Surroundings
from .transform import averaged, transformed

_ALIVE: weakref.WeakSet[TrainingStep] = weakref.WeakSet()
"""All of this process: what one combines, another should not add to."""


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
        ranks: how gradients lie on the ranks of a run.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], options: Options, progress: Progress, told: set[str], ranks: Ranks
    ) -> None:
        self.options = options
        self.progress = progress
        self.pending = Pending(CAPTURES[options.capture](), self._combine_early)
        self._optimizers, self._ranks = optimizers, ranks
        self._advice = Advice(told)
        self._selection = Selection()
        self._surroundings = Surroundings()
        self._settlement = Settlement(options, progress, self.pending, self._advice, ranks)
        self.batches = self._settlement.batches
        self._shortcuts = Shortcuts(self._settlement, self._surroundings.leaves)
        self._open: OpenBlock | None = None
        _ALIVE.add(self)

    @property
    def heads(self) -> list[str | None]:
        """Whose head each parameter of the param groups is, as far as that was seen."""
        return self._settlement.heads.named(self._every_parameter())

    @heads.setter
    def heads(self, named: Sequence[str | None]) -> None:
        self._settlement.heads.restore(self._every_parameter(), named)

    def backward(
        self, losses: object, accumulate: bool, retain_graph: bool, batch: int = 0, features: object = None
    ) -> None:
        """See `MultiTaskOptimizer.backward`."""
        with self._together():
            self._backward(losses, accumulate, retain_graph, batch, features)

    def _backward(self, losses: object, accumulate: bool, retain_graph: bool, batch: int, features: object) -> None:
        self.check_idle("backward()")
        self.batches.check(batch)
        if (every := self.options.every) > 1:
            refuse_capture(f"refresh_every={every} decides on the host", "use refresh_every=1")
        if self.options.capture == "factored":
            _check_factored("backward(accumulate=True)" if accumulate else None)
        named, stacked = named_losses(losses), is_stacked(losses)
        point = f"backward() of tasks {', '.join(named)}{' (accumulate)' if accumulate else ''}"
        point += "" if features is None else " (features)"
        tasks = self.tasks_with(named)
        parameters = self.parameters()
        self._check_continues("backward()", parameters)
        if not accumulate and not self.pending.accumulating:
            for name in named:
                self.pending.check_new(self.batches.key(name, batch))
        if self.options.transform is not None:
            if self._ranks.several:
                self._ranks.check(f"{point}, before the transform")
                named = averaged(named, self._ranks.mean)
            named, restacked = transformed(self.options.transform, named, tasks, isinstance(losses, Mapping))
            stacked = stacked or restacked
        if stacked:
            self._advice.once(
                "stacked",
                "the losses were stacked into one tensor, through which each task reaches every parameter "
                "(with zeros), so that heads count as shared; pass them as a list or dict",
            )
        if not self._ranks.hides:
            elsewhere = functools.partial(_combined_elsewhere, self)
            self._surroundings.look(named, parameters, self._settlement.keeps, elsewhere)
        self._advice.findings(self._surroundings.findings)
        call = Call(named, tasks, parameters, retain_graph, isinstance(losses, Mapping))
        if features is not None and self._ranks.hides:
            raise ValueError(
                "features= where parameters are sharded is not handled: passes down to the features do not go through "
                "the framework's hooks, so that gradients of the heads would not be reduced; use replicated parameters "
                "(data_parallel=), or leave features= out"
            )
        self._ranks.check(point)  # what this rank alone refuses was refused before the others wait for it in a pass
        if features is not None:
            self._shortcuts.through(call, features, accumulate)
        elif accumulate or not (self._shortcuts.weighted(call) or self._shortcuts.apart(call)):
            self._run_each(call, accumulate, batch)

    def _run_each(self, call: Call, accumulate: bool, batch: int) -> None:
        """One pass a loss, each a row; then the combination, unless more are to come."""
        named, tasks, parameters, retain_graph, names_given = call
        managed, pending, batches = parameters.managed, self.pending, self.batches
        pending.prepare([batches.key(name, batch) for name in tasks], managed)
        outside = self._surroundings.leaves()
        keeps = self._settlement.keeps or (outside and not batches.is_last(batch))
        kept = Kept(list(named.values()), parameters) if keeps else None
        inputs = None if kept is None else kept.inputs
        if kept is not None and inputs is None:
            self._advice.once("hidden-outside", HIDDEN)
        isolation = Isolation(managed, parameters.others)
        rows, versions = dict(pending.rows), pending.versions()
        more = accumulate or batches.number > 1
        sender = None if more else self._ranks.sender(len(named), managed)
        try:
            for k, (name, loss) in enumerate(named.items()):
                key = batches.key(name, batch)
                previous = rows.get(key)
                pending.open(key, managed, previous)
                keep = retain_graph or k < len(named) - 1
                run_backward(functools.partial(loss.backward, retain_graph=keep, inputs=inputs))
                rows[key] = pending.take(key, parameters, previous, outside)
                if sender is not None:
                    rows[key] = pending.send(key, rows[key], sender)
            values = self._settlement.losses_with(named, batch) if self.options.method.needs_losses else {}
            combined = None
            if not more:
                self._settlement.check_rows(rows, managed)
                combined = self._settlement.combined(tasks, rows, values, parameters, names_given)
        except BaseException as error:
            try:
                if sender is not None and isinstance(error, Exception):
                    sender.give_up()
            finally:
                isolation.undo()
                pending.after_failure(versions)
            raise
        finally:
            if kept is not None:
                kept.undo()
        self._settlement.finish(isolation, parameters, keep_others=not batches.is_last(batch))
        self.progress.tasks = tasks
        if combined is None:
            pending.keep(rows, values, managed)
            pending.accumulating = batches.number == 1
        else:
            self._settlement.hand_over(combined, batches.tasks(rows), managed)

    @_disable_dynamo
    def open_block(self, block: TaskBlock) -> None:
        """Hides the gradients that are there, so that a row can be captured."""
        what = f"task({block.name!r})"
        self.check_idle(what)
        if self.options.capture == "factored":
            _check_factored(what)
        self._ranks.check(what)
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
        keeps = self._settlement.keeps or not self.batches.is_last(block.batch)
        around = [*outside, *elsewhere] if keeps else elsewhere
        before = [(param, grad := held(param), _version(grad)) for param in around]
        self._open = OpenBlock(block, parameters, outside, isolation, versions, before)
        if keeps:
            for param in around:
                hold(param, None)

    @_disable_dynamo
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
            losses = self._settlement.losses_with({} if block.loss is None else {name: block.loss}, block.batch)
            self._settlement.finish(opened.isolation, opened.parameters, not self.batches.is_last(block.batch))
            self.progress.tasks = tasks
            pending.keep({**pending.rows, key: row}, losses, opened.parameters.managed)
            opened.done = True
        finally:
            if not opened.done:
                opened.isolation.undo()
                pending.after_failure(opened.versions)

    def _look_around(self, opened: OpenBlock) -> None:
        """Puts gradients outside the optimizer back, or warns of what was added to those that another one combines."""
        if self._settlement.keeps or not self.batches.is_last(opened.block.batch):
            for param, grad, _ in opened.around:
                hold(param, grad)
        elif any(held(param) is not grad or _version(grad) != version for param, grad, version in opened.around):
            self._advice.once("elsewhere", ADDS_ELSEWHERE)

    def combine(self) -> None:
        """Combines the captured rows into ``.grad``.

        Raises:
            RuntimeError: there are none, or a block is open.
        """
        with self._together():
            self._combine()

    def _combine(self) -> None:
        self.check_idle("combine()")
        parameters = self.parameters()
        self.pending.check_params(parameters.managed)
        if not self.pending.rows:
            if self._combined_by_a_look(parameters):
                self.progress.read_early = False
                return
            raise RuntimeError("there is nothing to combine; capture tasks with opt.task(name) or backward() first")
        pending = self.pending
        self._settlement.check_rows(pending.rows, parameters.managed)
        combined = self._settlement.combined(self.progress.tasks, pending.rows, pending.losses, parameters, True)
        self._settlement.hand_over(combined, self.batches.tasks(pending.rows), parameters.managed)

    @_disable_dynamo
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
        if not (self.progress.has_gradient and any(p.grad is not None for p in self._every_parameter())):
            own = self._ranks.several and not self._ranks.hides
            raise RuntimeError(
                "step() with no task captured since the last step or zero_grad(); call opt.backward([...]) or use "
                "opt.task(name) first (where a trainer calls backward(): mtl_optim.trainers.joint_loss), or step "
                "the wrapped optimizer (opt.optimizer) to use plain gradients"
                + (", which are those of this rank alone until you average them" if own else "")
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
        return self._selection(self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _every_parameter(self) -> list[Tensor]:
        return [param for group in self._groups() for param in group["params"]]

    def tasks_with(self, names: Sequence[str] | Mapping[str, Tensor]) -> tuple[str, ...]:
        """The known task names and those of ``names`` that are new."""
        return with_new(self.progress.tasks, names, self.options.fixed_tasks is not None)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Tells the other ranks, which else would wait, of an error of this one."""
        try:
            yield
        except RanksDisagreeError:
            raise
        except Exception as error:
            self._ranks.fail(error)
            raise

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


def _combined_elsewhere(step: TrainingStep) -> list[Tensor]:
    """The parameters that other optimizers of this kind combine, and this one does not hold."""
    others = [other for other in _ALIVE if other is not step and other._open is None]
    if not others:
        return []
    own = set(map(id, step._every_parameter()))
    return [
        param
        for other in others
        for group in other._groups()
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
