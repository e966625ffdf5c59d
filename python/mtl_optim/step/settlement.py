"""From the rows of a step to ``.grad``: their combination, over the ranks of a run, and what is kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..capture.grads import Isolation, Row, RowKey, add_grads
from ..distributed.ranks import Ranks
from ..distributed.sending import Sent
from ..options import Options
from .advice import Advice
from .batches import Batches
from .combination import Combined, Combiner
from .heads import Heads
from .lazy import stand_aside
from .losses import stack_losses
from .parameters import Parameters
from .pending import Pending
from .progress import Progress
from .refresh import Reusable
from .transform import tell_norms


class Settlement:
    """What all ways to take a step end in.

    Args:
        options: see `MultiTaskOptimizer`.
        progress: where it stands.
        pending: rows that are not combined yet.
        advice: what users are told.
        ranks: how gradients lie on the ranks of a run.
    """

    def __init__(self, options: Options, progress: Progress, pending: Pending, advice: Advice, ranks: Ranks) -> None:
        self.options, self.progress, self.pending = options, progress, pending
        self.advice, self.ranks = advice, ranks
        self.batches = Batches.of(options.method)
        self._combiner = Combiner(options)

    @property
    def heads(self) -> Heads:
        """Those that were seen so far."""
        return self._combiner.heads

    @property
    def keeps(self) -> bool:
        """Whether gradients outside the optimizer are left as they are."""
        return self.options.outside == "keep"

    @property
    def share_is_due(self) -> bool:
        """Whether this step compares its Gram matrix with that over all parameters."""
        every, last = self.options.share_every, self.progress.report
        if every is None:
            return False
        return last is None or last.gram_share is None or last.gram_share.age + 1 >= every

    def losses_with(self, named: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The loss values of the step's last batch, with those of ``named``."""
        return self.pending.losses_with(named if self.batches.is_last(batch) else {})

    def finish(self, isolation: Isolation, parameters: Parameters, keep_others: bool = False) -> None:
        """Puts gradients back, and adds to those of others their mean over the ranks."""
        isolation.finish(keep_others, lambda grads: self.ranks.average(grads, parameters.others))

    def check_rows(self, rows: Mapping[RowKey, Row], managed: Sequence[Tensor]) -> None:
        """Raise RuntimeError if some are not what was captured; look for parameters that tasks share in parts."""
        self.pending.check_rows(rows)
        if not self.ranks.hides and not any(isinstance(row, Sent) for row in rows.values()):
            self.advice.packed(self.batches.split(rows)[-1], managed)

    def combined(
        self,
        tasks: tuple[str, ...],
        rows: Mapping[RowKey, Row],
        losses: Mapping[str, Tensor],
        parameters: Parameters,
        names_given: bool,
        likes: Sequence[Tensor] | None = None,
    ) -> Combined:
        """What the rows of a step come to.

        Args:
            likes: of the shapes and dtypes of the rows, where these are not those of the parameters.
        """
        batches = self.batches.split(rows)
        last = batches[-1]
        if len(last) == 1:
            self.advice.lone_task(next(iter(last)), tasks, names_given)
        method = self.options.method
        absent: Row = [None] * len(parameters.managed)
        values = None
        if method.needs_losses:
            device = next((param.device for param in parameters.managed), torch.device("cpu"))
            values = stack_losses(losses, tasks, device)
        *earlier, found = [[batch.get(name, absent) for name in tasks] for batch in batches]
        ranks, likes = self.ranks, parameters.managed if likes is None else likes
        with torch.no_grad():
            values = None if values is None else ranks.mean(values)
            *before, reduced = ranks.reduce([*earlier, found], likes)
            combined = self._combiner(
                tasks, reduced.rows, parameters, values, [one.rows for one in before], self.share_is_due,
                ranks.total if ranks.several else None, reduced.counted,
            )  # fmt: skip
            combined = dataclasses.replace(combined, grads=ranks.expand(combined.grads, reduced, likes))
        tell_norms(self.options.transform, combined.report, list(last))
        if method.stops_at_zero_rows and combined.anything_shared:
            self.advice.zero_rows(combined.report)
        return combined

    def hand_over(self, combined: Combined, present: list[str], managed: Sequence[Tensor]) -> None:
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
