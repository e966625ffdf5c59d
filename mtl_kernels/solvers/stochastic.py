"""Weights that take projected gradient steps from one training step to the next, on products of two batches.

Both functions take A = J1 J2^T of two independent batches (see `mtl_kernels.cross_gram`), an unbiased estimate of the
Gram matrix of the full gradients. It need not be symmetric, nor its diagonal positive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines

__all__ = ["modo_weights", "sdmgrad_weights"]


def sdmgrad_weights(
    cross_gram: Tensor,
    *,
    state: Tensor,
    lam: float = 0.3,
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    normalize: bool = True,
    pref: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """SDMGrad's weights (Xiao et al. 2023, arXiv 2305.18409), for the rows of a third batch.

    ``n_iter`` times: b <- momentum b + A (w + lam pref), w <- P(w - lr b), with b = 0 before the first and P the
    Euclidean projection onto the simplex. Returned is (w + lam pref) / (1 + lam).

    Args:
        cross_gram: A, ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        state: w, float64 ``[..., K]``, contiguous, changed in place but for problems that are not finite. All zeros:
            1 / K each. A task that is not active keeps its share, and the others share theirs.
        lam: how much the preferred direction counts, >= 0.
        lr, momentum, n_iter: of the steps; > 0, in [0, 1), >= 1.
        normalize: take A / (m^2 + 1e-8 max |A_ij|) for A, with m the mean of sqrt(max(A_ii, 0)), as the published
            code does but for its absolute epsilon: ``lr`` then fits gradients of any length, and the result is free of
            their scale.
        pref: numbers >= 0, ``[K]`` or ``[..., K]``; what counts is their proportion over the active tasks. None, or
            all zero: alike. Values are not looked at: the methods check theirs.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        float64 ``[..., K]``, >= 0 with sum 1.

    Raises:
        ValueError, TypeError: an option out of range, or tensors of the wrong shape, dtype or device.
    """
    options = sdmgrad_options(lam, lr, momentum, n_iter, normalize)
    call = SolverCall("sdmgrad", options, active, inputs=pref, state=state, certified=False)
    return ops.solve(cross_gram, call, backend=backend)[0]


def modo_weights(
    cross_gram: Tensor,
    *,
    state: Tensor,
    gamma: float = 0.1,
    rho: float = 0.1,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """MoDo's weights (Chen et al. 2023, arXiv 2305.20057): w <- P(w - gamma (A w + rho w)), once.

    P is the Euclidean projection onto the simplex. The step is as long as the products of the gradients are large.

    Args:
        cross_gram: A, ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        state: w, as for `sdmgrad_weights`.
        gamma: the step size, > 0.
        rho: the regularisation towards equal weights, >= 0, in units of A.
        active, backend: as for `sdmgrad_weights`.

    Returns:
        float64 ``[..., K]``, >= 0 with sum 1.

    Raises:
        ValueError, TypeError: an option out of range, or tensors of the wrong shape, dtype or device.
    """
    call = SolverCall("modo", modo_options(gamma, rho), active, state=state, certified=False)
    return ops.solve(cross_gram, call, backend=backend)[0]


def sdmgrad_options(
    lam: float = 0.3, lr: float = 10.0, momentum: float = 0.5, n_iter: int = 20, normalize: bool = True
) -> tuple[float, ...]:
    """The options of solver "sdmgrad". Raise TypeError or ValueError for those that `sdmgrad_weights` refuses."""
    if isinstance(n_iter, bool) or not isinstance(n_iter, int):
        raise TypeError(f"expected n_iter as an integer, found {n_iter!r}")
    if n_iter < 1:
        raise ValueError(f"expected n_iter >= 1, found {n_iter}")
    if not isinstance(normalize, bool):
        raise TypeError(f"expected normalize as True or False, found {normalize!r}")
    if _number("momentum", momentum) >= 1:
        raise ValueError(f"expected momentum in [0, 1), found {momentum}")
    return (_number("lam", lam), _positive("lr", lr), float(momentum), float(n_iter), float(normalize))


def modo_options(gamma: float = 0.1, rho: float = 0.1) -> tuple[float, ...]:
    """The options of solver "modo". Raise TypeError or ValueError for those that `modo_weights` refuses."""
    return (_positive("gamma", gamma), _number("rho", rho))


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected {name} as a number, found {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"expected {name} as a finite number >= 0, found {value!r}")
    return float(value)


def _positive(name: str, value: float) -> float:
    if _number(name, value) == 0:
        raise ValueError(f"expected {name} > 0, found {value!r}")
    return float(value)


@defines("sdmgrad", num_options=5, state_doubles=lambda num_tasks: num_tasks)
def sdmgrad(problem: Problem) -> Answer:
    """Projected SGD with momentum on the active tasks' shares; options: (lam, lr, momentum, n_iter, normalise)."""
    lam, lr, momentum, n_iter, normalise = problem.options
    a = _normalised(problem.gram) if normalise else problem.gram
    pref = problem.inputs
    if pref is None or not pref.any():
        pref = torch.ones_like(a[0])
    pref = pref / pref.sum()
    w, share = _shares(problem)
    velocity = torch.zeros_like(w)
    for _ in range(int(n_iter)):
        velocity = momentum * velocity + (a @ w + lam * (a @ pref))
        w = project_onto_simplex(w - lr * velocity)
    _keep(problem, w * share)
    return Answer((w + lam * pref) / (1 + lam), iterations=int(n_iter))


@defines("modo", num_options=2, state_doubles=lambda num_tasks: num_tasks, scale_free=False)
def modo(problem: Problem) -> Answer:
    """One projected step on the shares of the active tasks; options: (gamma, rho)."""
    gamma, rho = problem.options
    w, share = _shares(problem)
    w = project_onto_simplex(w - gamma * (problem.gram @ w + rho * w))
    _keep(problem, w * share)
    return Answer(w, iterations=1)


def project_onto_simplex(x: Tensor) -> Tensor:
    """The nearest w >= 0 with sum 1 (Held, Wolfe & Crowder 1974): of the n largest entries, n as many as stay > 0."""
    x = x - x.max()
    largest = x.sort(descending=True).values
    thresholds = (largest.cumsum(0) - 1) / torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    n = int((largest > thresholds).nonzero().max())
    return (x - thresholds[n]).clamp(min=0)


def _normalised(a: Tensor) -> Tensor:
    """A in units of the mean length of the gradients, as far as products of two batches tell it."""
    largest = a.abs().max()
    if largest == 0:
        return a
    a = a / largest
    return a / (a.diagonal().clamp(min=0).sqrt().mean() ** 2 + 1e-8)


def _shares(problem: Problem) -> tuple[Tensor, float]:
    """The active tasks' weights of the last step, made to add up to 1, and what they are to add up to in the state."""
    state = problem.state
    if state is None:
        raise ValueError("a solver that keeps weights needs a state")
    if not (state.sum() > 0 and state.sum().isfinite()):
        state.fill_(1 / problem.num_tasks)
    among = state[problem.tasks]
    share = float(among.sum())
    if share > 0:
        return among / share, 1.0 if len(among) == problem.num_tasks else share
    return torch.full_like(among, 1 / len(among)), len(among) / problem.num_tasks


def _keep(problem: Problem, weights: Tensor) -> None:
    if problem.state is not None:
        problem.state[problem.tasks] = weights
