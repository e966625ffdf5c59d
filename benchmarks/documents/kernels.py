"""gram and combine at the largest size of every K, against their floors and torch."""

from __future__ import annotations

from .markdown import short, table, times
from .source import OURS, Row, Rows, number, timed

HEAD = ("K", "MB of rows", "gram, ms", "/ floor", "budget", "torch `J @ J.T`, ms", "combine, ms", "/ floor", "budget",
        "torch `w @ J`, ms", "with `out=`, ms")  # fmt: skip
_BYTES = {"float32": 4, "bfloat16": 2}


def float32(rows: Rows) -> list[str]:
    return _lines(rows, "float32")


def bfloat16(rows: Rows) -> list[str]:
    return _lines(rows, "bfloat16")


def _lines(rows: Rows, dtype: str) -> list[str]:
    largest: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = row["kernel"], row["provider"], int(row["K"])
        if row["kernel"] in ("gram", "combine") and row["dtype"] == dtype:
            if key not in largest or int(largest[key]["N"]) < int(row["N"]):
                largest[key] = row
    cells = []
    for k in sorted({k for _, _, k in largest}):
        gram, combine = (largest.get((kernel, OURS, k)) for kernel in ("gram", "combine"))
        columns = max(int(row["N"]) for key, row in largest.items() if key[2] == k)
        cells.append([
            str(k), f"{k * columns * _BYTES[dtype] / 1e6:.0f}",
            *_ours(gram), _beside(largest.get(("gram", "torch", k))),
            *_ours(combine), *(_beside(largest.get(("combine", name, k))) for name in ("torch", "torch out=")),
        ])  # fmt: skip
    return table(HEAD, cells) if cells else []


def _ours(row: Row | None) -> list[str]:
    ratio = number(row, "ratio")
    return [timed(row, 1e-3), "" if ratio is None else f"{ratio:.2f}", short(number(row, "budget"))]


def _beside(row: Row | None) -> str:
    """A competitor's time, and what that is of ours."""
    over = times(number(row, "times_ours"))
    return timed(row, 1e-3) + (f" ({over})" if over else "")
