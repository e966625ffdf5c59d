"""Gram, solve and combine in one, and the two solvers by themselves, by K."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import short, table
from .source import OURS, Rows, number, timed

SOLVERS = {"pcgrad": "PCGrad, random order", "min_norm": "min-norm"}
STEPS = {"pcgrad_step": "PCGrad", "mgda_step": "MGDA"}
_LEFT_OUT = f"{OURS} reference"
"""The definition in PyTorch, which nobody waits for."""


def two_solvers(rows: Rows) -> list[str]:
    """Microseconds a call of every provider, and the budgets."""
    own = [row for row in rows if row["kernel"] in SOLVERS and row["provider"] != _LEFT_OUT]
    tasks = sorted({int(row["K"]) for row in own})
    cells = []
    for kernel, title in SOLVERS.items():
        of = [row for row in own if row["kernel"] == kernel]
        cells += [[title, provider, *values] for (provider, _), values in _by_provider(of, tasks, 1.0).items()]
        budgets = {int(row["K"]): number(row, "budget") for row in of if row["provider"] == OURS}
        if of:
            cells.append([title, "budget", *(short(budgets.get(k)) for k in tasks)])
    return table(("solver", "by", *(f"K = {k}" for k in tasks)), cells) if cells else []


def whole(rows: Rows) -> list[str]:
    """Milliseconds of gram, solve and combine in turn, at every N."""
    own = [row for row in rows if row["kernel"] in STEPS]
    tasks = sorted({int(row["K"]) for row in own})
    cells = [
        [title, provider, f"{columns:,}", *values]
        for kernel, title in STEPS.items()
        for (provider, columns), values in _by_provider(
            [row for row in own if row["kernel"] == kernel], tasks, 1e-3
        ).items()
    ]
    return table(("method", "by", "N", *(f"K = {k}" for k in tasks)), cells) if cells else []


def _by_provider(rows: Rows, tasks: Sequence[int], unit: float) -> dict[tuple[str, int], list[str]]:
    """By provider and N, the smaller first, the times of every K; those of a wrong result say so."""
    at = {(row["provider"], int(row["N"]), int(row["K"])): row for row in rows}
    keys = dict.fromkeys((provider, columns) for provider, columns, _ in at)
    return {
        (provider, columns): [timed(at.get((provider, columns, k)), unit) for k in tasks]
        for provider, columns in sorted(keys, key=lambda key: key[1])
    }
