"""GradDrop, TrimmedMean, ExcessMTL, MoCo and DBMTL by their definitions, over several steps of the same tasks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from mtl_optim import DBMTL, ExcessMTL, GradDrop, Method, MoCo, TrimmedMean

from . import agrees
from .draw import KINDS, make_rows
from .projections import WORD, philox4x32_10

Step = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, float]]
"""Of rows [K, N], losses [K] and which tasks take part, bool [K], the combination and the size of what it adds up."""


def sign_dropout(seed: int, leak: np.ndarray) -> Step:
    """GradDrop (arXiv 2010.06808, Algorithm 1), one number at a time, with a Philox in Python integers."""
    count = 0

    def step(rows: np.ndarray, losses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, float]:
        nonlocal count
        found = np.zeros(rows.shape[1])
        for n, column in enumerate(rows.T):
            counter = [count & WORD, count >> 32, 0, n // 4]
            draw = (philox4x32_10(counter, [seed & WORD, seed >> 32])[n % 4] + 0.5) * 2.0**-32
            total, size = sum(column), sum(map(abs, column))
            purity = 0.5 * (1 + total / size) if size > 0 else 0.5
            for k, value in enumerate(column):
                keep = float(purity > draw) if value > 0 else float(purity < draw)
                found[n] += (leak[k] + (1 - leak[k]) * keep) * value
        count += 1
        return found, float(np.linalg.norm(rows, axis=1).sum())

    return step


def trimmed(trim: int) -> Step:
    """The trimmed mean (arXiv 1803.01498, Definition 2) of the tasks that take part, one number at a time."""

    def step(rows: np.ndarray, losses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, float]:
        there = rows[active]
        found = [math.fsum(sorted(c)[trim : len(c) - trim]) / (len(c) - 2 * trim) for c in there.T]
        return np.array(found), float(np.linalg.norm(there, axis=1).max())

    return step


def excess_risks(num_tasks: int, eta: float, warmup: int) -> Step:
    """ExcessMTL (arXiv 2402.02009, eqs. 6, 7 and 9)."""
    log_w = np.full(num_tasks, -math.log(num_tasks))
    baselines: list[list[float]] = [[] for _ in range(num_tasks)]
    squares: np.ndarray | None = None
    count = 0

    def step(rows: np.ndarray, losses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, float]:
        nonlocal squares, count
        squares = np.zeros_like(rows) if squares is None else squares
        here = np.flatnonzero(active)
        relative = np.zeros(num_tasks)
        for k in here:
            squares[k] += rows[k] ** 2
            risk = float((rows[k] ** 2 / np.sqrt(squares[k] + 1e-7)).sum())
            if risk > 0:
                first = not baselines[k]
                if count < warmup or first:
                    baselines[k].append(risk)
                relative[k] = risk if first and warmup == 0 else risk / np.mean(baselines[k])
        if count >= warmup:
            before = np.logaddexp.reduce(log_w[here])
            log_w[here] += eta * relative[here]
            log_w[here] += before - np.logaddexp.reduce(log_w[here])
        count += 1
        w = np.exp(log_w[here] - np.logaddexp.reduce(log_w[here]))
        return w @ rows[here], float(w @ np.linalg.norm(rows[here], axis=1))

    return step


def tracked(num_tasks: int, beta: float, gamma: float, rho: float, sigmas: tuple[float, float]) -> Step:
    """MoCo (arXiv 2210.12624) as its authors gave it to LibMTL."""
    w = np.full(num_tasks, 1 / num_tasks)
    y: np.ndarray | None = None
    count = 0

    def step(rows: np.ndarray, losses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, float]:
        nonlocal y, count
        y = np.zeros_like(rows) if y is None else y
        count += 1
        here, sizes = np.flatnonzero(active), np.linalg.norm(y, axis=1) + losses
        for k in here:
            length = np.linalg.norm(rows[k])
            goal = rows[k] * (losses[k] / length) if length > 0 else rows[k]
            y[k] -= beta / count ** sigmas[0] * (y[k] - goal)
        logits = w[here] - gamma / count ** sigmas[1] * (y[here] @ y[here].T + rho * np.eye(len(here))) @ w[here]
        w[here] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        return w[here] @ y[here], float(w[here] @ sizes[here])

    return step


def dual_balanced(num_tasks: int, beta: float, sigma: float) -> Step:
    """DB-MTL (arXiv 2308.12029, Algorithm 1)."""
    average: np.ndarray | None = None
    count = 0

    def step(rows: np.ndarray, losses: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, float]:
        nonlocal average, count
        average = np.zeros_like(rows) if average is None else average
        count += 1
        here, sizes = np.flatnonzero(active), np.linalg.norm(average, axis=1)
        for k in here:
            h = rows[k] / (losses[k] + 1e-8)
            sizes[k] += np.linalg.norm(h)
            average[k] = h + beta / count**sigma * (average[k] - h)
        length = np.linalg.norm(average[here], axis=1)
        weights = length.max() / (length + 1e-8)
        return weights @ average[here], float(weights @ sizes[here])

    return step


def deviation(generator: np.random.Generator, method: Method, step: Step, num_tasks: int, least: int = 1) -> float:
    """The largest deviation over up to six steps, relative to what is added up."""
    num_columns = int(generator.integers(1, 13))
    kinds = generator.choice([kind for kind in KINDS if kind != "spread"], size=6)
    worst = 0.0
    for kind in kinds[: int(generator.integers(1, 7))]:
        rows = make_rows(generator, str(kind), num_tasks, num_columns, 2) * 10.0 ** generator.integers(-2, 3)
        losses, active = generator.lognormal(0, 1, num_tasks), generator.random(num_tasks) < 0.8
        if active.sum() < least or generator.random() < 0.5:
            active[:] = True
        mask = None if active.all() else torch.from_numpy(active)
        found = method(torch.from_numpy(rows), losses=torch.from_numpy(losses), active=mask).numpy()
        rows[~active] = 0.0
        expected, size = step(rows, losses, active)
        off = float(np.linalg.norm(found - expected))
        worst = max(worst, off / size if size > 0 else off)
    return worst


@agrees("graddrop", oracle="one number at a time", tolerance=1e-14)
def graddrop(generator: np.random.Generator) -> float:
    """Of combinations over several steps, with and without leaks."""
    num_tasks, seed = int(generator.integers(1, 9)), int(generator.integers(2**40))
    leak = generator.random(num_tasks) * (generator.random() < 0.5)
    return deviation(generator, GradDrop(leak.tolist(), seed), sign_dropout(seed, leak), num_tasks)


@agrees("trimmedmean", oracle="one number at a time", tolerance=1e-14)
def trimmed_mean(generator: np.random.Generator) -> float:
    """Of combinations over several steps."""
    num_tasks = int(generator.integers(1, 9))
    trim = int(generator.integers(0, (num_tasks + 1) // 2))
    return deviation(generator, TrimmedMean(trim), trimmed(trim), num_tasks, 2 * trim + 1)


@agrees("excessmtl", oracle="the definition in NumPy", tolerance=1e-9)
def excess_mtl(generator: np.random.Generator) -> float:
    """Of combinations over several steps; the rounding of an exponent, which is up to about 1e6, is that of w."""
    num_tasks, eta, warmup = int(generator.integers(1, 9)), float(generator.random()), int(generator.integers(0, 3))
    return deviation(generator, ExcessMTL(eta, warmup), excess_risks(num_tasks, eta, warmup), num_tasks)


@agrees("moco", oracle="the definition in NumPy", tolerance=1e-14)
def moco(generator: np.random.Generator) -> float:
    """Of combinations over several steps."""
    num_tasks = int(generator.integers(1, 9))
    beta, gamma, rho, *sigmas = (float(value) for value in generator.random(5))
    options = beta, gamma, rho, *sigmas
    return deviation(generator, MoCo(*options), tracked(num_tasks, beta, gamma, rho, (sigmas[0], sigmas[1])), num_tasks)


@agrees("dbmtl", oracle="the definition in NumPy", tolerance=1e-13)
def dbmtl(generator: np.random.Generator) -> float:
    """Of combinations over several steps."""
    num_tasks, beta, sigma = int(generator.integers(1, 9)), float(generator.random()), float(generator.random())
    return deviation(generator, DBMTL(beta, sigma), dual_balanced(num_tasks, beta, sigma), num_tasks)
