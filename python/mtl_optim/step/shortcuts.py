"""Ways to take a step that cost less than K whole backward passes, or less memory than K whole rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..capture.grads import Isolation, Row, RowKey, add_grads, take_grads
from ..capture.passes import run_backward, run_passes, weighted_passes
from .call import Call
from .combination import mean_weights
from .factored import BatchingError, Factored, FactoredPlans, UnseenUseError
from .features import Features
from .parameters import Parameters
from .partial import Partial
from .settlement import Settlement


class Shortcuts:
    """Each takes a call of ``backward``, and but for features tells whether it has dealt with it.

    Args:
        settlement: what they end in.
        outside: the leaves outside the optimizer that losses were seen to reach.
    """

    def __init__(self, settlement: Settlement, outside: Callable[[], list[Tensor]]) -> None:
        self._settlement, self._outside = settlement, outside
        options = settlement.options
        self._plans = FactoredPlans(options.passes) if options.capture == "factored" else None

    def through(self, call: Call, features: object, accumulate: bool) -> None:
        """One pass a loss down to the features, each a row; and one from there with what the rows combine to."""
        named, tasks, parameters, retain_graph, names_given = call
        pending = self._settlement.pending
        if accumulate or pending.rows:
            raise RuntimeError(
                "features= combines the losses of one call: without accumulate=True, and after combine() where rows "
                "were captured; sum micro-batches up by calling backward() for each of them"
            )
        through = Features.of(features, named, parameters, self._settlement.options, self._settlement.keeps)
        whole = through.in_front(parameters)
        isolation = Isolation(parameters.managed, parameters.others)
        rows: dict[RowKey, Row] = {}
        try:
            for k, (name, loss) in enumerate(named.items()):
                rows[name] = through.row(name, loss, whole, retain_graph or k < len(named) - 1)
            sums = through.sums(list(rows.values()))
            values = self._settlement.losses_with(named, 0) if self._settlement.options.method.needs_losses else {}
            combined = self._settlement.combined(tasks, rows, values, whole, names_given)
            through.run_behind(combined.grads, sums, retain_graph)
            behind = self._settlement.ranks.average(take_grads(parameters.managed), parameters.managed)
        except BaseException:
            isolation.undo()
            raise
        self._settlement.finish(isolation, parameters)
        self._settlement.progress.tasks = tasks
        beside, owner = ([*of][len(through.tensors) :] for of in (combined.grads, combined.owner))
        grads = [a if b is None else b for a, b in zip(beside, behind, strict=True)]
        combined = dataclasses.replace(combined, grads=grads, owner=owner)
        self._settlement.hand_over(combined, list(named), parameters.managed)

    def weighted(self, call: Call) -> bool:
        """One weighted backward pass with the last weights; False where new ones are due."""
        named, _, parameters, retain_graph, _ = call
        last, managed, pending = self._settlement.progress.reusable, parameters.managed, self._settlement.pending
        if last is None or pending.rows or not last.serves(named, managed, self._settlement.options.every):
            return False
        if (dtype := last.too_coarse(named)) is not None:
            self._settlement.advice.once(
                "coarse",
                f"losses in {str(dtype).removeprefix('torch.')} would round the weights, so that refresh_every has no "
                "effect here; compute them in float32, from outputs.float()",
            )
            return False
        plain_heads, hides = self._settlement.options.head_scaling == "none", self._settlement.ranks.hides
        if hides and (parameters.others or (plain_heads and last.has_heads)):
            self._settlement.advice.once(
                "sharded-plain",
                "where parameters are sharded, one pass cannot give heads and param groups with mtl=False a plain sum "
                'and others a weighted one, so that refresh_every has no effect here; use head_scaling="weights"',
            )
            return False
        passes = (
            last.whole_pass(named) if hides else last.passes(named, parameters, plain_heads, self._settlement.keeps)
        )
        if passes is None:
            self._settlement.advice.once(
                "hidden",
                "the graph of the losses hides parameters (reentrant checkpointing?), so that refresh_every "
                "has no effect here; call checkpoint(..., use_reentrant=False)",
            )
            return False
        pending.prepare(self._settlement.progress.tasks, managed)
        isolation = Isolation(managed, parameters.others)
        try:
            pending.open(last.present[0], managed, None)  # the row of any task will do for the sum over all
            run_passes(passes, retain_graph)
            grads = pending.take(last.present[0], parameters, None, self._outside())
            grads = self._settlement.ranks.average(grads, managed)
        except BaseException:
            isolation.undo()
            pending.after_failure({})
            raise
        self._settlement.finish(isolation, parameters)
        with torch.no_grad():
            add_grads(managed, grads)
        pending.clear()
        progress = self._settlement.progress
        progress.reusable = last.older(managed)
        progress.report = None if progress.report is None else progress.report.aged()
        progress.has_gradient = True
        return True

    def apart(self, call: Call) -> bool:
        """Rows of cheaper passes, a weighted one for what is not in the Gram matrix; False where there is no way."""
        named, _, parameters, _, _ = call
        partial = self._partial(named, parameters)
        inside = parameters if partial is None else partial.rows
        plans = self._plans
        others = partial is None and not self._settlement.keeps
        factored = None if plans is None else plans.make(list(named.values()), inside, others, self._settlement.ranks)
        if plans is not None and factored is None:
            self._settlement.advice.once(
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
            return self.apart(call)
        except BatchingError as error:
            asked_for = not plans.give_up_batching()
            if asked_for or factored.proven:
                advice = 'use passes="auto" or "loop"' if asked_for else "run the forward pass again"
                raise RuntimeError(f"one backward pass for all tasks cannot run: {error}; {advice}") from error
            self._settlement.advice.once(
                "loop", f"tasks have a backward pass each, as one for all of them cannot run: {error}"
            )
            return self.apart(call)
        plans.proven = True
        return True

    def _run_apart(self, call: Call, partial: Partial | None, inside: Parameters, factored: Factored | None) -> None:
        """A step with rows over some parameters, or with coordinates in them, or both."""
        named, tasks, parameters, retain_graph, names_given = call
        managed, pending, losses = parameters.managed, self._settlement.pending, list(named.values())
        more = partial is not None and bool(partial.rest or partial.plain)
        pending.prepare(list(tasks), inside.managed)
        isolation = Isolation(managed, [*parameters.others, *([] if factored is None else factored.outside)])
        rows: dict[RowKey, Row] = {}
        try:
            if factored is not None:
                rows = factored.rows(named, pending, retain_graph or more)
                self._settlement.advice.packed(self._settlement.batches.split(rows)[-1], inside.managed)
            else:
                for k, (name, loss) in enumerate(named.items()):
                    pending.open(name, inside.managed, None)
                    keep = retain_graph or more or k < len(named) - 1
                    run_backward(functools.partial(loss.backward, retain_graph=keep, inputs=inside.managed))
                    rows[name] = pending.take(name, inside, None, [], any_will_do=True)
                self._settlement.check_rows(rows, inside.managed)
            values = self._settlement.losses_with(named, 0) if self._settlement.options.method.needs_losses else {}
            whole = rows if partial is None else {name: partial.whole(row, parameters) for name, row in rows.items()}
            likes = list(managed)
            if factored is not None:
                for at, like in zip(_places(partial, managed), factored.likes(), strict=True):
                    likes[at] = like
            combined = self._settlement.combined(tasks, whole, values, parameters, names_given, likes)
            grads, report = list(combined.grads), combined.report
            if factored is not None:
                report = dataclasses.replace(report, factoring=factored.report)
                for p, at in enumerate(_places(partial, managed)):
                    if (grad := grads[at]) is not None:
                        grads[at] = factored.gradient(p, grad)
            if partial is not None:
                weights = mean_weights(report)
                own = [weights[report.tasks.index(name)] for name in named]
                run_passes(weighted_passes(losses, own, partial.rest, partial.plain), retain_graph)
                rest = self._settlement.ranks.average(take_grads(managed), managed)
                grads = [a if b is None else b for a, b in zip(grads, rest, strict=True)]
        except BaseException:
            isolation.undo()
            pending.after_failure({})
            raise
        self._settlement.finish(isolation, parameters)
        self._settlement.progress.tasks = tasks
        self._settlement.hand_over(dataclasses.replace(combined, grads=grads, report=report), list(named), managed)

    def _partial(self, named: Mapping[str, Tensor], parameters: Parameters) -> Partial | None:
        """How passes end early; None where all parameters are in the Gram matrix, or their rows have to be whole."""
        if (
            not parameters.partial
            or self._settlement.pending.rows
            or self._settlement.share_is_due
            or self._settlement.options.capture == "arena"
        ):
            return None
        if self._settlement.ranks.hides:
            self._settlement.advice.once(
                "sharded-gram", "passes cannot end early where parameters are sharded: gram=False saves nothing"
            )
            return None
        if any(loss.dtype.itemsize < 4 for loss in named.values()):
            self._settlement.advice.once(
                "coarse-gram",
                "losses in 16 bits would round the weights, so that gram=False saves nothing here; compute them in "
                "float32, from outputs.float()",
            )
            return None
        partial = Partial.of(list(named.values()), parameters, self._settlement.keeps)
        if partial is None:
            self._settlement.advice.once(
                "hidden-gram",
                "the graph of the losses hides parameters (reentrant checkpointing?), so that gram=False saves nothing "
                "here; call checkpoint(..., use_reentrant=False)",
            )
        return partial


def _places(partial: Partial | None, managed: Sequence[Tensor]) -> Sequence[int]:
    """Where the parameters that rows are over stand among the managed ones."""
    return range(len(managed)) if partial is None else partial.places
