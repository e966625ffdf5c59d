"""What the kernels are compared with: torch itself, the published loops, and TorchJD where it is installed.

Everything here is written from the papers or calls a library's public functions.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks


def pcgrad_loop(rows: Tensor) -> Tensor:
    """PCGrad on the gradients themselves, as the single-file codes run it (Yu et al. 2020, Algorithm 1)."""
    total = torch.zeros_like(rows[0])
    for i, order in enumerate(draw_orders(rows.shape[0])):
        projected = rows[i].clone()
        for j in order:
            if j == i:
                continue
            product = torch.dot(projected, rows[j])
            if product < 0:
                projected -= product / rows[j].norm() ** 2 * rows[j]
        total += projected
    return total


def pcgrad_loop_error(rows: Tensor) -> float:
    """The loop's direction against the definition on coefficients, for the orders that it draws."""
    random.seed(1)
    orders = draw_orders(rows.shape[0])
    random.seed(1)
    found = pcgrad_loop(rows)
    return checks.direction_error(found, rows, checks.pcgrad_weights(checks.exact_gram(rows), orders))


def torchjd_step_error(aggregator: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """The direction of TorchJD's PCGrad against the definition, for the orders that it draws from torch's generator."""
    torch.manual_seed(1)
    orders = [torch.randperm(rows.shape[0]).tolist() for _ in range(rows.shape[0])]
    torch.manual_seed(1)
    found = aggregator(rows)
    return checks.direction_error(found, rows, checks.pcgrad_weights(checks.exact_gram(rows), orders))


def draw_orders(num_tasks: int) -> list[list[int]]:
    """For every task the order in which it meets the tasks, from Python's generator."""
    return [random.sample(range(num_tasks), num_tasks) for _ in range(num_tasks)]


def frank_wolfe_loop(gram: Tensor, max_iters: int = 250, tol: float = 1e-5) -> Tensor:
    """Min-norm weights as the public MGDA codes find them (Sener & Koltun 2018, Algorithm 2), in torch."""
    num_tasks = gram.shape[0]
    weights = torch.full((num_tasks,), 1 / num_tasks, dtype=gram.dtype, device=gram.device)
    for _ in range(max_iters):
        product = gram @ weights
        t = int(torch.argmin(product))
        v1v1, v1v2, v2v2 = weights @ product, product[t], gram[t, t]
        if v1v2 >= v2v2:
            step = 1.0
        elif v1v2 >= v1v1:
            break
        else:
            step = float((v1v1 - v1v2) / (v1v1 + v2v2 - 2 * v1v2))
        weights = (1 - step) * weights
        weights[t] += step
        if step < tol:
            break
    return weights


def torchjd(kernel: str) -> Callable[[Tensor], Tensor] | None:
    """TorchJD's counterpart: on a Gram matrix for a solver, on the rows for a step; None if not installed."""
    try:
        from torchjd import aggregation  # type: ignore[import-not-found]
    except ImportError:
        return None
    aggregator = {"pcgrad": "PCGrad", "min_norm": "MGDA", "pcgrad_step": "PCGrad", "mgda_step": "MGDA"}[kernel]
    whole = getattr(aggregation, aggregator)()
    if kernel.endswith("_step"):
        return lambda rows: whole(rows)
    named = getattr(aggregation, f"{aggregator}Weighting", None)
    weighting = named() if named is not None else getattr(whole, "gramian_weighting", None)
    return None if weighting is None else lambda gram: weighting(gram)
