"""Parameters that are several tasks' own in one tensor: learned log-variances, or one layer for all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture.grads import Row

_SAMPLE = 64
"""Slices of a tensor that are looked at: overlapping gradients overlap nearly everywhere."""


def packed_parameters(rows: Sequence[Row]) -> list[int]:
    """The parameters that are divided among the tasks: every index of a dimension is reached by exactly one of several.

    Autograd gives such tasks zeros where others have their part, so that the parameter counts as shared. The host waits
    for the device.
    """
    if not rows:
        return []
    found = {}
    for p in range(len(rows[0])):
        grads = [grad for row in rows if (grad := row[p]) is not None]
        if len(grads) > 1 and (flags := _partitions(grads)):
            found[p] = torch.stack(flags).any()
    if not found:
        return []
    there = torch.stack(list(found.values())).tolist()
    return [p for p, flag in zip(found, there, strict=True) if flag]


def _partitions(grads: Sequence[Tensor]) -> list[Tensor]:
    """For each dimension that could be divided among the tasks, whether it is."""
    first = grads[0]
    flags = []
    for dim in range(min(first.dim(), 2)) if first.dim() <= 2 else (0,):
        size = first.shape[dim]
        if size < len(grads):
            continue
        touched = torch.stack([_touched(grad, dim) for grad in grads])
        flags.append((touched.sum(0) == 1).all() & touched.any(1).all())
    return flags


def _touched(grad: Tensor, dim: int) -> Tensor:
    """bool ``[size of dim]``: where the gradient is not zero."""
    slices = grad.detach().movedim(dim, 0).reshape(grad.shape[dim], -1)
    step = max(1, slices.shape[1] // _SAMPLE)
    return slices[:, ::step].ne(0).any(1)
