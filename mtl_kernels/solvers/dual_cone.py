"""Combinations in the dual cone of the task gradients, or a part of it: UPGrad, DualProj and PCD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks, ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..solution import Solution
from .min_norm import nearest_point

__all__ = ["dualproj_weights", "pcd_weights", "upgrad_weights"]

_EPSILON = torch.finfo(torch.float64).eps


def upgrad_weights(
    gram: Tensor,
    *,
    pref: Tensor | None = None,
    reg: float = 1e-4,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w = sum_i w_i with w_i = argmin of v'Hv over v >= p_i e_i: UPGrad (Quinton & Rey 2024, arXiv 2406.16232).

    So every p_i g_i is projected onto the dual cone of the gradients, up to the regularisation H = G + reg trace(G) I,
    and the projections are added.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        pref: p, numbers >= 0, ``[K]`` or ``[..., K]``; default 1 / K_active. Values are not looked
            at: the methods check theirs.
        reg: a number >= 0; 0 projects exactly.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights >= p. gap: how far the conditions (H w_i)_j >= 0, = 0 where w_ij exceeds p_i e_ij, are from
        being met, on unit rows and for w_i that sum to 1 in units of the norms n of H; the largest of all i and j. So
        (Gw)_j >= -reg trace(G) w_j - gap n_j sum_k n_k w_k. iterations: rows that entered a support after its start, of
        all i. A zero row has weight p_j.

    Raises:
        ValueError, TypeError: a reg that is not a finite number >= 0, or tensors of the wrong shape, dtype or device.
    """
    return _solve("upgrad", gram, pref, reg, active, backend)


