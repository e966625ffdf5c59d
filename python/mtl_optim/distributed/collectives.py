"""Collectives of whole tensors, under the names that a version of torch has for them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(mine: Tensor, size: int, group: ProcessGroup | None) -> Tensor:
    """The flat tensors of all ``size`` ranks, one after the other."""
    found = mine.new_empty(size * mine.numel())
    _gather(found, mine, group=group)
    return found


def reduce_scatter(flat: Tensor, size: int, group: ProcessGroup | None) -> Tensor:
    """This rank's part, one of ``size``, of the sum over the ranks."""
    found, work = start_reduce_scatter(flat, size, group)
    work.wait()
    return found


def start_reduce_scatter(flat: Tensor, size: int, group: ProcessGroup | None) -> tuple[Tensor, Work]:
    """The same without a wait, and what to wait for before it is read."""
    found = flat.new_empty(flat.numel() // size)
    return found, _scatter(found, flat, group=group, async_op=True)


def all_reduce(tensor: Tensor, group: ProcessGroup | None) -> None:
    """The sum over the ranks, in place."""
    dist.all_reduce(tensor, group=group)
