"""Tables of 64-bit words that kernels read on a device: how they get there, and which ones are kept."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

KEPT = 64
"""Values a cache keeps, at most."""

KEPT_BYTES = 16 << 20
"""Bytes of tables a cache keeps: rows that are new at every step bring a table of K * P addresses each time."""

_FEWEST = 4
"""Values a cache keeps however large they are: the tables of one step, which may come again at the next."""

T = TypeVar("T")


class Cache:
    """The values that were asked for last, by key. Not for several threads at once."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Hashable, make: Callable[[], T], size: int | Callable[[T], int] = 0) -> T:
        """The value of ``key``, made where it is not kept; ``size`` bytes, or of the value, count for it."""
        entry = self._values.get(key)
        if entry is None:
            made = make()
            entry = self._values[key] = (made, size(made) if callable(size) else size)
            self._bytes += entry[1]
            while len(self) > KEPT or (self._bytes > KEPT_BYTES and len(self) > _FEWEST):
                _, (_, freed) = self._values.popitem(last=False)
                self._bytes -= freed
        else:
            self._values.move_to_end(key)
        found: T = entry[0]
        return found


def packed(words: Iterable[int]) -> bytes:
    """Integers from 0 to 2^64 - 1 as a table: as a key it is exact, and takes 8 bytes each where a tuple takes 40."""
    return array("Q", words).tobytes()


def on_host(table: bytes) -> Tensor:
    """int64 ``[words]`` in memory of its own, on the CPU whatever torch's default device is."""
    if not table:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(table), dtype=torch.int64)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device, which need not be the current device, goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
