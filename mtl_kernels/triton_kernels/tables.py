"""The tables that kernels read on the device: addresses, and the work of every program.

Both are uploaded from pinned memory, without a wait, when they are first needed and kept for the calls that follow.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..rows import ITEMSIZES, RowTable
from ..uploads import Cache, capturing, on_host, packed
from .plan import make_plan

PINS_IN_A_CAPTURE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
"""Whether torch has pinned memory during a capture: before, its allocator queried events, and failed there."""

_caches: dict[tuple[torch.device, int], Cache] = {}
"""By device and stream: on another stream an upload might not have happened yet."""
_lock = threading.RLock()
_captured: list[Tensor] = []
"""Pinned memory that a captured graph copies from at every replay: never freed."""

T = TypeVar("T")


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


def work(
    numels: Sequence[int], codes: Sequence[int], groups: Sequence[int], max_chunks: int, device: torch.device
) -> Work:
    """The plan for parameters of these sizes; those whose ``codes`` differ go to launches of their own."""
    key = (tuple(numels), tuple(codes), tuple(groups), max_chunks)

    def build() -> Work:
        plan = make_plan(*key)
        lists: list[list[int]] = [plan.slots]
        for launch in plan.launches:
            lists += [_flat(launch.segments), _flat(launch.chunks)]
        uploaded = _upload(packed(_flat(lists)), device)
        slots, *rest = uploaded.split([len(values) for values in lists])
        launches = [
            Launch(launch.code, segments, chunks, len(launch.chunks))
            for launch, segments, chunks in zip(plan.launches, rest[::2], rest[1::2], strict=True)
        ]
        return Work(launches, slots, plan.slots[-1])

    return _find(("work", *key), device, build)


def pointers(table: RowTable, out: Sequence[Tensor | None] = (), numbers: Sequence[int] = ()) -> Tensor:
    """int64 ``[K, P]``, more rows for the addresses of ``out``, and what ``numbers`` there are."""
    addresses = table.addresses + packed(0 if tensor is None else tensor.data_ptr() for tensor in out)
    words = addresses + packed(numbers)

    def build() -> Tensor:
        if table.device.type == "cuda":
            _check_aligned(addresses, table, out)
        return _upload(words, table.device)

    # The dtypes say which addresses are aligned.
    key = ("pointers", words, tuple(table.codes), tuple(None if tensor is None else tensor.dtype for tensor in out))
    return _find(key, table.device, build, len(words))


def _flat(lists: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def _check_aligned(addresses: bytes, table: RowTable, out: Sequence[Tensor | None]) -> None:
    """Raise where an element lies across the addresses it could be read at."""
    row_sizes = [ITEMSIZES[code] for code in table.codes]
    out_sizes = [1 if tensor is None else tensor.element_size() for tensor in out]
    sizes = on_host(packed([*row_sizes * table.num_tasks, *out_sizes]))
    odd = on_host(addresses) % sizes
    if odd.any():
        at = int(odd.nonzero()[0])
        row, p = divmod(at, table.num_params)
        raise ValueError(
            f"{f'row {row}' if row < table.num_tasks else 'out'}, parameter {p} lies at an address that its element "
            f"size {int(sizes[at])} does not divide; a GPU cannot read it there: clone the tensor"
        )


def _find(key: Hashable, device: torch.device, build: Callable[[], T], size: int = 0) -> T:
    """What ``build`` returned before on this stream.

    A graph that is being captured gets its own, for what it holds has to outlive the cache.
    """
    if capturing(device):
        _check_capture()
        return build()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        return _caches.setdefault((device, stream), Cache()).find(key, build, size)


def _check_capture() -> None:
    if not PINS_IN_A_CAPTURE:
        raise RuntimeError(
            "the triton backend can go into a CUDA graph with torch 2.11 or newer, found torch "
            f"{torch.__version__}: use a newer one, or the compiled backend cuda"
        )


def _upload(table: bytes, device: torch.device) -> Tensor:
    values = on_host(table)
    if device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=torch.int64, device="cpu", pin_memory=True).copy_(values)
    if capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)
