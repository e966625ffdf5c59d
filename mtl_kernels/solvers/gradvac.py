"""GradVac: every task's gradient is brought to a target for its cosine with each other task's."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..rng import order_keys
from .pcgrad import pcgrad_options

__all__ = ["gradvac_weights"]

_EPSILON = torch.finfo(torch.float64).eps


def gradvac_weights(
    gram: Tensor,
    *,
    state: Tensor,
    beta: float = 0.5,
    order: Literal["random", "fixed"] = "random",
    reduction: Literal["sum", "mean"] = "sum",
    rng: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weights w such that J^T w is GradVac's direction, and a step of its targets (Wang et al. 2021, arXiv 2010.05874).

    With g = g_i, for each task j != i in turn: c = cos(g, g_j); if c < r_ij, the original g_j times
    ||g|| (r_ij sqrt(1 - c^2) - c sqrt(1 - r_ij^2)) / (||g_j|| sqrt(1 - r_ij^2)) is added, so that the cosine becomes
    r_ij; then, in any case, r_ij <- (1 - beta) r_ij + beta c. J^T w is the sum of the g. With targets of 0 and beta = 0
    that is `pcgrad_weights`.

    Where one of the two is zero, also a g that has cancelled to rounding, there is no cosine: nothing is added, and
    r_ij stays. No finite multiple of g_j brings a cosine to 1: none is added for r_ij > 1 - 16 eps.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        state: the targets r, float64 ``[..., K, K]``, contiguous, in [-1, 1]; updated in place. Left alone where the
            problem is not finite, and in the rows and columns of tasks that are not active.
        beta: how much of r a step replaces, in [0, 1].
        order, reduction, rng, active, backend: as for `pcgrad_weights`.

    Returns:
        float64 ``[..., K]``.

    Raises:
        ValueError, TypeError: an unknown order or reduction, a beta out of range, or tensors of the wrong shape, dtype
            or device.
    """
    options = gradvac_options(order, reduction, beta)
    if not isinstance(state, Tensor):
        raise TypeError(f"expected state as a tensor of targets [..., K, K], found {type(state).__name__}")
    if isinstance(gram, Tensor) and state.shape != gram.shape:
        raise ValueError(
            f"expected state of the shape of the Gram matrix, {list(gram.shape)}, found {list(state.shape)}"
        )
    if not state.is_contiguous():
        raise ValueError(f"expected state as a contiguous tensor, found strides {state.stride()}; pass a copy of it")
    if order == "random" and rng is None and isinstance(gram, Tensor):
        rng = torch.randint(1 << 62, (2,), dtype=torch.int64, device=gram.device)
    return ops.solve(gram, gradvac_call(options, state, rng, active), backend=backend)[0]


def gradvac_call(
    options: tuple[float, ...], targets: Tensor, rng: Tensor | None, active: Tensor | None, advance_rng: bool = False
) -> SolverCall:
    """The call of solver "gradvac" with targets ``[..., K, K]``, contiguous."""
    return SolverCall(
        "gradvac", options, active, rng, state=targets.flatten(-2), advance_rng=advance_rng, certified=False
    )


def gradvac_options(order: str, reduction: str, beta: float) -> tuple[float, ...]:
    """The options of solver "gradvac". Raise ValueError for those that `gradvac_weights` refuses."""
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise ValueError(f"expected beta as a number in [0, 1], found {beta!r}")
    return (*pcgrad_options(order, reduction), float(beta))


@defines(
    "gradvac",
    num_options=3,
    needs_rng=lambda options: options[0] != 0,
    state_doubles=lambda num_tasks: num_tasks**2,
)
def definition(problem: Problem) -> Answer:
    """Algorithm 1 on coefficients; options: (random, mean, beta)."""
    gram, tasks = problem.gram, problem.tasks
    random, mean, beta = problem.options
    if problem.state is None:
        raise ValueError("a solver that keeps targets needs a state")
    targets = problem.state.view(problem.num_tasks, problem.num_tasks)
    keys = order_keys(problem.rng, problem.position, problem.num_tasks) if random and problem.rng is not None else None
    norm = gram.diagonal().clamp(min=0).sqrt()
    weights = torch.zeros_like(norm)
    for i, task in enumerate(tasks):
        others = [j for j in range(len(tasks)) if j != i]
        if keys is not None:
            others.sort(key=[keys[task, other].item() for other in tasks].__getitem__)
        g = torch.zeros_like(norm)  # its coefficients
        g[i] = 1.0
        for j in others:
            square = g @ gram @ g
            if norm[j] == 0 or square <= 4 * len(tasks) * _EPSILON * (g.abs() @ norm) ** 2:
                continue
            product, length = gram[j] @ g, square.sqrt()
            c = (product / length / norm[j]).clamp(-1, 1).item()
            r = targets[task, tasks[j]].item()
            if c < r <= 1 - 16 * _EPSILON:
                g[j] += length / norm[j] * (r * math.sqrt(1 - c * c) / math.sqrt(1 - r * r)) - product / norm[j] ** 2
            targets[task, tasks[j]] = (1 - beta) * r + beta * c
        weights += g
    return Answer(weights / len(tasks) if mean else weights)
