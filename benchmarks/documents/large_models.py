"""What large models send and hold on many ranks: arithmetic, nothing measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..scaling import NAMES, evaluate
from ..traffic import MODES
from .markdown import table

SHOWN = ((8, 1e8, 8), (8, 1e9, 64), (8, 1e10, 512), (8, 1e11, 4096), (40, 1e9, 64), (40, 1e11, 4096))
"""K, N, R."""


def lines(bytes_each: int = 4, shown: Sequence[tuple[int, float, int]] = SHOWN) -> list[str]:
    """Sent / held a rank, in GB."""
    cells = []
    for tasks, parameters, ranks in shown:
        found = evaluate(tasks, parameters, ranks, bytes_each)
        values = [f"{_short(row['sent_gb'])} / {_short(row['held_gb'])}" for row in found]
        cells.append([f"{tasks}, {parameters:.0e}, {ranks}".replace("e+", "e"), *values])
    return table(("K, N, R", *(NAMES.get(mode, mode) for mode in MODES)), cells)


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{float(f'{value:.3g}'):,g}"
