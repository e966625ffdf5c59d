"""The tables that kernels read on the device: addresses, and the work of every program.

Both are uploaded from pinned memory, without a wait, when they are first needed and kept for the calls that follow.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import RowTable
from .plan import make_plan

CACHED_TABLES = 64
"""Tables kept, of the ones used last."""

_ITEMSIZES = (4, 8, 2, 2)
_cache: OrderedDict[Hashable, object] = OrderedDict()
_captured: list[Tensor] = []
"""Pinned memory that a captured graph copies from at every replay: never freed."""


class Launch(NamedTuple):
    """One launch of a plan on the device, see `plan.Launch`."""

    code: int
    segments: Tensor
    chunks: Tensor
    num_chunks: int


class Work(NamedTuple):
    """A plan on the device, see `plan.Plan`."""

    launches: list[Launch]
    slots: Tensor
    num_slots: int


def work(table: RowTable, groups: Sequence[int], max_chunks: int) -> Work:
    """The plan for a table's sizes."""
    key = (tuple(table.numels), tuple(table.codes), tuple(groups), max_chunks)

    def build() -> Work:
        plan = make_plan(*key)
        lists: list[list[int]] = [plan.slots]
        for launch in plan.launches:
            lists += [_flat(launch.segments), _flat(launch.chunks)]
        packed = _upload(_flat(lists), table.device)
        slots, *rest = packed.split([len(values) for values in lists])
        launches = [
            Launch(launch.code, segments, chunks, len(launch.chunks))
            for launch, segments, chunks in zip(plan.launches, rest[::2], rest[1::2], strict=True)
        ]
        return Work(launches, slots, plan.slots[-1])

    found = _cached(("work", *key), table.device, build)
    return found  # type: ignore[return-value]


def pointers(table: RowTable, out: Sequence[Tensor | None] = ()) -> Tensor:
    """int64 ``[K, P]``, and one more row for the addresses of ``out``."""
    addresses = [*table.pointers, *(0 if tensor is None else tensor.data_ptr() for tensor in out)]
    key = tuple(addresses)

    def build() -> Tensor:
        if table.device.type == "cuda":
            _check_aligned(addresses, table)
        return _upload(addresses, table.device)

    found = _cached(("pointers", key, tuple(table.codes)), table.device, build)
    return found  # type: ignore[return-value]


def _flat(lists: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def _check_aligned(addresses: Sequence[int], table: RowTable) -> None:
    sizes = torch.tensor([_ITEMSIZES[code] for code in table.codes])
    odd = torch.tensor(addresses).view(-1, table.num_params) % sizes
    if odd.any():
        row, p = odd.nonzero()[0].tolist()
        raise ValueError(
            f"{f'row {row}' if row < table.num_tasks else 'out'}, parameter {p} lies at an address that its element "
            f"size {int(sizes[p])} does not divide; a GPU cannot read it there: clone the tensor"
        )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _cached(key: Hashable, device: torch.device, build) -> object:  # type: ignore[no-untyped-def]
    """What ``build`` returned before on this stream: elsewhere its upload might not have happened yet.

    A graph that is being captured gets its own, for what it holds has to outlive the cache.
    """
    if _capturing(device):
        return build()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, key)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = build()
        if len(_cache) > CACHED_TABLES:
            _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    return found


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
    pinned.copy_(torch.tensor(values, dtype=torch.int64, device="cpu"))
    if _capturing(device):
        _captured.append(pinned)
    return torch.empty(len(values), dtype=torch.int64, device=device).copy_(pinned, non_blocking=True)
