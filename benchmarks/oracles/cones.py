"""UPGrad, DualProj, PCD and DCGD: nearest points of cones, found with the rows themselves."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import nnls

from mtl_kernels import dualproj_weights, pcd_weights, upgrad_weights
from mtl_optim import DCGD

from . import agrees
from .draw import draw_rows


def onto_dual_cone(rows: np.ndarray, pref: np.ndarray, reg: float) -> np.ndarray:
    """The v >= pref of least ||J'v||^2 + reg sum n^2 ||v||^2, by scipy's non-negative least squares.

    With A the rows, each longer by its own sqrt(reg sum n^2): y >= 0 that minimises ||A'(pref + y / n_A)||.
    """
    length = np.linalg.norm(rows)
    if length == 0:
        return pref
    wide = np.hstack([rows / length, np.sqrt(reg) * np.eye(len(rows))])
    norm = np.linalg.norm(wide, axis=1)
    there = np.linalg.norm(rows, axis=1) > 0
    unit = wide[there] / norm[there, None]
    sides = pref * norm
    y = np.zeros(len(rows))
    if sides.sum() > 0:
        y[there] = nnls(unit.T, -(wide.T @ pref) / sides.sum(), maxiter=1000 * len(rows))[0]
    return pref + np.divide(y * sides.sum(), norm, out=np.zeros_like(y), where=norm > 0)


def upgrad(rows: np.ndarray, pref: np.ndarray, reg: float) -> np.ndarray:
    """The sum of the projections of every pref_i g_i."""
    return sum((onto_dual_cone(rows, part, reg) for part in np.diag(pref)), np.zeros(len(rows)))


def pcd(rows: np.ndarray, scale: np.ndarray, tau: float) -> np.ndarray | None:
    """The direction d nearest to scale_1 g_1 that meets the others, from every set of equalities; None: there is none.

    Where a set is independent, d is a_1 and the combination of it that meets it with equality.
    """
    scaled = rows * scale[:, None]
    norm = np.linalg.norm(scaled, axis=1)
    if norm[0] == 0:
        return np.zeros(rows.shape[1])
    others = [j for j in range(1, len(rows)) if norm[j] > 0]
    best = None
    for size in range(len(others) + 1):
        for chosen in map(list, itertools.combinations(others, size)):
            unit = scaled[chosen] / norm[chosen, None]
            d = scaled[0].copy()
            if size:
                base, triangle = np.linalg.qr(unit.T)
                if size > rows.shape[1] or np.abs(np.diag(triangle)).min() < 1e-7:
                    continue
                d = d - base @ (base.T @ d) + base @ np.linalg.solve(triangle.T, tau * norm[chosen])
                y = np.linalg.solve(triangle, base.T @ (d - scaled[0]))
                if y.min() < -1e-9 * np.abs(y).max():
                    continue
            rounding = 1e-11 * (np.linalg.norm(d) + norm.max())
            if all(scaled[j] @ d / norm[j] >= tau * norm[j] - rounding for j in others):
                if best is None or np.linalg.norm(d - scaled[0]) < np.linalg.norm(best - scaled[0]):
                    best = d
    if best is None:
        return None
    length = np.linalg.norm(best)
    if length <= 1e-7 * norm[0]:
        return np.zeros_like(best)
    return best * np.linalg.norm(rows[0]) / length


def dcgd(rows: np.ndarray, variant: str, inside: bool) -> np.ndarray:
    """Hwang & Lim 2024, on the vectors; ``inside``: whether their sum is in the dual cone."""
    first, second = rows
    total = first + second
    if not first.any() or not second.any():
        return total
    if variant == "center":
        bisector = first / np.linalg.norm(first) + second / np.linalg.norm(second)
        square = bisector @ bisector
        return total @ bisector / square * bisector if square > 1e-24 else 0 * total
    if inside:
        return total
    planes = [total - total @ row / (row @ row) * row for row in rows]
    return (planes[0] + planes[1]) / 2 if variant == "average" else planes[int((rows @ total).argmin())]


def _draw_preference(generator: np.random.Generator, num_tasks: int) -> np.ndarray:
    if generator.random() < 0.5:
        return np.full(num_tasks, 1 / num_tasks)
    pref = generator.random(num_tasks) * (generator.random(num_tasks) < 0.8)
    return pref if pref.any() else np.ones(num_tasks)


def _apart(rows: np.ndarray, pref: np.ndarray, reg: float, found: np.ndarray, expected: np.ndarray) -> float:
    """How far the weights are apart in units of the norms, relative to those of pref, whose size G + reg tr G gives."""
    norm = np.sqrt((rows**2).sum(1) + reg * (rows**2).sum())
    scale = float(pref @ norm)
    return float(np.abs((found - expected) * norm).max()) / scale if scale > 0 else float(np.abs(found - pref).max())


@agrees("upgrad", oracle="scipy.optimize.nnls on rows", tolerance=1e-10)
def upgrad_deviation(generator: np.random.Generator) -> float:
    """Of the weights in units of the norms."""
    rows, reg = draw_rows(generator), float(10.0 ** generator.integers(-4, 1))
    pref = _draw_preference(generator, len(rows))
    found = upgrad_weights(torch.from_numpy(rows @ rows.T), pref=torch.from_numpy(pref), reg=reg).weights.numpy()
    return _apart(rows, pref, reg, found, upgrad(rows, pref, reg))


@agrees("dualproj", oracle="scipy.optimize.nnls on rows", tolerance=1e-10)
def dualproj_deviation(generator: np.random.Generator) -> float:
    """Of the weights in units of the norms."""
    rows, reg = draw_rows(generator), float(10.0 ** generator.integers(-4, 1))
    pref = _draw_preference(generator, len(rows))
    found = dualproj_weights(torch.from_numpy(rows @ rows.T), pref=torch.from_numpy(pref), reg=reg).weights.numpy()
    return _apart(rows, pref, reg, found, onto_dual_cone(rows, pref, reg))


WELL_POSED = ("plain", "low_rank", "duplicate", "anti_parallel", "zero_rows", "conflicting", "spread")


@agrees("pcd", oracle="every set of equalities, on rows", tolerance=1e-10)
def pcd_deviation(generator: np.random.Generator) -> float:
    """Of the direction d, from no state, with which all a_k are unit rows, or from any.

    Relative to (sum w n)^2 / ||d||: that many times its own rounding is what the rounding of G does to d.
    """
    rows = draw_rows(generator, max_tasks=6, kinds=WELL_POSED)
    num_tasks, square = len(rows), (rows**2).sum(1)
    tau = float(generator.choice([0.0, 0.02, 0.5]))
    before = np.zeros(2 * num_tasks)
    if generator.random() < 0.5:
        before = np.concatenate([square * 10.0 ** generator.uniform(-1, 1, num_tasks), np.full(num_tasks, 3.0)])
    averages = 0.9 * before[:num_tasks] + 0.1 * square
    scale = 1 / np.sqrt(averages / (1 - 0.9 ** (before[num_tasks:] + 1)) + 1e-8)
    gram = torch.from_numpy(rows @ rows.T)
    found = pcd_weights(gram, state=torch.from_numpy(before), tau=tau, beta=0.9, eps=1e-8).weights.numpy()
    expected = pcd(rows, scale, tau)
    length = np.linalg.norm(rows[0])
    if length == 0:
        return float(np.abs(found).max())
    off = np.linalg.norm(rows.T @ found - (rows[0] if expected is None else expected))
    return float(off * length / max(length, found @ np.sqrt(square)) ** 2)


@agrees("dcgd", oracle="vectors", tolerance=1e-11)
def dcgd_deviation(generator: np.random.Generator) -> float:
    """Of the direction, relative to the weighted rows; a sum on the edge of the cone may be in it or not."""
    rows = draw_rows(generator, min_tasks=2, max_tasks=2)
    variant = ("center", "average", "projection")[int(generator.integers(3))]
    found = DCGD(variant).weights(torch.from_numpy(rows @ rows.T)).numpy()
    norm, least = np.linalg.norm(rows, axis=1), float((rows @ rows.sum(0)).min())
    edge = 1e-14 * norm.sum() ** 2
    sides = [side for side in (True, False) if (least >= -edge if side else least < edge)]
    off = min(float(np.linalg.norm(rows.T @ found - dcgd(rows, variant, side))) for side in sides)
    return off / (found @ norm) if found @ norm > 0 else off
