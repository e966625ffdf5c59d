"""PCGrad and GradVac by definition: on vectors, in an order drawn by a Philox in Python integers."""

from __future__ import annotations

import numpy as np
import torch

from mtl_kernels import gradvac_weights, pcgrad_weights, rng_state

from . import agrees
from .draw import draw_rows

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


@agrees("pcgrad", oracle="projections of vectors", tolerance=1e-12)
def pcgrad(generator: np.random.Generator) -> float:
    """How far the directions are apart, relative to the lengths of the weighted rows."""
    rows = draw_rows(generator)
    seed, step = (int(n) for n in generator.integers(2**40, size=2))
    weights = pcgrad_weights(torch.from_numpy(rows @ rows.T), rng=rng_state(seed, step)).numpy()
    orders = [pcgrad_order(seed, step, 0, i, len(rows)) for i in range(len(rows))]
    scale = np.abs(weights) @ np.linalg.norm(rows, axis=1)
    off = np.linalg.norm(rows.T @ weights - pcgrad_direction(rows, orders))
    return float(off / scale) if scale > 0 else float(off)


def gradvac_step(
    rows: np.ndarray, orders: list[list[int]], targets: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """GradVac by its definition (arXiv 2010.05874, Algorithm 1): direction, new targets, what rounding leaves.

    The last: a cosine of a vector that is a sum of much longer ones is known from a Gram matrix to the square of its
    share, and near r = 1 every 1 - r^2 makes more of what is unknown.
    """
    total, targets, left = np.zeros(rows.shape[1]), targets.copy(), 1.0
    for i, order in enumerate(orders):
        g = rows[i].copy()
        longest, steep = np.linalg.norm(g), 1.0
        for j in order:
            length, other = np.linalg.norm(g), np.linalg.norm(rows[j])
            if other == 0 or length**2 <= 4 * len(rows) * np.finfo(float).eps * longest**2:
                continue
            cosine = np.clip(g / length @ (rows[j] / other), -1, 1)
            target = targets[i, j]
            targets[i, j] = (1 - beta) * target + beta * cosine
            left = min(left, steep * (length / longest) ** 2)
            if cosine < target <= 1 - 16 * np.finfo(float).eps:
                own, wanted = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
                more = length * (target * own - cosine * wanted) / (other * wanted)
                g += more * rows[j]
                longest += abs(more) * other
                steep *= 1 - target**2
        left = min(left, steep * (np.linalg.norm(g) / longest) ** 2) if longest > 0 else left
        total += g
    return total, targets, left


@agrees("gradvac", oracle="Algorithm 1 on vectors", tolerance=1e-14)
def gradvac(generator: np.random.Generator) -> float:
    """How far directions, relative to the weighted rows, and targets are apart over three steps, times what is left."""
    first = draw_rows(generator, max_exponent=6)
    seed, step = (int(n) for n in generator.integers(2**40, size=2))
    beta = float(generator.choice([0.0, 0.01, 0.5, 1.0]))
    targets = generator.uniform(-1, 1, (len(first), len(first)))
    state, left, off = torch.from_numpy(targets.copy()), 1.0, 0.0
    for later in range(3):
        rows = first + later * 0.3 * np.abs(first).max() * generator.standard_normal(first.shape)
        rng = rng_state(seed, step + later)
        weights = gradvac_weights(torch.from_numpy(rows @ rows.T), state=state, beta=beta, rng=rng).numpy()
        orders = [pcgrad_order(seed, step + later, 0, i, len(rows)) for i in range(len(rows))]
        expected, targets, now = gradvac_step(rows, orders, targets, beta)
        left *= now
        scale = np.abs(weights) @ np.linalg.norm(rows, axis=1)
        apart = np.linalg.norm(rows.T @ weights - expected) / scale if scale > 0 else 0.0
        off = max(off, left * max(apart, np.abs(state.numpy() - targets).max()))
    return off
