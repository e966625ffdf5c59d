"""Kernels that combine the per-task gradients of multi-task training.

``gram`` reads the rows once, a ``*_weights`` function turns the Gram matrix into one weight per task, and
``combine`` reads the rows once more and writes d = J^T w.
"""

from typing import TYPE_CHECKING, Any

from . import reference
from .angles import cosines, norms
from .call import SolverCall
from .config import show_config
from .dispatch import available_backends, use_backend
from .ops import (
    Statistics,
    accumulate_squares,
    combine,
    cross_gram,
    graddrop,
    gram,
    gram_solve,
    statistics,
    trimmed_mean,
    update_average,
)
from .rng import rng_state
from .rows import MAX_TASKS, Part, RowTable
from .solution import Solution
from .solvers import *  # noqa: F403
from .solvers import __all__ as _solvers
from .version import __version__

__all__ = [
    "MAX_TASKS",
    "Part",
    "RowTable",
    "Solution",
    "SolverCall",
    "Statistics",
    "__version__",
    "accumulate_squares",
    "available_backends",
    "combine",
    "cosines",
    "cross_gram",
    "graddrop",
    "gram",
    "gram_solve",
    "norms",
    "reference",
    "rng_state",
    "show_config",
    "statistics",
    "trimmed_mean",
    "update_average",
    "use_backend",
    *_solvers,
]

if TYPE_CHECKING:  # the solvers' functions, which type checkers do not find

    def __getattr__(name: str) -> Any: ...
