"""A step on two ranks against its passes and its bytes."""

from __future__ import annotations

from .markdown import short, table
from .source import Rows, number


def lines(rows: Rows) -> list[str]:
    cells = [
        [row["network"], row["K"], row["ranks"], row["mode"], short(number(row, "median_ms")),
         "" if (ratio := number(row, "ratio")) is None else f"{ratio:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(("network", "K", "ranks", "", "ms", "/ passes and bytes"), cells)
