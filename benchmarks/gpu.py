"""The kernels on a GPU against a copy of the same bytes, against torch, and against the published codes.

Protocol
    Kernel time: as many calls as it takes to walk over three times the L2, each on rows of its own, captured as one
    CUDA graph that is replayed; the median, 20th and 80th percentile over the replays, per call. At most 256 sets of
    rows, so that the smallest (K N below about 5e4 float32 elements) come from the L2, for every provider and the copy.
    Call time: until an eager call returns to the host. Latency: an eager call and the wait for its work. What waits
    for the device by itself, as the published loops do, cannot be captured and is compared by its latency alone.

    The denominator is a device-to-device copy that moves as many bytes (read plus written), on the same memory,
    measured beside every case: gram reads K N elements, combine reads K N and writes N, a step reads 2 K N and
    writes N.

Every result is first checked against float64. For one that fails, no ratio is computed, stored or printed. The run
fails where one of ours is wrong, where one that has a budget is missing, and where it was not the CUDA kernels that
ran. The same program runs on a CPU (--device cpu) to be tested there; what it measures there is of no interest.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import mtl_kernels as mk
from benchmarks import device, plots
from benchmarks.bench import Bench, line
from benchmarks.cases import measure_rows, measure_solver
from benchmarks.counts import MOST_KERNELS, case_of, measure_counts
from benchmarks.plan import GPU_BATCHES, GPU_TASKS, Case, gpu_expected, gpu_plan, has_budget
from benchmarks.providers import SOLVERS, backend_of
from benchmarks.results import OURS, Row, environment, show

UNTIMED = ("count", "left out", "failed", "missing")


def measure(bench: Bench, case: Case, step: Callable[[], None], batch: int | None = None) -> None:
    """Runs a step of the plan unless the time is up; one that fails is noted."""
    if bench.late(case, batch):
        return
    try:
        step()
    except Exception as error:
        bench.fail(case, error, batch=batch)


def measure_all(bench: Bench, sizes: Sequence[tuple[int, int, torch.dtype]], tasks: Sequence[int]) -> None:
    """The sizes with a budget, the launches, the solvers, and then the other sizes."""

    def measure_sizes(chosen: Iterable[tuple[int, int, torch.dtype]]) -> None:
        for rows in chosen:
            measure(bench, Case("all", *rows), functools.partial(measure_rows, bench, *rows))

    measure_sizes(filter(has_budget, sizes))
    measure(bench, case_of("count"), functools.partial(measure_counts, bench))
    for kernel, num_tasks, batch in itertools.product(SOLVERS, tasks, GPU_BATCHES):
        step = functools.partial(measure_solver, bench, kernel, num_tasks, batch)
        measure(bench, Case(kernel, num_tasks, 0, torch.float64), step, batch)
    measure_sizes(itertools.filterfalse(has_budget, sizes))


def note_missing(bench: Bench, sizes: Sequence[tuple[int, int, torch.dtype]]) -> None:
    """Notes what has a budget and was not measured, though the device has the memory for it."""
    found = {
        (row.kernel, row.K, row.N, row.dtype, _what(row))
        for row in bench.rows
        if row.provider == OURS and row.measure not in UNTIMED[1:]
    }
    for case, what in _expected(bench, sizes):
        dtype = str(case.dtype).removeprefix("torch.")
        if (case.kernel, case.num_tasks, case.num_columns, dtype, what) not in found:
            bench.note("missing", case, f"its {what} has a budget")


def _expected(bench: Bench, sizes: Sequence[tuple[int, int, torch.dtype]]) -> Iterator[tuple[Case, str]]:
    yield from gpu_expected([rows for rows in sizes if rows not in bench.too_large])
    if bench.where.device.type == "cuda":  # elsewhere there is nothing to count
        yield from ((case_of(kernel), "count") for kernel in MOST_KERNELS)


def _what(row: Row) -> str:
    return "kernel" if row.measure in ("graph", "events", "clock") else row.measure


def faults(bench: Bench) -> list[str]:
    """Why the run must not pass; a missed budget is a result, not a fault."""
    ours = [row for row in bench.rows if row.provider.startswith(OURS)]
    found = [line(row) for row in ours if row.correct is False or row.measure in ("failed", "missing")]
    chosen = backend_of(OURS, bench.where.device)
    if bench.where.device.type == "cuda" and chosen != "cuda":
        reason = mk.available_backends()["cuda"]
        found.insert(0, f"what ran on the GPU is the backend {chosen!r}, not 'cuda': {reason}")
    return found


def headline(rows: list[Row]) -> list[Row]:
    """What the printed table shows: kernel times of the largest sizes, latencies of the smallest, solvers alone."""

    def shown(row: Row) -> bool:
        if row.kernel in SOLVERS:
            return row.measure == "latency" and row.batch == 1
        if row.measure in ("call", "latency"):
            return row.N == 10_000 and row.kernel.endswith("_step")
        return row.N == largest.get((row.kernel, row.K, row.dtype)) and row.kernel != "copy"

    largest: dict[tuple[str, int, str], int] = {}
    rows = [row for row in rows if row.measure not in UNTIMED]
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
    parser.add_argument("--seconds", type=float, default=300.0, help="no case begins after so long (default: 300)")
    parser.add_argument("--repeats", type=int, default=15, help="at most so many (default: 15)")
    parser.add_argument("--max-elements", type=float, default=2e10, help="of the K x N rows (default: 2e10)")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(GPU_TASKS), help="numbers of tasks (default: all)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: expected a positive number, found {options.repeats}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the CSV and the picture, prints the table; 1 with a fault."""
    begin = time.monotonic()
    options = parse(arguments)
    where = device.find(options.device)
    facts = environment(options.machine, where.name)
    path = options.output / f"{facts['machine']}.csv"
    print(mk.show_config(), f"device: {where.name}, cache {where.cache_bytes / 1e6:.0f} MB", sep="\n", flush=True)
    bench = Bench(where, options.seconds, options.repeats, path, facts)
    sizes = [rows for rows in gpu_plan(int(options.max_elements)) if rows[0] in options.tasks]
    stopped = ""
    try:
        measure_all(bench, sizes, options.tasks)
    except KeyboardInterrupt:
        stopped = "interrupted"
    except Exception as error:  # the device is beyond use; what was measured before is not
        stopped = f"{type(error).__name__}: {error}"
    if stopped:
        print(f"stopped: {stopped}", flush=True)
    note_missing(bench, sizes)
    show(headline(bench.rows))
    if plots.roofline(bench.rows, path.with_suffix(".png"), ("float32", "bfloat16")):
        print(f"picture: {path.with_suffix('.png')}")
    wrong = faults(bench) + ([f"stopped: {stopped}"] if stopped and stopped != "interrupted" else [])
    missed = [row for row in bench.rows if row.within_budget is False]
    for text in (*(f"budget missed: {line(row)}" for row in missed), *(f"FAULT: {text}" for text in wrong)):
        print(text)
    print(f"{len(bench.rows)} rows in {time.monotonic() - begin:.0f} s: {path}; "
          f"left out: {len(bench.noted('left out'))}; failures: {len(bench.noted('failed'))}; "
          f"budgets: {sum(row.within_budget is True for row in bench.rows)} kept, {len(missed)} missed; "
          f"faults: {len(wrong)}")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
