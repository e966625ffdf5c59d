"""Nash-MTL and FairGrad."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls

from mtl_kernels import Solution, fairgrad_weights, nash_mtl_weights

from . import agrees
from .draw import KINDS, draw_rows

_ALIKE = tuple(kind for kind in KINDS if kind != "spread")


def fairest_step(rows: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """The d that maximizes sum_k (g_k . d)^(1-alpha) / (1-alpha) - |d|^2 / 2 over all g_k . d > 0, on the rows alone.

    Newton's method in d, from the point of least norm in the hull of the unit rows, where every g_k . d > 0. Also
    returns how long that point is; where next to nothing, there is no such d.
    """
    length = np.linalg.norm(rows, axis=1)
    unit, size = rows / length[:, None], length.max()
    share, _ = nnls(np.vstack([unit.T, np.ones(len(rows))]), np.append(np.zeros(rows.shape[1]), 1.0))
    d = unit.T @ share / share.sum()
    least = float(np.linalg.norm(d))
    if least < 1e-9:
        return d, least
    rows = rows / size

    def utility(progress: np.ndarray) -> float:
        return float(np.sum(np.log(progress) if alpha == 1 else progress ** (1 - alpha) / (1 - alpha)))

    best, z = -np.inf, rows @ d
    for grown in np.geomspace(1e-4, 1e8, 50):  # a start of about the right length
        value = utility(grown * z) - grown**2 * (d @ d) / 2
        if value > best:
            best, scale = value, grown
    d = scale * d
    for _ in range(300):
        z = rows @ d
        gradient = rows.T @ z**-alpha - d
        curvature = np.eye(len(d)) + (rows.T * (alpha * z ** (-alpha - 1))) @ rows
        step = np.linalg.solve(curvature, gradient)
        part = 1.0
        while True:  # halved until all progress is positive and the slope has not turned downwards by much
            there = d + part * step
            z = rows @ there
            if (z > 0).all() and (rows.T @ z**-alpha - there) @ step >= -0.25 * (gradient @ step):
                break
            part /= 2
        d = d + part * step
        if np.abs(step).max() <= 1e-15 * np.abs(d).max():
            break
    return d * size ** ((1 - alpha) / (1 + alpha)), least


def off_by(rows: np.ndarray, alpha: float, found: Solution) -> float:
    """|J'w - d| / |d|, times the square of what unit rows leave at least: the rounding of G is amplified by as much."""
    d, least = fairest_step(rows, alpha)
    if found.gap is None or (found.gap == 1) != (least < 2e-7):
        return 0.0 if 1e-9 < least < 1e-6 else np.inf
    return 0.0 if found.gap == 1 else float(np.linalg.norm(rows.T @ found.weights.numpy() - d)) / _length(d) * least**2


def _length(d: np.ndarray) -> float:
    return float(np.linalg.norm(d))


@agrees("nashmtl", oracle="largest sum of log(g_k . d), Newton on the rows", tolerance=1e-13)
def nash_mtl(generator: np.random.Generator) -> float:
    """How far the direction is off; with a zero row, how far the weights are from the last ones."""
    rows = draw_rows(generator)
    last = torch.from_numpy(generator.random(len(rows)))
    found = nash_mtl_weights(torch.from_numpy(rows @ rows.T), max_norm=0.0, last=last)
    if not rows.any(axis=1).all():
        return float((found.weights - last).abs().max())
    return off_by(rows, 1.0, found)


@agrees("fairgrad", oracle="largest alpha-fair utility, Newton on the rows", tolerance=1e-12)
def fairgrad(generator: np.random.Generator) -> float:
    """How far the direction of the rows that are not zero is off, and what zero rows weigh."""
    rows = draw_rows(generator, kinds=_ALIKE)
    alpha = float(generator.choice([0.5, 1.0, 2.0, 5.0]))
    found = fairgrad_weights(torch.from_numpy(rows @ rows.T), alpha=alpha)
    there = rows.any(axis=1)
    if found.weights.numpy()[~there].any() or not there.any():
        return float(found.weights.abs().max())
    return off_by(rows[there], alpha, found._replace(weights=found.weights[torch.from_numpy(there)]))
