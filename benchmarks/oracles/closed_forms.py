"""Methods in closed form, on the rows themselves: Krum, random weights, unit rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from mtl_kernels import random_weights, rng_state
from mtl_optim import MGDA, GradNormBalance, Krum, Normalized

from . import agrees
from .convex import min_norm
from .draw import draw_rows
from .projections import philox4x32_10


@agrees("krum", oracle="distances of vectors", tolerance=1e-12)
def krum(generator: np.random.Generator) -> float:
    """By how much the scores of the selected rows are above the lowest ones, relative to the longest row."""
    rows = draw_rows(generator, min_tasks=3, max_tasks=12)
    num_tasks = len(rows)
    n_byzantine = int(generator.integers(0, num_tasks - 2))
    n_selected = int(generator.integers(1, num_tasks + 1))
    found = Krum(n_byzantine, n_selected).weights(torch.from_numpy(rows @ rows.T)).numpy()
    distances = np.square(rows[:, None] - rows[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, 1)[:, : num_tasks - n_byzantine - 2].sum(1)
    if (found > 0).sum() != n_selected or np.abs(found[found > 0] * n_selected - 1).max() > 1e-15:
        return math.inf
    square = np.square(rows).sum(1).max()
    return float((scores[found > 0].sum() - np.sort(scores)[:n_selected].sum()) / square) if square > 0 else 0.0


@agrees("randomweights", oracle="Philox in integers, and its logarithms", tolerance=1e-13)
def random(generator: np.random.Generator) -> float:
    """The largest difference of a weight, relative to it."""
    num_tasks, problem = int(generator.integers(1, 129)), int(generator.integers(3))
    seed, step = (int(word) for word in generator.integers(2**63, size=2))
    rng = rng_state(seed, step)
    found = random_weights(torch.eye(num_tasks).expand(3, -1, -1), rng=rng)[problem].numpy()
    shares = []
    for task in range(num_tasks):
        counter = [step & 0xFFFFFFFF, step >> 32, problem, 4096 + task]
        words = [word >> 6 for word in philox4x32_10(counter, [seed & 0xFFFFFFFF, seed >> 32])]
        u, v = ((words[n] * 2**26 + words[n + 1] + 0.5) / 2**52 for n in (0, 2))
        shares.append(math.exp(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)))
    expected = np.array(shares) / math.fsum(shares)
    return float(np.abs(found / expected - 1).max())


@agrees("gradnormbalance", oracle="unit vectors, added", tolerance=1e-13)
def balance(generator: np.random.Generator) -> float:
    """How far the sums of the unit rows are apart, per task."""
    rows = draw_rows(generator)
    weights = GradNormBalance().weights(torch.from_numpy(rows @ rows.T)).numpy()
    return float(np.linalg.norm(rows.T @ weights - _unit(rows).sum(0))) / len(rows)


@agrees("normalized", oracle="MGDA by scipy's nnls on unit rows", tolerance=1e-12)
def normalized(generator: np.random.Generator) -> float:
    """By how much the square of the direction is above the least."""
    rows = draw_rows(generator)
    weights = Normalized(MGDA()).weights(torch.from_numpy(rows @ rows.T)).numpy()
    unit = _unit(rows)
    least = np.square(unit.T @ min_norm(unit)).sum()
    return float(np.square(rows.T @ weights).sum() - least)


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
