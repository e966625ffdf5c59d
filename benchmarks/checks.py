"""Whether a result is right: its error against float64, and the most that is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import mtl_kernels as mk
from mtl_kernels.rng import order_keys

SAMPLE = 4096

# Ours must keep the contract of the kernels; others what their arithmetic can be expected to give.
_LOOSE_GRAM = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 5e-3}

_BLOCK_BYTES = 1 << 30
_SPLITS = 64


def exact_gram(rows: Tensor) -> Tensor:
    """The Gram matrix of dense rows in float64 on their device, as a batch of short products: one long one is slow."""
    num_tasks, num_columns = rows.shape
    total = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=rows.device)
    step = max(_SPLITS, _BLOCK_BYTES // (8 * num_tasks) // _SPLITS * _SPLITS)
    for begin in range(0, num_columns, step):
        block = rows[:, begin : begin + step].double()
        whole = block.shape[1] // _SPLITS * _SPLITS
        pieces = block[:, :whole].reshape(num_tasks, _SPLITS, -1).transpose(0, 1)
        total += (pieces @ pieces.mT).sum(0) + block[:, whole:] @ block[:, whole:].T
    return (total + total.T) / 2


def gram_error(found: Tensor, exact: Tensor) -> float:
    """The largest error of an entry relative to the lengths of its two rows."""
    length = mk.norms(exact)
    return float(((found.double() - exact).abs() / (length[:, None] * length[None, :])).max())


def gram_limit(provider_is_ours: bool, num_tasks: int, dtype: torch.dtype) -> float:
    """1e-7 K for our Gram of rows that are not float64."""
    if provider_is_ours:
        return 1e-14 * num_tasks if dtype is torch.float64 else 1e-7 * num_tasks
    return _LOOSE_GRAM[dtype]


def combine_error(found: Tensor, rows: Tensor, weights: Tensor) -> float:
    """The largest error of an element relative to the sum of its terms' sizes, over a sample of columns."""
    columns = sample(rows.shape[1]).to(rows.device)
    terms = rows[:, columns].double() * weights.double()[:, None]
    return float(((found[columns].double() - terms.sum(0)).abs() / terms.abs().sum(0)).max())


def combine_limit(provider_is_ours: bool, num_tasks: int, dtype: torch.dtype) -> float:
    """One rounding for ours, one a task for others."""
    return torch.finfo(dtype).eps * (0.51 if provider_is_ours else 1 + math.sqrt(num_tasks))


def sample(num_columns: int) -> Tensor:
    """The first and the last columns and some between, the same ones every time."""
    if num_columns <= SAMPLE:
        return torch.arange(num_columns)
    generator = torch.Generator().manual_seed(num_columns)
    edge = torch.arange(64)
    between = torch.randint(num_columns, (SAMPLE - 128,), generator=generator)
    return torch.cat([edge, between, num_columns - 1 - edge])


def pcgrad_weights(gram: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad's weights in float64 for given orders, by its definition on coefficients."""
    matrix = gram.double().cpu().numpy()
    total = np.zeros(len(matrix))
    for i, order in enumerate(orders):
        coefficients = np.zeros_like(total)
        coefficients[i] = 1
        for j in order:
            product = matrix[j] @ coefficients
            if j != i and product < 0:
                coefficients[j] -= product / matrix[j, j]
        total += coefficients
    return torch.from_numpy(total)


def our_orders(rng: Tensor, num_tasks: int, problem: int = 0) -> list[list[int]]:
    """The orders that `mtl_kernels.pcgrad_weights` takes from a state for one problem of a batch."""
    return order_keys(rng, problem, num_tasks).cpu().argsort(dim=-1).tolist()


def weights_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest weight."""
    expected = expected.to(found.device)
    return float((found.double() - expected).abs().max() / expected.abs().max())


def direction_error(found: Tensor, rows: Tensor, weights: Tensor) -> float:
    """The distance from J^T w relative to the length of J^T w, over a sample of columns."""
    columns = sample(rows.shape[1]).to(rows.device)
    expected = weights.to(rows.device) @ rows[:, columns].double()
    return float((found[columns].double() - expected).norm() / expected.norm())


def min_norm_weights(gram: Tensor) -> tuple[Tensor, float]:
    """Weights of the least w'Gw, found on the CPU, and a value that none goes below, which the weights prove.

    No point of the simplex is more than 2 (w'Gw - min_k (Gw)_k) below w'Gw: the solver need not be trusted.
    """
    gram = gram.double().cpu()
    weights = mk.min_norm_weights(gram).weights
    product = gram @ weights
    return weights, float(2 * product.min() - weights @ product)


def min_norm_error(found: Tensor, gram: Tensor) -> float:
    """How far w'Gw may be from the least value, relative to the smallest G_jj; inf off the simplex."""
    found, gram = found.double().cpu(), gram.double().cpu()
    if not (found.min() >= -1e-6 and abs(float(found.sum()) - 1) <= 1e-4):  # so that NaN is off it too
        return math.inf
    return max(0.0, float(found @ gram @ found) - min_norm_weights(gram)[1]) / float(gram.diagonal().min())
