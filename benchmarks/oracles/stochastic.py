"""SDMGrad and MoDo by their published steps, on the gradients themselves.

With SDMGrad's own step size the steps do not contract: a difference in the last bit grows up to the size of the simplex
within one solve. So each step is compared from where the compiled one started it; whole solves with short steps.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import brentq

from mtl_kernels import cross_gram, sdmgrad_weights
from mtl_optim import MoDo, SDMGrad

from . import agrees
from .draw import draw_rows


def project(x: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex: max(x - t, 0), with t where that adds up to 1."""
    x = x - x.max()
    low, high = -1.0, 0.0  # the largest entry alone would be 1, and 0
    t = brentq(lambda t: np.maximum(x - t, 0).sum() - 1, low, high, xtol=1e-12) if len(x) > 1 else -1.0
    support = x > t
    return np.maximum(x - (x[support].sum() - 1) / support.sum(), 0) * support


def normalised(a: np.ndarray) -> np.ndarray:
    """A over the square of the mean length of the gradients, as products of two batches tell it."""
    largest = np.abs(a).max()
    if largest == 0:
        return a
    return a / (np.sqrt(np.maximum(np.diag(a), 0)).mean() ** 2 + 1e-8 * largest)


def draw_batches(generator: np.random.Generator, count: int, **limits: int) -> list[np.ndarray]:
    """The rows of some tasks on independent batches: the same but for noise, from next to none to all there is."""
    rows = draw_rows(generator, **limits)
    noise = 10.0 ** generator.uniform(-3, 1) * np.linalg.norm(rows, axis=1, keepdims=True)
    return [rows + noise * generator.standard_normal(rows.shape) / rows.shape[1] ** 0.5 for _ in range(count)]


@agrees("sdmgrad", oracle="each of its steps, from where it started", tolerance=1e-13)
def sdmgrad_step_by_step(generator: np.random.Generator) -> float:
    """The largest difference after a step, relative to the length of the step or to 1."""
    a = cross_gram(*map(torch.from_numpy, draw_batches(generator, 2))).numpy()
    num_tasks = len(a)
    lam, lr, momentum = generator.uniform(0, 1), 10 ** generator.uniform(-2, 1.3), generator.uniform(0, 0.9)
    pref = generator.random(num_tasks)
    w = generator.dirichlet(np.ones(num_tasks))
    velocity, start, worst = np.zeros(num_tasks), w, 0.0
    for n in range(1, 21):
        velocity = momentum * velocity + normalised(a) @ (w + lam * pref / pref.sum())
        expected = project(w - lr * velocity)
        state = torch.from_numpy(start.copy())
        sdmgrad_weights(
            torch.from_numpy(a), state=state, lam=lam, lr=lr, momentum=momentum, n_iter=n, pref=torch.from_numpy(pref)
        )
        w = state.numpy()
        worst = max(worst, float(np.abs(w - expected).max()) / max(1.0, lr * float(np.abs(velocity).max())))
    return worst


@agrees("sdmgrad", oracle="steps on the vectors, over 4 training steps", tolerance=1e-12)
def sdmgrad_on_vectors(generator: np.random.Generator) -> float:
    """How far the directions are apart, relative to the longest row."""
    lam, momentum, n_iter = generator.uniform(0, 1), generator.uniform(0, 0.5), int(generator.integers(1, 6))
    batches = draw_batches(generator, 12)
    num_tasks = len(batches[0])
    pref = generator.random(num_tasks) + 0.1
    largest = max(np.linalg.norm(normalised(one @ two.T)) for one, two in itertools.pairwise(batches))
    lr = 0.5 / max(1.0, largest)
    method = SDMGrad(lam=lam, lr=float(lr), momentum=momentum, n_iter=n_iter, pref=pref.tolist())
    pref, w, worst = pref / pref.sum(), np.full(num_tasks, 1 / num_tasks), 0.0
    for j1, j2, j3 in zip(*(batches[n::3] for n in range(3)), strict=True):
        a = j1 @ j2.T
        largest = np.abs(a).max()
        scale = np.sqrt(np.maximum([g1 @ g2 for g1, g2 in zip(j1, j2, strict=True)], 0)).mean() ** 2 + 1e-8 * largest
        velocity = np.zeros(num_tasks)
        for _ in range(n_iter):
            towards = j2.T @ (w + lam * pref)
            velocity = momentum * velocity + np.array([g1 @ towards for g1 in j1]) / (scale or 1.0)
            w = project(w - lr * velocity)
        expected = (j3.T @ w + lam * j3.T @ pref) / (1 + lam)
        found = method(*map(torch.from_numpy, (j1, j2, j3))).numpy()
        longest = np.linalg.norm(j3, axis=1).max()
        worst = max(worst, float(np.linalg.norm(found - expected)) / longest if longest > 0 else 0.0)
    return worst


@agrees("modo", oracle="steps on the vectors, each from where it started", tolerance=1e-12)
def modo_on_vectors(generator: np.random.Generator) -> float:
    """How far the directions are apart, relative to the longest row and the length of the step on w, or to 1."""
    count = int(generator.integers(2, 4))
    batches = draw_batches(generator, 4 * count)
    gamma, rho = 10 ** generator.uniform(-3, 0), generator.uniform(0, 1)
    method, worst = MoDo(gamma=gamma, rho=rho, num_batches=count), 0.0
    w = np.full(len(batches[0]), 1 / len(batches[0]))
    for first in range(0, len(batches), count):
        step = batches[first : first + count]
        change = gamma * (step[0] @ (step[1].T @ w) + rho * w)
        expected = step[-1].T @ project(w - change)
        found = method(*map(torch.from_numpy, step)).numpy()
        w = method.state["weights"].numpy().copy()
        longest = np.linalg.norm(step[-1], axis=1).max() * max(1.0, np.abs(change).max())
        worst = max(worst, float(np.linalg.norm(found - expected)) / longest if longest > 0 else 0.0)
    return worst
