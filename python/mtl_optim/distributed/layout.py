"""Gradients one after the other in flat memory, of which every rank has an equal share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture.grads import Row, grad_dtype


class Slot(NamedTuple):
    """Where a parameter lies in the flat memory of its dtype."""

    param: int
    begin: int
    end: int


class Layout:
    """Where the gradients of some parameters lie, in one flat tensor a dtype.

    Args:
        places: of the parameters, among ``params``.
        size, rank: how many shares there are, and which is this rank's.

    Attributes:
        places, params: those given. slots: the parameters of every dtype. shares: the elements of a share of it.
    """

    def __init__(self, places: Sequence[int], params: Sequence[Tensor], size: int, rank: int) -> None:
        self.places, self.slots = list(places), dict[torch.dtype, list[Slot]]()
        self.params, self._size, self._rank = params, size, rank
        for p in places:
            mine = self.slots.setdefault(grad_dtype(params[p]), [])
            begin = mine[-1].end if mine else 0
            mine.append(Slot(p, begin, begin + params[p].numel()))
        self.shares = {dtype: math.ceil(slots[-1].end / size) for dtype, slots in self.slots.items()}

    def means(self, grads: Row, dtype: torch.dtype, padded: bool) -> Tensor:
        """The gradients of a dtype divided by the number of ranks; None is zero.

        Args:
            padded: whether to end with zeros for shares of equal length.
        """
        slots = self.slots[dtype]
        length = self.shares[dtype] * self._size if padded else slots[-1].end
        flat = torch.empty(length, dtype=dtype, device=self._device(dtype))
        flat[slots[-1].end :].zero_()
        for slot in slots:
            place = flat[slot.begin : slot.end]
            if (grad := grads[slot.param]) is None:
                place.zero_()
            else:
                torch.mul(grad, 1 / self._size, out=place.view(grad.shape))
        return flat

    def empty_share(self, dtype: torch.dtype) -> Tensor:
        """Memory for this rank's share."""
        return torch.empty(self.shares[dtype], dtype=dtype, device=self._device(dtype))

    def pieces(self, dtype: torch.dtype, share: Tensor) -> dict[int, Tensor]:
        """What lies of every parameter in this rank's share, flat; of no elements where nothing does."""
        low, found = self._rank * self.shares[dtype], {}
        for slot in self.slots[dtype]:
            begin, end = max(slot.begin - low, 0), min(slot.end - low, len(share))
            found[slot.param] = share[begin : max(begin, end)] if begin < len(share) else share[:0]
        return found

    def shaped(self, dtype: torch.dtype, flat: Tensor) -> dict[int, Tensor]:
        """The gradients in memory of their own, in the shapes and memory formats of their parameters."""
        return {
            slot.param: torch.empty_like(self.params[slot.param], dtype=flat.dtype).copy_(
                flat[slot.begin : slot.end].view(self.params[slot.param].shape)
            )
            for slot in self.slots[dtype]
        }

    def _device(self, dtype: torch.dtype) -> torch.device:
        return self.params[self.slots[dtype][0].param].device
