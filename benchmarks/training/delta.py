"""Delta-m: how much better a multi-task training is than a baseline, on average over its tasks.

    Delta_m = 1/K sum_k (-1)^(l_k) (M_k - B_k) / B_k,    l_k = 1 where less of metric k is better, else 0

(Maninis et al. 2019, arXiv 1904.08918, equation 4). Positive is better, as there; some later papers print it with the
other sign. B_k is the mean over the seeds of the baseline, so that a baseline's own Delta-m has mean 0, and its
spread is what seeds alone make.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Metrics = Mapping[str, float]


class Spread(NamedTuple):
    """Over seeds: mean, sample standard deviation (nan for one seed), least and most."""

    mean: float
    deviation: float
    least: float
    most: float


def delta_m(found: Metrics, baseline: Metrics, higher: Mapping[str, bool]) -> float:
    """Delta-m in percent; nan where a baseline is 0 or not positive, for which it is not defined.

    Raises:
        ValueError: other tasks than those of the baseline.
    """
    if found.keys() != baseline.keys():
        raise ValueError(f"expected the tasks {', '.join(baseline)}, found {', '.join(found)}")
    if any(value <= 0 for value in baseline.values()):
        return math.nan
    terms = [(1 if higher[task] else -1) * (found[task] - b) / b for task, b in baseline.items()]
    return 100 * sum(terms) / len(terms)


def mean_of(seeds: Iterable[Metrics]) -> dict[str, float]:
    """The mean of every task's metric over the seeds."""
    every = list(seeds)
    return {task: sum(one[task] for one in every) / len(every) for task in every[0]}


def spread(values: Sequence[float]) -> Spread:
    """Of one value a seed."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan
    return Spread(mean, deviation, min(values), max(values))
