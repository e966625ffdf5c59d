"""MGDA."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls

from mtl_kernels import min_norm_weights

from . import agrees
from .draw import draw_rows


def min_norm(rows: np.ndarray) -> np.ndarray:
    """Simplex weights of the least-norm combination, by scipy's non-negative least squares on unit rows.

    With U the unit rows and a_k = min n / n_k: u >= 0 that minimises |U'u|^2 + (a'u - 1)^2, then w ~ a u.
    """
    length = np.linalg.norm(rows, axis=1)
    if length.min() == 0:
        return np.eye(len(rows))[length.argmin()]
    a = length.min() / length
    system = np.vstack([(rows / length[:, None]).T, a])
    solution, _ = nnls(system, np.append(np.zeros(rows.shape[1]), 1.0), maxiter=100 * len(rows))
    weights = solution * a
    return weights / weights.sum()


@agrees("mgda", oracle="scipy.optimize.nnls on unit rows", tolerance=1e-13)
def mgda(generator: np.random.Generator) -> float:
    """By how much |J'w|^2 is above the oracle's, relative to the shortest row; with a zero row, what others weigh."""
    rows = draw_rows(generator)
    length = np.linalg.norm(rows, axis=1)
    found = min_norm_weights(torch.from_numpy(rows @ rows.T)).weights.numpy()
    if length.min() == 0:
        return float(found[length > 0].sum())
    square, least = (float(np.square(rows.T @ weights).sum()) for weights in (found, min_norm(rows)))
    return (square - least) / length.min() ** 2
