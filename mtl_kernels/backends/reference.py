"""The pure PyTorch backend: any device, nothing compiled; the fallback, and the oracle of the compiled kernels.

Products are taken in float64 over blocks of columns, so that no float64 copy of a whole row is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rows import RowTable

BLOCK = 1 << 16
"""Columns converted to float64 at a time."""

_WITHOUT_FLOAT64 = ("mps",)


def gram_into(table: RowTable, groups: Sequence[int], out: Tensor) -> None:
    """Adds J_s J_s^T of each group s of parameters to ``out[s]``, float64 ``[S, K, K]``."""
    for p, like in enumerate(table.like):
        if like is None:
            continue
        tasks = [k for k in range(table.num_tasks) if table.entries[k][p] is not None]
        flat = [_flat(table.entries[k][p]) for k in tasks]
        for begin in range(0, like.numel(), BLOCK):
            block = torch.stack([row[begin : begin + BLOCK].double() for row in flat])
            product = block @ block.T
            if len(tasks) < table.num_tasks:
                product = _spread(_spread(product, tasks, table.num_tasks).T, tasks, table.num_tasks).T
            out[groups[p]] += product
    lower = out.tril(-1)
    out.copy_(out.tril() + lower.mT)


def _spread(rows: Tensor, tasks: Sequence[int], num_tasks: int) -> Tensor:
    """The rows at the places of their tasks among ``num_tasks``, with zeros in between.

    By slices: the host would wait for an index to reach the device, and a CUDA graph could not be captured.
    """
    pieces, nothing = iter(rows.split(1)), rows.new_zeros(1, rows.shape[1])
    present = set(tasks)
    return torch.cat([next(pieces) if task in present else nothing for task in range(num_tasks)])


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
        column = [(weights[groups[p], k], _flat(row[p])) for k, row in enumerate(table.entries) if row[p] is not None]
        flat = _flat(target)
        for begin in range(0, flat.numel(), BLOCK):
            end = begin + BLOCK
            total = torch.zeros(flat[begin:end].shape, dtype=torch.float64, device=flat.device)
            for weight, row in column:
                total += weight * row[begin:end].double()
            if accumulate:
                total += flat[begin:end].double()
            flat[begin:end] = total if target.dtype.itemsize > 2 else _to_odd_float(total)


def _to_odd_float(x: Tensor) -> Tensor:
    """float64 as float32 whose last bit is set where anything was cut off: rounding that to 16 bits rounds once."""
    nearest = x.float()
    inexact = (nearest.double() != x) & x.isfinite()
    bits = nearest.view(torch.int32) - (nearest.double().abs() > x.abs()).int()
    return torch.where(inexact, bits | 1, nearest.view(torch.int32)).view(torch.float32)


def _flat(tensor: Tensor | None) -> Tensor:
    """The elements in the order of memory, without a copy; tensors of a `RowTable` fill their memory."""
    if tensor is None:
        raise ValueError("a parameter that no task reaches has no elements")
    return tensor.as_strided((tensor.numel(),), (1,))


def check_solver(solver: str, options: Sequence[float], rng: Tensor | None) -> None:
    """Raise as the compiled backends do, for the backends that are not: see ``solvers/find.h``."""
    from ..solvers import REFERENCE

    if solver not in REFERENCE:
        raise ValueError(f"unknown solver {solver!r}; expected one of {', '.join(REFERENCE)}")
    expected = REFERENCE[solver]
    if len(options) != expected.num_options:
        raise ValueError(f"solver {solver!r} takes {expected.num_options} options, found {len(options)}")
    if rng is None and expected.needs_rng(options):
        raise ValueError(f"solver {solver!r} needs an rng state with these options")


def solve(
    solver: str,
    gram: Tensor,
    active: Tensor | None,
    rng: Tensor | None,
    options: Sequence[float],
    inputs: Tensor | None,
    certified: bool,
) -> tuple[Tensor, Tensor | None]:
    """Runs the PyTorch form of a solver on ``gram`` float64 ``[..., K, K]``, flattened to one batch dimension."""
    from ..solvers import REFERENCE

    check_solver(solver, options, rng)
    lead, num_tasks = gram.shape[:-2], gram.shape[-1]
    if active is None:
        active = torch.ones((), dtype=torch.bool, device=gram.device)
    active = active.expand(*lead, num_tasks).reshape(-1, num_tasks)
    if inputs is not None:
        inputs = inputs.expand(*lead, num_tasks).reshape(-1, num_tasks)
    weights, certificate = REFERENCE[solver].solve(
        gram.reshape(-1, num_tasks, num_tasks), active, rng, tuple(options), inputs
    )
    return weights.reshape(*lead, num_tasks), certificate.reshape(*lead, 2)


class ReferenceBackend:
    """The functions of this file behind the interface of a backend."""

    name = "reference"
    fused = False
    gram_into = staticmethod(gram_into)
    combine_into = staticmethod(combine_into)
    solve = staticmethod(solve)

    def missing(self) -> str | None:
        return None

    def refusal(self, device: torch.device) -> str | None:
        if device.type in _WITHOUT_FLOAT64:
            return f"it computes in float64, which {device.type} does not have; move them to the CPU with .cpu()"
        return None

    def automatic_on(self, device: torch.device) -> bool:
        return True
