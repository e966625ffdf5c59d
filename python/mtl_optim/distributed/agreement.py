"""What ranks tell each other on the host before they go into collectives that all of them have to be in."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import collectives
from .ranks import RanksDisagreeError


class Agreement:
    """An exchange of small values between the ranks of a group, on the host: nothing waits for a GPU.

    It has a group of its own, of gloo, so that what one rank says of an error does not meet a collective of others. All
    agreements of the same ranks have the same one.

    Args:
        group: the ranks; None for all.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self._host = _host_group(self.group)

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """The values of all ranks, in their order.

        Raises:
            RanksDisagreeError: another rank is somewhere else: at another call, of other tasks, or it has failed.
        """
        mine = (what, value)
        found: list[tuple[str, Any]] = [mine] * self.size
        dist.all_gather_object(found, mine, group=self._host)
        failed = [(rank, text) for rank, (there, text) in enumerate(found) if there == _FAILED]
        if failed:
            rank, text = failed[0]
            raise RanksDisagreeError(f"rank {rank} failed: {text}. No rank has changed its gradients")
        if any(there != what for there, _ in found):
            raise RanksDisagreeError(f"the ranks are at different points of a step: {_listed([w for w, _ in found])}")
        return [value for _, value in found]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks: the same bits on all of them, as every element is added up on one."""
        flat = nn.functional.pad(values.reshape(-1), (0, -values.numel() % self.size))
        mine = collectives.reduce_scatter(flat, self.size, self.group)
        return collectives.all_gather(mine, self.size, self.group)[: values.numel()].view(values.shape)

    def gather(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors of all ranks, in their order, of these sizes along a dimension."""
        own = tensor.detach().movedim(dim, 0)
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        found = collectives.all_gather(padded.view(-1), self.size, self.group).view(self.size, *padded.shape)
        return [there[:size].movedim(0, dim) for there, size in zip(found, sizes, strict=True)]

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks, at their next exchange, that this one will not be there."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (_FAILED, f"{type(error).__name__}: {error}"), group=self._host)


_FAILED = "failed"
_HOSTS: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()
"""By the group that it is for. A group is threads and sockets, which do not go with the last reference to it."""


def _host_group(group: Any) -> ProcessGroup:
    found = _HOSTS.get(group)
    if found is None:
        ranks = dist.get_process_group_ranks(group)
        found = dist.new_group(ranks, timeout=_timeout(group), backend="gloo", use_local_synchronization=True)
        _HOSTS[group] = found
    return found


def _timeout(group: ProcessGroup | None) -> timedelta | None:
    """That of a group; None where its backend does not tell."""
    if group is None:
        return None
    for device in ("cpu", "cuda"):
        try:
            found = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return found if isinstance(found, timedelta) else None
    return None


def _listed(points: Sequence[str]) -> str:
    """Which ranks are where."""
    ranks: dict[str, list[int]] = {}
    for rank, point in enumerate(points):
        ranks.setdefault(point, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, which))}: {point}" for point, which in ranks.items())
