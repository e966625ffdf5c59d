"""Interleaved wall-clock measurement of functions that compete for the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the 20th and 80th percentile over the repeats."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Effort:
    """How long to measure: a repeat lasts ``min_time`` seconds or one call, a case about ``case_time``."""

    repeats: int
    min_repeats: int
    min_time: float
    case_time: float


FULL = Effort(repeats=21, min_repeats=5, min_time=2e-3, case_time=2.0)
QUICK = Effort(repeats=7, min_repeats=3, min_time=1e-3, case_time=0.25)


def summarize(seconds: list[float]) -> Timing:
    """Percentiles by linear interpolation between the sorted repeats."""
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    return Timing(statistics.median(ordered), percentile(0.2), percentile(0.8))


def measure(functions: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Timing]:
    """Times all functions in turn, repeat by repeat, so that a slow spell of the machine meets all of them.

    A repeat is a loop of calls of at least ``effort.min_time``; every function is called twice before.
    Cases so slow that the least number of repeats takes three times ``effort.case_time`` make do with fewer.
    """
    calls = {name: _calls_for(function, effort.min_time) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    order = list(functions)
    for repeat in range(effort.repeats):
        elapsed = time.perf_counter() - begin
        enough = effort.case_time if repeat >= effort.min_repeats else 3 * effort.case_time
        if repeat >= 2 and elapsed > enough:
            break
        for name in order:
            seconds[name].append(_loop(functions[name], calls[name]))
        order.reverse()
    return {name: summarize(found) for name, found in seconds.items()}


def _loop(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _calls_for(function: Callable[[], object], min_time: float) -> int:
    function()
    calls = 1
    while (elapsed := _loop(function, calls) * calls) < min_time and calls < 1 << 20:
        calls = max(2 * calls, math.ceil(calls * min(min_time / max(elapsed, 1e-7), 100)))
    return calls
