"""The point of least norm in the convex hull of the task gradients, which is MGDA's direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .common import Problems, Reference, Solution, prepare, settle, uniform

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
    options = min_norm_options(solver, max_iters, tol)
    weights, certificate = ops.solve("min_norm", gram, options=options, active=active, backend=backend)
    gap, iterations = certificate.unbind(-1)
    return Solution(weights, gap, iterations.to(torch.int64))


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


def reference(
    gram: Tensor, active: Tensor, rng: Tensor | None, options: Sequence[float], inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`min_norm_weights` in PyTorch, for a batch; options: (frank_wolfe, max_iters or 0, tol)."""
    published, cap, tol = options
    num_tasks = gram.shape[-1]
    max_iters = int(cap) if cap > 0 else 10 * num_tasks + 40
    problems = prepare(gram, active)
    weights, iterations = (_frank_wolfe if published else _wolfe)(problems, max_iters, tol)
    scale = _power_of_two_scale(_largest(problems))
    product = _times(problems.gram * scale.view(-1, 1, 1), weights)
    gap = (weights * product).sum(-1) - _least(product, active)[0]
    gap = torch.where(problems.num_active > 0, gap.clamp(min=0) / scale, torch.zeros_like(gap))
    return settle(problems, weights, gap, iterations)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _largest(problems: Problems) -> Tensor:
    return problems.gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=0)


def _power_of_two_scale(values: Tensor) -> Tensor:
    """The power of two that brings each value into [1/2, 1), exact to multiply by; 1 for 0."""
    exponent = torch.where(values > 0, torch.frexp(values)[1], torch.zeros_like(values, dtype=torch.int32))
    return torch.ldexp(torch.ones_like(values), -exponent.clamp(min=-1022))


