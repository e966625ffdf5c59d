"""Peak memory between two moments."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Protocol

import torch


class Meter(Protocol):
    """What is read at both."""

    def begin(self) -> None: ...

    def end(self) -> float:
        """Bytes above what there was at the beginning."""


class Resident:
    """Of this process, whose peak can be set back."""

    def begin(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be taken again unseen
        self.reset()
        self._before = self._read("VmRSS")

    def end(self) -> float:
        return self._read("VmHWM") - self._before

    @staticmethod
    def reset() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Largest:
    """Of this process where its peak cannot be set back: too little where memory freed before is used again."""

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> float:
        return self._read() - self._before

    @staticmethod
    def _read() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


class Allocated:
    """On the current GPU."""

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def end(self) -> float:
        return float(torch.cuda.max_memory_allocated() - self._before)
