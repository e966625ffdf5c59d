"""Independent oracles: for each method another way to its answer, and how far apart the two are.

A file of this folder holds those of a few related methods, and is found by being here::

    @agrees("cagrad", oracle="every support, by roots of one variable", tolerance=1e-9)
    def cagrad(generator: np.random.Generator) -> float:
        rows = draw_rows(generator, max_tasks=5)
        ...

The function draws one case and returns the deviation, a number without unit: of d relative to the rows, or of the
objective relative to its scale, as fits the problem. ``python -m benchmarks.agreement`` runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Deviation = Callable[[np.random.Generator], float]


class Agreement(NamedTuple):
    """A method and an oracle.

    Attributes:
        method: its name in `mtl_optim.list_methods`, or that of a loss or operation.
        oracle: what the method is held against, in a few words.
        tolerance: a larger deviation is an error of one of the two.
        deviation: draws one case and tells how far apart they are.
    """

    method: str
    oracle: str
    tolerance: float
    deviation: Deviation


_AGREEMENTS: list[Agreement] = []


def agrees(method: str, *, oracle: str, tolerance: float) -> Callable[[Deviation], Deviation]:
    """Registers the decorated function; see `Agreement` for the arguments. A method may have several oracles."""

    def register(deviation: Deviation) -> Deviation:
        _AGREEMENTS.append(Agreement(method, oracle, tolerance, deviation))
        return deviation

    return register


def agreements() -> list[Agreement]:
    """All of this folder, by the name of the method."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    return sorted(_AGREEMENTS, key=lambda agreement: (agreement.method, agreement.oracle))
