"""Every operation in pure PyTorch, on any device and dtype: `mtl_kernels`' functions bound to the reference backend.

``reference.gram(rows)`` is ``gram(rows, backend="reference")``, and so on for every operation and solver function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import ops, solvers
from .angles import cosines, norms

__all__ = [
    "accumulate_squares",
    "combine",
    "cosines",
    "cross_gram",
    "graddrop",
    "gram",
    "gram_solve",
    "norms",
    "statistics",
    "trimmed_mean",
    "update_average",
    *solvers.__all__,
]

gram = functools.partial(ops.gram, backend="reference")
cross_gram = functools.partial(ops.cross_gram, backend="reference")
statistics = functools.partial(ops.statistics, backend="reference")
gram_solve = functools.partial(ops.gram_solve, backend="reference")
combine = functools.partial(ops.combine, backend="reference")
graddrop = functools.partial(ops.graddrop, backend="reference")
trimmed_mean = functools.partial(ops.trimmed_mean, backend="reference")
update_average = functools.partial(ops.update_average, backend="reference")
accumulate_squares = functools.partial(ops.accumulate_squares, backend="reference")


def __getattr__(name: str) -> Callable[..., Any]:
    if name in solvers.__all__:
        return functools.partial(getattr(solvers, name), backend="reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
