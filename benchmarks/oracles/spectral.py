"""AlignedMTL, ConFIG and IMTL-G from singular value decompositions of the rows themselves.

Deviations are in units of what the rounding of G does to the answer: a rounding for every unit of the condition of G
on the space that counts, and more where an answer is the difference of large numbers. All three methods jump where an
eigenvalue passes their cut, and where b or sum a passes zero: cases close to that are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from mtl_kernels import aligned_mtl_weights, config_weights, imtl_g_weights

from . import agrees
from .draw import draw_rows

EPSILON = float(np.finfo(np.float64).eps)
CLOSE = 100.0
SCALES: dict[str, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "median": lambda squares: float(np.sort(squares)[(len(squares) - 1) // 2]),
    "rmse": np.mean,
}
MEANS: dict[str, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "max": np.max,
    "harmonic": lambda n: len(n) / float((1 / n).sum()),
    "arithmetic": np.mean,
    "geometric": lambda n: float(np.exp(np.log(n).mean())),
}


class Decomposition(NamedTuple):
    """J = left sqrt(squares) right' without the squares that count as zero.

    Attributes:
        left: ``[K, r]``. squares: ``[r]``, descending. right: ``[N, r]``.
        condition: the largest square over the least.
        rounding: K * eps * condition: how far K rows' rounding turns the space of ``left`` in that of all rows.
        clear: no square is close to the cut.
    """

    left: np.ndarray
    squares: np.ndarray
    right: np.ndarray
    condition: float
    rounding: float
    clear: bool


def decompose(rows: np.ndarray) -> Decomposition:
    """The singular values of J whose squares are above K * eps times the largest one."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    squares = values**2
    cut = len(rows) * EPSILON * squares[0]
    kept = squares > cut
    clear = not ((squares > cut / CLOSE) & (squares < cut * CLOSE)).any()
    condition = float(squares[0] / squares[kept][-1]) if kept.any() else 1.0
    return Decomposition(left[:, kept], squares[kept], right[kept].T, condition, len(rows) * EPSILON * condition, clear)


def exact_gram(rows: np.ndarray) -> torch.Tensor:
    """G, rounded once: what is left of a zero eigenvalue then is below the cut, whatever the rows are."""
    longer = rows.astype(np.longdouble)
    return torch.from_numpy((longer @ longer.T).astype(np.float64))


class Expected(NamedTuple):
    """A vector or weights, and what the rounding of G may change: per unit of it, in the vector or in each weight."""

    value: np.ndarray
    sensitivity: np.ndarray | float


def aligned_mtl(rows: np.ndarray, pref: np.ndarray, scale_mode: str) -> Expected | None:
    """d: pref times the rows that are nearest to J and of one singular value; None close to a jump."""
    found = decompose(rows)
    if not found.clear:
        return None
    if len(found.squares) == 0:
        return Expected(np.zeros(rows.shape[1]), 1.0)
    length = np.sqrt(SCALES[scale_mode](found.squares))
    return Expected(length * (found.right @ (found.left.T @ pref)), length * np.linalg.norm(pref) * found.condition)


class Nearest(NamedTuple):
    """y that minimises |U U'y - b| on unit rows U, with the least norm; U'y, the b that counts, U U'y."""

    y: np.ndarray
    direction: np.ndarray
    products: np.ndarray
    sensitivity: float
    rounding: float


def nearest(unit: np.ndarray, b: np.ndarray) -> Nearest | None:
    """As its class says, all zero where U U'y is nothing but rounding; None close to a jump."""
    left, squares, right, condition, rounding, clear = decompose(unit)
    coefficients = left.T @ b
    dependent = len(squares) < len(unit)
    share = np.linalg.norm(coefficients) / np.linalg.norm(b)
    if not clear or (dependent and rounding < share < CLOSE * rounding):
        return None
    if dependent and share <= rounding:
        coefficients = np.zeros_like(coefficients)
    y, products = left @ (coefficients / squares), left @ coefficients
    missed = np.linalg.norm(b - products) / squares[-1] if dependent else 0.0
    sensitivity = float(condition * (np.linalg.norm(y) + missed))
    return Nearest(y, right @ (coefficients / np.sqrt(squares)), products, sensitivity, rounding)


