"""The point of least norm in the convex hull of the task gradients, which is MGDA's direction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..solution import Solution

__all__ = ["min_norm_weights"]

_EPSILON = torch.finfo(torch.float64).eps
_FRANK_WOLFE_ITERATIONS = 250
_FRANK_WOLFE_TOLERANCE = 1e-6


def min_norm_weights(
    gram: Tensor,
    *,
    solver: Literal["exact", "frank_wolfe"] = "exact",
    max_iters: int | None = None,
    tol: float | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w = argmin of w'Gw over the simplex: MGDA (Desideri 2012; Sener & Koltun 2018, arXiv 1810.04650).

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        solver: "exact", the active set of Wolfe 1976 (see arXiv 1710.02608), finite and accurate to rounding;
            or "frank_wolfe", the published Algorithm 2: uniform start, exact line search, error about
            1 / iterations.
        max_iters: at most so many iterations; default 10 K + 40 for "exact" (about K are needed), 250 for
            "frank_wolfe".
        tol: stop when gap <= tol * max_j G_jj; default 0 for "exact" (stops at rounding), 1e-6 for
            "frank_wolfe".
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights >= 0 that sum to 1; gap = w'Gw - min_j (Gw)_j over active j, in units of G, which
        certifies w'Gw - optimum <= 2 gap; iterations. With a zero row, w is 1 there and d = 0. Where the
        optimum is not unique (dependent rows), w is one of the optima. No active task: weights and gap 0.

    Raises:
        ValueError, TypeError: an unknown solver, max_iters < 1, a negative or nan tol, or tensors of the
            wrong shape, dtype or device.
    """
    call = SolverCall("min_norm", min_norm_options(solver, max_iters, tol), active)
    return Solution.of(*ops.solve(gram, call, backend=backend))


def min_norm_options(solver: str, max_iters: int | None = None, tol: float | None = None) -> tuple[float, ...]:
    """The options of solver "min_norm". Raise ValueError for those that `min_norm_weights` refuses."""
    if solver not in ("exact", "frank_wolfe"):
        raise ValueError(f'expected solver "exact" or "frank_wolfe", found {solver!r}')
    if max_iters is not None and (isinstance(max_iters, bool) or not isinstance(max_iters, int) or max_iters < 1):
        raise ValueError(f"expected max_iters as a positive integer or None, found {max_iters!r}")
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, int | float) or not tol >= 0):
        raise ValueError(f"expected tol as a number >= 0 or None, found {tol!r}")
    published = solver == "frank_wolfe"
    if max_iters is None:
        max_iters = _FRANK_WOLFE_ITERATIONS if published else 0
    if tol is None:
        tol = _FRANK_WOLFE_TOLERANCE if published else 0.0
    return (float(published), float(max_iters), float(tol))


@defines("min_norm", num_options=3, gap_of_gram=True)
def definition(problem: Problem) -> Answer:
    """argmin of w'Gw over the simplex, and its gap; options: (frank_wolfe, max_iters or 0, tol)."""
    published, cap, tol = problem.options
    scale = _power_of_two_scale(problem.gram.diagonal().max())
    gram = problem.gram * scale
    max_iters = int(cap) if cap > 0 else 10 * problem.num_tasks + 40
    w, iterations = (_frank_wolfe if published else nearest_point)(gram, max_iters, tol)
    gap = (w @ gram @ w - (gram @ w).min()).clamp(min=0) / scale
    return Answer(w, gap.item(), iterations)


def _power_of_two_scale(value: Tensor) -> Tensor:
    """The power of two that brings the value into [1/2, 1), exact to multiply by; 1 for 0."""
    return torch.ldexp(torch.ones_like(value), -torch.frexp(value.clamp(min=0))[1].clamp(min=-1022))


