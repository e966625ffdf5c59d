"""`MultiTaskOptimizer`: any PyTorch optimizer, fed with a combination of the gradients of several losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .capture.compiled import keep_buffers
from .cuda_graphs import refuse_capture
from .distributed.find import check_added, check_several, find_ranks
from .distributed.ranks import Ranks
from .methods import Method
from .monitor.report import Report
from .options import Options, check_param_groups, check_saved, wrapped_optimizers
from .step.block import TaskBlock
from .step.names import check_task_name, fixed_tasks
from .step.partial import check_partial
from .step.progress import Progress
from .step.refresh import Reusable
from .step.training_step import TrainingStep
from .step.transform import Transform, restore, state_of
from .warn import warn_user
from .wrapper import OptimizerWrapper

_STATE_VERSION = 1


class MultiTaskOptimizer(OptimizerWrapper):
    """Wraps an optimizer: the gradients of several losses are combined by a method, then stepped with.

    ::

        opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters()), PCGrad())
        opt.zero_grad()
        opt.backward({"depth": depth_loss, "normals": normal_loss})
        opt.step()

    The *managed* parameters are those of the wrapped optimizers that require grad, except param groups with
    ``mtl=False``, which receive the plain sum. A managed parameter that two or more tasks reach *in a step*
    is shared: its gradients are combined. One that a single task reaches keeps that gradient (see
    ``head_scaling``), one that none reaches keeps its ``.grad``. As everywhere in PyTorch, the result is added to a
    ``.grad`` that is already there.

    Parameters of param groups with ``gram=False`` receive the weighted sum too, but do not count in the Gram matrix
    that the weights come from. The passes of `backward` then end at the parameters that do count, and one weighted pass
    serves all others: leaving out the early layers saves most of K passes and of K rows (`gram_groups` makes groups).
    What is combined is the exact weighted sum, with weights that are those of the last layers. A parameter of such
    a group that a single task reaches has that task's weight. Every gradient is captured in full in `task` blocks,
    with ``accumulate=True``, ``capture="arena"``, 16-bit losses and reentrant checkpointing, with the same result.
    With several problems (``granularity``), the weight is the mean over those in which the task takes part.

    A list of losses names its tasks "0", "1", ...; a dict names them itself. Tasks keep the order in which
    they were first seen. A known task that is absent from a step takes no part in it.

    It is a `torch.optim.Optimizer` that shares ``param_groups``, ``state``, ``defaults`` and step hooks with
    the wrapped one (``.optimizer``): learning-rate schedulers, gradient clipping and GradScaler take it as
    it is. With GradScaler, scale every loss. Whoever reads a ``.grad`` between `task` blocks and `step` gets the
    combination, which is then made.

    Models may be compiled, as a whole or in parts, and `step` too. So that a compiled graph can take several backward
    passes, building one of these turns ``torch._functorch.config.donated_buffer`` off and adds to
    ``torch.compiler.config.cache_key_tag``, for all that is compiled later. Calls of `backward` and `combine` in a
    compiled function are graph breaks, one each.

    Args:
        optimizer: any `torch.optim.Optimizer`; or a list of them over different parameters (Muon for matrices and AdamW
            for the rest), which share one combination and step one after the other, the first with the closure.
        method: an instance of a `mtl_optim.Method`.
        head_scaling: what happens to single-task gradients: "none", or "weights" to multiply them by their
            task's weight in the problem of their param group; a parameter that belongs to no problem in
            which its task takes part (always so with granularity="parameter") takes the mean of that task's
            weights. "weights", like refresh_every > 1, is not for methods whose combination is no weighted sum of
            the rows of the step (`GradDrop`, `TrimmedMean`, `MoCo`, `DBMTL`).
        granularity: one Gram matrix per "model", per param "group" or per "parameter".
        capture: where the gradients of the tasks are held. "harvest" takes the tensors that autograd made, no copy.
            "arena" copies them into one buffer per dtype, a row for every task ever seen, whose addresses stay the
            same: ``.grad`` then lies in it too, until the next pass overwrites it. For CUDA graphs.
            "factored" takes no gradient of a weight whose inputs have few rows (at most 0.4 times as many as columns),
            but its coordinates in a basis of these inputs: lengths, angles and the combination are the same to
            rounding, passes are cheaper and need a fraction of the memory of K rows. It is for weights of linear layers
            (and other products of matrices), embeddings and convolutions of small images; all others have whole rows in
            the same passes, as do those with hooks. `Report.factoring` tells which and why. Not for methods that
            combine elements or take several batches, nor with `task` blocks, ``accumulate=True``, ``features=`` or a
            CUDA graph. Where reentrant checkpointing hides parameters, rows are whole, which is said once.
        passes: of ``capture="factored"``: "loop", a backward pass a task; "batched", passes for up to eight tasks at a
            time (``torch.autograd.grad(is_grads_batched=True)``) through what tasks share, which hooks of parameters do
            not see; or "auto", which is batched on GPUs, and on CPUs where no product of the graph has more than 64
            rows of inputs and there are no convolutions, unless hooks, custom functions or tasks that read several
            depths speak against it. What "auto" cannot batch has a pass a task from then on, which is said once.
        data_parallel: where every rank of a run has all parameters and a batch of its own, the
            `torch.nn.parallel.DistributedDataParallel` model or the process group: rows are then those of the mean
            over the ranks, weights the same on all of them to the bit, and gradients those of one process with all
            batches. The reducer of the model is kept out for as long as this optimizer lives. Parameters sharded with
            fully_shard (FSDP2) or tensor parallel are seen by themselves. In a run of several ranks one of them is
            needed, or ``False`` where ranks train apart. All ranks have to run the same tasks in the same order. A
            transform sees the means of the losses over the ranks. It is not part of copies and pickles. Methods that
            combine elements are for one rank; ``features=`` and ``capture="factored"`` also for ranks with replicated
            parameters.
        reduce: with replicated parameters, "scatter" leaves a rank a piece of every row, and sends (K + 1) N (R - 1) /
            R elements for K tasks, N shared parameters and R ranks; "all" leaves whole rows on all of them, and sends
            2 K N (R - 1) / R.
        refresh_every: compute the weights at every n-th call of `backward` only; the calls between run one
            weighted backward pass with the last weights. ``None`` goes by the method's own ``refresh_every``, which is
            1 for most. More than 1 needs granularity="model". A step with other tasks or
            parameters, with `task` blocks or with ``accumulate=True`` computes them anew, as do the one after
            gradients that were not finite and one with 16-bit losses, which would round the weights. Which task reaches
            which parameter must be as in the step that the weights are of: it is not looked at again.
        outside: what becomes of gradients of tensors that are not in the optimizer: "sum" adds the plain sum to their
            ``.grad``, as ``backward()`` does; "keep" leaves it as it is. In `task` blocks, whose backward passes are
            not this optimizer's, "keep" covers what earlier calls of `backward` reached and what other
            MultiTaskOptimizers combine.
        share_every: with param groups of ``gram=False``, at every n-th step that computes weights whole rows are
            taken, and the Gram matrix is compared with that over all shared parameters: `Report.gram_share`, and
            a line in its summary. ``None`` takes no such steps.
        transform: what the losses of `backward` go through before their passes, so that the method combines the
            gradients of what comes out: an instance of `mtl_optim.losses` that is a sum of one term per task (LogSum(),
            UncertaintyWeighting(K)...), or any function from losses to as many losses, a list or dict as they were
            passed. The report, and methods that go by the values of losses, see what comes out. Its learned parameters
            belong into a param group; each is reached by one task and treated as its head. `losses.GradNorm` takes its
            norms from the combination. Modules built without names need all tasks in every step. It does not reach
            into `task` blocks, whose passes are the user's: call
            ``opt.transform.terms({name: loss})[name].backward()`` there. Its state is part of `state_dict`.
        tasks: the names, fixed; any other name then raises. ``None`` takes names as they appear.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown option, options that do not go together, or a
            parameter in two optimizers.
        RuntimeError: parameters sharded by FSDP1 or DeepSpeed; ``data_parallel`` without a process group.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        method: Method,
        *,
        head_scaling: str = "none",
        granularity: str = "model",
        capture: str = "harvest",
        passes: str = "auto",
        data_parallel: Any = None,
        reduce: str = "scatter",
        refresh_every: int | None = None,
        outside: str = "sum",
        share_every: int | None = None,
        transform: Transform | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        names = fixed_tasks(tasks)
        self.options = Options(
            method, head_scaling, granularity, capture, passes, refresh_every, outside, share_every, transform, names
        )
        optimizers = wrapped_optimizers(optimizer)
        if any(isinstance(one, MultiTaskOptimizer) for one in optimizers):
            raise TypeError("MultiTaskOptimizer: the optimizer is already one; wrap its .optimizer")
        groups = [group for one in optimizers for group in one.param_groups]
        check_partial(groups, method)
        if share_every is not None and all(group.get("gram", True) for group in groups):
            raise ValueError(
                f"MultiTaskOptimizer: share_every={share_every} compares the Gram matrix with one that also has the "
                "param groups of gram=False, and there are none; see gram_groups()"
            )
        super().__init__(optimizers)
        self._start(Progress(names or ()), set(), find_ranks(data_parallel, reduce, groups, self))
        check_several(self._ranks, self.options)

    def _start(self, progress: Progress, told: set[str], ranks: Ranks) -> None:
        keep_buffers()
        self._told, self._ranks = told, ranks
        self._training = TrainingStep(self.optimizers, self.options, progress, told, ranks)

    @property
    def method(self) -> Method:
        """The method that combines."""
        return self.options.method

    @property
    def transform(self) -> Transform | None:
        """What the losses of `backward` go through; None if they are combined as they are."""
        return self.options.transform

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names known so far, in the order of the rows."""
        return self._training.progress.tasks

    @property
    def report(self) -> Report | None:
        """The last combination, None before the first; no state dict holds it. Nothing is copied to the host."""
        return self._training.progress.report

    @_disable_dynamo
    def backward(
        self,
        losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
        *,
        accumulate: bool = False,
        retain_graph: bool = False,
        batch: int = 0,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """One backward pass per loss, then one combination into ``.grad``.

        Args:
            losses: K scalar losses as a list, tuple or dict, before any ``transform``. They may share a graph or not. A
                tensor [K] is taken too, but each of its elements reaches (with zeros) whatever any of them reaches.
            accumulate: keep the rows and do not combine yet: later calls add to them, and `combine`, `step`
                or a last call without ``accumulate`` combines. For micro-batches.
            retain_graph: keep the graph after the last pass.
            batch: for methods that take several independent batches a step (`SDMGrad`, `MoDo`), which of them the
                losses are of, 0 to ``method.num_batches - 1``. Nothing is combined until `combine`, `step` or whoever
                reads a ``.grad`` asks for it, which needs every batch of every task. What is not combined
                (single-task parameters, param groups with ``mtl=False``, tensors outside the optimizer) has the
                gradients of the last batch alone, whose Gram matrix is in the report.
            features: what the heads of all tasks were called with, one tensor or several of this forward pass. Rows are
                then the gradients at these tensors (and for shared parameters that a loss reaches without them), and
                what they combine to takes one pass through what is behind: K passes through heads and one through the
                trunk. No memory of K rows over the trunk, and any method goes. It is another problem than that over the
                parameters: for `MGDA` its minimum bounds that one from above, up to a factor of the trunk's Jacobian
                (MGDA-UB, Sener & Koltun 2018, arXiv 1810.04650, section 3.3). Parameters behind with ``mtl=False`` and
                tensors outside the optimizer have the plain sum. Not for methods that keep numbers for every element
                (`MoCo`, `DBMTL`, `ExcessMTL`) or take several batches, nor with ``accumulate``, ``refresh_every`` > 1,
                another granularity than "model" or capture than "harvest".

        Raises:
            TypeError, ValueError: losses that are not scalars requiring grad, given twice, of unknown tasks,
                or that reach no parameter of the optimizer; a batch that the method does not take; features that are no
                tensors in the graph of the losses, that are computed from one another, or that a loss goes past to a
                parameter behind them.
            RuntimeError: inside a `task` block, in a run of several ranks that nothing was said of, where ranks run
                other tasks or another one has failed, a task captured twice, or an error of autograd. Whatever is
                raised, gradients and captured rows are as they were; the one exception is an error in the middle of
                adding to rows in place (``accumulate``) or of collectives: those are dropped,
                with a warning.
        """
        self._training.backward(losses, accumulate, retain_graph, batch, features)

    def task(self, name: str, *, accumulate: bool = False, batch: int = 0) -> TaskBlock:
        """A ``with`` block whose ``.backward()`` calls become one task's row; `step` or `combine` combines.

        Args:
            name: of the task.
            accumulate: add to the row that an earlier block of this step captured, if any: for micro-batches.
            batch: which of the step's independent batches, as for `backward`. Tensors outside the optimizer that no
                earlier call of `backward` has reached have the sum over all of them.

        Returns:
            A context manager that yields itself. A ``transform`` does not reach into the block: call ``backward()`` on
            what it makes of the loss. Methods that need the value of the loss read its ``loss``::

                with opt.task("depth") as task:
                    task.loss = loss_fn(model(batch))
                    task.loss.backward()

        Raises (here, or on entering or leaving the block; gradients and rows are then as they were):
            TypeError, ValueError: an unknown name, a batch that the method does not take, a block that captured
                nothing, a missing loss.
            RuntimeError: inside another block, in a run of several ranks that nothing was said of or that run other
                tasks, a task captured twice without ``accumulate``, or after a gradient of this step was read.
        """
        check_task_name(name)
        self._training.tasks_with([name])
        self._training.batches.check(batch)
        return TaskBlock(self._training, name, accumulate, batch)

    @_disable_dynamo
    def combine(self) -> None:
        """Combines the captured rows into ``.grad``; `step` and whoever reads a ``.grad`` do so by themselves.

        Raises:
            RuntimeError: no rows were captured, a task lacks one of the batches that the method takes, or inside a
                `task` block.
        """
        self._training.combine()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Combines captured rows, if any, and steps the wrapped optimizer.

        Args:
            closure: reevaluates the model, calls `backward` or uses `task`, and returns the loss.

        Returns:
            What the wrapped optimizer returns, the first of several.

        Raises:
            RuntimeError: nothing was captured since the last step, a task lacks one of the batches that the method
                takes, or inside a `task` block.
        """
        self._training.check_idle("step()")
        if closure is None:
            self._make_gradient()
            result = self._step_wrapped(None)
        else:
            refuse_capture("a closure is called", "call backward() and then step() without one")
            # The closure may add to micro-batches; other rows are combined, as it may look at gradients first.
            if self._training.pending.rows and not self._training.pending.accumulating:
                self._training.combine()
            result = self._step_wrapped(functools.partial(self._run_closure, closure))
        self._training.stepped()
        return result

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        self._make_gradient()
        return loss

    @_disable_dynamo
    def _make_gradient(self) -> None:
        self._training.make_gradient()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the wrapped optimizer and drops rows that were not combined.

        Raises:
            RuntimeError: inside a `task` block.
        """
        self._training.check_idle("zero_grad()")
        self._training.clear()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group to the wrapped optimizer; ``mtl=False`` in it asks for the plain sum.

        Raises:
            TypeError, ValueError, RuntimeError: a group the optimizer or this class cannot take, several optimizers, or
                rows that were not yet combined.
        """
        self._training.check_idle("add_param_group()")
        if self._training.pending.rows:
            raise RuntimeError("add_param_group() between capture and combination; call opt.combine() first")
        if len(self.optimizers) > 1:
            raise ValueError("add_param_group() with several optimizers: add it to one of opt.optimizers")
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", ()), (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        if isinstance(param_group, dict) and "params" in param_group:
            check_param_groups([param_group])
            check_partial([param_group], self.method)
            check_added(self._ranks, [param_group])
        self.optimizers[0].add_param_group(param_group)
        self._training.progress.reusable = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler.step() asks before it steps: the moment to refuse a step with wrong scales."""
        refuse_capture("GradScaler decides on the host whether to step", "use bfloat16 without a scaler")
        if not self.method.scales_with_gradient:
            raise RuntimeError(
                f"{self.method!r} does not scale with the gradients, so GradScaler would divide its step by "
                "a scale that is not in it; use bfloat16 without a GradScaler, or another normalisation"
            )
        if self.transform is not None and not getattr(self.transform, "scales_with_losses", False):
            raise RuntimeError(
                f"transform {self.transform!r} sees losses that GradScaler has scaled, and what it makes of them need "
                "not scale along; use bfloat16 without a GradScaler, or leave transform= out and call backward() "
                "with what it makes of the losses, scaled by scaler.scale()"
            )
        return super()._step_supports_amp_scaling

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with one more entry, ``"mtl"``; resuming from it is exact.

        Several optimizers give one dict, as if their param groups were of one. Rows that were captured but not combined
        are not part of it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        progress = self._training.progress
        state_dict = self._state_dict_wrapped()
        state_dict["mtl"] = {
            "version": _STATE_VERSION,
            "method": type(self.method).__name__,
            "config": self.method.config(),
            "state": self.method.state_dict(),
            "transform": state_of(self.transform),
            "tasks": list(progress.tasks),
            "heads": self._training.heads,
            "refresh": None if progress.reusable is None else progress.reusable.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; that of a plain optimizer is taken with a warning.

        Raises:
            ValueError: saved with another method, transform or fixed tasks, or by a newer version, or of other
                param groups; everything stays as it was.
            TypeError: no dict.
        """
        self._training.check_idle("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"MultiTaskOptimizer.load_state_dict: expected what state_dict() returned, found "
                f"{type(state_dict).__name__}"
            )
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        saved = state_dict.pop("mtl", None)
        if saved is None:
            warn_user(
                "this state dict is that of a plain optimizer: the method's state (random numbers, task "
                "names) stays as it is"
            )
            self._load_state_dict_wrapped(state_dict)
        else:
            transform = state_of(self.transform)
            check_saved(saved, _STATE_VERSION, self.options, transform)
            reusable = None if saved["refresh"] is None else self._reusable(saved["refresh"])
            tasks = tuple(saved["tasks"])
            before = self.method.state_dict()
            try:
                self.method.load_state_dict(saved["state"])
                restore(self.transform, saved.get("transform"))
                self._load_state_dict_wrapped(state_dict)
            except BaseException:
                self.method.load_state_dict(before)
                restore(self.transform, transform)
                raise
            self._training.progress.tasks = tasks
            self._training.progress.reusable = reusable
            if "heads" in saved:  # not in older ones
                self._training.heads = saved["heads"]
        self._training.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _reusable(self, saved: dict[str, Any]) -> Reusable:
        parameters = self._training.parameters()
        return Reusable.from_state_dict(saved, [*parameters.managed, *parameters.others][0].device)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in ("optimizers", "options", "_told")}
        return {**kept, "progress": dataclasses.replace(self._training.progress), "heads": self._training.heads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers, self.options = state["optimizers"], state["options"]
        self._share()
        groups = [group for one in self.optimizers for group in one.param_groups]
        self._start(state["progress"], state["_told"], find_ranks(None, "scatter", groups, self))
        self._training.heads = state["heads"]

    def __repr__(self) -> str:
        wrapped = "\n".join(map(repr, self.optimizers))
        return f"MultiTaskOptimizer({self.options}, tasks={list(self.tasks)},\n{wrapped})"
