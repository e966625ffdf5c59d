"""Replicated parameters: every rank has all of them, and the gradients of its own batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..capture.grads import Row, grad_dtype
from . import collectives
from .agreement import Agreement
from .ranks import Reduced


class Slot(NamedTuple):
    """Where a parameter lies in the flat memory of its dtype."""

    param: int
    begin: int
    end: int


class Replicated:
    """The mean of rows over ranks, by reduce-scatter: each rank gets the same piece of every row.

    K rows of N elements on R ranks: (K + 1) N (R - 1) / R elements are sent a rank, and K N / R are held, where an
    all-reduce of every row sends 2 K N (R - 1) / R and holds K N. Parameters that one task alone reaches are
    averaged whole, once.

    Args:
        group: the ranks; None for all.
        reduce: "scatter", or "all" for the all-reduce.
    """

    several, hides = True, False

    def __init__(self, group: ProcessGroup | None, reduce: str = "scatter") -> None:
        self._agreement = Agreement(group)
        self._group, self._size, self._rank = self._agreement.group, self._agreement.size, self._agreement.rank
        self._scatters = reduce == "scatter"

    def check(self, point: str) -> None:
        self._agreement.exchange(point)

    def fail(self, error: BaseException) -> None:
        self._agreement.fail(error)

    def reduce(self, batches: Sequence[Sequence[Row]], params: Sequence[Tensor]) -> list[Reduced]:
        if any(param.is_complex() for param in params):
            raise TypeError("complex parameters are not reduced over ranks; hold them as pairs of reals")
        masks = self._agree_on([[grad is not None for grad in row] for rows in batches for row in rows])
        found, num_tasks = [], len(batches[0])
        for b, rows in enumerate(batches):
            mask = masks[b * num_tasks : (b + 1) * num_tasks]
            split = [self._scatters and sum(there[p] for there in mask) > 1 for p in range(len(params))]
            reduced = [self._reduced(row, there, split, params) for row, there in zip(rows, mask, strict=True)]
            found.append(Reduced(reduced, [apart or self._rank == 0 for apart in split], split))
        return found

    def _reduced(self, row: Row, there: Sequence[bool], split: Sequence[bool], params: Sequence[Tensor]) -> Row:
        """One row of the mean."""
        found: Row = [None] * len(params)
        whole = [p for p, here in enumerate(there) if here and not split[p]]
        for p, mean in zip(whole, self._means([row[p] for p in whole], [params[p] for p in whole]), strict=True):
            found[p] = mean
        for dtype, (slots, size) in self._layout([p for p, apart in enumerate(split) if apart], params).items():
            if not any(there[slot.param] for slot in slots):
                continue
            flat = self._flat(row, slots, size * self._size, dtype, params)
            share = collectives.reduce_scatter(flat, self._size, self._group)
            for slot, piece in self._pieces(slots, size, share):
                found[slot.param] = piece if there[slot.param] else None
        return found

    def total(self, gram: Tensor) -> Tensor:
        return self._agreement.sum(gram)

    def expand(self, grads: Row, reduced: Reduced, params: Sequence[Tensor]) -> Row:
        found = list(grads)
        for dtype, (slots, size) in self._layout([p for p, apart in enumerate(reduced.split) if apart], params).items():
            share = torch.empty(size, dtype=dtype, device=params[slots[0].param].device)
            for slot, piece in self._pieces(slots, size, share):
                if (grad := grads[slot.param]) is not None:
                    piece.copy_(grad)
            flat = collectives.all_gather(share, self._size, self._group)
            for slot in slots:
                found[slot.param] = _shaped(flat, slot, params)
        return found

    def average(self, grads: Row, params: Sequence[Tensor]) -> Row:
        if not params:
            return grads
        (there,) = self._agree_on([[grad is not None for grad in grads]])
        places = [p for p, here in enumerate(there) if here]
        found: Row = [None] * len(params)
        means = self._means([grads[p] for p in places], [params[p] for p in places])
        for p, mean in zip(places, means, strict=True):
            found[p] = mean
        return found

    def mean(self, values: Tensor) -> Tensor:
        return self._agreement.sum(values) / self._size

    def _agree_on(self, mask: list[list[bool]]) -> list[list[bool]]:
        """What any rank has."""
        packed = [sum(here << p for p, here in enumerate(row)) for row in mask]
        everywhere = self._agreement.exchange("combination", packed)
        return [[any(there[k] >> p & 1 for there in everywhere) for p in range(len(row))] for k, row in enumerate(mask)]

    def _layout(self, places: Sequence[int], params: Sequence[Tensor]) -> dict[torch.dtype, tuple[list[Slot], int]]:
        """For every dtype the slots of its parameters, and the elements that a rank gets of them."""
        slots: dict[torch.dtype, list[Slot]] = {}
        for p in places:
            mine = slots.setdefault(grad_dtype(params[p]), [])
            begin = mine[-1].end if mine else 0
            mine.append(Slot(p, begin, begin + params[p].numel()))
        return {dtype: (mine, math.ceil(mine[-1].end / self._size)) for dtype, mine in slots.items()}

    def _pieces(self, slots: Sequence[Slot], size: int, share: Tensor) -> list[tuple[Slot, Tensor]]:
        """What lies of every parameter in the share of this rank, flat; of no elements where nothing does."""
        low, found = self._rank * size, []
        for slot in slots:
            begin, end = max(slot.begin - low, 0), min(slot.end - low, size)
            found.append((slot, share[begin : max(begin, end)] if begin < size else share[:0]))
        return found

    def _flat(
        self, grads: Row, slots: Sequence[Slot], size: int, dtype: torch.dtype, params: Sequence[Tensor]
    ) -> Tensor:
        """Gradients divided by the number of ranks, one after the other; None is zero."""
        flat = torch.zeros(size, dtype=dtype, device=params[slots[0].param].device)
        for slot in slots:
            if (grad := grads[slot.param]) is not None:
                torch.mul(grad, 1 / self._size, out=flat[slot.begin : slot.end].view(grad.shape))
        return flat

    def _means(self, grads: Row, params: Sequence[Tensor]) -> list[Tensor]:
        """The means of whole gradients over the ranks; None counts as zero."""
        found: dict[int, Tensor] = {}
        for dtype, (slots, _) in self._layout(range(len(params)), params).items():
            flat = self._flat(grads, slots, slots[-1].end, dtype, params)
            collectives.all_reduce(flat, self._group)
            found.update((slot.param, _shaped(flat, slot, params)) for slot in slots)
        return [found[p] for p in range(len(params))]


def _shaped(flat: Tensor, slot: Slot, params: Sequence[Tensor]) -> Tensor:
    """A gradient in memory of its own, in the shape and memory format of its parameter."""
    param = params[slot.param]
    return torch.empty_like(param, dtype=flat.dtype).copy_(flat[slot.begin : slot.end].view(param.shape))
