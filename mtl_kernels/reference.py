"""Every operation in pure PyTorch, on any device and dtype: `mtl_kernels`' functions bound to the reference backend.

``reference.gram(rows)`` is ``gram(rows, backend="reference")``, and so on for every operation and solver function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import ops, solvers
from .angles import cosines, norms

__all__ = ["combine", "cosines", "cross_gram", "gram", "gram_solve", "norms", "statistics", *solvers.__all__]

gram = functools.partial(ops.gram, backend="reference")
cross_gram = functools.partial(ops.cross_gram, backend="reference")
statistics = functools.partial(ops.statistics, backend="reference")
gram_solve = functools.partial(ops.gram_solve, backend="reference")
combine = functools.partial(ops.combine, backend="reference")


def __getattr__(name: str) -> Callable[..., Any]:
    if name in solvers.__all__:
        return functools.partial(getattr(solvers, name), backend="reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
