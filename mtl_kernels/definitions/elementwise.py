"""Operations that need the rows element by element: K values of a column become one, or a row updates its state.

All in float64, over blocks of columns; results are rounded once to the dtype of where they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import ColumnCall, StateCall
from ..rng import uniform
from ..rows import RowTable
from .sums import BLOCK, flat, rounded


def reduce_columns_into(table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
    """Writes what ``call`` makes of the K values of every element to ``out[p]``, for parameters that a task reaches."""
    first = 0
    for p, target in enumerate(out):
        if target is None:
            continue
        written = flat(target)
        for begin in range(0, written.numel(), BLOCK):
            length = min(BLOCK, written.numel() - begin)
            zeros = torch.zeros(length, dtype=torch.float64, device=written.device)
            values = torch.stack(
                [zeros if row[p] is None else flat(row[p])[begin : begin + length].double() for row in table.entries]
            )
            if call.operation == "graddrop":
                found = graddrop(values, call.leak, uniform(_state(call), first + begin, length))
            else:
                found = trimmed_mean(values, call.trim)
            written[begin : begin + length] = rounded(found, target.dtype)
        first += written.numel()


def graddrop(values: Tensor, leak: Tensor | None, threshold: Tensor) -> Tensor:
    """GradDrop (Chen 2020, arXiv 2010.06808, algorithm 1, f the identity) of values ``[K, n]``; thresholds ``[n]``.

    P = (1 + sum_k g_k / sum_k |g_k|) / 2, and 1/2 where all g_k are zero. Positive values are kept where P > U,
    negative ones where P < U; of the others task k leaks a share leak_k. Where a value is not finite, the sum of all.
    """
    total, size = torch.zeros_like(threshold), torch.zeros_like(threshold)
    for value in values:  # in the order of the tasks: every backend keeps the same signs
        total += value
        size += value.abs()
    purity = torch.where(size == 0, 0.5, (1 + total / size) / 2)
    kept = ((values > 0) & (purity > threshold)) | ((values < 0) & (purity < threshold))
    leaked = torch.zeros_like(values) if leak is None else leak[:, None] * values
    found = torch.where(kept, values, leaked).sum(0)
    return torch.where(purity.isnan(), total, found)


def trimmed_mean(values: Tensor, trim: int) -> Tensor:
    """The mean of values ``[K, n]`` without the ``trim`` largest and smallest of each column (Yin 2018).

    NaN where one of the K values is; infinite ones are the largest and smallest there are.
    """
    kept = values.sort(0).values[trim : values.shape[0] - trim]
    return torch.where(values.isnan().any(0), torch.nan, kept.mean(0))


def update_state(table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor) -> None:
    """Updates every tensor of ``state``, laid out as the rows, and adds what comes of task k to ``sums[groups[p], k]``.

    "average": s <- keep s + gain g, and s^2. "squares": s <- s + gain g^2, and g^2 / sqrt(s + epsilon). Both sums are
    of s as it is rounded. A factor 0 leaves its operand out, whatever that holds, and s keeps its bits where
    nothing changes it.
    """
    for k, states in enumerate(state.entries):
        for p, kept in enumerate(states):
            if kept is None:
                continue
            row = table.entries[k][p]
            for begin in range(0, kept.numel(), BLOCK):
                block = flat(kept)[begin : begin + BLOCK]
                g = torch.zeros_like(block) if row is None else flat(row)[begin : begin + BLOCK]
                sums[groups[p], k] += _update(call, block, g.double(), (groups[p], k))


def _update(call: StateCall, kept: Tensor, g: Tensor, place: tuple[int, int]) -> Tensor:
    gain = call.gain[place]
    if call.keep is None:
        changed = torch.where(gain == 0, 0.0, gain * g * g)
        kept.copy_(torch.where(changed == 0, kept, rounded(kept.double() + changed, kept.dtype)))
        return (g * g / (kept.double() + call.epsilon).sqrt()).sum()
    keep = call.keep[place]
    new = torch.where(keep == 0, 0.0, keep * kept.double()) + torch.where(gain == 0, 0.0, gain * g)
    kept.copy_(torch.where((keep == 1) & (gain == 0), kept, rounded(new, kept.dtype)))
    return kept.double().square().sum()


def _state(call: ColumnCall) -> Tensor:
    if call.rng is None:
        raise ValueError(f"{call.operation} needs an rng state; pass rng=rng_state(seed, step)")
    return call.rng
