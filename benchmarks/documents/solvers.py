"""The weights of every method from a Gram matrix, beside other libraries."""

from __future__ import annotations

from .markdown import short, table, times
from .source import OURS, Row, Rows, distinct, number

_COMPARED = (8, 40)
"""Numbers of tasks at which other libraries are shown."""


def lines(rows: Rows) -> list[str]:
    at = {(row["method"], row["provider"], row["K"], row["batch"]): row for row in rows}
    tasks = sorted({int(row["K"]) for row in rows if row["batch"] == "1"})
    batches = [(k, b) for b in distinct(rows, "batch") if b != "1" for k in _COMPARED[:1]]
    peers = [name for name in distinct(rows, "provider") if name != OURS]
    cells = []
    for method in distinct(rows, "method"):
        ours = [short(number(at.get((method, OURS, str(k), "1")), "median_us")) for k in tasks]
        ours += [short(number(at.get((method, OURS, str(k), b)), "median_us")) for k, b in batches]
        gaps = [gap for row in rows if row["method"] == method and (gap := number(row, "gap")) is not None]
        if not any(ours):
            continue
        beside = [[_beside(at.get((method, peer, str(k), "1"))) for k in _COMPARED] for peer in peers]
        cells.append([
            method, *ours, f"{max(gaps):.0e}" if gaps else "", *(", ".join(filter(None, found)) for found in beside)
        ])  # fmt: skip
    head = ["method", *(f"K = {k}" for k in tasks), *(f"{b} problems of K = {k}" for k, b in batches), "largest gap"]
    return table([*head, *(f"{peer} at {', '.join(map(str, _COMPARED))}" for peer in peers)], cells)


def _beside(row: Row | None) -> str:
    over = times(number(row, "times_ours"))
    return short(number(row, "median_us")) + (f" ({over})" if over else "")
