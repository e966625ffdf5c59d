"""Replicated parameters: every rank has all of them, and the gradients of its own batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..capture.grads import Row, same_tensors
from . import collectives
from .agreement import Agreement
from .layout import Layout
from .ranks import Reduced
from .sending import Sender, Sent
from .several import Several


class Replicated(Several):
    """The mean of rows over ranks, by reduce-scatter: each rank gets the same piece of every row.

    K rows of N elements on R ranks: (K + 1) N (R - 1) / R elements are sent a rank, and K N / R are held, where an
    all-reduce of every row sends 2 K N (R - 1) / R and holds K N. A row is on its way while the next task's pass runs,
    as soon as a step has shown what several tasks reach. Parameters that one task alone reaches are averaged whole,
    once. Features, which are no leaves, are of this rank's batch: the gradient of the mean over the ranks has its own
    entries for each of them, of which this rank has its own, and nothing is sent.

    Args:
        group: the ranks; None for all.
        reduce: "scatter", or "all" for the all-reduce.
        agreement: of the same group, where there is one.
    """

    hides = False

    def __init__(self, group: ProcessGroup | None, reduce: str = "scatter", agreement: Agreement | None = None) -> None:
        super().__init__(Agreement(group) if agreement is None else agreement)
        self._group, self._size = self._agreement.group, self._agreement.size
        self._scatters = reduce == "scatter"
        self._last: Layout | None = None
        self._params: list[Tensor] = []

    def sender(self, num_rows: int, params: Sequence[Tensor]) -> Sender | None:
        if self._last is None or not same_tensors(params, self._params):
            return None
        return Sender(num_rows, self._last, self._size, self._group)

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        if any(param.is_complex() for param in params):
            raise TypeError("complex parameters are not reduced over ranks; hold them as pairs of reals")
        masks = self._agree_on([[grad is not None for grad in row] for rows in batches for row in rows])
        num_tasks = len(batches[0])
        return [
            self._reduced(rows, masks[b * num_tasks : (b + 1) * num_tasks], params) for b, rows in enumerate(batches)
        ]

    def _reduced(self, rows: Sequence[Row], masks: Sequence[Sequence[bool]], params: Sequence[Tensor]) -> Reduced:
        """The rows of a batch.

        Args:
            masks: what each of them reaches, on any rank.
        """
        leaves = [param.is_leaf for param in params]
        shared = [p for p, leaf in enumerate(leaves) if leaf and sum(there[p] for there in masks) > 1]
        layouts = [row.layout for row in rows if isinstance(row, Sent)][:1]
        sent = set(layouts[0].places) if layouts else set()
        if self._scatters and (more := [p for p in shared if p not in sent]):
            layouts.append(self._layout(more, params))
        self._keep(shared, layouts, params)
        split = {p for layout in layouts for p in layout.places}
        whole = [p for p, leaf in enumerate(leaves) if leaf and p not in split]
        found = []
        for row, there in zip(rows, masks, strict=True):
            pieces = self._means(row, [p for p in whole if there[p]], params)
            for layout in layouts:
                pieces |= self._scattered(row, there, layout)
            for p, leaf in enumerate(leaves):
                if there[p] and not leaf:
                    pieces[p] = torch.zeros_like(params[p]) if (grad := row[p]) is None else grad.mul_(1 / self._size)
            found.append([pieces.get(p) if here else None for p, here in enumerate(there)])
        counted = [p in split or not leaf or self.rank == 0 for p, leaf in enumerate(leaves)]
        return Reduced(found, counted, layouts)

    def _scattered(self, row: Row, there: Sequence[bool], layout: Layout) -> dict[int, Tensor]:
        """This rank's pieces of the mean of a row."""
        if isinstance(row, Sent) and row.layout is layout:
            row.wait()
            return row.pieces
        found: dict[int, Tensor] = {}
        for dtype, slots in layout.slots.items():
            if any(there[slot.param] for slot in slots):
                flat = layout.means(row, dtype, padded=True)
                found |= layout.pieces(dtype, collectives.reduce_scatter(flat, self._size, self._group))
        return found

    def _means(self, grads: Row, places: Sequence[int], params: Sequence[Tensor]) -> dict[int, Tensor]:
        """The means of some whole gradients over the ranks."""
        found: dict[int, Tensor] = {}
        layout = self._layout(places, params)
        for dtype in layout.slots:
            flat = layout.means(grads, dtype, padded=False)
            collectives.all_reduce(flat, self._group)
            found |= layout.shaped(dtype, flat)
        return found

    def _keep(self, shared: list[int], layouts: list[Layout], params: Sequence[Tensor]) -> None:
        """What the rows of the next step are sent by as they come."""
        if not self._scatters or not all(param.is_leaf for param in params):
            return
        known = layouts[0] if layouts and layouts[0].places == shared else None
        self._last = known or (self._layout(shared, params) if shared else None)
        self._params = list(params)

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        # A pass from the features makes this rank's part of a mean once more.
        found = [
            grad if grad is None or param.is_leaf else grad.mul_(self._size)
            for grad, param in zip(grads, params, strict=True)
        ]
        for layout in reduced.layouts:
            for dtype in layout.slots:
                share = layout.empty_share(dtype)
                for p, piece in layout.pieces(dtype, share).items():
                    if (grad := grads[p]) is not None:
                        piece.copy_(grad)
                shaped = layout.shaped(dtype, collectives.all_gather(share, self._size, self._group))
                for p, whole in shaped.items():
                    found[p] = None if grads[p] is None else whole
        return found

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        if not params:
            return grads
        (there,) = self._agree_on([[grad is not None for grad in grads]])
        means = self._means(grads, [p for p, here in enumerate(there) if here], params)
        return [means.get(p) for p in range(len(params))]

    def _agree_on(self, mask: list[list[bool]]) -> list[list[bool]]:
        """What any rank has."""
        packed = [sum(here << p for p, here in enumerate(row)) for row in mask]
        everywhere = self._agreement.exchange("combination", packed)
        return [[any(there[k] >> p & 1 for there in everywhere) for p in range(len(row))] for k, row in enumerate(mask)]

    def _layout(self, places: Sequence[int], params: Sequence[Tensor]) -> Layout:
        return Layout(places, params, self._size, self.rank)
