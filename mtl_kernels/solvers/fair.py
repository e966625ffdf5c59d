"""Weights that share a step fairly among the tasks: those of Nash-MTL and FairGrad."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..solution import Solution

__all__ = ["fairgrad_weights", "nash_mtl_weights"]

_EPSILON = torch.finfo(torch.float64).eps
_CERTAIN = 64 * _EPSILON
_MAX_ITERATIONS = 1000
_ALPHAS = (0.1, 1000.0)


def nash_mtl_weights(
    gram: Tensor,
    *,
    max_norm: float = 1.0,
    zero_rows: Literal["last", "skip"] = "last",
    last: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w > 0 with G w = 1 / w, the bargaining solution of Nash-MTL (Navon et al. 2022, arXiv 2202.01017, claim 3.1).

    The minimizer of w'Gw/2 - sum of log w, by Newton's method. It exists if and only if no convex combination of the
    rows is zero (the tasks are not at a Pareto-stationary point), and then ||J^T w||^2 = K: with ``max_norm`` = 1, d
    has length 1 for any K.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        max_norm: w is scaled down where ||J^T w|| is more; 0 for any length.
        zero_rows: with a zero row there is no solution, and "last" takes the last weights; "skip" gives it weight 0
            and solves for the others.
        last: float64 ``[..., K]``, contiguous, what the last solution was: w where there is none now, and changed in
            place where there is one, for the tasks in it. None stands for all ones.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights; gap = max_i |(G w)_i - 1 / w_i| / (1 / w_i + sum_j |G_ij| w_j) before the clip, by how much
        the entries of G would have to change for w to be exact; 1 where there is no solution; iterations. Rows that
        cancel to less than about 1e-7 of their length count as having none: that is near the rounding of G.

    Raises:
        ValueError, TypeError: a negative or nan max_norm, an unknown choice, or tensors of the wrong shape, dtype or
            device.
    """
    options = nash_mtl_options(max_norm, zero_rows)
    if last is None and isinstance(gram, Tensor):
        last = torch.ones(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    return Solution.of(*ops.solve(gram, SolverCall("nash_mtl", options, active, state=last), backend=backend))


def nash_mtl_options(max_norm: float, zero_rows: str) -> tuple[float, ...]:
    """The options of solver "nash_mtl". Raise ValueError for those that `nash_mtl_weights` refuses."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm >= 0:
        raise ValueError(f"expected max_norm as a number >= 0, found {max_norm!r}")
    if zero_rows not in ("last", "skip"):
        raise ValueError(f'expected zero_rows "last" or "skip", found {zero_rows!r}')
    return (float(max_norm), float(zero_rows == "skip"))


def fairgrad_weights(
    gram: Tensor, *, alpha: float = 1.0, active: Tensor | None = None, backend: str | None = None
) -> Solution:
    """w > 0 with G w = w^(-1/alpha), the alpha-fair step of FairGrad (Ban & Ji 2024, arXiv 2402.15638, eq. 7).

    The minimizer of w'Gw/2 - sum of w^(1-1/alpha) / (1-1/alpha), by Newton's method; with d = J^T w it says
    w_i = (g_i . d)^-alpha. alpha = 1 is `nash_mtl_weights` without its clip. A large alpha comes near max-min
    fairness, a small one near w = 1 with the conflicts taken out.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        alpha: 0 for the mean, 1 / K_active each; or 0.1 to 1000.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights; gap = max_i |(G w)_i - s_i| / (s_i + sum_j |G_ij| w_j) with s = w^(-1/alpha), as that of
        `nash_mtl_weights`; iterations. Zero rows are left out and get weight 0. Where a convex combination of the
        others is zero, no step improves every task: w = 0, and gap 1.

    Raises:
        ValueError, TypeError: an alpha out of range, or tensors of the wrong shape, dtype or device.
    """
    return Solution.of(*ops.solve(gram, SolverCall("fairgrad", fairgrad_options(alpha), active), backend=backend))


def fairgrad_options(alpha: float) -> tuple[float, ...]:
    """The options of solver "fairgrad". Raise ValueError for those that `fairgrad_weights` refuses."""
    least, most = _ALPHAS
    number = not isinstance(alpha, bool) and isinstance(alpha, int | float)
    if not number or not (alpha == 0 or least <= alpha <= most):
        raise ValueError(f"expected alpha as 0 or a number in [{least:g}, {most:g}], found {alpha!r}")
    return (float(alpha),)


@defines("nash_mtl", num_options=2, state_doubles=lambda num_tasks: num_tasks, scale_free=False)
def nash_mtl(problem: Problem) -> Answer:
    """G w = 1 / w, or the last w; then ||J^T w|| <= max_norm. Options: (max_norm, skip zero rows); state: last w."""
    gram, (max_norm, skip) = problem.gram, problem.options
    tasks, last = torch.tensor(problem.tasks, device="cpu"), problem.state
    if last is None:
        raise ValueError("nash_mtl keeps a state, found none")
    there = gram.diagonal() > 0
    found = _solve(gram[there][:, there], 1.0) if there.all() or skip else None
    if found is None:
        w, gap, iterations = last[tasks], 1.0, 0
    else:
        w = torch.zeros_like(gram[0])
        w[there], gap, iterations = found
        last[tasks[there]] = w[there]
    square = _product(gram, w) @ w
    return Answer(w * (max_norm / square.sqrt()) if 0 < max_norm < square.sqrt() else w, gap, iterations)


@defines("fairgrad", num_options=1, scale_free=False)
def fairgrad(problem: Problem) -> Answer:
    """G w = w^(-1/alpha), or 0. Options: (alpha,)."""
    gram, (alpha,) = problem.gram, problem.options
    w = torch.zeros_like(gram[0])
    if alpha == 0:
        return Answer(w + 1 / len(w))
    there = gram.diagonal() > 0
    found = _solve(gram[there][:, there], alpha)
    if found is None:
        return Answer(w, 1.0)
    w[there], gap, iterations = found
    return Answer(w, gap, iterations)


def _solve(gram: Tensor, alpha: float) -> tuple[Tensor, float, int] | None:
    """w > 0 with G w = w^(-1/alpha), how far it is from that, and iterations; None where there is no such w.

    Newton's method on the potential whose gradient is C x - s(x), on unit rows: C the cosines, x_i = n_i w_i,
    s_i = n_i^(b-1) x_i^-b, b = 1/alpha. A step is halved as long as the potential rises steeply at its end.
    """
    b, norm = 1 / alpha, gram.diagonal().sqrt()
    unit = norm.max() if len(norm) else 1.0
    alone = (norm / unit) ** ((b - 1) / (b + 1))  # the x of every task on its own
    x, last = alone, math.inf

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        s = alone * (x / alone) ** -b
        return _product(gram, x / norm) / norm - s, s

    for iteration in range(_MAX_ITERATIONS):
        slopes, s = gradient(x)
        if len(x) and not x @ (slopes + s) > _CERTAIN * x.sum() ** 2:
            return None
        root = (x / s).sqrt()
        matrix = gram * torch.outer(root / norm, root / norm) + b * torch.eye(len(x), dtype=x.dtype, device="cpu")
        factor, broken = torch.linalg.cholesky_ex(matrix)
        if broken:
            return None  # by the rounding of rows that cancel: it has no eigenvalue below b
        step = -root * _divide(factor, root * slopes)
        change = max((step / x).abs().tolist(), default=0.0)
        if change <= 4 * _EPSILON * len(x) or (change < 1e-4 and change > last / 4):
            terms = (gram / norm / norm.unsqueeze(1)).abs() @ x
            if ((root * _divide(factor, root * terms)).abs() * _CERTAIN > x).any():
                return None  # what rounding may be of these terms could be as large as a weight
            errors = slopes.abs() / (s + terms)
            return x / norm * unit ** (1 - 2 / (1 + b)), max(errors.tolist(), default=0.0), iteration
        part = min(1.0, 0.99 / max((-step / x).max().item(), 0.99))
        while change > 1e-3 and gradient(x + part * step)[0] @ step > -0.25 * (slopes @ step):
            part /= 2
        x, last = x + part * step, change
    return None


def _divide(factor: Tensor, vector: Tensor) -> Tensor:
    """x with L L' x = vector."""
    return torch.cholesky_solve(vector.unsqueeze(-1), factor).squeeze(-1)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector``, every sum rounded once: of halves of its factors all products are exact."""
    matrices, vectors = _halves(matrix), _halves(vector)
    terms = torch.cat([one * other for one in matrices for other in vectors], -1)
    return torch.tensor([math.fsum(row) for row in terms.tolist()], dtype=vector.dtype, device="cpu")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of at most 27 bits each that add up to x."""
    mantissa, exponent = torch.frexp(x)
    high = torch.ldexp((mantissa * 2**26).round() / 2**26, exponent)
    return high, x - high
