"""A run on one device: what was measured so far and what was not, until the time is up.

A `Bench` measures, in a process that a kernel may take down; a `Record` keeps its rows, in the process that stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .device import Call, Device
from .isolate import Attempts
from .plan import Case
from .providers import backend_of
from .results import OURS, Row, compare, write_csv
from .timing import Timing

_WALK = 2e-3
"""Seconds that a sequence of calls lasts at the least, so that starting it does not show."""
_LONGEST_WALK = 0.2
_PIECE = 45.0
"""Seconds that one provider may take on one case."""

Size = tuple[int, int, torch.dtype]
"""K, N, dtype."""


class Piece(NamedTuple):
    """What is tried at once: a provider on a case, or without a provider all of the case."""

    case: Case
    provider: str = ""
    batch: int | None = None

    def like(self, other: Piece) -> bool:
        """Whether both launch the same kernel, at any number of columns."""
        mine, others = self.case, other.case
        same = (mine.kernel, mine.num_tasks, mine.dtype) == (others.kernel, others.num_tasks, others.dtype)
        return same and self.provider == other.provider != ""


@dataclass
class Record:
    """Rows of the CSV ``folder``/MACHINE.csv, written as they come."""

    folder: Path
    facts: dict[str, str | int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    too_large: set[Size] = field(default_factory=set)
    """Sizes that this device has not the memory for."""

    @property
    def path(self) -> Path:
        return self.folder / f"{self.facts.get('machine', 'unknown')}.csv"

    def take(self, what: str, value: object) -> None:
        """What a `Bench` sends."""
        if what == "facts" and isinstance(value, dict):
            self.facts = value
        elif what == "rows" and isinstance(value, list):
            self.add(value)
        elif what == "too large" and isinstance(value, tuple):
            self.too_large.add(value)

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            for name, value in self.facts.items():
                setattr(row, name, value)
            print(line(row), flush=True)
        write_csv(rows, self.path, append=bool(self.rows))
        self.rows += rows

    def lose(self, piece: object, reason: str) -> None:
        """Notes a piece that took its process down."""
        if isinstance(piece, Piece):
            note = f"{reason}; its process was lost"
            self.add([untimed(piece.case, piece.provider or OURS, "failed", piece.batch, note)])

    def noted(self, *measures: str) -> list[Row]:
        return [row for row in self.rows if row.measure in measures]


class Bench:
    """Tries the pieces of the plan on one device, and sends what comes of them."""

    def __init__(
        self, where: Device, attempts: Attempts, deadline: float, repeats: int, rows: Sequence[Row] = ()
    ) -> None:
        self.where = where
        self.attempts = attempts
        self.deadline = deadline
        self.repeats = repeats
        self.rows = list(rows)
        """Of the processes before this one as well."""
        attempts.wait = where.synchronize

    def attempt(self, piece: Piece, work: Callable[[], object], seconds: float = _PIECE) -> None:
        """Runs a piece unless it was tried or the time is up; one that fails is noted."""
        if piece in self.attempts.ended:
            return
        if time.monotonic() >= self.deadline:
            self.note("left out", piece, "no time left")
        elif any(isinstance(lost, Piece) and piece.like(lost) for lost in self.attempts.lost):
            self.note("left out", piece, "its process was lost at another size")
        elif why := self.attempts.attempt(piece, work, seconds):
            self.note("failed", piece, why)

    def add(self, rows: list[Row]) -> None:
        """Sends rows of one case, compared with what there is of it."""
        compare([*filter(rows[0].same_case, self.rows), *rows])
        self.rows += rows
        self.attempts.send("rows", rows)

    def note(self, what: str, piece: Piece, why: str) -> None:
        """A row without a time: something was left out or failed."""
        self.add([untimed(piece.case, piece.provider or OURS, what, piece.batch, why)])

    def too_large(self, size: Size) -> None:
        self.attempts.send("too large", size)

    def timed(self, case: Case, provider: str, timing: Timing, measure: str, batch: int | None = None) -> Row:
        """A row with a time, not yet judged."""
        row = untimed(case, provider, measure, batch)
        row.median_us, row.p20_us, row.p80_us = timing.median * 1e6, timing.p20 * 1e6, timing.p80 * 1e6
        row.backend = backend_of(provider, self.where.device)
        if row.backend == "triton" and measure == "graph":
            row.note = "with copies of tables to the device, which every replay makes again"
        return row

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