def _frank_wolfe(gram: Tensor, max_iters: int, tol: float) -> tuple[Tensor, int]:
    """Sener & Koltun 2018, Algorithm 2: w <- (1 - g) w + g e_t, t = argmin_j (Gw)_j, g by exact line search."""
    w = torch.full_like(gram[0], 1 / len(gram))
    for iteration in range(max_iters):
        product = gram @ w
        t = int(product.argmin())
        value, least, corner = w @ product, product[t], gram[t, t]
        if not value - least > tol * gram.diagonal().max():
            return w / w.sum(), iteration
        g = 1.0 if least >= corner else (value - least) / (value - 2 * least + corner)
        w = (1 - g) * w
        w[t] += g
    return w / w.sum(), max_iters


def nearest_point(gram: Tensor, max_iters: int, tol: float) -> tuple[Tensor, int]:
    """Wolfe 1976, on unit rows: with C their cosines, a_k = min n / n_k, w_k = a_k y_k: min y'Cy, a'y = 1, y >= 0."""
    least, start = gram.diagonal().min(0)
    if least <= 0:  # a zero row is the answer
        return torch.eye(len(gram), dtype=gram.dtype, device="cpu")[start], 0
    norm = gram.diagonal().sqrt()
    a, cosines = norm[start] / norm, gram / norm / norm.unsqueeze(1)
    support, entered, value = [int(start)], set[int](), torch.inf
    y = best = (1 / a).where(torch.arange(len(a), device="cpu") == start, 0.0)
    for iteration in range(max_iters + 1):
        rounding = 2 * _EPSILON * len(a) * y.sum()
        found = float(y @ cosines @ y)
        if found > value + rounding * y.sum():  # rounding led astray
            y, support = best, best.nonzero().flatten().tolist()
        elif found < value - rounding * y.sum():
            entered.clear()
        best, value = y.clone(), min(found, value)
        # A row enters where (Gw)_j < w'Gw; once only until the value falls, so that rounding makes no cycle.
        violation = a * value - cosines @ y
        below = violation > rounding * (1 + a * y.sum())
        below[[*support, *entered]] = False
        if iteration == max_iters or not below.any() or (violation / a)[below].max() * a.min() ** 2 <= tol:
            break
        entering = int(violation.where(below, -torch.inf).argmax())
        entered.add(entering)
        support.append(entering)
        leaving = True
        while leaving:  # towards the least norm over the support; the first row whose y would turn negative leaves
            own = y[support]
            target, is_direction = _least_over(cosines, a, support)
            change = target if is_direction else target - own
            steps = [(float(own[i] / -change[i]), i) for i in range(len(own)) if change[i] < 0 and target[i] <= 0]
            step, i = min(steps, default=(0.0, 0))
            y[support] = (own + step * change).clamp(min=0) if steps else target
            if leaving := bool(steps):
                y[support.pop(i)] = 0.0
            y /= a @ y
    w = a * best
    return w / w.sum(), iteration


def _least_over(cosines: Tensor, a: Tensor, support: list[int]) -> tuple[Tensor, bool]:
    """Where y'Cy is least over a'y = 1 on the support: z / a'z with (C + aa') z = a.

    Where the last row depends on the others, so that there is no such point: the direction in which the norm falls.
    """
    matrix = (cosines + torch.outer(a, a))[support][:, support]
    inner = matrix[:-1, :-1] + _EPSILON * torch.eye(len(support) - 1, dtype=a.dtype, device="cpu")
    solved = torch.linalg.solve(inner, torch.stack((a[support[:-1]], -matrix[:-1, -1]), -1))
    z, kernel = torch.cat((solved, torch.tensor([[0.0, 1.0]], dtype=a.dtype, device="cpu"))).unbind(-1)
    pivot = matrix[-1] @ kernel
    if pivot <= 4 * _EPSILON * len(a):
        return kernel * (a[support] @ kernel).sign(), True
    z = z + kernel * ((a[support[-1]] - matrix[-1] @ z) / pivot)
    return z / (a[support] @ z), False
