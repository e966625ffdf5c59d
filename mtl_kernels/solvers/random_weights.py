"""Random weights, drawn anew at every step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..call import SolverCall
from ..definitions.solving import Answer, Problem, defines
from ..rng import philox

__all__ = ["random_weights"]

_DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli")
_WORD = 0xFFFFFFFF
_FIRST_BLOCK = 4096
"""The counter's last word starts here: PCGrad's orders of 128 tasks end below it, so no two draws share a word."""


def random_weights(
    gram: Tensor,
    *,
    rng: Tensor,
    distribution: Literal["normal", "uniform", "dirichlet", "bernoulli"] = "normal",
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A random point of the simplex for every problem: RLW (Lin et al. 2021, arXiv 2111.10603).

    Args:
        gram: ``[..., K, K]``, of which only the shape counts, and whether it is finite. Not finite among the active
            tasks: 1 / K_active for each.
        rng: int64 ``[2]``, see `rng_state`; the weights are a function of it, of the position in the batch and of the
            task.
        distribution: "normal", the softmax of normal numbers; "uniform", uniform numbers divided by their sum;
            "dirichlet", every point of the simplex alike; "bernoulli", equal weights on a random subset, on all tasks
            where it is empty.
        active: bool ``[K]`` or ``[..., K]``; other tasks take no part and get weight 0.
        backend: see `mtl_kernels.use_backend`.

    Returns:
        float64 ``[..., K]``, >= 0 with sum 1 over the active tasks.

    Raises:
        ValueError, TypeError: an unknown distribution, or tensors of the wrong shape, dtype or device.
    """
    call = SolverCall("random_weights", random_options(distribution), active, rng, certified=False)
    return ops.solve(gram, call, backend=backend)[0]


def random_options(distribution: str) -> tuple[float, ...]:
    """The options of solver "random_weights". Raise ValueError for an unknown distribution."""
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"expected distribution as one of {_DISTRIBUTIONS}, found {distribution!r}")
    return (float(_DISTRIBUTIONS.index(distribution)),)


@defines("random_weights", num_options=1, needs_rng=lambda options: True)
def definition(problem: Problem) -> Answer:
    """Two numbers of each task, u and v, from the four words of the counter (step, problem, 4096 + task)."""
    if problem.rng is None:
        raise ValueError("random weights need an rng state")
    seed, step = problem.rng[0], problem.rng[1]
    task = torch.tensor(problem.tasks, device="cpu") + _FIRST_BLOCK
    counter = (step & _WORD, (step >> 32) & _WORD, torch.full_like(task, problem.position & _WORD), task)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD)) >> 6
    u, v = (((words[:, 0::2] * 2**26 + words[:, 1::2]).double() + 0.5) * 2.0**-52).unbind(1)
    distribution = _DISTRIBUTIONS[int(problem.options[0])]
    if distribution == "normal":
        share = ((-2 * u.log()).sqrt() * (2 * math.pi * v).cos()).exp()  # Box and Muller
    elif distribution == "uniform":
        share = u
    elif distribution == "dirichlet":
        share = -u.log()
    else:
        share = (u < 0.5).double()
    return Answer(share / share.sum() if share.any() else torch.full_like(u, 1 / len(u)))
