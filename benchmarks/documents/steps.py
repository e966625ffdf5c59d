"""Training steps against their K backward passes."""

from __future__ import annotations

from .markdown import short, table
from .source import OURS, Rows, number

HEAD = ("K", "method", "plain sum, ms", "K backwards, ms", "`opt.backward`, ms", "of which combine, ms",
        "/ K backwards", "TorchJD autojac, ms", "/ K backwards")  # fmt: skip


def lines(rows: Rows) -> list[str]:
    at = {(row["K"], row["method"], row["provider"]): row for row in rows}
    cells = []
    for k, method in sorted(dict.fromkeys(key[:2] for key in at), key=lambda key: int(key[0])):
        plain, floor, ours, torchjd = (
            at.get((k, method, provider)) for provider in ("plain sum", "K backwards", OURS, "torchjd")
        )
        cells.append([
            k, method, *(short(number(row, "median_ms")) for row in (plain, floor, ours)),
            short(number(ours, "combine_ms")), short(number(ours, "ratio_to_K_backwards")),
            short(number(torchjd, "median_ms")), short(number(torchjd, "ratio_to_K_backwards")),
        ])  # fmt: skip
    return table(HEAD, cells)
