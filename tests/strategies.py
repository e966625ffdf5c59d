"""Hypothesis strategies for task gradients: every rank and scale, and the degenerate shapes they come in."""

import numpy as np
from hypothesis import strategies as st

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


@st.composite
def row_matrices(
    draw: st.DrawFn,
    min_tasks: int = 1,
    max_tasks: int = 8,
    max_columns: int = 12,
    kinds: tuple[str, ...] = KINDS,
    max_exponent: int = 15,
) -> np.ndarray:
    """Rows J, float64 [K, N], N >= 1, scaled by a power of ten up to ``max_exponent``.

    In the kind "spread" every row has such a scale of its own.
    """
    num_tasks = draw(st.integers(min_tasks, max_tasks))
    num_columns = draw(st.integers(1, max_columns))
    kind = draw(st.sampled_from(kinds))
    exponent = draw(st.integers(-max_exponent, max_exponent))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
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
        return rows * 10.0 ** generator.uniform(-max_exponent, max_exponent, size=(num_tasks, 1))
    return rows * 10.0**exponent
