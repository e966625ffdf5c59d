"""Independent float64 implementations to hold the solvers against: on rows, not on Gram matrices."""

import numpy as np
from scipy.optimize import nnls

WORD = 0xFFFFFFFF


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. (2011) in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def pcgrad_order(seed: int, step: int, problem: int, task: int, num_tasks: int) -> list[int]:
    """The order in which a task meets the others: ascending (word & ~127) | j."""
    keys = {}
    for j in range(num_tasks):
        counter = [step & WORD, step >> 32 & WORD, problem, task * 32 + j // 4]
        keys[j] = philox4x32_10(counter, [seed & WORD, seed >> 32 & WORD])[j % 4] & ~127 | j
    return [j for j in sorted(keys, key=keys.__getitem__) if j != task]


def pcgrad_direction(rows: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """PCGrad by its definition (arXiv 2001.06782, Algorithm 1): explicit projections of vectors, summed."""
    total = np.zeros(rows.shape[1])
    for i, order in enumerate(orders):
        projected = rows[i].copy()
        for j in order:
            product, square = projected @ rows[j], rows[j] @ rows[j]
            if product < 0 and square > 0:
                projected -= product / square * rows[j]
        total += projected
    return total


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
