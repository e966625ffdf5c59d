"""CAGrad: the mean of the task gradients, bent towards the task that gains least from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..solution import Solution

__all__ = ["cagrad_weights"]

_EPSILON = torch.finfo(torch.float64).eps
_RESCALES = ("none", "paper", "max")
_SCALES = ("mean", "sum")


def cagrad_weights(
    gram: Tensor,
    *,
    c: float = 0.4,
    rescale: Literal["none", "paper", "max"] = "none",
    scale: Literal["mean", "sum"] = "mean",
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w such that d = J^T w maximises min_i g_i'd within ||d - g0|| <= c ||g0||, g0 the mean of the rows.

    Liu et al. 2021 (arXiv 2110.14048), by the dual problem: with u = 1 / K_active and p = c ||g0||, w_in minimises
    F(w) = w'Gu + p sqrt(w'Gw) over the simplex, and w = u + p w_in / ||J'w_in||. Where ||J'w_in|| = 0 no d raises every
    g_i'd above 0, and w = 0; so it is where g0 = 0.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        c: how far d may be from g0, >= 0; 0 is the mean.
        rescale: what w is divided by: "none", "paper" 1 + c^2, "max" 1 + c.
        scale: "mean", or "sum", which multiplies by K_active as the authors' code does.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights >= 0; gap = F(w_in) - min_j g_j'd over active j, of d before it is rescaled, in units of G,
        which certifies F(w_in) - optimum <= gap; iterations. J'w_in counts as zero where w'Gw is rounding of G, at most
        8 K_active eps (sum_k w_k n_k)^2. Dependent rows may share the weights in more ways than one; d is the same.

    Raises:
        ValueError, TypeError: an unknown rescale or scale, c negative or not finite, or tensors of the wrong shape,
            dtype or device.
    """
    call = SolverCall("cagrad", cagrad_options(c, rescale, scale), active)
    return Solution.of(*ops.solve(gram, call, backend=backend))


def cagrad_options(c: float, rescale: str, scale: str) -> tuple[float, ...]:
    """The options of solver "cagrad". Raise ValueError for those that `cagrad_weights` refuses."""
    if isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c) or c < 0:
        raise ValueError(f"expected c as a finite number >= 0, found {c!r}")
    if rescale not in _RESCALES:
        raise ValueError(f'expected rescale "none", "paper" or "max", found {rescale!r}')
    if scale not in _SCALES:
        raise ValueError(f'expected scale "mean" or "sum", found {scale!r}')
    return (float(c), float(_RESCALES.index(rescale)), float(_SCALES.index(scale)))


@defines("cagrad", num_options=3, gap_of_gram=True)
def definition(problem: Problem) -> Answer:
    """u + p w_in / ||J'w_in||, its gap, and steps of Newton's method; options: (c, rescale, times K_active)."""
    c, rescale, summed = problem.options
    num_tasks = len(problem.gram)
    w = torch.full_like(problem.gram[0], 1 / num_tasks)
    gap, iterations = 0.0, 0
    if c * c > 0:  # a c whose square float64 does not hold changes no weight
        correction, gap, iterations = _correction(problem.gram, c)
        w = torch.zeros_like(w) if correction is None else w + correction
    divisor = (1.0, 1 + c * c, 1 + c)[int(rescale)]
    return Answer(w * ((num_tasks if summed else 1) / divisor), gap, iterations)