def _least(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Least value and its index in each row, among the entries that are True; inf where none is."""
    least = torch.where(among, values, torch.full_like(values, math.inf)).min(dim=-1)
    return least.values, least.indices


def _one_hot(index: Tensor, num_tasks: int) -> Tensor:
    return torch.arange(num_tasks, device=index.device) == index.unsqueeze(-1)


def _all(done: Tensor) -> bool:
    """Whether every problem is done; asked on a CPU only, elsewhere the answer would wait for the device."""
    return done.device.type == "cpu" and bool(done.all())


def _frank_wolfe(problems: Problems, max_iters: int, tol: float) -> tuple[Tensor, Tensor]:
    """Sener & Koltun 2018, Algorithm 2."""
    num_tasks = problems.gram.shape[-1]
    largest = _largest(problems)
    scale = _power_of_two_scale(largest)
    gram = problems.gram * scale.view(-1, 1, 1)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    weights = uniform(problems)
    product = _times(gram, weights)
    done = problems.num_active == 0
    iterations = torch.zeros_like(problems.num_active)
    for _ in range(max_iters):
        value = (weights * product).sum(-1)
        least, vertex = _least(product, problems.active)
        done = done | ~(value - least > tol * (largest * scale))
        if _all(done):
            break
        corner = squares.gather(-1, vertex.unsqueeze(-1)).squeeze(-1)
        step = torch.where(least >= corner, torch.ones_like(value), (value - least) / (value - 2 * least + corner))
        step = torch.where(done, torch.zeros_like(step), step).unsqueeze(-1)
        row = gram.gather(-2, vertex.view(-1, 1, 1).expand(-1, 1, num_tasks)).squeeze(-2)
        weights = (1 - step) * weights + step * _one_hot(vertex, num_tasks)
        product = (1 - step) * product + step * row
        iterations = iterations + ~done
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, weights), iterations


def _wolfe(problems: Problems, max_iters: int, tol: float) -> tuple[Tensor, Tensor]:
    """Wolfe's active set on unit rows; csrc/include/mtl_kernels/solvers/min_norm.h has the derivation.

    A pass of the loop is one minor step for every problem of the batch, after a major step where due.
    """
    gram, active = problems.gram, problems.active
    num_tasks = gram.shape[-1]
    zero = gram.new_zeros(())
    squares = gram.diagonal(dim1=-2, dim2=-1)
    least, start = _least(squares, active)
    at_start = _one_hot(start, num_tasks) & active
    vertex_is_answer = ~(least > 0)
    done = vertex_is_answer | (problems.num_active == 0)
    solvable = (active & ~done.unsqueeze(-1)) & (squares > 0)
    inverse_norm = torch.where(solvable, squares.clamp(min=0).sqrt().reciprocal(), zero)
    a = torch.where(solvable, inverse_norm * least.clamp(min=0).sqrt().unsqueeze(-1), zero)
    least_a = torch.where(solvable, a, torch.ones_like(a)).amin(-1)
    cosines = gram * inverse_norm.unsqueeze(-1) * inverse_norm.unsqueeze(-2)
    matrix = cosines + a.unsqueeze(-1) * a.unsqueeze(-2)
    identity = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
    rounding = 2 * _EPSILON * problems.num_active
    floor = 4 * _EPSILON * problems.num_active

    support = at_start & ~done.unsqueeze(-1)
    entered = torch.zeros_like(support)
    y = torch.where(support, a.reciprocal(), zero)
    best = y
    best_product = torch.zeros_like(y)
    best_value = torch.full_like(least, math.inf)
    best_length = torch.full_like(least, math.inf)
    entering = start
    due = torch.ones_like(done)
    iterations = torch.zeros_like(problems.num_active)

    passes = 4 * max_iters + 1
    if gram.device.type != "cpu":
        passes = min(passes, 6 * num_tasks + 24)
    for _ in range(passes):
        product = _times(cosines, y)
        value = (y * product).sum(-1)
        length = y.sum(-1)
        noise = rounding * torch.minimum(length, best_length).square()
        kept = due & (value <= best_value + noise)
        fell = due & (value < best_value - noise)
        entered = entered & ~fell.unsqueeze(-1)
        best = torch.where(kept.unsqueeze(-1), y, best)
        best_product = torch.where(kept.unsqueeze(-1), product, best_product)
        best_length = torch.where(kept, length, best_length)
        best_value = torch.where(kept, torch.minimum(value, best_value), best_value)
        back = (due & ~kept).unsqueeze(-1)
        y = torch.where(back, best, y)
        support = torch.where(back, best > 0, support)

        residual = best_product - a * best_value.unsqueeze(-1)
        allowed = (rounding * best_length).unsqueeze(-1) * (1 + a * best_length.unsqueeze(-1))
        violated = solvable & ~support & ~entered & (residual < -allowed)
        gap = torch.where(violated, -residual / a, zero).amax(-1)
        worst = _least(residual, violated)[1]
        done = done | (due & (~violated.any(-1) | (gap * least_a * least_a <= tol) | (iterations >= max_iters)))
        if _all(done):
            break
        begin = due & ~done
        entering = torch.where(begin, worst, entering)
        chosen = _one_hot(entering, num_tasks)
        support = support | (chosen & begin.unsqueeze(-1))
        entered = entered | (chosen & begin.unsqueeze(-1))
        iterations = iterations + begin

        rest = support & ~chosen
        within = support & chosen
        has_entering = within.any(-1)
        column = torch.where(rest, _times(matrix, chosen.to(gram.dtype)), zero)
        block = torch.where(rest.unsqueeze(-1) & rest.unsqueeze(-2), matrix, identity) + _EPSILON * identity
        right = torch.stack((torch.where(rest, a, zero), -column), dim=-1)
        solved = torch.linalg.solve_ex(block, right, check_errors=False).result
        minimizer, kernel = solved[..., 0], solved[..., 1] + within.to(gram.dtype)
        entering_a = (a * chosen).sum(-1)
        diagonal = (matrix.diagonal(dim1=-2, dim2=-1) * chosen).sum(-1)
        pivot = diagonal + (column * solved[..., 1]).sum(-1)
        along_kernel = (has_entering & ~(pivot > floor)).unsqueeze(-1)
        amount = (entering_a - (column * minimizer).sum(-1)) / pivot
        minimizer = torch.where(has_entering.unsqueeze(-1), minimizer + kernel * amount.unsqueeze(-1), minimizer)
        minimizer = minimizer / (a * minimizer).sum(-1, keepdim=True)

        target = torch.where(along_kernel, kernel, minimizer)
        delta = torch.where(along_kernel, kernel, minimizer - y)
        leaves = support & torch.where(along_kernel, kernel < 0, minimizer <= 0)
        step, first = _least(torch.where(y > 0, y / -delta, zero), leaves)
        blocked = leaves.any(-1)
        leaving = _one_hot(first, num_tasks) & blocked.unsqueeze(-1)
        moved = torch.where(blocked.unsqueeze(-1), y + step.unsqueeze(-1) * delta, target)
        moved = torch.where(support & ~leaving, moved.clamp(min=0), zero)
        moved = torch.where(along_kernel, moved / (a * moved).sum(-1, keepdim=True), moved)
        y = torch.where(done.unsqueeze(-1), y, moved)
        support = support & ~leaving
        due = ~blocked

    weights = best * a
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / total, torch.zeros_like(weights))
    return torch.where(vertex_is_answer.unsqueeze(-1), at_start.to(weights.dtype), weights), iterations


REFERENCE = Reference(reference, num_options=3, needs_rng=lambda options: False)
