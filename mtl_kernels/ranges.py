"""float64 rows whose squares leave the range of float64, which a Gram matrix cannot hold.

Seen on a CPU only: on a GPU the host would have to wait for the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .definitions import sums
from .rows import DTYPE_CODES, RowTable

_SMALL = 2.0**-900
"""Squares below are on their way to lose bits, then to vanish."""


def leaves_range(table: RowTable, gram: Tensor) -> bool:
    """Whether a Gram matrix ``[..., K, K]`` of float64 rows has squares that are not finite, or all so small."""
    if DTYPE_CODES[torch.float64] not in table.codes or table.device.type != "cpu":
        return False
    squares = gram.diagonal(dim1=-2, dim2=-1)
    largest = squares.amax(-1)
    return not bool(squares.isfinite().all()) or bool((largest < _SMALL).any())


def scaled_gram(table: RowTable, groups: Sequence[int], num_groups: int) -> tuple[Tensor, Tensor] | None:
    """Gram matrices ``[S, K, K]`` of rows that are scaled by a power of two, one for each group.

    Returns:
        They and the scales ``[S]``; None where there is nothing to scale: rows that are not finite, or all zero.
    """
    largest = torch.zeros(num_groups, dtype=torch.float64, device="cpu")
    for row in table.entries:
        for tensor, group in zip(row, groups, strict=True):
            if tensor is not None and tensor.numel() > 0:
                largest[group] = torch.maximum(largest[group], tensor.abs().max().double())
    if not largest.isfinite().all() or not largest.any():
        return None
    # A longer row than this one does not exist: with elements below 1, N of them have squares that add up to N.
    scales = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest)[1].clamp(min=-1000))
    found = torch.zeros(num_groups, table.num_tasks, table.num_tasks, dtype=torch.float64, device="cpu")
    sums.gram_into(table, groups, found, scales.tolist())
    return found, scales


def check_range(table: RowTable, gram: Tensor, groups: Sequence[int] | None = None) -> None:
    """Raise ValueError where finite rows have a Gram matrix that is not: methods would take them for broken."""
    if table.part is not None or not leaves_range(table, gram) or gram.isfinite().all():
        return  # of a part: not all ranks would raise
    group_list = [0] * table.num_params if groups is None else groups
    if scaled_gram(table, group_list, max(group_list, default=0) + 1) is not None:
        raise ValueError(
            "the squares of float64 gradients overflow (elements beyond about 1e154), although they are finite; scale "
            "the losses down, or use a method that a solver of mtl_kernels does alone"
        )
