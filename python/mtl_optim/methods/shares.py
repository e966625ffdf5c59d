"""Equal weights over the active tasks: what a method gives where it has nothing to go by."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_among(gram: Tensor, active: Tensor | None) -> Tensor:
    """bool ``[..., 1]``: whether ``gram`` ``[..., K, K]`` is finite among the active tasks."""
    finite = gram.isfinite()
    if active is not None:
        finite = finite | ~(active.unsqueeze(-1) & active.unsqueeze(-2))
    return finite.flatten(-2).all(-1, keepdim=True)


def equal_shares(gram: Tensor, active: Tensor | None) -> Tensor:
    """1 / (number of active tasks) on every active task, 0 on the others: float64 ``[..., K]``."""
    if active is None:
        return torch.full(gram.shape[:-1], 1.0 / gram.shape[-1], dtype=torch.float64, device=gram.device)
    count = active.sum(-1, keepdim=True).clamp(min=1).double()
    return torch.where(active, count.reciprocal(), 0.0).expand(gram.shape[:-1]).contiguous()
