"""CAGrad, by trying every set of tasks that may hold the weight."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch

from mtl_kernels import cagrad_weights

from . import agrees
from .draw import draw_rows

EPSILON = np.finfo(np.float64).eps


def cagrad(rows: np.ndarray, c: float) -> tuple[float, np.ndarray]:
    """The least of F(w) = g_w'g0 + c |g0| |g_w| over the simplex, g_w = J'w, and a w where it is. For a few rows.

    Where the weight is on the rows S alone, and g_w not 0, z = c |g0| g_w / |g_w| has g_i'(g0 + z) = t for all i in S,
    lies in their span and is c |g0| long. So z = t z1 - z0 by least squares, and t is a root of a quadratic equation.
    Every w >= 0 found bounds the least F from above, and the right S is among them; so is the shortest g_w, for which F
    may be 0.
    """
    mean = rows.mean(axis=0)
    length = np.linalg.norm(rows, axis=1)
    reach = c * np.linalg.norm(mean)

    def value(w: np.ndarray) -> float:
        return float(rows.T @ w @ mean + reach * np.linalg.norm(rows.T @ w))

    found = [*np.eye(len(rows))]
    for size in range(2, len(rows) + 1):
        for support in map(list, combinations(np.flatnonzero(length).tolist(), size)):
            unit = rows[support] / length[support, None]
            inverse = np.linalg.pinv(unit, rcond=1e-14)
            z1, z0 = inverse @ (length.max() / length[support]), inverse @ unit @ mean
            cancelling = np.linalg.svd(unit.T)[2][-1]
            candidates = [inverse.T @ z for z in (z1, *_on_sphere(z1, z0, reach))]
            for v in (*candidates, cancelling, -cancelling):
                w = np.zeros(len(rows))
                w[support] = np.clip(v, 0, None) / length[support]
                if w.any():
                    found.append(w / w.sum())
    values = [value(w) for w in found]
    return min(values), found[int(np.argmin(values))]


def _on_sphere(z1: np.ndarray, z0: np.ndarray, radius: float) -> list[np.ndarray]:
    """The t z1 - z0 of this length."""
    square = z1 @ z1
    if not square > 0:
        return []
    middle = z1 @ z0 / square
    left = radius**2 - np.square(z0 - middle * z1).sum()
    return [] if left < 0 else [(middle + sign * np.sqrt(left / square)) * z1 - z0 for sign in (1, -1)]


def told(rows: np.ndarray, weights: np.ndarray) -> float:
    """What a Gram matrix rounded to eps tells of the direction of J'w_in, and of g0: eps divided by this.

    The square of the share of their lengths that cancellation leaves of both.
    """
    length = np.linalg.norm(rows, axis=1)
    w = np.clip(weights - 1 / len(rows), 0, None)
    left = np.linalg.norm(rows.T @ w) / (w @ length) * np.linalg.norm(rows.mean(axis=0)) / length.mean()
    return float(left) ** 2


@agrees("cagrad", oracle="every support, by least squares on rows", tolerance=1e-13)
def cagrad_deviation(generator: np.random.Generator) -> float:
    """How far min_i g_i'd is below the least F, or d - g0 from its length, as a share of what a Gram matrix tells.

    Relative to c |g0|, and to its product with the longest row. Where the weights are 0, F may be above 0 by what
    rounding leaves of a J'w that is 0, and not below.
    """
    rows = draw_rows(generator, max_tasks=5)
    c = float(generator.choice([0.01, 0.1, 0.4, 0.7, 0.95, 1.5, 4.0]))
    weights = cagrad_weights(torch.from_numpy(rows @ rows.T), c=c).weights.numpy()
    mean, length = rows.mean(axis=0), np.linalg.norm(rows, axis=1)
    reach = c * float(np.linalg.norm(mean))
    d = rows.T @ weights
    if np.linalg.norm(mean) <= 1e-7 * length.mean():  # is rounding, or nearly, and so is d
        return float(np.linalg.norm(d) > 1e-6 * (1 + c) * length.mean())
    least, w_in = cagrad(rows, c)
    if not weights.any():
        above = least / (reach * (w_in @ length)) if least > 0 else 0.0
        return float(max(above**2, -least / (reach * length.max())))
    short = (least - (rows @ d).min()) / (reach * length.max())
    off = abs(np.linalg.norm(d - mean) / reach - 1)
    return max(short, off) * told(rows, weights)
