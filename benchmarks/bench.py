"""A run on one device: what was measured so far and what was not, until the time is up."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from .device import Call, Device
from .plan import Case
from .providers import backend_of
from .results import OURS, Row, write_csv
from .timing import Timing

_WALK = 2e-3
"""Seconds that a sequence of calls lasts at the least, so that starting it does not show."""
_LONGEST_WALK = 0.2


class Bench:
    """Rows of the CSV, written as they come."""

    def __init__(self, where: Device, seconds: float, repeats: int, path: Path, facts: dict[str, str | int]) -> None:
        self.where = where
        self.deadline = time.monotonic() + seconds
        self.repeats = repeats
        self.path = path
        self.facts = facts
        self.rows: list[Row] = []
        self.too_large: set[tuple[int, int, torch.dtype]] = set()
        """Sizes (K, N, dtype) that this device has not the memory for."""

    def add(self, rows: list[Row]) -> None:
        """Keeps rows, and writes all there are: what was measured survives whatever ends the run."""
        for row in rows:
            for name, value in self.facts.items():
                setattr(row, name, value)
            print(line(row), flush=True)
        write_csv(rows, self.path, append=bool(self.rows))
        self.rows += rows

    def late(self, case: Case, batch: int | None = None) -> bool:
        """Whether the time is up, noting what is left out for it."""
        if time.monotonic() < self.deadline:
            return False
        self.note("left out", case, "no time left", batch=batch)
        return True

    def note(self, what: str, case: Case, why: str, provider: str = OURS, batch: int | None = None) -> None:
        """A row without a time: something was left out, failed or is missing."""
        self.add([untimed(case, provider, what, batch, why)])

    def fail(self, case: Case, error: Exception, provider: str = OURS, batch: int | None = None) -> None:
        """Notes a failure and goes on, unless the device is beyond use."""
        text = str(error).splitlines()[0] if str(error) else ""
        self.note("failed", case, f"{type(error).__name__}: {text}", provider, batch)
        self.where.synchronize()

    def timed(self, case: Case, provider: str, timing: Timing, measure: str, batch: int | None = None) -> Row:
        """A row with a time, not yet judged."""
        row = untimed(case, provider, measure, batch)
        row.median_us, row.p20_us, row.p80_us = timing.median * 1e6, timing.p20 * 1e6, timing.p80 * 1e6
        row.backend = backend_of(provider, self.where.device)
        if row.backend == "triton" and measure == "graph":
            row.note = "with copies of tables to the device, which every replay makes again"
        return row

    def noted(self, *measures: str) -> list[Row]:
        return [row for row in self.rows if row.measure in measures]

    def kernel_time(self, calls: list[Call]) -> tuple[Timing, str]:
        """The time of the calls in turn; of fewer of them the slower they are."""
        first = self.where.once(calls[0])
        calls = calls[: max(len(dict.fromkeys(calls)), math.ceil(_WALK / first))]
        return self.where.kernel_time(calls[: math.ceil(_LONGEST_WALK / first)], self.repeats)


def untimed(case: Case, provider: str, measure: str, batch: int | None = None, note: str = "") -> Row:
    """A row without a time."""
    dtype = str(case.dtype).removeprefix("torch.")
    nan = math.nan
    return Row(case.kernel, provider, case.num_tasks, case.num_columns, dtype, nan, nan, nan, measure=measure,
               batch=batch, note=note)  # fmt: skip


def line(row: Row) -> str:
    """One row on one line, for the log."""
    size = f"K={row.K}" + (f" N={row.N:,}" if row.N else "") + (f" batch={row.batch}" if row.batch else "")
    text = f"{row.kernel} {size} {row.dtype} {row.provider}"
    if row.measure == "count":
        return f"{text}: {row.launches} kernels, {row.copies} copies, {row.syncs} waits"
    if row.measure in ("left out", "failed", "missing"):
        return f"{row.measure.upper()}: {text}: {row.note}"
    text += f" [{row.measure}]: {row.median_us:.4g} us"
    text += f", {1 / row.ratio:.3f} of copy" if row.ratio else ""
    text += f", {row.times_ours:.2f}x ours" if row.times_ours else ""
    return text if row.correct is not False else f"{text}, WRONG ({row.error:.2g})"
