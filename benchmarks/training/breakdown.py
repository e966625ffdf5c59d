"""Where the time of a combination goes: the kernels by themselves, on the rows of a batch."""

from __future__ import annotations

from typing import Any

import torch

import mtl_kernels

from .. import timing
from ..workloads.workload import Workload
from .jobs import Recipe
from .steppers import shared_of

_EFFORT = timing.Effort(repeats=7, min_repeats=3, min_time=2e-4, case_time=0.03)


def parts(workload: Workload, recipe: Recipe) -> dict[str, Any]:
    """Columns: how many parameters are shared and in how many tensors, and milliseconds of gram, solve and combine.

    What a combination takes beyond these three is bookkeeping in Python: which parameters are shared, tables of their
    rows, the report. No times where nothing is shared, or the method goes by more than a Gram matrix.
    """
    shared, _, objective = shared_of(workload, workload.batch(0))
    found: dict[str, Any] = {"shared": sum(p.numel() for p in shared), "shared_tensors": len(shared)}
    method = recipe.method.bound_to(tuple(objective.losses))
    if not shared or method.needs_losses or not method.weighs_rows or method.num_batches > 1:
        return found
    rows = [
        list(torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True))
        for loss in objective.losses.values()
    ]
    gram = mtl_kernels.gram(rows)
    weights = method.solve(gram).weights
    timed = {
        "gram": lambda: mtl_kernels.gram(rows),
        "solve": lambda: method.solve(gram),
        "combine": lambda: mtl_kernels.combine(rows, weights),
    }
    return found | {f"{name}_ms": 1e3 * t.median for name, t in timing.measure(timed, _EFFORT).items()}
