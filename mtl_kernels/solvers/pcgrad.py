"""PCGrad: every task's gradient loses its component against each task that it conflicts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..rng import order_keys
from .common import Reference, prepare, settle


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
    return ops.solve_weights("pcgrad", gram, options=options, active=active, rng=rng, backend=backend)


def pcgrad_options(order: str, reduction: str) -> tuple[float, ...]:
    """The options of solver "pcgrad". Raise ValueError for an unknown order or reduction."""
    if order not in ("random", "fixed"):
        raise ValueError(f'expected order "random" or "fixed", found {order!r}')
    if reduction not in ("sum", "mean"):
        raise ValueError(f'expected reduction "sum" or "mean", found {reduction!r}')
    return (float(order == "random"), float(reduction == "mean"))


def reference(
    gram: Tensor, active: Tensor, rng: Tensor | None, options: Sequence[float], inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`pcgrad_weights` in PyTorch, for a batch; options: (random, mean). All tasks visit at the same time."""
    random, mean = options
    problems = prepare(gram, active)
    gram = problems.gram
    batch, num_tasks, _ = gram.shape
    last = torch.full((), 1 << 32, dtype=torch.int64, device=gram.device)
    keys = torch.arange(num_tasks, device=gram.device).expand(gram.shape)
    if rng is not None and random:
        keys = order_keys(rng, batch, num_tasks)
    itself = torch.eye(num_tasks, dtype=torch.bool, device=gram.device)
    keys, visits = torch.where(itself | ~active.unsqueeze(-2), last, keys).sort(dim=-1)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    coefficients = itself.to(gram.dtype).repeat(batch, 1, 1)
    products = gram.clone()
    for visit in range(num_tasks - 1):
        j = visits[..., visit]
        product = products.gather(-1, j.unsqueeze(-1)).squeeze(-1)
        square = squares.gather(-1, j)
        conflict = (product < 0) & (square > 0) & (keys[..., visit] < last)
        factor = torch.where(conflict, product / square, torch.zeros_like(product)).unsqueeze(-1)
        products -= factor * gram.gather(1, j.unsqueeze(-1).expand_as(gram))
        coefficients.scatter_add_(-1, j.unsqueeze(-1), -factor)
    weights = (coefficients * active.unsqueeze(-1)).sum(-2) * active
    if mean:
        weights = weights / problems.num_active.clamp(min=1).unsqueeze(-1)
    nothing = gram.new_zeros(batch)
    return settle(problems, weights, nothing, nothing)


REFERENCE = Reference(reference, num_options=2, needs_rng=lambda options: options[0] != 0)
