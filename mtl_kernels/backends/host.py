"""Solves of a GPU's Gram matrices on the host, for backends that have no kernel for a solver."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import SolverCall
from ..definitions import solving
from ..uploads import capturing
from .cpu import CpuBackend


def refuse_capture(device: torch.device, solver: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured on the device: the host would have to wait for it."""
    if capturing(device):
        raise RuntimeError(
            f"solver {solver!r} would run on the host while a CUDA graph is captured, which cannot be replayed; use "
            "the compiled backend cuda, whose solvers run on the device"
        )


def solve(call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
    """`Backend.solve` by the compiled solver of the CPU, or the definition where that is missing: one wait.

    Raises:
        RuntimeError: while a CUDA graph is captured.
    """
    refuse_capture(gram.device, call.solver)
    compiled = CpuBackend()
    run = solving.solve if compiled.missing() else compiled.solve
    there = {name: value.cpu() for name in ("active", "rng", "inputs") if (value := getattr(call, name)) is not None}
    state = None if call.state is None else call.state.to("cpu", copy=True)
    weights, certificate = run(call._replace(**there, state=state), gram.cpu())
    if call.state is not None and state is not None:
        call.state.copy_(state)
    return weights.to(gram.device), None if certificate is None else certificate.to(gram.device)