def config(rows: np.ndarray, pref: np.ndarray, length: str) -> Expected | None:
    """d = l b / |b| with b = U^+ pref; None close to a jump."""
    n = np.linalg.norm(rows, axis=1)
    rows, pref, n = rows[n > 0], pref[n > 0], n[n > 0]
    zero = Expected(np.zeros(rows.shape[1]), 1.0)
    if not pref.any():
        return zero
    unit = rows / n[:, None]
    if (found := nearest(unit, pref)) is None:
        return None
    if not found.direction.any():
        return zero
    size = float(np.linalg.norm(found.direction))
    direction = found.direction / size
    lengths = n if length == "projection" else np.full_like(n, MEANS[length](n))
    turned = np.sqrt(len(n)) * found.sensitivity / size
    return Expected((lengths @ unit @ direction) * direction, 2 * lengths.sum() * turned)


def imtl_g(rows: np.ndarray) -> Expected | None:
    """The weights w = a / sum a with a = y / n, y = C^+ 1; None close to a jump, or where sum a is mostly rounding."""
    n = np.linalg.norm(rows, axis=1)
    w, sensitivity = np.zeros(len(n)), np.ones(len(n))
    there, least = n > 0, n.min(where=n > 0, initial=np.inf)
    if not there.any():
        return Expected(w, sensitivity)
    if (found := nearest(rows[there] / n[there, None], np.ones(there.sum()))) is None:
        return None
    inverse = least / n[there]
    a = found.y * inverse
    if not a.any():
        return Expected(w, sensitivity)
    total = a.sum()
    if abs(total) < CLOSE * found.rounding * np.abs(a).sum() or found.rounding * found.sensitivity > 0.1 * abs(total):
        return None
    w[there] = a / total
    sensitivity[there] = (inverse + np.abs(w[there]) * inverse.sum()) * found.sensitivity / abs(total)
    return Expected(w, sensitivity)


def _draw(
    generator: np.random.Generator, expect: Callable[[np.ndarray], Expected | None]
) -> tuple[np.ndarray, Expected]:
    while True:
        rows = draw_rows(generator)
        if (expected := expect(rows)) is not None:
            return rows, expected


def _preference(generator: np.random.Generator, num_tasks: int) -> np.ndarray:
    return generator.exponential(size=num_tasks) * (generator.random(num_tasks) < 0.9)


@agrees("alignedmtl", oracle="singular values of the rows", tolerance=1e-14)
def aligned_mtl_deviation(generator: np.random.Generator) -> float:
    """How far the directions are apart, in units of the rounding of G."""
    mode, pref = str(generator.choice(list(SCALES))), _preference(generator, 8)
    rows, (expected, sensitivity) = _draw(generator, lambda rows: aligned_mtl(rows, pref[: len(rows)], mode))
    pref = pref[: len(rows)]
    found = aligned_mtl_weights(exact_gram(rows), pref=torch.from_numpy(pref), scale_mode=mode).weights.numpy()
    return _relative(np.linalg.norm(rows.T @ found - expected), sensitivity)


@agrees("config", oracle="pseudo-inverse of the unit rows", tolerance=2e-15)
def config_deviation(generator: np.random.Generator) -> float:
    """How far the directions are apart, in units of the rounding of G."""
    length, pref = str(generator.choice(["projection", *MEANS])), _preference(generator, 8)
    rows, (expected, sensitivity) = _draw(generator, lambda rows: config(rows, pref[: len(rows)], length))
    pref = pref[: len(rows)]
    found = config_weights(exact_gram(rows), pref=torch.from_numpy(pref), length=length).weights.numpy()
    return _relative(np.linalg.norm(rows.T @ found - expected), sensitivity)


@agrees("imtlg", oracle="pseudo-inverse of the unit rows", tolerance=5e-15)
def imtl_g_deviation(generator: np.random.Generator) -> float:
    """How far the weights are apart, in units of the rounding of G."""
    rows, (expected, sensitivity) = _draw(generator, imtl_g)
    found = imtl_g_weights(exact_gram(rows)).weights.numpy()
    return max(map(_relative, np.abs(found - expected), np.asarray(sensitivity)))


def _relative(off: float, unit: float) -> float:
    return float(off / unit) if off > 0 else 0.0
