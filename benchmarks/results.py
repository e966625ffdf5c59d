"""Rows of measurements: what is stored, what is shown, and when a comparison may be made at all."""

from __future__ import annotations

import csv
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .provenance import commit, cpu_name, slug

OURS = "mtl-kernels"


@dataclass
class Row:
    """One provider on one case, in the columns of the CSV; an empty cell is None.

    ratio: median / that of the denominator. times_ours: median / the median of mtl-kernels on the same case, measured
    the same way. Both, and the verdict on the budget, are there only for results that were found correct.

    On a GPU ``measure`` says what the time is of: "graph" or "events" for the kernels, "call" until a call returns to
    the host, "latency" until the work of one call is done. Rows of other measures have no time. "count": how many
    kernels a call launches, how many copies and fills it makes, and how often the host waits for the device.
    "left out", "failed" and "missing" (though it has a budget) say in ``note`` why.
    effort: "quick" for a look with few repeats and cases, "full" for a measurement.
    """

    kernel: str
    provider: str
    K: int
    N: int
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float | None = None
    ratio: float | None = None
    denominator: str = ""
    denominator_us: float | None = None
    budget: float | None = None
    within_budget: bool | None = None
    times_ours: float | None = None
    correct: bool | None = None
    error: float | None = None
    measure: str = ""
    batch: int | None = None
    launches: int | None = None
    copies: int | None = None
    syncs: int | None = None
    backend: str = ""
    note: str = ""
    machine: str = ""
    device: str = ""
    cpu: str = ""
    threads: int = 0
    instruction_set: str = ""
    torch: str = ""
    mtl_kernels: str = ""
    commit: str = ""
    date: str = ""
    effort: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return self.K * self.N * int(getattr(torch, self.dtype).itemsize)

    def same_case(self, other: Row) -> bool:
        """Whether both are of one kernel on the same input."""
        mine = (self.kernel, self.K, self.N, self.dtype, self.batch)
        return mine == (other.kernel, other.K, other.N, other.dtype, other.batch)


def judge(row: Row, error: float, limit: float, budget: float | None, budget_in_us: bool) -> Row:
    """Fills in correctness and, only where the result is right, the ratio to the floor and the verdict."""
    row.error, row.correct = error, bool(error <= limit)
    if not row.correct:
        row.ratio = None
        return row
    if row.denominator_us:
        row.ratio = row.median_us / row.denominator_us
    if row.provider == OURS and budget is not None:
        row.budget = budget
        reached = row.median_us if budget_in_us else row.ratio
        row.within_budget = None if reached is None else reached <= budget
    return row


def compare(rows: Sequence[Row]) -> None:
    """Sets times_ours of the rows of one case, where both results are correct.

    Only times of one kind are compared: between events of a loop that waits for the host lies the host's time too,
    which a replayed graph does not have.
    """
    for row in rows:
        ours = next((r for r in rows if r.provider == OURS and r.measure == row.measure), None)
        if ours is not None and row is not ours and row.correct and ours.correct:
            row.times_ours = row.median_us / ours.median_us


def environment(machine: str | None, device: str = "cpu", quick: bool = False) -> dict[str, str | int]:
    """The columns that say where, with what and with which effort a row was measured; ``device`` is a GPU's name.

    A machine is named after its processor, cores and instruction set unless ``machine`` is its name.
    """
    from mtl_kernels.config import config

    facts = config()
    threads = torch.get_num_threads()
    instructions = facts["instruction set"]
    known = "" if instructions.startswith("none") else instructions
    return {
        "machine": machine or slug(f"{cpu_name()} {os.cpu_count()} cores {known}" if device == "cpu" else device),
        "device": device,
        "cpu": cpu_name(),
        "threads": threads,
        "instruction_set": instructions,
        "torch": facts["torch"],
        "mtl_kernels": facts["mtl-kernels"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "effort": "quick" if quick else "full",
    }


def write_csv(rows: Sequence[Row], path: Path, append: bool = False) -> None:
    """Writes rows, replacing the file or at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Row)]
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not append:
            writer.writerow(names)
        writer.writerows([_cell(name, getattr(row, name)) for name in names] for row in rows)


def _cell(name: str, value: object) -> object:
    if value is None or (name.endswith("_us") and value != value):  # NaN: a row without a time
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def format_time(microseconds: float) -> str:
    """Microseconds with three digits and a fitting unit."""
    for unit, factor in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 1000 * factor or unit == "s":
            value = microseconds / factor
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"
    raise ValueError(microseconds)


def cells(row: Row) -> list[str]:
    """A row as the printed table shows it: no ratio of any kind for a result that is wrong."""
    provider = f"{row.provider} [{row.measure}]" if row.measure in ("call", "latency") else row.provider
    if row.correct is False:
        return [row.kernel, str(row.K), f"{row.N:,}" if row.N else "", row.dtype, provider,
                format_time(row.median_us), "", "", "", "", f"wrong ({row.error:.1e})"]  # fmt: skip
    return [
        row.kernel,
        str(row.K) if row.K else "",
        f"{row.N:,}" if row.N else "",
        row.dtype,
        provider,
        format_time(row.median_us),
        f"{format_time(row.p20_us)} - {format_time(row.p80_us)}",
        "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.times_ours is None else f"{row.times_ours:.2f}x",
        "" if row.within_budget is None else ("yes" if row.within_budget else "NO") + f" (<= {row.budget:g})",
    ]


HEADINGS = (
    "kernel",
    "K",
    "N",
    "dtype",
    "provider",
    "median",
    "p20 - p80",
    "GB/s",
    "/ floor",
    "/ ours",
    "in budget",
)


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (HEADINGS, *(cells(row) for row in rows)):
            print("  ".join(line))
        return
    table = Table(*HEADINGS)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("kernel", "dtype", "provider", "in budget") else "right"
    previous = None
    for row in rows:
        if previous is not None and (row.kernel, row.K) != previous:
            table.add_section()
        previous = (row.kernel, row.K)
        bad = row.correct is False or row.within_budget is False
        table.add_row(*cells(row), style="red" if bad else "bold" if row.provider == OURS else None)
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)
