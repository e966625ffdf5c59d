"""Gradients of tasks, of every rank and scale, and in the degenerate shapes they come in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KINDS = (
    "plain",
    "low_rank",
    "near_parallel",
    "near_dependent",
    "duplicate",
    "anti_parallel",
    "zero_rows",
    "integers",
    "conflicting",
    "spread",
)


def make_rows(
    generator: np.random.Generator, kind: str, num_tasks: int, num_columns: int, max_exponent: int
) -> np.ndarray:
    """Rows J, float64 [K, N], of a kind; in the kind "spread" each scaled by a power of ten up to ``max_exponent``."""
    rows = generator.standard_normal((num_tasks, num_columns))
    one, other = generator.integers(num_tasks, size=2)
    if kind == "low_rank":
        rank = int(generator.integers(1, num_tasks + 1))
        rows = generator.standard_normal((num_tasks, rank)) @ rows[:rank]
    elif kind == "near_parallel":
        rows = rows[:1] + 10.0 ** -generator.integers(1, 10) * rows
    elif kind == "near_dependent":
        mixture = generator.standard_normal(num_tasks) @ rows
        rows[one] = mixture + 10.0 ** -generator.integers(4, 14) * rows[one]
    elif kind == "duplicate":
        rows[one] = rows[other]
    elif kind == "anti_parallel" and one != other:
        rows[one] = -(10.0 ** generator.integers(-3, 4)) * rows[other]
    elif kind == "zero_rows":
        rows[generator.random(num_tasks) < 0.4] = 0.0
    elif kind == "integers":
        rows = generator.integers(-2, 3, size=rows.shape).astype(np.float64)
    elif kind == "conflicting":
        rows -= 1.5 * rows.mean(axis=0)
    elif kind == "spread":
        rows = rows * 10.0 ** generator.uniform(-max_exponent, max_exponent, size=(num_tasks, 1))
    return rows


def draw_rows(
    generator: np.random.Generator,
    min_tasks: int = 1,
    max_tasks: int = 8,
    max_columns: int = 12,
    kinds: Sequence[str] = KINDS,
    max_exponent: int = 12,
) -> np.ndarray:
    """Rows J, float64 [K, N], of one of ``kinds``, scaled by a power of ten up to ``max_exponent``."""
    num_tasks = int(generator.integers(min_tasks, max_tasks + 1))
    num_columns = int(generator.integers(1, max_columns + 1))
    kind = kinds[int(generator.integers(len(kinds)))]
    rows = make_rows(generator, kind, num_tasks, num_columns, max_exponent)
    return rows if kind == "spread" else rows * 10.0 ** generator.integers(-max_exponent, max_exponent + 1)
