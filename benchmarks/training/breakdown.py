"""What a call of ``backward`` takes over its passes, and where that goes: the kernels by themselves, on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import mtl_kernels
from mtl_kernels import RowTable
from mtl_optim import MultiTaskOptimizer
from mtl_optim.capture.grads import take_grads

from .. import timing
from ..workloads.workload import Workload
from .jobs import Recipe
from .steppers import shared_of

_EFFORT = timing.Effort(repeats=7, min_repeats=3, min_time=2e-4, case_time=0.03)
_CALLS = timing.Effort(repeats=41, min_repeats=5, min_time=2e-3, case_time=0.1)


def calls(optimizer: MultiTaskOptimizer, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Columns: milliseconds of K backward passes that keep their gradients, and of ``backward``, over one graph.

    In turn, so that both meet the same machine; every ``.grad`` is None before a pass.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def passes() -> list[list[Tensor | None]]:
        rows = []
        for loss in losses.values():
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            rows.append(take_grads(params))
        return rows

    def whole() -> list[Tensor | None]:
        optimizer.backward(losses, retain_graph=True)
        return take_grads(params)

    took = timing.measure({"raw_passes_ms": passes, "whole_ms": whole}, _CALLS)
    optimizer.zero_grad()
    return {name: 1e3 * t.median for name, t in took.items()}


def parts(workload: Workload, recipe: Recipe, optimizer: MultiTaskOptimizer) -> dict[str, Any]:
    """Columns: how many parameters are shared and in how many tensors, `calls`, and milliseconds of the kernels.

    What `calls` differ by beyond gram, solve and combine is bookkeeping in Python: which parameters are shared, whether
    their gradients lie apart, tables of rows, the report. No times of kernels where nothing is shared, or the method
    goes by more than a Gram matrix.
    """
    shared, _, objective = shared_of(workload, workload.batch(0))
    found: dict[str, Any] = {"shared": sum(p.numel() for p in shared), "shared_tensors": len(shared)}
    if recipe.method.num_batches == 1:
        found |= calls(optimizer, objective.losses)
    method = recipe.method.bound_to(tuple(objective.losses))
    if not shared or method.needs_losses or not method.weighs_rows or method.num_batches > 1:
        return found
    losses = objective.losses.values()
    rows = RowTable([torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses])
    gram = mtl_kernels.gram(rows)
    weights = method.solve(gram).weights
    timed = {
        "gram": lambda: mtl_kernels.gram(rows),
        "solve": lambda: method.solve(gram),
        "combine": lambda: mtl_kernels.combine(rows, weights),
    }
    return found | {f"{name}_ms": 1e3 * t.median for name, t in timing.measure(timed, _EFFORT).items()}
