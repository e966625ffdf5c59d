"""The kernels on a GPU against a copy of the same bytes, against torch, and against the published codes.

Protocol
    Kernel time: as many calls as it takes to walk over three times the L2, each on rows of its own, captured as one
    CUDA graph that is replayed; the median, 20th and 80th percentile over the replays, per call. What cannot be
    captured is timed with events around the same calls. Call time: until an eager call returns to the host. Latency:
    an eager call and the wait for its work.

    The denominator is a device-to-device copy that moves as many bytes (read plus written), on the same memory,
    measured beside every case: gram reads K N elements, combine reads K N and writes N, a step reads 2 K N and
    writes N.

Every result is first checked against float64. For one that fails, no ratio is computed, stored or printed.
The same program runs on a CPU (--device cpu) to be tested there; what it measures there is of no interest.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import mtl_kernels as mk
from benchmarks import checks, device, plots
from benchmarks.device import Call, Device
from benchmarks.plan import GPU_BATCHES, GPU_TASKS, Case, gpu_budget, gpu_kernels, gpu_plan
from benchmarks.providers import (
    SOLVERS,
    Inputs,
    Provider,
    make_weights,
    providers,
    solver_calls,
    solver_error,
    solver_limit,
)
from benchmarks.results import OURS, Row, compare, environment, judge, show, write_csv
from benchmarks.timing import Timing

_LAUNCHES = 64
_RESERVE = 4 << 30
_HOST_COLUMNS = 1_000_000


class Bench:
    """The rows that were measured so far, on one device, until the time is up."""

    def __init__(self, where: Device, seconds: float, repeats: int, path: Path, facts: dict[str, str | int]) -> None:
        self.where = where
        self.deadline = time.monotonic() + seconds
        self.repeats = repeats
        self.path = path
        self.facts = facts
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.failures: list[str] = []

    def add(self, rows: list[Row]) -> None:
        """Keeps rows, and writes all there are: what was measured survives whatever ends the run."""
        for row in rows:
            for name, value in self.facts.items():
                setattr(row, name, value)
            print(line(row), flush=True)
        self.rows += rows
        write_csv(self.rows, self.path)

    def late(self, what: str) -> bool:
        """Whether the time is up, noting what is left out for it."""
        if time.monotonic() < self.deadline:
            return False
        self.skip(what, "no time left")
        return True

    def skip(self, what: str, why: str) -> None:
        self.left_out.append(f"{what}: {why}")
        print(f"left out: {self.left_out[-1]}", flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """Notes a failure and goes on, unless the device is beyond use."""
        self.failures.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        print(f"FAILED: {self.failures[-1]}", flush=True)
        self.where.synchronize()

    def kernel_time(self, calls: list[Call], capturable: bool = True) -> tuple[Timing, str]:
        """The time of the calls in turn; fewer repeats the slower they are."""
        first = self.where.once(calls[0])
        calls = calls[: max(len(dict.fromkeys(calls)), math.ceil(2e-3 / first))]
        calls = calls[: math.ceil((0.2 if capturable else 0.02) / first)]
        repeats = max(1 if first > 0.2 else 3, min(self.repeats, int(0.1 / (first * len(calls)))))
        return self.where.kernel_time(calls, repeats, capturable)


def line(row: Row) -> str:
    """One row on one line, for the log."""
    size = f"K={row.K}" + (f" N={row.N:,}" if row.N else "") + (f" batch={row.batch}" if row.batch else "")
    if row.measure == "count":
        return f"{row.kernel} {size} {row.provider}: {row.launches} kernels, {row.copies} copies, {row.syncs} waits"
    text = f"{row.kernel} {size} {row.dtype} {row.provider} [{row.measure}]: {row.median_us:.4g} us"
    text += f", {1 / row.ratio:.3f} of copy" if row.ratio else ""
    text += f", {row.times_ours:.2f}x ours" if row.times_ours else ""
    return text if row.correct is not False else f"{text}, WRONG ({row.error:.2g})"


def make_inputs(num_tasks: int, num_columns: int, dtype: torch.dtype, sets: int, where: Device) -> list[Inputs]:
    """Sets of independent random rows, side by side in memory: about half of the pairs are in conflict."""
    generator = torch.Generator(where.device).manual_seed(0)
    rows = torch.empty(sets, num_tasks, num_columns, dtype=dtype, device=where.device).normal_(generator=generator)
    out = torch.empty(sets, num_columns, dtype=dtype, device=where.device)
    weights = make_weights(num_tasks, where.device)
    rng = mk.rng_state(1, device=where.device)
    return [Inputs(rows[i], out[i], weights, rng) for i in range(sets)]


def moved_bytes(case: Case) -> int:
    """What the kernel must read and write at the least."""
    out = case.num_columns * case.dtype.itemsize
    if case.kernel == "combine":
        return case.row_bytes + out
    return 2 * case.row_bytes + out if case.kernel.endswith("_step") else case.row_bytes


def copy_seconds(bench: Bench, inputs: list[Inputs], launches: int) -> float:
    """Seconds of a copy that moves as many bytes as the rows of one set have."""
    half = inputs[0].rows.numel() // 2
    target = torch.empty(min(len(inputs), launches), half, dtype=inputs[0].rows.dtype, device=bench.where.device)
    calls: list[Call] = [
        functools.partial(target[i % len(target)].copy_, inputs[i % len(inputs)].rows.view(-1)[:half])
        for i in range(launches)
    ]
    timing, how = bench.kernel_time(calls)
    bench.add([_row(Case("copy", *inputs[0].rows.shape, inputs[0].rows.dtype), "torch copy_", timing, how)])
    return timing.median


def measure_rows(bench: Bench, num_tasks: int, num_columns: int, dtype: torch.dtype) -> None:
    """All kernels on rows of one size."""
    first = Case("gram", num_tasks, num_columns, dtype)
    name = f"K={num_tasks} N={num_columns:,} {first.dtype}"
    sets = max(1, math.ceil(3 * bench.where.cache_bytes / first.row_bytes))
    launches = max(sets, 1 if first.row_bytes > 1 << 30 else _LAUNCHES)
    # The rows, their outputs, what is copied, and the float64 blocks of the checks.
    needed = sets * (1.5 * first.row_bytes + 2 * num_columns * dtype.itemsize) + _RESERVE
    if bench.where.device.type == "cuda" and needed > (free := bench.where.free_bytes()):
        bench.skip(name, f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
        return
    inputs = make_inputs(num_tasks, num_columns, dtype, sets, bench.where)
    exact = checks.exact_gram(inputs[0].rows)
    copy = copy_seconds(bench, inputs, launches)
    for kernel in gpu_kernels(num_columns):
        case = Case(kernel, num_tasks, num_columns, dtype)
        if bench.late(f"{kernel} {name}"):
            continue
        found: list[Row] = []
        for provider in providers(case, exact, bench.where.device):
            try:
                found += measure_provider(bench, case, provider, inputs, launches, copy)
            except Exception as error:
                bench.fail(f"{kernel} {name}, {provider.name}", error)
        compare(found)
        bench.add(found)


def measure_provider(
    bench: Bench, case: Case, provider: Provider, inputs: list[Inputs], launches: int, copy: float
) -> list[Row]:
    """Checks a provider on the first set of rows, then measures it over all of them."""
    error = provider.error(inputs[0])
    sets = [provider.make(each) for each in inputs]
    timing, how = bench.kernel_time([sets[i % len(sets)] for i in range(launches)], provider.capturable)
    rows = [_row(case, provider.name, timing, how)]
    rows[0].gb_per_s = moved_bytes(case) / timing.median / 1e9
    rows[0].denominator = "copy_ of as many bytes"
    rows[0].denominator_us = copy * 1e6 * moved_bytes(case) / case.row_bytes
    if case.num_columns <= _HOST_COLUMNS and provider.name in (OURS, "torch.mm", "torch PCGrad loop", "torchjd"):
        repeats = max(3, min(2 * bench.repeats, int(0.05 / timing.median)))
        rows.append(_row(case, provider.name, bench.where.call_time(sets[0], repeats), "call"))
        rows.append(_row(case, provider.name, bench.where.latency(sets[0], repeats), "latency"))
    for row in rows:
        judge(row, error, provider.limit, gpu_budget(case, row.measure), budget_in_us=row.measure == "latency")
    return rows


def _row(case: Case, provider: str, timing: Timing, measure: str, batch: int | None = None) -> Row:
    return Row(
        case.kernel, provider, case.num_tasks, case.num_columns, str(case.dtype).removeprefix("torch."),
        timing.median * 1e6, timing.p20 * 1e6, timing.p80 * 1e6, measure=measure, batch=batch,
    )  # fmt: skip


def solver_gram(num_tasks: int, batch: int, where: Device) -> Tensor:
    """Gram matrices of independent random rows, ``[K, K]`` for a batch of one."""
    generator = torch.Generator(where.device).manual_seed(num_tasks)
    rows = torch.randn(batch, num_tasks, 2 * num_tasks, generator=generator, dtype=torch.float64, device=where.device)
    gram = rows @ rows.mT
    gram = (gram + gram.mT) / 2
    return gram[0].clone() if batch == 1 else gram


def measure_solver(bench: Bench, kernel: str, num_tasks: int, batch: int) -> None:
    """All providers of a solver on one batch; the first and the last problem are checked."""
    gram, rng = solver_gram(num_tasks, batch, bench.where), mk.rng_state(1, device=bench.where.device)
    case = Case(kernel, num_tasks, 0, torch.float64)
    found: list[Row] = []
    for name, (call, weigh, capturable) in solver_calls(kernel, gram, rng).items():
        try:
            # TorchJD draws orders of its own: only what it minimises can be checked.
            checked = not (name == "torchjd" and kernel == "pcgrad")
            errors = [
                solver_error(kernel, weights, matrix, rng, problem)
                for problem, weights, matrix in _ends(weigh(), gram)
                if checked
            ]
            timing, how = bench.kernel_time([call] * _LAUNCHES, capturable)
            repeats = max(3, min(2 * bench.repeats, int(0.05 / timing.median)))
            rows = [
                _row(case, name, timing, how, batch),
                _row(case, name, bench.where.call_time(call, repeats), "call", batch),
                _row(case, name, bench.where.latency(call, repeats), "latency", batch),
            ]
            for row in rows:
                if checked:
                    judge(row, max(errors), solver_limit(kernel), None, budget_in_us=True)
            found += rows
        except Exception as error:
            bench.fail(f"{kernel} K={num_tasks} batch={batch}, {name}", error)
    compare(found)
    bench.add(found)


def _ends(weights: Tensor, gram: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    if gram.dim() == 2:
        yield 0, weights, gram
        return
    for problem in (0, gram.shape[0] - 1):
        yield problem, weights[problem], gram[problem]


def counted_calls(where: Device) -> dict[str, tuple[Call, int | None]]:
    """Calls by name, and the most kernels that each may launch."""
    inputs = make_inputs(8, 100_000, torch.float32, 1, where)[0]
    gram = mk.gram(inputs.rows)

    def step(solver: str) -> None:
        name, options = SOLVERS[solver]
        weights = mk.gram_solve(inputs.rows, name, options=options, rng=inputs.rng, advance_rng=True)[1]
        mk.combine(inputs.rows, weights, out=inputs.out)

    return {
        "gram": (lambda: mk.gram(inputs.rows), 1),
        "statistics": (lambda: mk.statistics(inputs.rows), None),
        "combine": (lambda: mk.combine(inputs.rows, inputs.weights, out=inputs.out), 1),
        "pcgrad": (lambda: mk.pcgrad_weights(gram, rng=inputs.rng), None),
        "min_norm": (lambda: mk.min_norm_weights(gram), None),
        "pcgrad_step": (lambda: step("pcgrad"), 2),
        "mgda_step": (lambda: step("min_norm"), 2),
    }


def measure(bench: Bench, step: functools.partial[None]) -> None:
    """Runs a step of the plan unless the time is up; one that fails is noted."""
    what = " ".join(map(str, step.args[1:]))
    if bench.late(what):
        return
    try:
        step()
    except Exception as error:
        bench.fail(what, error)


def measure_counts(bench: Bench) -> None:
    """Kernels, copies and waits of a call of each operation, K = 8."""
    for kernel, (call, most) in counted_calls(bench.where).items():
        try:
            counts = bench.where.count(call)
        except Exception as error:
            bench.fail(f"counting {kernel}", error)
            continue
        if counts is None:
            continue
        row = Row(kernel, OURS, 8, 100_000, "float32", math.nan, math.nan, math.nan, measure="count")
        row.launches, row.copies, row.syncs = counts.kernels, counts.copies, counts.syncs
        if most is not None:
            row.budget, row.within_budget = most, counts.kernels <= most and counts.syncs == 0
        bench.add([row])


def headline(rows: list[Row]) -> list[Row]:
    """What the printed table shows: kernel times of the largest sizes, latencies of the smallest, solvers alone."""

    def shown(row: Row) -> bool:
        if row.measure == "count":
            return False
        if row.kernel in SOLVERS:
            return row.measure == "latency" and row.batch == 1
        if row.measure in ("call", "latency"):
            return row.N == 10_000 and row.kernel.endswith("_step")
        return row.N == largest.get((row.kernel, row.K, row.dtype)) and row.kernel != "copy"

    largest: dict[tuple[str, int, str], int] = {}
    for row in rows:
        key = (row.kernel, row.K, row.dtype)
        largest[key] = max(row.N, largest.get(key, 0))
    return sorted(filter(shown, rows), key=lambda row: (row.kernel, row.dtype, row.K, row.N))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results",
                        help="folder of MACHINE.csv and .png (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--machine", help="name of the files (default: from the GPU's name)")
    parser.add_argument("--seconds", type=float, default=170.0, help="no case begins after so long (default: 170)")
    parser.add_argument("--repeats", type=int, default=15, help="at most so many (default: 15)")
    parser.add_argument("--max-elements", type=float, default=2e10, help="of the K x N rows (default: 2e10)")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(GPU_TASKS), help="numbers of tasks (default: all)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: expected a positive number, found {options.repeats}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the CSV and the picture, prints the table; 1 when one of our own results is wrong or missing."""
    options = parse(arguments)
    where = device.find(options.device)
    facts = environment(options.machine, where.name)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{facts['machine']}.csv"
    print(mk.show_config(), f"device: {where.name}, cache {where.cache_bytes / 1e6:.0f} MB", sep="\n", flush=True)
    bench = Bench(where, options.seconds, options.repeats, path, facts)
    begin = time.monotonic()
    sizes = [rows for rows in gpu_plan(int(options.max_elements)) if rows[0] in options.tasks]
    steps = [functools.partial(measure_rows, bench, *rows) for rows in sizes]
    solvers = [
        functools.partial(measure_solver, bench, kernel, num_tasks, batch)
        for kernel in SOLVERS
        for num_tasks in options.tasks
        for batch in GPU_BATCHES
    ]
    # The sizes with a budget and the solvers before the rest; the profiler last, for it slows what follows.
    budgeted = sum(rows[1] in (10_000, 100_000_000) for rows in sizes)
    try:
        for step in (*steps[:budgeted], *solvers, *steps[budgeted:]):
            measure(bench, step)
        measure_counts(bench)
    except KeyboardInterrupt:
        bench.skip("the rest", "interrupted")
    show(headline(bench.rows))
    if plots.roofline(bench.rows, path.with_suffix(".png"), ("float32", "bfloat16")):
        print(f"picture: {path.with_suffix('.png')}")
    wrong = [row for row in bench.rows if row.correct is False and row.provider == OURS]
    missed = [row for row in bench.rows if row.within_budget is False]
    for text in (*map(line, wrong), *map(line, missed)):
        print(f"wrong or beyond its budget: {text}")
    print(f"{len(bench.rows)} rows in {time.monotonic() - begin:.0f} s: {path}; left out: {len(bench.left_out)}; "
          f"failures: {len(bench.failures)}; budgets: {sum(r.within_budget is True for r in bench.rows)} kept, "
          f"{len(missed)} missed; wrong results of ours: {len(wrong)}")  # fmt: skip
    return 1 if wrong or any(OURS in failure for failure in bench.failures) else 0


if __name__ == "__main__":
    sys.exit(main())
