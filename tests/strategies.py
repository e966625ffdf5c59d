"""Hypothesis strategies for task gradients."""

import numpy as np
from hypothesis import strategies as st

from benchmarks.oracles.draw import KINDS, make_rows


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
    rows = make_rows(generator, kind, num_tasks, num_columns, max_exponent)
    return rows if kind == "spread" else rows * 10.0**exponent
