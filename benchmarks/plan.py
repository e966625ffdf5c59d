"""Which cases are measured, and what each must reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

KERNELS = ("gram", "combine", "pcgrad", "min_norm", "pcgrad_step", "mgda_step")
TASKS = (2, 3, 4, 8, 16, 32, 40, 64)

GPU_KERNELS = ("gram", "combine", "gram_pcgrad", "gram_min_norm", "pcgrad_step", "mgda_step")
GPU_TASKS = (2, 4, 8, 16, 32, 64, 128)
GPU_BATCHES = (1, 64, 1024)
_GPU_COLUMNS = (10_000, 1_000_000, 10_000_000, 100_000_000)
_GPU_ELEMENTS = 1_000_000_000
_GPU_STREAMING_COLUMNS = 1 << 26
_GPU_SHARE_OF_COPY = ((16, 0.90), (64, 0.75))
_GPU_STEP_COLUMNS = 10_000
_GPU_REPLAYED_STEP, _GPU_EAGER_STEP = 30.0, 60.0
"""Microseconds of a step of that many columns: its kernels in a replayed graph, and a call until its work is done."""

STREAMING_BYTES = 64 << 20
"""From here on the rows fit no cache and the bandwidth budgets apply; below, ratios get no verdict."""

_GRAM_BUDGET = ((6, 1.10), (8, 1.15), (16, 1.3), (32, 1.8), (64, 2.5))
_SOLVER_MICROSECONDS = {"pcgrad": ((8, 5.0), (40, 100.0)), "min_norm": ((8, 20.0), (40, 5000.0))}
_LOOP_ELEMENTS = 400_000_000


@dataclass(frozen=True)
class Case:
    """One kernel at one size. The solvers have num_columns = 0: they see the Gram matrix alone."""

    kernel: str
    num_tasks: int
    num_columns: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_tasks * self.num_columns * self.dtype.itemsize


def sizes(num_tasks: int, item_size: int, max_bytes: int) -> list[int]:
    """Numbers of columns from 1e3 up in decades, and the most that ``max_bytes`` of rows allow."""
    largest = max_bytes // (item_size * num_tasks)
    decades = [10**exponent for exponent in range(3, 12) if 10**exponent <= 0.8 * largest]
    return [*decades, largest] if largest >= 1000 else decades


def plan(kernels: Sequence[str], max_bytes: int, quick: bool) -> Iterator[Case]:
    """All cases in the order in which they are measured."""
    for kernel in kernels:
        for num_tasks in (2, 8, 32) if quick else TASKS:
            if kernel in ("gram", "combine"):
                columns = sizes(num_tasks, 4, max_bytes)
                for n in columns[1:4:2] if quick else columns:
                    yield Case(kernel, num_tasks, n, torch.float32)
                if num_tasks in (2, 8, 16, 64):
                    for n in [*([] if quick else [10_000]), *sizes(num_tasks, 2, max_bytes)[-1:]]:
                        yield Case(kernel, num_tasks, n, torch.bfloat16)
            elif kernel in ("pcgrad", "min_norm"):
                yield Case(kernel, num_tasks, 0, torch.float64)
            else:
                for n in (100_000,) if quick else (10_000, 1_000_000):
                    if num_tasks * n * 4 <= max_bytes:
                        yield Case(kernel, num_tasks, n, torch.float32)


def loop_is_affordable(case: Case) -> bool:
    """Whether K^2 passes over vectors of N elements fit into a measurement."""
    return case.num_tasks**2 * case.num_columns <= _LOOP_ELEMENTS


def budget(case: Case) -> float | None:
    """What the kernel must reach: a ratio to its floor, for solvers microseconds; None if nothing is set.

    Between the numbers of tasks that have a Gram budget it is interpolated.
    """
    if case.kernel == "gram" and case.row_bytes >= STREAMING_BYTES:
        below = _GRAM_BUDGET[0]
        for tasks, ratio in _GRAM_BUDGET:
            if case.num_tasks <= tasks:
                share = 0 if tasks == below[0] else (case.num_tasks - below[0]) / (tasks - below[0])
                return ratio if tasks == below[0] else below[1] + share * (ratio - below[1])
            below = (tasks, ratio)
    if case.kernel == "combine" and case.row_bytes >= STREAMING_BYTES:
        return 1.1
    for tasks, microseconds in _SOLVER_MICROSECONDS.get(case.kernel, ()):
        if case.num_tasks <= tasks:
            return microseconds
    return None


def gpu_plan(max_elements: int) -> list[tuple[int, int, torch.dtype]]:
    """(K, N, dtype) of the rows that are measured on a GPU, those with budgets first."""
    found = []
    for num_tasks in GPU_TASKS:
        # Rows that begin at an odd address would be another case.
        spread = _GPU_ELEMENTS // num_tasks // 64 * 64
        for num_columns in {*_GPU_COLUMNS, spread}:
            for dtype in (torch.float32, torch.bfloat16):
                if num_tasks * num_columns <= max_elements:
                    found.append((num_tasks, num_columns, dtype))
    order = {100_000_000: 0, 10_000: 1, 1_000_000: 3, 10_000_000: 4}
    return sorted(found, key=lambda rows: (not has_budget(rows), order.get(rows[1], 2), rows[0], str(rows[2])))


def has_budget(rows: tuple[int, int, torch.dtype]) -> bool:
    return next(gpu_expected([rows]), None) is not None


def gpu_kernels(num_columns: int) -> tuple[str, ...]:
    """The kernels that are measured at a size; beside 1e4, 1e6 and 1e8 columns only those that move memory."""
    return GPU_KERNELS if num_columns in (10_000, 1_000_000, 100_000_000) else GPU_KERNELS[:2]


def gpu_expected(sizes: Sequence[tuple[int, int, torch.dtype]]) -> Iterator[tuple[Case, str]]:
    """What has a budget among these sizes, and whether it is of the "kernel" or of the "latency"."""
    for num_tasks, num_columns, dtype in sizes:
        for kernel in gpu_kernels(num_columns):
            case = Case(kernel, num_tasks, num_columns, dtype)
            yield from ((case, measure) for measure in ("kernel", "latency") if gpu_budget(case, measure) is not None)


def gpu_budget(case: Case, measure: str) -> float | None:
    """What a kernel must reach on a GPU: a ratio to a copy, for a step microseconds; None where nothing is set."""
    if case.kernel.endswith("_step") and case.num_columns == _GPU_STEP_COLUMNS and measure != "call":
        return _GPU_EAGER_STEP if measure == "latency" else _GPU_REPLAYED_STEP
    if measure in ("call", "latency") or case.kernel not in ("gram", "combine"):
        return None
    if case.num_columns < _GPU_STREAMING_COLUMNS:
        return None
    (low, best), (high, least) = _GPU_SHARE_OF_COPY
    if case.num_tasks > high:
        return None
    share = max(0, case.num_tasks - low) / (high - low)
    return 1 / (best + share * (least - best))
