"""Krum: the rows that have the nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines

__all__ = ["krum_weights"]


def krum_weights(
    gram: Tensor,
    n_byzantine: int,
    *,
    n_selected: int = 1,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1 / n_selected on the rows of the lowest scores: Krum and Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757).

    With f = n_byzantine, the score of row i is the sum of its K - f - 2 smallest squared distances
    G_ii + G_jj - 2 G_ij to other rows. Ties go to the lower index.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        n_byzantine: how many rows may be arbitrary, f in 0..K - 3.
        n_selected: how many rows are averaged, 1..K.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0. Of n active tasks with
            n < f + 3 the score is the distance to the nearest other one; of n < n_selected all are averaged.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        float64 ``[..., K]``.

    Raises:
        ValueError, TypeError: numbers out of range for K tasks, or tensors of the wrong shape, dtype or device.
    """
    if isinstance(gram, Tensor) and gram.dim() >= 2:
        check_krum(gram.shape[-1], n_byzantine, n_selected)
    call = SolverCall("krum", krum_options(n_byzantine, n_selected), active, certified=False)
    return ops.solve(gram, call, backend=backend)[0]


def krum_options(n_byzantine: int, n_selected: int) -> tuple[float, ...]:
    """The options of solver "krum". Raise TypeError or ValueError for what fits no K."""
    for option, value, least in (("n_byzantine", n_byzantine, 0), ("n_selected", n_selected, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Krum: expected {option} as an integer, found {value!r}")
        if value < least:
            raise ValueError(f"Krum: expected {option} >= {least}, found {value}")
    return (float(n_byzantine), float(n_selected))


def check_krum(num_tasks: int, n_byzantine: int, n_selected: int) -> None:
    """Raise ValueError where there are too few tasks."""
    if num_tasks < n_byzantine + 3:
        raise ValueError(
            f"Krum(n_byzantine={n_byzantine}) needs at least n_byzantine + 3 = {n_byzantine + 3} tasks, found K = "
            f"{num_tasks}; lower n_byzantine to at most {num_tasks - 3}"
            if num_tasks >= 3
            else f"Krum needs at least n_byzantine + 3 = {n_byzantine + 3} tasks, found K = {num_tasks}; use another "
            "method for so few"
        )
    if num_tasks < n_selected:
        raise ValueError(
            f"Krum(n_selected={n_selected}) selects more rows than there are, K = {num_tasks}; lower n_selected to at "
            f"most {num_tasks}"
        )


@defines("krum", num_options=2)
def definition(problem: Problem) -> Answer:
    """Scores from sorted distances; options: (n_byzantine, n_selected)."""
    n_byzantine, n_selected = (int(option) for option in problem.options)
    num_active = len(problem.gram)
    squares = problem.gram.diagonal()
    gram = problem.gram * torch.ldexp(torch.ones(()).double(), -torch.frexp(squares.max())[1])
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    counted = min(max(num_active - n_byzantine - 2, 1), num_active - 1)
    scores = []
    for i in range(num_active):
        others = torch.cat((distances[i, :i], distances[i, i + 1 :])).sort().values
        scores.append(sum(others[:counted].tolist()))
    order = sorted(range(num_active), key=lambda i: (scores[i], i))
    selected = min(n_selected, num_active)
    weights = torch.zeros_like(squares)
    weights[order[:selected]] = 1 / selected
    return Answer(weights)
