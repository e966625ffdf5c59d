"""PCGrad: every task's gradient loses its component against each task that it conflicts with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..rng import order_keys

__all__ = ["pcgrad_weights"]


def pcgrad_weights(
    gram: Tensor,
    *,
    order: Literal["random", "fixed"] = "random",
    reduction: Literal["sum", "mean"] = "sum",
    rng: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weights w such that J^T w is PCGrad's direction (Yu et al. 2020, arXiv 2001.06782, Algorithm 1).

    With c_i = e_i, for each task j != i in turn: s = (G c_i)_j; if s < 0: c_i[j] -= s / G_jj. w = sum_i c_i.
    Projections are onto the original rows; a zero row projects nothing.

    Args:
        gram: ``[..., K, K]``, used in float64. Not finite among the active tasks: 1 / K_active for each.
        order: in which a task meets the others: "random" as published, drawn anew for each task, or "fixed",
            ascending.
        reduction: "sum" as published, or "mean" over the active tasks.
        rng: int64 ``[2]``, see `rng_state`; the order is a function of it and of the position in the batch.
            ``None`` draws a fresh state from torch's default generator of the device. Unused when order is
            "fixed".
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        float64 ``[..., K]``. Without a conflict exactly 1 for every active task, or 1 / K_active for "mean".

    Raises:
        ValueError, TypeError: an unknown order or reduction, or tensors of the wrong shape, dtype or device.
    """
    options = pcgrad_options(order, reduction)
    if order == "random" and rng is None and isinstance(gram, Tensor):
        rng = torch.randint(1 << 62, (2,), dtype=torch.int64, device=gram.device)
    return ops.solve(gram, SolverCall("pcgrad", options, active, rng, certified=False), backend=backend)[0]


def pcgrad_options(order: str, reduction: str) -> tuple[float, ...]:
    """The options of solver "pcgrad". Raise ValueError for an unknown order or reduction."""
    if order not in ("random", "fixed"):
        raise ValueError(f'expected order "random" or "fixed", found {order!r}')
    if reduction not in ("sum", "mean"):
        raise ValueError(f'expected reduction "sum" or "mean", found {reduction!r}')
    return (float(order == "random"), float(reduction == "mean"))


@defines("pcgrad", num_options=2, needs_rng=lambda options: options[0] != 0)
def definition(problem: Problem) -> Answer:
    """Algorithm 1 on coefficients; options: (random, mean)."""
    gram, tasks = problem.gram, problem.tasks
    random, mean = problem.options
    keys = order_keys(problem.rng, problem.position, problem.num_tasks) if random and problem.rng is not None else None
    weights = torch.zeros_like(gram[0])
    for i, task in enumerate(tasks):
        others = [j for j in range(len(tasks)) if j != i]
        if keys is not None:
            others.sort(key=[keys[task, other].item() for other in tasks].__getitem__)
        c = torch.zeros_like(gram[0])
        c[i] = 1.0
        for j in others:
            s = gram[j] @ c
            if s < 0 and gram[j, j] > 0:
                c[j] -= s / gram[j, j]
        weights += c
    return Answer(weights / len(tasks) if mean else weights)