def dualproj_weights(
    gram: Tensor,
    *,
    pref: Tensor | None = None,
    reg: float = 1e-4,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """w = argmin of v'Hv over v >= p: J'p projected onto the dual cone of the gradients, H = G + reg trace(G) I.

    Arguments, returns and raises are those of `upgrad_weights`, with one problem for K of them.
    """
    return _solve("dualproj", gram, pref, reg, active, backend)


def pcd_weights(
    gram: Tensor,
    *,
    state: Tensor | None = None,
    tau: float = 0.02,
    beta: float = 0.999,
    eps: float = 1e-8,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Solution:
    """Priority-constrained descent (Varam & AlHajri 2026, arXiv 2606.29521) of the first active task before the others.

    With a_k = s_k g_k: the d nearest to a_1 with a_k'd >= tau ||a_k||^2 for all other k, times ||g_1|| / ||d||.
    s_k = 1 / sqrt(vhat_k + eps), vhat_k the average of G_kk that forgets by beta, corrected for its start.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        state: float64 ``[..., 2 K]``, the averages v_k and the numbers of steps t_k, zeros at first. Changed in place,
            but for problems that are not finite and tasks that are not active. None: a first step.
        tau, eps: numbers >= 0.
        beta: a number in [0, 1).
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        `Solution`: weights >= 0. gap: how far the conditions, a_k'd >= tau ||a_k||^2 with equality where the weight is
        positive, are from being met, on unit rows and for weights that sum to 1 in units of the norms. iterations: rows
        that entered the support after its start. Where no d meets the conditions, because a convex combination of the
        other unit rows is zero to rounding, w is 1 on the first task alone and gap the square of that combination.
        Weights 0 where g_1 = 0, and where the nearest d is 0, which takes tau = 0.

    Raises:
        ValueError, TypeError: an option out of range, or tensors of the wrong shape, dtype or device.
    """
    options = pcd_options(tau, beta, eps)
    if state is None:
        checks.check_gram(gram)
        state = torch.zeros(*gram.shape[:-2], 2 * gram.shape[-1], dtype=torch.float64, device=gram.device)
    return Solution.of(*ops.solve(gram, SolverCall("pcd", options, active, state=state), backend=backend))


def pcd_options(tau: float, beta: float, eps: float) -> tuple[float, ...]:
    """The options of solver "pcd". Raise ValueError for those that `pcd_weights` refuses."""
    options = (_at_least_zero("tau", tau), _at_least_zero("beta", beta), _at_least_zero("eps", eps))
    if not beta < 1:
        raise ValueError(f"expected beta < 1, found {beta!r}")
    return options


def dual_cone_options(reg: float) -> tuple[float, ...]:
    """The options of solvers "upgrad" and "dualproj". Raise ValueError unless reg is a finite number >= 0."""
    return (_at_least_zero("reg", reg),)


def _at_least_zero(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"expected {name} as a finite number >= 0, found {value!r}")
    return float(value)


def _solve(
    solver: str, gram: Tensor, pref: Tensor | None, reg: float, active: Tensor | None, backend: str | None
) -> Solution:
    options = dual_cone_options(reg)
    if pref is not None:
        checks.check_gram(gram)
        pref = checks.per_task(pref, gram, "pref", torch.float64)
    return Solution.of(*ops.solve(gram, SolverCall(solver, options, active, inputs=pref), backend=backend))


@defines("upgrad", num_options=1)
def upgrad_definition(problem: Problem) -> Answer:
    """The sum of the projections of p_i g_i, one by one; options: (reg,)."""
    pref = _preference(problem)
    cosines, norm = _unit_rows(problem, problem.options[0])
    weights, gap, steps = pref.clone(), 0.0, 0
    for i in torch.nonzero(pref * norm).flatten():
        q = torch.zeros_like(pref)
        q[i] = 1.0
        y, residual, count = _into_cone(cosines, q)
        weights += y * (pref[i] * norm[i]) / torch.where(norm > 0, norm, 1.0)
        gap, steps = max(gap, residual), steps + count
    return Answer(weights, gap, steps)


@defines("dualproj", num_options=1)
def dualproj_definition(problem: Problem) -> Answer:
    """The projection of J'p; options: (reg,)."""
    pref = _preference(problem)
    cosines, norm = _unit_rows(problem, problem.options[0])
    length = pref @ norm
    if length == 0:
        return Answer(pref)
    y, residual, steps = _into_cone(cosines, pref * norm / length)
    return Answer(pref + y * length / torch.where(norm > 0, norm, 1.0), residual, steps)


@defines("pcd", num_options=3, state_doubles=lambda num_tasks: 2 * num_tasks, scale_free=False)
def pcd_definition(problem: Problem) -> Answer:
    """a_1, moved to where it meets the others, in the length of g_1; options: (tau, beta, eps)."""
    tau, beta, eps = problem.options
    cosines, norm = _unit_rows(problem, 0.0)
    length = norm * _next_scale(problem, beta, eps)
    first = torch.eye(len(norm), dtype=norm.dtype, device="cpu")[0]
    if norm[0] == 0:
        return Answer(torch.zeros_like(norm))
    others = (norm > 0).nonzero().flatten()[1:]
    rounding = 8 * _EPSILON * len(norm)
    if tau > 0 and len(others):
        among = cosines[others][:, others]
        nearest, steps = nearest_point(among, 10 * len(norm) + 40, 0.0)
        if (left := float(nearest @ among @ nearest)) <= rounding:  # they cancel: no d meets them all
            return Answer(first, max(left, 0.0), steps)
    target = tau * length * (1 - first)
    unit = length[0] + target.max()
    y, residual, steps = _into_cone(cosines, first * length[0] / unit, target / unit)
    v = y + first * length[0] / unit
    square = v @ cosines @ v
    if tau == 0 and square <= rounding * v.sum() ** 2:
        return Answer(torch.zeros_like(norm), residual, steps)
    return Answer(v / square.sqrt() * norm[0] / torch.where(norm > 0, norm, 1.0), residual, steps)


def _next_scale(problem: Problem, beta: float, eps: float) -> Tensor:
    """s of the active tasks, from the state that the step leaves."""
    if problem.state is None:
        raise ValueError('solver "pcd" needs a state')
    v, t = problem.state.view(2, problem.num_tasks)
    v[problem.tasks] = beta * v[problem.tasks] + (1 - beta) * problem.gram.diagonal()
    t[problem.tasks] += 1
    vhat: Tensor = v / (1 - beta**t)
    return (vhat[problem.tasks] + eps).rsqrt()


def _preference(problem: Problem) -> Tensor:
    if problem.inputs is not None:
        return problem.inputs
    return torch.full_like(problem.gram[0], 1 / len(problem.tasks))


def _unit_rows(problem: Problem, reg: float) -> tuple[Tensor, Tensor]:
    """Cosines of H = G + reg trace(G) I, and norms but for a power of two; 0 for rows that are zero."""
    square = problem.gram.diagonal().clamp(min=0)
    scale = torch.ldexp(torch.ones_like(square[0]), -torch.frexp(square.max())[1].clamp(min=-1022))
    ridge = reg * (square * scale).sum()
    there = square > 0
    norm = torch.where(there, square * scale + ridge, 0.0).sqrt()
    inverse = torch.where(there, 1 / norm, 0.0)
    cosines = (problem.gram * scale) * inverse * inverse.unsqueeze(1)
    cosines.fill_diagonal_(0.0)
    return cosines + there.double().diag(), norm


def _into_cone(cosines: Tensor, q: Tensor, target: Tensor | None = None) -> tuple[Tensor, float, int]:
    """The y >= 0 with r = C (q + y) >= 0 and y'r = 0, how far it is from that, and the number of rows that entered.

    With a target, r = C (q + y) - target, and y_1 = 0 whatever r_1 is. Lawson & Hanson 1974, from y = 0: the row with
    the least r enters, and y moves to where r is 0 on its support, dropping rows that would turn negative on the way.
    """
    start, free = cosines @ q, cosines.diagonal() > 0
    if target is not None:
        start, free = start - target, free & (torch.arange(len(q), device="cpu") > 0)
    y, fixed = torch.zeros_like(q), float(q.sum() + (0 if target is None else target.max()))
    support, entered, value, count = torch.zeros_like(free), torch.zeros_like(free), 0.0, 0
    while count < 10 * len(q) + 40:
        r = cosines @ y + start
        rounding = 2 * _EPSILON * len(q) * (fixed + float(y.sum()))
        # A row enters once only until the value falls, so that rounding makes no cycle.
        if (found := float(y @ (r + start)) / 2) < value - rounding * (fixed + float(y.sum())):
            value = found
            entered.zero_()
        below = free & ~support & ~entered & (r < -rounding)
        if not below.any():
            break
        entering = r.where(below, torch.inf).argmin()
        support[entering] = entered[entering] = True
        y = _settled(cosines, start, support, y)
        count += 1
    for _ in range(2):
        y = _settled(cosines, start, support, y)
    r = torch.where(free, cosines @ y + start, 0.0)
    violation = torch.where(support, r.abs(), (-r).clamp(min=0)).max()
    return y, float(violation) / (fixed + float(y.sum())), count


def _settled(cosines: Tensor, start: Tensor, support: Tensor, y: Tensor) -> Tensor:
    """y where (C y + start)_j = 0 on the support, from which rows are taken whose y reaches 0 on the way there.

    mu I makes the matrix positive definite, and is not felt but where C alone says next to nothing.
    """
    mu = 4 * _EPSILON * len(y)
    while support.any():
        own = support.nonzero().flatten()
        matrix = cosines[own][:, own] + mu * torch.eye(len(own), dtype=y.dtype, device="cpu")
        step = torch.zeros_like(y)
        step[own] = torch.linalg.solve(matrix, -(cosines @ y + start)[own])
        leaving = support & (y + step <= 0)
        if not leaving.any():
            return y + step
        share = torch.where(leaving, torch.where(y > 0, y / -step, 0.0), torch.inf)
        first = share.argmin()
        y = (y + share[first] * step).clamp(min=0)
        y[first], support[first] = 0.0, False
    return y
