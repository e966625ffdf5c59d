"""`MultiTaskOptimizer`: any PyTorch optimizer, fed with a combination of the gradients of several losses."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl_kernels import MAX_TASKS

from . import validate
from .capture import CAPTURES, run_backward
from .combination import Combined, Combiner
from .cuda_graphs import refuse_capture
from .grads import Isolation, Row, add_grads
from .graph import Parameters, outside_leaves, select_parameters, split_compiled_graph
from .methods import Method
from .pending import Pending, stack_losses
from .progress import OpenBlock, Progress
from .refresh import Reusable
from .report import Report
from .task import TaskBlock
from .wrapper import OptimizerWrapper

_STATE_VERSION = 1
_AMP_ATTRIBUTES = ("grad_scale", "found_inf")


class MultiTaskOptimizer(OptimizerWrapper):
    """Wraps an optimizer: the gradients of several losses are combined by a method, then stepped with.

    ::

        opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters()), PCGrad())
        opt.zero_grad()
        opt.backward({"depth": depth_loss, "normals": normal_loss})
        opt.step()

    The *managed* parameters are those of the wrapped optimizer that require grad, except param groups with
    ``mtl=False``, which receive the plain sum. A managed parameter that two or more tasks reach *in a step*
    is shared: its gradients are combined. One that a single task reaches keeps that gradient (see
    ``head_scaling``), one that none reaches keeps its ``.grad``. As everywhere in PyTorch, the result is added to a
    ``.grad`` that is already there.

    A list of losses names its tasks "0", "1", ...; a dict names them itself. Tasks keep the order in which
    they were first seen. A known task that is absent from a step takes no part in it.

    It is a `torch.optim.Optimizer` that shares ``param_groups``, ``state``, ``defaults`` and step hooks with
    the wrapped one (``.optimizer``): learning-rate schedulers, gradient clipping and GradScaler take it as
    it is. With GradScaler, scale every loss; after ``task()`` blocks call `combine` before
    ``scaler.unscale_`` or ``scaler.step``.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        method: an instance of a `mtl_optim.Method`.
        head_scaling: what happens to single-task gradients: "none", or "weights" to multiply them by their
            task's weight in the problem of their param group; a parameter that belongs to no problem in
            which its task takes part (always so with granularity="parameter") takes the mean of that task's
            weights.
        granularity: one Gram matrix per "model", per param "group" or per "parameter".
        capture: where the gradients of the tasks are held. "harvest" takes the tensors that autograd made, no copy.
            "arena" copies them into one buffer per dtype, a row for every task ever seen, whose addresses stay the
            same: ``.grad`` then lies in it too, until the next pass overwrites it. For CUDA graphs.
        refresh_every: compute the weights at every n-th call of `backward` only; the calls between run one
            weighted backward pass with the last weights. Needs granularity="model". A step with other tasks or
            parameters, with `task` blocks or with ``accumulate=True`` computes them anew, as do the one after
            gradients that were not finite and one with 16-bit losses, which would round the weights.
        tasks: the names, fixed; any other name then raises. ``None`` takes names as they appear.

    Raises:
        TypeError, ValueError: an argument of another type, or an unknown option.
        RuntimeError: sharded parameters (DTensor).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: Method,
        *,
        head_scaling: str = "none",
        granularity: str = "model",
        capture: str = "harvest",
        refresh_every: int = 1,
        tasks: Sequence[str] | None = None,
    ) -> None:
        if isinstance(optimizer, MultiTaskOptimizer):
            raise TypeError("MultiTaskOptimizer: the optimizer is already one; wrap its .optimizer")
        validate.check_optimizer_options(optimizer, method, head_scaling, granularity, capture, refresh_every)
        super().__init__(optimizer)
        self.method = method
        self.head_scaling = head_scaling
        self.granularity = granularity
        self.capture = capture
        self.refresh_every = refresh_every
        self._fixed_tasks = tasks is not None
        self._progress = Progress(validate.task_names(tasks))
        self._warned: set[str] = set()
        self._start()

    def _start(self) -> None:
        """What is neither configuration nor state that outlives a copy."""
        self._combiner = Combiner(self.method, self.head_scaling, self.granularity)
        self._pending = Pending(CAPTURES[self.capture]())
        self._inspected: set[str] = set()
        self._outside: list[weakref.ref[Tensor]] = []

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names known so far, in the order of the rows."""
        return self._progress.tasks

    @property
    def report(self) -> Report | None:
        """The last combination; None before the first. Reading it copies nothing to the host."""
        return self._progress.report

    def backward(
        self,
        losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
        *,
        accumulate: bool = False,
        retain_graph: bool = False,
    ) -> None:
        """One backward pass per loss, then one combination into ``.grad``.

        Args:
            losses: K scalar losses as a list, tuple or dict. They may share a graph or not. A tensor [K] is
                taken too, but each of its elements reaches (with zeros) whatever any of them reaches.
            accumulate: keep the rows and do not combine yet: later calls add to them, and `combine`, `step`
                or a last call without ``accumulate`` combines. For micro-batches.
            retain_graph: keep the graph after the last pass.

        Raises:
            TypeError, ValueError: losses that are not scalars requiring grad, given twice, of unknown tasks,
                or that reach no managed parameter.
            RuntimeError: inside a `task` block, in a distributed run, a task captured twice, or an error of
                autograd. Whatever is raised, gradients and captured rows are as they were; the one exception
                is an error in the middle of adding to rows in place (``accumulate``): those are dropped,
                with a warning.
        """
        self._check_idle("backward()")
        validate.check_single_rank()
        if self.refresh_every > 1:
            refuse_capture(f"refresh_every={self.refresh_every} decides on the host", "use refresh_every=1")
        named = validate.named_losses(losses)
        if validate.is_stacked(losses):
            self._warn_once(
                "stacked",
                "the losses were stacked into one tensor, through which each task reaches every parameter "
                "(with zeros), so that heads count as shared; pass them as a list or dict",
            )
        tasks = self._with_tasks(named)
        parameters, pending = select_parameters(self.param_groups), self._pending
        managed = parameters.managed
        pending.check_params(managed)
        if not accumulate and not pending.accumulating:
            for name in named:
                pending.check_new(name)
        self._inspect(named, parameters)
        if not accumulate and self._backward_reusing(named, parameters, retain_graph):
            return
        pending.prepare(tasks, managed)
        others = self._unmanaged(parameters)
        isolation = Isolation(managed, parameters.others)
        rows, versions = dict(pending.rows), pending.versions()
        try:
            for k, (name, loss) in enumerate(named.items()):
                previous = rows.get(name)
                pending.open(name, managed, previous)
                keep = retain_graph or k < len(named) - 1
                run_backward(functools.partial(loss.backward, retain_graph=keep))
                rows[name] = pending.take(name, managed, previous, others)
            values = pending.losses_with(named) if self.method.needs_losses else {}
            combined = None if accumulate else self._combine_rows(tasks, rows, values, parameters)
        except BaseException:
            isolation.undo()
            pending.after_failure(versions)
            raise
        isolation.finish()
        self._progress.tasks = tasks
        if combined is None:
            pending.keep(rows, values, managed)
            pending.accumulating = True
        else:
            self._finish(combined, list(rows), managed)

    def task(self, name: str, *, accumulate: bool = False) -> TaskBlock:
        """A ``with`` block whose ``.backward()`` calls become one task's row; `step` or `combine` combines.

        Args:
            name: of the task.
            accumulate: add to the row that an earlier block of this step captured, if any: for micro-batches.

        Returns:
            A context manager that yields itself. Methods that need the value of the loss read its ``loss``::

                with opt.task("depth") as task:
                    task.loss = loss_fn(model(batch))
                    task.loss.backward()

        Raises (here, or on entering or leaving the block; gradients and rows are then as they were):
            TypeError, ValueError: an unknown name, a block that captured nothing, a missing loss.
            RuntimeError: inside another block, in a distributed run, a task captured twice without
                ``accumulate``.
        """
        validate.check_task_name(name)
        self._with_tasks([name])
        return TaskBlock(self, name, accumulate)

    def combine(self) -> None:
        """Combines the captured rows into ``.grad``; `step` does so by itself.

        Raises:
            RuntimeError: no rows were captured, or inside a `task` block.
        """
        self._check_idle("combine()")
        if not self._pending.rows:
            raise RuntimeError("there is nothing to combine; capture tasks with opt.task(name) or backward() first")
        parameters, pending = select_parameters(self.param_groups), self._pending
        pending.check_params(parameters.managed)
        combined = self._combine_rows(self._progress.tasks, pending.rows, pending.losses, parameters)
        self._finish(combined, list(pending.rows), parameters.managed)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Combines captured rows, if any, and steps the wrapped optimizer.

        Args:
            closure: reevaluates the model, calls `backward` or uses `task`, and returns the loss.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RuntimeError: nothing was captured since the last step, or inside a `task` block.
        """
        self._check_idle("step()")
        if closure is not None:
            refuse_capture("a closure is called", "call backward() and then step() without one")
        forwarded = [name for name in _AMP_ATTRIBUTES if name in self.__dict__]
        for name in forwarded:
            setattr(self.optimizer, name, self.__dict__[name])
        try:
            if closure is None:
                self._make_gradient()
                result = self.optimizer.step()
            else:
                result = self.optimizer.step(functools.partial(self._run_closure, closure))
        finally:
            for name in forwarded:
                delattr(self.optimizer, name)
        self._progress.has_gradient = False
        return result

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._make_gradient()
        return loss

    def _make_gradient(self) -> None:
        if self._pending.rows:
            self.combine()
        # GradScaler does not call step() when it skips one: then only the gradients tell that they were dealt with.
        there = any(param.grad is not None for group in self.param_groups for param in group["params"])
        if not (self._progress.has_gradient and there):
            raise RuntimeError(
                "step() with no task captured since the last step or zero_grad(); call opt.backward([...]) or use "
                "opt.task(name) first, or step the wrapped optimizer (opt.optimizer) to use plain gradients"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the wrapped optimizer and drops rows that were not combined.

        Raises:
            RuntimeError: inside a `task` block.
        """
        self._check_idle("zero_grad()")
        self._pending.clear()
        self._progress.has_gradient = False
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group to the wrapped optimizer; ``mtl=False`` in it asks for the plain sum.

        Raises:
            TypeError, ValueError, RuntimeError: a group the optimizer or this class cannot take, or rows
                that were not yet combined.
        """
        if self._pending.rows or self._progress.block is not None:
            raise RuntimeError("add_param_group() between capture and combination; call opt.combine() first")
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", ()), (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        if isinstance(param_group, dict) and "params" in param_group:
            validate.check_param_groups([param_group])
        self.optimizer.add_param_group(param_group)
        self._inspected.clear()
        self._outside.clear()
        self._progress.reusable = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler.step() asks before it steps: the moment to refuse a step with wrong scales."""
        refuse_capture("GradScaler decides on the host whether to step", "use bfloat16 without a scaler")
        if self._pending.rows:
            raise RuntimeError(
                "GradScaler.step() before the captured tasks were combined: their gradients were not "
                "unscaled. Call opt.combine() after the last task, before scaler.unscale_(opt) or "
                "scaler.step(opt)"
            )
        if not self.method.scales_with_gradient:
            raise RuntimeError(
                f"{self.method!r} does not scale with the gradients, so GradScaler would divide its step by "
                "a scale that is not in it; use bfloat16 without a GradScaler, or another normalisation"
            )
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with one more entry, ``"mtl"``; resuming from it is exact.

        Rows that were captured but not combined are not part of it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.optimizer.state_dict()
        state_dict["mtl"] = {
            "version": _STATE_VERSION,
            "method": type(self.method).__name__,
            "config": self.method.config(),
            "state": self.method.state_dict(),
            "tasks": list(self._progress.tasks),
            "refresh": None if self._progress.reusable is None else self._progress.reusable.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; that of a plain optimizer is taken with a warning.

        Raises:
            ValueError: saved with another method or other fixed tasks, or by a newer version, or of other
                param groups; everything stays as it was.
        """
        self._check_idle("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        saved = state_dict.pop("mtl", None)
        if saved is None:
            warnings.warn(
                "this state dict is that of a plain optimizer: the method's state (random numbers, task "
                "names) stays as it is",
                UserWarning,
                stacklevel=2,
            )
            self.optimizer.load_state_dict(state_dict)
        else:
            validate.check_saved(
                saved, _STATE_VERSION, self.method, self._progress.tasks if self._fixed_tasks else None
            )
            reusable = (
                None
                if saved["refresh"] is None
                else Reusable.from_state_dict(saved["refresh"], select_parameters(self.param_groups).managed[0].device)
            )
            tasks = tuple(saved["tasks"])
            before = self.method.state_dict()
            self.method.load_state_dict(saved["state"])
            try:
                self.optimizer.load_state_dict(state_dict)
            except BaseException:
                self.method.load_state_dict(before)
                raise
            self._progress.tasks = tasks
            self._progress.reusable = reusable
        self._pending.clear()
        self._progress.has_gradient = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("optimizer", "method", "head_scaling", "granularity", "capture", "refresh_every")
        state = {name: self.__dict__[name] for name in (*kept, "_fixed_tasks", "_warned")}
        return {**state, "_progress": dataclasses.replace(self._progress, block=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        self._start()

    def __repr__(self) -> str:
        options = f"head_scaling={self.head_scaling!r}, granularity={self.granularity!r}"
        options += f", capture={self.capture!r}, refresh_every={self.refresh_every}, tasks={list(self._progress.tasks)}"
        return f"MultiTaskOptimizer({self.method!r}, {options},\n{self.optimizer!r})"

    def _check_idle(self, what: str) -> None:
        if self._progress.block is not None:
            raise RuntimeError(
                f"{what} inside the block of opt.task({self._progress.block.name!r}); leave the block first"
            )

    def _with_tasks(self, names: Sequence[str] | Mapping[str, Tensor]) -> tuple[str, ...]:
        """The known task names and those of ``names`` that are new."""
        new = [name for name in names if name not in self._progress.tasks]
        if new and self._fixed_tasks:
            raise ValueError(
                f"unknown task {new[0]!r}; this optimizer was built with tasks={list(self._progress.tasks)}"
            )
        tasks = (*self._progress.tasks, *new)
        if len(tasks) > MAX_TASKS:
            raise ValueError(f"{len(tasks)} task names seen, at most {MAX_TASKS} are supported; are names made anew?")
        return tasks

    def _inspect(self, named: Mapping[str, Tensor], parameters: Parameters) -> None:
        """Looks once through the graph of each new loss for parameters that the optimizer does not hold."""
        new = {name: loss for name, loss in named.items() if name not in self._inspected}
        outside = outside_leaves(new, parameters)
        self._inspected.update(new)
        if outside:
            self._outside.extend(map(weakref.ref, outside))
            self._warn_once(
                "outside",
                f"the losses reach {len(outside)} tensor(s) that require grad and are not in the optimizer; their "
                ".grad is the plain sum over the losses, and opt.zero_grad() does not clear it",
            )
        if split_compiled_graph(new.values()):
            self._warn_once(
                "compiled",
                "the losses use different outputs of one torch.compile graph, through which each task reaches every "
                "parameter in it (with zeros), so that heads count as shared; compile the shared part and the "
                "heads one by one",
            )

    def _unmanaged(self, parameters: Parameters) -> list[Tensor]:
        """The tensors known to receive gradients that are not combined."""
        outside = [leaf for ref in self._outside if (leaf := ref()) is not None]
        return [*parameters.others, *outside]

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, UserWarning, stacklevel=4)

    def _combine_rows(
        self,
        tasks: tuple[str, ...],
        rows: Mapping[str, Row],
        losses: Mapping[str, Tensor],
        parameters: Parameters,
    ) -> Combined:
        if len(rows) == 1:
            self._warn_once(
                "single",
                f"there is nothing to combine: only task {next(iter(rows))!r} is present. Pass the losses "
                "one by one, not their sum",
            )
        self._pending.check_rows(rows)
        needed = self.method.needs_losses
        values = stack_losses(losses, tasks, parameters.managed[0].device) if needed else None
        absent: Row = [None] * len(parameters.managed)
        with torch.no_grad():
            return self._combiner(tasks, [rows.get(name, absent) for name in tasks], parameters.group_of, values)

    def _finish(self, combined: Combined, present: list[str], managed: Sequence[Tensor]) -> None:
        """Hands the gradients over, and keeps what later steps may reuse."""
        with torch.no_grad():
            add_grads(managed, combined.grads)
        self._progress.report = combined.report
        self._pending.clear()
        self._progress.has_gradient = True
        self._progress.reusable = None
        if self.refresh_every > 1:
            self._progress.reusable = Reusable.of(combined, present, managed)

    def _backward_reusing(self, named: Mapping[str, Tensor], parameters: Parameters, retain_graph: bool) -> bool:
        """One weighted backward pass with the last weights; False where new ones are due."""
        last, managed, pending = self._progress.reusable, parameters.managed, self._pending
        if (
            last is None
            or pending.rows
            or last.age + 1 >= self.refresh_every
            or set(last.present) != set(named)
            or not last.fits(managed)
            or not last.finite
        ):
            return False
        if (dtype := last.too_coarse(named)) is not None:
            self._warn_once(
                "coarse",
                f"losses in {str(dtype).removeprefix('torch.')} would round the weights, so that refresh_every has no "
                "effect here; compute them in float32, from outputs.float()",
            )
            return False
        passes = last.passes(named, parameters, self.head_scaling == "none")
        if passes is None:
            self._warn_once(
                "hidden",
                "the graph of the losses hides parameters (reentrant checkpointing?), so that refresh_every "
                "has no effect here; call checkpoint(..., use_reentrant=False)",
            )
            return False
        pending.prepare(self._progress.tasks, managed)
        isolation = Isolation(managed, parameters.others)
        try:
            pending.open(last.present[0], managed, None)  # the row of any task will do for the sum over all
            for k, one_pass in enumerate(passes):
                run_backward(functools.partial(one_pass, retain_graph=retain_graph or k < len(passes) - 1))
            grads = pending.take(last.present[0], managed, None, self._unmanaged(parameters))
        except BaseException:
            isolation.undo()
            pending.after_failure({})
            raise
        isolation.finish()
        with torch.no_grad():
            add_grads(managed, grads)
        pending.clear()
        self._progress.reusable = last.older(managed)
        self._progress.report = None if self._progress.report is None else self._progress.report.aged()
        self._progress.has_gradient = True
        return True

    def _open_block(self, block: TaskBlock, name: str, accumulate: bool) -> None:
        self._check_idle(f"task({name!r})")
        validate.check_single_rank()
        parameters = select_parameters(self.param_groups)
        managed = parameters.managed
        self._pending.check_params(managed)
        if not accumulate:
            self._pending.check_new(name)
        self._pending.prepare(self._with_tasks([name]), managed)
        versions, isolation = self._pending.versions(), Isolation(managed, parameters.others)
        try:
            self._pending.open(name, managed, self._pending.rows.get(name))
        except BaseException:
            isolation.undo()
            raise
        others = self._unmanaged(parameters)
        self._progress.block = OpenBlock(block, name, managed, others, isolation, versions)

    def _close_block(self, block: TaskBlock, failed: bool) -> None:
        opened = self._progress.block
        if opened is None or opened.block is not block:
            raise RuntimeError("this task block is not the open one")
        self._progress.block = None
        pending, name = self._pending, opened.name
        try:
            if failed:
                return
            row = pending.take(name, opened.managed, pending.rows.get(name), opened.others)
            tasks = self._with_tasks([name])
            if self.method.needs_losses and block.loss is None:
                raise ValueError(
                    f"{self.method!r} needs the value of the loss of task {name!r}: with "
                    f"opt.task({name!r}) as task: set task.loss = loss in the block"
                )
            if block.loss is not None:
                validate.check_loss_value(name, block.loss)
            losses = pending.losses_with({} if block.loss is None else {name: block.loss})
            opened.isolation.finish()
            self._progress.tasks = tasks
            pending.keep({**pending.rows, name: row}, losses, opened.managed)
            opened.done = True
        finally:
            if not opened.done:
                opened.isolation.undo()
                pending.after_failure(opened.versions)
