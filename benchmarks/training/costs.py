"""What steps cost, from the table of trainings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..documents.markdown import short
from ..documents.source import Rows
from .jobs import PLAIN, SINGLE, TUNED

HEAD = ("workload", "K", "method", "forward", "passes", "combination", "optimizer", "peak, MB", "K passes",
        "`backward`", "more", "gram", "solve", "combine", "Python")  # fmt: skip
BUDGET = 0.05
STEP = ("forward_ms", "passes_ms", "combination_ms", "optimizer_ms")


def value(rows: Rows, column: str) -> float | None:
    """The median over rows; None where none has it."""
    found = [float(row[column]) for row in rows if row.get(column)]
    return statistics.median(found) if found else None


def step_ms(rows: Rows) -> float | None:
    """Of a whole step."""
    found = [sum(float(row[part]) for part in STEP) for row in rows if row.get(STEP[0])]
    return statistics.median(found) if found else None


def by_method(runs: Rows) -> dict[tuple[str, str], list[dict[str, str]]]:
    """The rows of all seeds, by workload and method."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in runs:
        found.setdefault((row["workload"], row["method"]), []).append(row)
    return found


def cost_rows(runs: Rows) -> tuple[list[list[str]], list[tuple[str, str, float, float | None]]]:
    """The cells of the table; of those above the budget workload, method, share, and how much of that is Python."""
    cells, over = [], []
    for (workload, method), rows in by_method(runs).items():
        if method in (SINGLE, TUNED, PLAIN) or "/" in method:
            continue
        passes, whole = value(rows, "raw_passes_ms"), value(rows, "whole_ms")
        if passes is None or whole is None:
            continue
        kernels = [value(rows, f"{part}_ms") for part in ("gram", "solve", "combine")]
        there = [kernel for kernel in kernels if kernel is not None]
        python = whole - passes - sum(there) if len(there) == len(kernels) else None
        share = whole / passes - 1
        if share > BUDGET:
            over.append((workload, method, share, None if python is None else max(0.0, python) / (whole - passes)))
        step = [value(rows, column) for column in (*STEP, "peak_mb")]
        numbers = [*map(short, step), short(passes), short(whole), f"{100 * share:.1f} %"]
        cells.append([workload, rows[0]["K"], method, *numbers, *map(short, [*kernels, python])])
    return cells, over


def where_time_goes(over: Sequence[tuple[str, str, float, float | None]], number: int) -> list[str]:
    """Which combinations are above the budget, and what of them."""
    if not over:
        return [f"All {number} are within 5 % of their passes.", ""]
    shares = [100 * share for _, _, share, _ in over]
    names = ", ".join(dict.fromkeys(workload for workload, *_ in over))
    lines = [
        f"{number - len(over)} of {number} are within 5 % of their passes; the others are {min(shares):.0f} % to "
        f"{max(shares):.0f} % above them, on {names}."
    ]
    if python := [part for *_, part in over if part is not None]:
        lines.append(
            f"Of these, where kernels were measured by themselves, {100 * statistics.median(python):.0f} % is Python "
            "(median): which parameters are shared, whether gradients lie apart, tables of rows, the report. It shows "
            "where passes are short."
        )
    return [*lines, ""]


def peer_rows(runs: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and cells: a line for each workload and method that a peer was trained with."""
    grouped = by_method(runs)
    peers = list(dict.fromkeys(method.partition("/")[0] for _, method in grouped if "/" in method))
    head = ["workload", "K", "method", "plain sum", "ours"]
    for peer in peers:
        head += [peer, f"{peer} / ours", "apart, length"]
    cells = []
    for workload in dict.fromkeys(name for name, _ in grouped):
        methods = [method for name, method in grouped if name == workload and "/" in method]
        for method in dict.fromkeys(method.partition("/")[2] for method in methods):
            ours = grouped.get((workload, method))
            if ours is None:
                continue
            line = [workload, ours[0]["K"], method, _step(grouped.get((workload, PLAIN), [])), _step(ours)]
            for peer in peers:
                rows = grouped.get((workload, f"{peer}/{method}"), [])
                theirs, own = step_ms(rows), step_ms(ours)
                line += [_step(rows), f"{theirs / own:.1f}" if theirs and own else "", _agreement(rows)]
            cells.append(line)
    return head, cells


def _step(rows: Rows) -> str:
    time, memory = step_ms(rows), value(rows, "peak_mb")
    return "" if time is None else short(time) + ("" if memory is None else f" ({memory:.0f})")


def _agreement(rows: Rows) -> str:
    apart, longer = value(rows, "apart"), value(rows, "longer")
    if apart is not None and longer is not None:
        return f"{apart:.0e}, {longer:.2f}"
    return next((row["note"] for row in rows if row.get("note")), "")
