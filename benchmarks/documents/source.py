"""The CSVs of a folder of results, ``MACHINE-KIND.csv``, and what they say of machine and effort."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .markdown import short

OURS = "mtl-kernels"
KINDS = ("kernels", "steps", "solvers", "agreement", "passes", "scaling", "train")

Row = dict[str, str]
Rows = Sequence[Row]


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Results:
    """A folder of CSVs.

    Attributes:
        machine: the only one to look at; None for all of them.
    """

    folder: Path
    machine: str | None = None

    @property
    def machines(self) -> list[str]:
        """Those with a table of any kind."""
        return sorted({machine for kind in KINDS for machine, _ in self.of(kind)})

    def of(self, kind: str) -> list[tuple[str, list[Row]]]:
        """Machines with the rows of their table of a kind, the newest first."""
        found = []
        for path in sorted(self.folder.glob(f"*-{kind}.csv")):
            machine = path.name.removesuffix(f"-{kind}.csv")
            if self.machine in (None, machine) and (rows := read_table(path)):
                found.append((machine, rows))
        return sorted(found, key=lambda one: max(row.get("date") or "" for row in one[1]), reverse=True)


def distinct(rows: Rows, column: str) -> list[str]:
    """What a column holds, each once and in order."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def number(row: Row | None, column: str) -> float | None:
    """A cell as a number; None where there is no such row or the cell is empty."""
    cell = "" if row is None else row.get(column) or ""
    return float(cell) if cell else None


def timed(row: Row | None, unit: float) -> str:
    """The median of a row of kernels in microseconds times a unit; one of a wrong result says so."""
    found = number(row, "median_us")
    if row is None or found is None:
        return ""
    return short(found * unit) + (", wrong" if row["correct"] == "False" else "")


def setting(rows: Rows) -> str:
    """On what, with what and when rows were measured, and whether that was a quick look."""
    said = {
        column: ", ".join(distinct(rows, column))
        for column in ("cpu", "threads", "instruction_set", "torch", "mtl_kernels", "commit")
    }
    days = sorted({row["date"][:10] for row in rows if row.get("date")})
    span = "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    threads = f"{said['threads']} thread{'' if said['threads'] == '1' else 's'}"
    quick = " A quick look: few repeats, fewer cases." if "quick" in distinct(rows, "effort") else ""
    return (
        f"{said['cpu']}, {threads}, {said['instruction_set']}; torch {said['torch']}, "
        f"mtl-kernels {said['mtl_kernels']}, commit {said['commit']}, {span}.{quick}"
    )
