"""What the solvers share: their result, and the problems that are the same for every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Weights of the original rows, and how good they are.

    Attributes:
        weights: float64 ``[..., K]``.
        gap: float64 ``[...]`` duality gap, nan for a Gram matrix that is not finite; ``None`` where the method has no
            certificate.
        iterations: int64 ``[...]``, or ``None`` likewise.
    """

    weights: Tensor
    gap: Tensor | None = None
    iterations: Tensor | None = None


class Reference(NamedTuple):
    """The PyTorch form of a solver, and what it is called with, as in its header.

    Attributes:
        solve: (gram [B, K, K], active [B, K], rng, options, inputs) -> (weights [B, K], certificate [B, 2]).
        num_options: the length of ``options``.
        needs_rng: whether these options need an rng state.
    """

    solve: Callable[[Tensor, Tensor, Tensor | None, Sequence[float], Tensor | None], tuple[Tensor, Tensor]]
    num_options: int
    needs_rng: Callable[[Sequence[float]], bool]


class Problems(NamedTuple):
    """A batch of problems made safe to compute on, see `prepare`."""

    gram: Tensor
    active: Tensor
    num_active: Tensor
    finite: Tensor


def prepare(gram: Tensor, active: Tensor) -> Problems:
    """Puts zeros for inactive tasks, and throughout where ``gram`` ``[B, K, K]`` is not finite."""
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    finite = (gram.isfinite() | ~pair).flatten(1).all(1)
    clean = torch.where(pair & finite.view(-1, 1, 1), gram, torch.zeros_like(gram))
    return Problems(clean, active, active.sum(-1), finite)


def uniform(problems: Problems) -> Tensor:
    """1 / K_active for every active task, 0 for the others: ``[B, K]``."""
    return problems.active.to(torch.float64) / problems.num_active.clamp(min=1).unsqueeze(-1)


def settle(problems: Problems, weights: Tensor, gap: Tensor, iterations: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and certificate ``[B, 2]``; uniform weights and gap nan where the Gram matrix is not finite."""
    weights = torch.where(problems.finite.unsqueeze(-1), weights, uniform(problems))
    gap = torch.where(problems.finite, gap, torch.full_like(gap, torch.nan))
    iterations = torch.where(problems.finite, iterations.to(gap.dtype), torch.zeros_like(gap))
    return weights, torch.stack((gap, iterations), dim=-1)
