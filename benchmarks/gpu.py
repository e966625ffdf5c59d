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
ran. A case that takes its process down, or does not end, is noted as failed, and a new process goes on behind it. The
same program runs on a CPU (--device cpu) to be tested there; what it measures there is of no interest.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import mtl_kernels as mk
from benchmarks import counts, device, isolate, plots
from benchmarks.bench import Bench, Piece, Record, Size, line, untimed
from benchmarks.cases import measure_rows, measure_solver
from benchmarks.plan import GPU_BATCHES, GPU_TASKS, Case, gpu_expected, gpu_plan, has_budget
from benchmarks.providers import SOLVERS
from benchmarks.results import OURS, Row, environment, show

UNTIMED = ("count", "left out", "failed", "missing")

_SIZE = 200.0
"""Seconds that all kernels at one size, or all providers of a solver, may take."""


def work(attempts: isolate.Attempts, options: argparse.Namespace, deadline: float, rows: Sequence[Row]) -> None:
    """Measures what was not tried yet, in a process that may be lost; ``rows`` are those of the processes before."""
    where = device.find(options.device)
    attempts.send("facts", environment(options.machine, where.name))
    print(mk.show_config(), f"device: {where.name}, cache {where.cache_bytes / 1e6:.0f} MB", sep="\n", flush=True)
    measure_all(Bench(where, attempts, deadline, options.repeats, rows), sizes_of(options), options.tasks)


def sizes_of(options: argparse.Namespace) -> list[Size]:
    return [rows for rows in gpu_plan(int(options.max_elements)) if rows[0] in options.tasks]


def measure_all(bench: Bench, sizes: Sequence[Size], tasks: Sequence[int]) -> None:
    """The sizes with a budget, the launches, the solvers, and then the other sizes."""

    def measure_sizes(chosen: Iterable[Size]) -> None:
        for rows in chosen:
            bench.attempt(Piece(Case("all", *rows)), functools.partial(measure_rows, bench, *rows), _SIZE)

    measure_sizes(filter(has_budget, sizes))
    count = functools.partial(counts.measure_counts, bench)
    bench.attempt(Piece(counts.case_of("count")), count, 1.5 * counts.SECONDS)
    for kernel, num_tasks, batch in itertools.product(SOLVERS, tasks, GPU_BATCHES):
        step = functools.partial(measure_solver, bench, kernel, num_tasks, batch)
        bench.attempt(Piece(Case(kernel, num_tasks, 0, torch.float64), batch=batch), step, _SIZE)
    measure_sizes(itertools.filterfalse(has_budget, sizes))


def note_missing(record: Record, sizes: Sequence[Size], on_gpu: bool) -> None:
    """Notes what has a budget and was not measured, though the device has the memory for it."""
    found = {
        (row.kernel, row.K, row.N, row.dtype, _what(row))
        for row in record.rows
        if row.provider == OURS and row.measure not in UNTIMED[1:]
    }
    expected = list(gpu_expected([rows for rows in sizes if rows not in record.too_large]))
    if on_gpu:  # elsewhere there is nothing to count
        expected += [(counts.case_of(kernel), "count") for kernel in counts.MOST_KERNELS]
    for case, what in expected:
        dtype = str(case.dtype).removeprefix("torch.")
        if (case.kernel, case.num_tasks, case.num_columns, dtype, what) not in found:
            record.add([untimed(case, OURS, "missing", note=f"its {what} has a budget")])


def _what(row: Row) -> str:
    return "kernel" if row.measure in ("graph", "events", "clock") else row.measure


def faults(rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """Why the run must not pass; a missed budget is a result, not a fault."""
    ours = [row for row in rows if row.provider.startswith(OURS)]
    found = [line(row) for row in ours if row.correct is False or row.measure in ("failed", "missing")]
    others = {row.backend for row in ours if row.provider == OURS} - {"", "cuda"}
    if on_gpu and others:
        reason = mk.available_backends()["cuda"]
        found.insert(0, f"what ran on the GPU is the backend {', '.join(sorted(others))}, not cuda: {reason}")
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


def main(arguments: list[str] | None = None, work: isolate.Work = work) -> int:
    """Measures, writes the CSV and the picture, prints the table; 1 with a fault."""
    begin = time.monotonic()
    options = parse(arguments)
    record, on_gpu, stopped = Record(options.output), options.device == "cuda", ""
    given = (options, begin + options.seconds, record.rows)
    try:
        stopped = isolate.run(work, given, record.take, record.lose)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    note_missing(record, sizes_of(options), on_gpu)
    show(headline(record.rows))
    picture = record.path.with_suffix(".png")
    if plots.roofline(record.rows, picture, ("float32", "bfloat16")):
        print(f"picture: {picture}")
    wrong = faults(record.rows, on_gpu) + ([f"stopped: {stopped}"] if stopped else [])
    missed = [row for row in record.rows if row.within_budget is False]
    for text in (*(f"budget missed: {line(row)}" for row in missed), *(f"FAULT: {text}" for text in wrong)):
        print(text)
    print(f"{len(record.rows)} rows in {time.monotonic() - begin:.0f} s: {record.path}; "
          f"left out: {len(record.noted('left out'))}; failures: {len(record.noted('failed'))}; "
          f"budgets: {sum(row.within_budget is True for row in record.rows)} kept, {len(missed)} missed; "
          f"faults: {len(wrong)}")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
