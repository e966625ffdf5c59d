"""A solver, or an elementwise operation on the rows, and what it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class SolverCall(NamedTuple):
    """Everything about a solve but the Gram matrix, as one value that operations, operators and backends hand on.

    Attributes:
        solver: its name, such as "min_norm".
        options: its hyper-parameters, in its own order.
        active: bool ``[K]`` or ``[..., K]``; tasks that are False take no part and get weight 0.
        rng: int64 ``[2]``, seed and step, see `mtl_kernels.rng_state`; None for solvers that draw nothing.
        inputs: extra inputs of each task, ``[K]`` or ``[..., K]``.
        state: float64 ``[..., n]``, contiguous, what the solver keeps of each problem between steps; changed in place
            but for problems that are not finite or have no active task. None for solvers that keep nothing.
        advance_rng: add one to the step of ``rng`` on its device, once every problem has read it.
        certified: whether the certificate is wanted; those of solvers in closed form say nothing.
    """

    solver: str
    options: Sequence[float] = ()
    active: Tensor | None = None
    rng: Tensor | None = None
    inputs: Tensor | None = None
    state: Tensor | None = None
    advance_rng: bool = False
    certified: bool = True


COLUMN_OPERATIONS = ("graddrop", "trimmed_mean")
STATE_OPERATIONS = ("average", "squares")
"""Names of operations, at the numbers that the kernels know them by."""


class ColumnCall(NamedTuple):
    """An operation that makes one value of the K values of a column: its name and what it needs besides the rows.

    Attributes:
        operation: "graddrop" or "trimmed_mean".
        leak: float64 ``[K]``, of graddrop; None for zeros.
        rng: int64 ``[2]``, seed and step, of graddrop.
        trim: how many of the largest and of the smallest values trimmed_mean leaves out.
    """

    operation: str
    leak: Tensor | None = None
    rng: Tensor | None = None
    trim: int = 0

    @property
    def code(self) -> int:
        return COLUMN_OPERATIONS.index(self.operation)


class StateCall(NamedTuple):
    """An operation that updates the state of every row in place and sums up what comes of it, see `definitions`.

    Attributes:
        operation: "average" or "squares".
        gain: float64 ``[S, K]``, of the row; where it is 0 the row is left out, whatever it holds.
        keep: the same of the old state, for "average".
        epsilon: beside the state under the root, for "squares".
    """

    operation: str
    gain: Tensor
    keep: Tensor | None = None
    epsilon: float = 0.0

    @property
    def code(self) -> int:
        return STATE_OPERATIONS.index(self.operation)
