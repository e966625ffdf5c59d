"""How far every method is from its independent oracle."""

from __future__ import annotations

from .markdown import table
from .source import Rows

_NUMBERS = ("median", "largest", "tolerance")


def lines(rows: Rows) -> list[str]:
    cells = [
        [row["method"], row["oracle"], f"{int(row['cases']):,}", *(f"{float(row[name]):.2g}" for name in _NUMBERS)]
        for row in rows
    ]
    return table(("method", "oracle", "cases", *_NUMBERS), cells)
