"""The Gram matrix of the rows, and their weighted sum.

Products are taken in float64 over blocks of columns, so that no float64 copy of a whole row is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rows import RowTable

BLOCK = 1 << 16
"""Columns converted to float64 at a time."""


def gram_into(table: RowTable, groups: Sequence[int], out: Tensor, scales: Sequence[float] | None = None) -> None:
    """Adds J_s J_s^T of each group s of parameters to ``out[s]``, float64 ``[S, K, K]``; of scales[s] J_s if given."""
    for p, like in enumerate(table.like):
        if like is None:
            continue
        tasks = [k for k in range(table.num_tasks) if table.entries[k][p] is not None]
        rows = [flat(table.entries[k][p]) for k in tasks]
        index = torch.tensor(tasks, device=out.device)
        for begin in range(0, like.numel(), BLOCK):
            block = torch.stack([row[begin : begin + BLOCK].double() for row in rows])
            block = block if scales is None else block * scales[groups[p]]
            out[groups[p]].index_put_((index.unsqueeze(1), index), block @ block.T, accumulate=True)
    lower = out.tril(-1)
    out.copy_(out.tril() + lower.mT)


def combine_into(
    table: RowTable,
    weights: Tensor,
    groups: Sequence[int],
    out: Sequence[Tensor | None],
    accumulate: bool = False,
) -> None:
    """Writes sum_k weights[groups[p], k] * rows[k][p] to ``out[p]`` for every parameter that a task reaches.

    Rounds to the dtype of ``out[p]``; with ``accumulate`` after adding what it held.
    """
    for p, target in enumerate(out):
        if target is None:
            continue
        column = [(weights[groups[p], k], flat(row[p])) for k, row in enumerate(table.entries) if row[p] is not None]
        written = flat(target)
        for begin in range(0, written.numel(), BLOCK):
            end = begin + BLOCK
            total = torch.zeros(written[begin:end].shape, dtype=torch.float64, device=written.device)
            for weight, row in column:
                total += weight * row[begin:end].double()
            if accumulate:
                total += written[begin:end].double()
            written[begin:end] = rounded(total, target.dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once to a row dtype."""
    if dtype.itemsize > 2:
        return x.to(dtype)
    # By way of a float32 whose last bit is set where anything was cut off.
    nearest = x.float()
    inexact = (nearest.double() != x) & x.isfinite()
    bits = nearest.view(torch.int32) - (nearest.double().abs() > x.abs()).int()
    return torch.where(inexact, bits | 1, nearest.view(torch.int32)).view(torch.float32).to(dtype)


def flat(tensor: Tensor | None) -> Tensor:
    """The elements in the order of memory, without a copy; tensors of a `RowTable` fill their memory."""
    if tensor is None:
        raise ValueError("a parameter that no task reaches has no elements")
    return tensor.as_strided((tensor.numel(),), (1,))