def _correction(gram: Tensor, c: float) -> tuple[Tensor | None, float, int]:
    """p w_in / ||J'w_in||, or None for zero; the gap; the number of steps.

    Let z(t) = J'v, v >= 0, be the shortest vector with g_i'(g0 + z) >= t for all i. It grows with t, and the largest t
    within reach is that of ||z(t)|| = p. Newton's method finds it: t decreases to it, as ||z(t)|| is convex, with
    derivative a'v / ||z||. All of it on unit rows, v_i = w_i n_i, a_i ~ 1 / n_i, and with a ridge of the size of their
    rounding, so that there is a z(t) for every t.
    """
    num_tasks = len(gram)
    scale = float(torch.ldexp(torch.ones_like(gram[0, 0]), -torch.frexp(gram.diagonal().max().clamp(min=0))[1]))
    gram = gram * scale
    norm = gram.diagonal().clamp(min=0).sqrt()
    square, length = gram.mean(), norm.mean()
    there = norm > 0
    n = norm[there]
    cosines = gram[there][:, there] / n / n.unsqueeze(1)
    one = torch.eye(len(n), dtype=gram.dtype, device="cpu")
    ridge = 4 * _EPSILON * num_tasks
    while torch.linalg.cholesky_ex(cosines + ridge / 2 * one).info and ridge < num_tasks:
        ridge *= 16  # a Gram matrix that is indefinite by more than the rounding of float64
    if not square > 2 * ridge * length**2:
        return None, 0.0, 0
    unit, p = float(square.sqrt()) * max(1.0, c), min(1.0, c)
    a, b = n.min() / n, gram.mean(-1)[there] / (n * unit)
    matrix = cosines + ridge * one

    def gap_of(v: Tensor, value: Tensor | float) -> float:
        below = value * n.min() - (b + cosines @ v) * n
        return float(below.max().clamp(min=0)) * unit / scale

    shortest, nearest = (_least_distance(matrix, target, torch.zeros_like(b)) for target in (torch.ones_like(b), -b))
    stationary = not there.all() or 1 <= 2 * ridge * shortest.sum()  # 1 / sum v: the least v'Cv where sum v = 1
    reached = nearest @ matrix @ nearest <= p * p  # t = 0, which where the rows are stationary is all there is
    if reached and stationary:
        return None, gap_of(nearest, 0.0), 0
    t, v = ((b + p * math.sqrt(1 + ridge)) / a).min() if reached else torch.zeros_like(square), nearest
    step, iterations = torch.full_like(t, math.inf), 0
    while step > _EPSILON * t.abs() and iterations < 100:
        v = _least_distance(matrix, t * a - b, v)
        length = (v @ matrix @ v).sqrt()
        step = length * (length - p) / (a @ v)
        t, iterations = t - step, iterations + 1
    found, gap = _polished(matrix, cosines, a, b, p, v, gap_of)
    correction = torch.zeros_like(norm)
    correction[there] = unit * found / n
    return correction, gap, iterations


def _polished(
    matrix: Tensor,
    cosines: Tensor,
    a: Tensor,
    b: Tensor,
    p: float,
    v: Tensor,
    gap_of: Callable[[Tensor, Tensor], float],
) -> tuple[Tensor, float]:
    """The solution with the ridge taken out again, and its gap: steps of Newton's method as long as they help."""
    inside, best, found = v > 0, math.inf, v
    for _ in range(3):
        v = v * p / (v @ cosines @ v).sqrt()
        value = (b @ v + p * p) / (a @ v)
        if not (gap := gap_of(v, value)) < best:
            break
        best, found = gap, v
        residual = (value * a - b - cosines @ v)[inside]
        v = v.clone()
        v[inside] = (v[inside] + torch.linalg.solve(matrix[inside][:, inside], residual)).clamp(min=0)
    return found, best


def _least_distance(matrix: Tensor, target: Tensor, v: Tensor) -> Tensor:
    """argmin of v'Mv / 2 - target'v over v >= 0, starting from ``v``: Lawson & Hanson 1974, chapter 23."""
    inside = v > 0
    for _ in range(10 * len(v) + 10):
        while inside.any():
            wanted = torch.zeros_like(v)
            wanted[inside] = torch.linalg.solve(matrix[inside][:, inside], target[inside])
            if (wanted[inside] > 0).all():
                v = wanted
                break
            blocked = inside & (wanted <= 0)
            v = v + (v / (v - wanted))[blocked].nan_to_num(nan=0.0).min() * (wanted - v)
            inside &= (v > _EPSILON * v.max()) & ~(blocked & (v <= 0))
            v = torch.where(inside, v, 0.0)
        slope = target - matrix @ v
        slope[inside | (slope <= 4 * _EPSILON * (target.abs() + v.sum()))] = 0
        if not slope.any():
            break
        inside[slope.argmax()] = True
    return v
