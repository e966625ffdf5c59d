"""One case on a device: its inputs, the copy it is held against, and every provider of it, checked and then timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mtl_kernels as mk

from . import checks
from .bench import Bench, Piece
from .device import Call, Device
from .plan import Case, gpu_budget, gpu_kernels
from .providers import (
    STEPS,
    Inputs,
    Provider,
    make_weights,
    providers,
    solver_calls,
    solver_error,
    solver_limit,
)
from .results import Row, judge
from .timing import Timing

_LAUNCHES = 64
_MOST_SETS = 256
"""Of inputs: more would take longer to capture than to measure. The smallest rows then come from the cache."""
_PIECE_BYTES = 4 << 30
_RESERVE = 4 << 30
_HOST_COLUMNS = 1_000_000
_HOST_SECONDS = 0.05
_KERNEL = 120.0
"""Seconds that all providers of a kernel may take on one case, a process lost in between aside."""


def make_inputs(num_tasks: int, num_columns: int, dtype: torch.dtype, sets: int, where: Device) -> list[Inputs]:
    """Sets of independent random rows, side by side in memory: about half of the pairs are in conflict."""
    generator = torch.Generator(where.device).manual_seed(0)
    rows = torch.empty(sets, num_tasks, num_columns, dtype=dtype, device=where.device).normal_(generator=generator)
    out = torch.empty(sets, num_columns, dtype=dtype, device=where.device)
    weights = make_weights(num_tasks, where.device)
    rng = mk.rng_state(1, device=where.device)
    return [Inputs(rows[i], out[i], weights, rng) for i in range(sets)]


def needed_bytes(case: Case, sets: int) -> int:
    """Memory for the rows, their outputs, what is copied, the vectors of the loops and the blocks of the checks."""
    out = case.num_columns * case.dtype.itemsize
    return sets * (case.row_bytes + out + min(case.row_bytes // 2, _PIECE_BYTES)) + 4 * out + _RESERVE


def moved_bytes(case: Case) -> int:
    """What the kernel must read and write at the least."""
    out = case.num_columns * case.dtype.itemsize
    if case.kernel == "combine":
        return case.row_bytes + out
    return 2 * case.row_bytes + out if case.kernel in STEPS else case.row_bytes


def copy_seconds(bench: Bench, inputs: list[Inputs], launches: int) -> float:
    """Seconds of a copy that moves as many bytes as the rows of one set have.

    Much memory is copied piece by piece to the same place, so that the rows may fill most of the device.
    """
    (num_tasks, num_columns), dtype = inputs[0].rows.shape, inputs[0].rows.dtype
    half = num_tasks * num_columns // 2
    piece = min(half, _PIECE_BYTES // dtype.itemsize)
    targets = torch.empty(len(inputs), piece, dtype=dtype, device=bench.where.device)

    def copy(i: int) -> None:
        for source in inputs[i].rows.view(-1)[:half].split(piece):
            targets[i][: source.numel()].copy_(source)

    calls: list[Call] = [functools.partial(copy, i % len(inputs)) for i in range(launches)]
    timing, how = bench.kernel_time(calls)
    row = bench.timed(Case("copy", num_tasks, num_columns, dtype), "torch copy_", timing, how)
    if not any(map(row.same_case, bench.rows)):  # by a process before this one
        bench.add([row])
    return timing.median


def measure_rows(bench: Bench, num_tasks: int, num_columns: int, dtype: torch.dtype) -> None:
    """All kernels on rows of one size."""
    size = Case("all", num_tasks, num_columns, dtype)
    sets = min(_MOST_SETS, max(1, math.ceil(3 * bench.where.cache_bytes / size.row_bytes)))
    launches = max(sets, 1 if size.row_bytes > 1 << 30 else _LAUNCHES)
    needed = needed_bytes(size, sets)
    if bench.where.device.type == "cuda" and needed > (free := bench.where.free_bytes()):
        if needed > bench.where.memory_bytes:
            bench.too_large((num_tasks, num_columns, dtype))
        bench.note("left out", Piece(size), f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
        return
    inputs = make_inputs(num_tasks, num_columns, dtype, sets, bench.where)
    exact = checks.exact_gram(inputs[0].rows)
    copy = copy_seconds(bench, inputs, launches)
    for kernel in gpu_kernels(num_columns):
        case = Case(kernel, num_tasks, num_columns, dtype)
        work = functools.partial(measure_kernel, bench, case, inputs, exact, launches, copy)
        bench.attempt(Piece(case), work, _KERNEL)


def measure_kernel(
    bench: Bench, case: Case, inputs: list[Inputs], exact: Tensor, launches: int, copy: float
) -> None:  # fmt: skip
    """All providers of a kernel."""
    for provider in providers(case, exact, bench.where.device):
        work = functools.partial(measure_provider, bench, case, provider, inputs, launches, copy)
        bench.attempt(Piece(case, provider.name), work)


def measure_provider(
    bench: Bench, case: Case, provider: Provider, inputs: list[Inputs], launches: int, copy: float
) -> list[Row]:
    """Checks a provider on the first set of rows, then measures it over all of them.

    What waits for the device is a call of the host's, not a sequence of kernels: of it only the latency is taken.
    """
    error = provider.error(inputs[0])
    sets = [provider.make(each) for each in inputs]
    timings: list[tuple[Timing, str]] = []
    if provider.capturable:
        timings.append(bench.kernel_time([sets[i % len(sets)] for i in range(launches)]))
        if case.num_columns <= _HOST_COLUMNS:
            timings.append((bench.where.call_time(sets[0], host_repeats(bench, timings[0][0].median)), "call"))
    if not provider.capturable or case.num_columns <= _HOST_COLUMNS or case.kernel in STEPS:
        once = timings[0][0].median if timings else bench.where.once(sets[0])
        timings.append((bench.where.latency(sets[0], host_repeats(bench, once)), "latency"))
    rows = [bench.timed(case, provider.name, timing, how) for timing, how in timings]
    if provider.capturable:
        rows[0].gb_per_s = moved_bytes(case) / timings[0][0].median / 1e9
        rows[0].denominator = "copy_ of as many bytes"
        rows[0].denominator_us = copy * 1e6 * moved_bytes(case) / case.row_bytes
    for row in rows:
        judge(row, error, provider.limit, gpu_budget(case, row.measure), budget_in_us=case.kernel in STEPS)
    bench.add(rows)
    return rows


def host_repeats(bench: Bench, seconds: float) -> int:
    """How often a call of so many seconds is timed from the host."""
    return max(3 if seconds < _HOST_SECONDS else 1, min(2 * bench.repeats, int(_HOST_SECONDS / max(seconds, 1e-9))))


def solver_gram(num_tasks: int, batch: int, where: Device) -> Tensor:
    """Gram matrices of independent random rows, ``[K, K]`` for a batch of one."""
    generator = torch.Generator(where.device).manual_seed(num_tasks)
    rows = torch.randn(batch, num_tasks, 2 * num_tasks, generator=generator, dtype=torch.float64, device=where.device)
    gram = rows @ rows.mT
    gram = (gram + gram.mT) / 2
    return gram[0].clone() if batch == 1 else gram


def measure_solver(bench: Bench, kernel: str, num_tasks: int, batch: int) -> None:
    """All providers of a solver on one batch."""
    case = Case(kernel, num_tasks, 0, torch.float64)
    gram, rng = solver_gram(num_tasks, batch, bench.where), mk.rng_state(1, device=bench.where.device)
    for name, (call, weigh, capturable) in solver_calls(kernel, gram, rng).items():
        work = functools.partial(measure_solver_of, bench, case, batch, name, gram, rng, call, weigh, capturable)
        bench.attempt(Piece(case, name, batch), work)


def measure_solver_of(
    bench: Bench, case: Case, batch: int, name: str, gram: Tensor, rng: Tensor, call: Call,
    weigh: Callable[[], Tensor], capturable: bool,
) -> None:  # fmt: skip
    """One provider of a solver; the first and the last problem are checked."""
    kernel = case.kernel
    # TorchJD draws orders of its own: only what it minimises can be checked.
    checked = not (name == "torchjd" and kernel == "pcgrad")
    errors = [
        solver_error(kernel, weights, matrix, rng, problem)
        for problem, weights, matrix in _ends(weigh(), gram)
        if checked
    ]
    timings = [bench.kernel_time([call] * _LAUNCHES)] if capturable else []
    once = timings[0][0].median if timings else bench.where.once(call)
    repeats = host_repeats(bench, once)
    timings += [(bench.where.call_time(call, repeats), "call")] if capturable else []
    timings.append((bench.where.latency(call, repeats), "latency"))
    rows = [bench.timed(case, name, timing, how, batch) for timing, how in timings]
    for row in rows:
        if checked:
            judge(row, max(errors), solver_limit(kernel), None, budget_in_us=True)
    bench.add(rows)


def _ends(weights: Tensor, gram: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    if gram.dim() == 2:
        yield 0, weights, gram
        return
    for problem in (0, gram.shape[0] - 1):
        yield problem, weights[problem], gram[problem]
