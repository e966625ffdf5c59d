"""The kernels on a CPU against their floors, against torch, and against the published codes.

Protocol
    For every case all competitors and the floor are timed in turn in one process, repeat by repeat, forwards
    and backwards, after two calls of warm-up; a repeat loops for at least 2 ms. The median and the 20th and
    80th percentile over the repeats are kept. Rows that fit a cache are found there by everyone; larger ones
    come from memory every time, since each call walks over all of them. Outputs are allocated beforehand
    wherever a competitor allows it.

Floors, measured on the same memory in the same turns
    read     the fastest of several torch reductions over the rows (bytes read as float32)
    combine  that read, plus the fastest way to write N elements
    step     two reads of the rows and one write of N elements
    For solvers the budget is in microseconds and there is no floor.

Every result is first checked against float64. For one that fails, no ratio is computed, stored or printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import mtl_kernels as mk
from benchmarks import checks, peers, plots
from benchmarks.plan import KERNELS, Case, budget, loop_is_affordable, plan
from benchmarks.results import OURS, Row, compare, environment, judge, show, write_csv
from benchmarks.timing import FULL, QUICK, Effort, Timing, measure

Check = Callable[[], float]
Competitor = tuple[Callable[[], object], Check, float]
"""What is timed; its error; the most error that is accepted."""


def readers(flat: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read memory with all threads, by name."""
    return {"read: sum": flat.sum, "read: max": flat.amax, "read: dot": lambda: torch.dot(flat, flat)}


def writers(out: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to write memory with all threads, by name."""
    return {"write: zero": out.zero_, "write: fill": lambda: out.fill_(1)}


def as_float32(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as float32 but for a last odd half."""
    flat = tensor.view(-1)
    if flat.dtype.itemsize < 4:
        flat = flat[: flat.numel() // 2 * 2]
    return flat.view(torch.float32)


def fastest(timings: dict[str, Timing], kind: str) -> tuple[str, float]:
    """The name and the median seconds of the fastest timing whose name begins with ``kind``."""
    return min(((name, t.median) for name, t in timings.items() if name.startswith(kind)), key=lambda found: found[1])


def make_rows(case: Case, generator: torch.Generator) -> Tensor:
    """Independent random rows: about half of the pairs are in conflict."""
    rows = torch.empty(case.num_tasks, case.num_columns, dtype=case.dtype)
    for row in rows:
        row.copy_(torch.randn(case.num_columns, generator=generator))
    return rows


def gram_competitors(rows: Tensor) -> dict[str, Competitor]:
    exact = mk.reference.gram(rows)
    limit = checks.gram_limit
    num_tasks, dtype = rows.shape[0], rows.dtype
    return {
        OURS: (
            lambda: mk.gram(rows),
            lambda: checks.gram_error(mk.gram(rows), exact),
            limit(True, num_tasks, dtype),
        ),
        "torch": (
            lambda: rows @ rows.T,
            lambda: checks.gram_error(rows @ rows.T, exact),
            limit(False, num_tasks, dtype),
        ),
    }


def combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    mk.combine(rows, weights, out=out)
    return out


def combine_competitors(rows: Tensor, out: Tensor) -> dict[str, Competitor]:
    num_tasks, dtype = rows.shape[0], rows.dtype
    weights = (torch.arange(num_tasks, dtype=torch.float64) % 7 - 2.5) / 4
    narrow = weights.to(dtype)
    other = torch.empty_like(out)
    return {
        OURS: (
            lambda: mk.combine(rows, weights, out=out),
            lambda: checks.combine_error(combine_into(rows, weights, out), rows, weights),
            checks.combine_limit(True, num_tasks, dtype),
        ),
        "torch": (
            lambda: narrow @ rows,
            lambda: checks.combine_error(narrow @ rows, rows, weights),
            checks.combine_limit(False, num_tasks, dtype),
        ),
        "torch out=": (
            lambda: torch.mv(rows.T, narrow, out=other),
            lambda: checks.combine_error(torch.mv(rows.T, narrow, out=other), rows, weights),
            checks.combine_limit(False, num_tasks, dtype),
        ),
    }


def solver_gram(num_tasks: int, generator: torch.Generator) -> Tensor:
    """The Gram matrix of K independent random rows, about half of the pairs in conflict."""
    rows = torch.randn(num_tasks, 2 * num_tasks, generator=generator, dtype=torch.float64)
    return rows @ rows.T


def pcgrad_competitors(gram: Tensor) -> dict[str, Competitor]:
    num_tasks, rng = gram.shape[0], mk.rng_state(1)
    expected = checks.pcgrad_weights(gram, checks.our_orders(rng, num_tasks))

    def ours(backend: str | None) -> Competitor:
        def call() -> Tensor:
            return mk.pcgrad_weights(gram, rng=rng, backend=backend)

        return call, lambda: checks.weights_error(call(), expected), 1e-10

    found = {OURS: ours(None), "mtl-kernels reference": ours("reference")}
    weighting = peers.torchjd("pcgrad")
    if weighting is not None:
        found["torchjd"] = (lambda: weighting(gram), lambda: torchjd_pcgrad_error(weighting, gram), 1e-10)
    return found


def torchjd_pcgrad_error(weighting: Callable[[Tensor], Tensor], gram: Tensor) -> float:
    """TorchJD's weights against the definition, for the orders that it draws from torch's generator."""
    torch.manual_seed(1)
    orders = [torch.randperm(gram.shape[0]).tolist() for _ in range(gram.shape[0])]
    torch.manual_seed(1)
    return checks.weights_error(weighting(gram), checks.pcgrad_weights(gram, orders))


def min_norm_competitors(gram: Tensor) -> dict[str, Competitor]:
    def competitor(call: Callable[[], Tensor], limit: float) -> Competitor:
        return call, lambda: checks.min_norm_error(call(), gram), limit

    found = {
        OURS: competitor(lambda: mk.min_norm_weights(gram).weights, 1e-9),
        "mtl-kernels frank_wolfe": competitor(lambda: mk.min_norm_weights(gram, solver="frank_wolfe").weights, 1e-2),
        "mtl-kernels reference": competitor(lambda: mk.min_norm_weights(gram, backend="reference").weights, 1e-9),
        "torch frank_wolfe loop": competitor(lambda: peers.frank_wolfe_loop(gram), 1e-2),
    }
    weighting = peers.torchjd("min_norm")
    if weighting is not None:
        found["torchjd"] = competitor(lambda: weighting(gram), 1e-2)
    return found


def pcgrad_step_competitors(case: Case, rows: Tensor, out: Tensor) -> dict[str, Competitor]:
    gram, rng = mk.reference.gram(rows), mk.rng_state(1)
    expected = checks.pcgrad_weights(gram, checks.our_orders(rng, case.num_tasks))

    def ours() -> Tensor:
        weights = mk.pcgrad_weights(mk.gram(rows), rng=rng)
        return combine_into(rows, weights, out)

    found: dict[str, Competitor] = {OURS: (ours, lambda: checks.direction_error(ours(), rows, expected), 1e-5)}
    if loop_is_affordable(case):
        found["full-space loop"] = (lambda: peers.pcgrad_loop(rows), lambda: peers.pcgrad_loop_error(rows), 1e-3)
    aggregator = peers.torchjd("pcgrad_step")
    if aggregator is not None:
        found["torchjd"] = (
            lambda: aggregator(rows),
            lambda: peers.torchjd_step_error(aggregator, rows),
            1e-3,
        )
    return found


def mgda_step_competitors(case: Case, rows: Tensor, out: Tensor) -> dict[str, Competitor]:
    expected = mk.reference.min_norm_weights(mk.reference.gram(rows)).weights

    def ours() -> Tensor:
        return combine_into(rows, mk.min_norm_weights(mk.gram(rows)).weights, out)

    def torch_loop() -> Tensor:
        return peers.frank_wolfe_loop(rows @ rows.T) @ rows

    def competitor(call: Callable[[], Tensor], limit: float) -> Competitor:
        return call, lambda: checks.direction_error(call(), rows, expected), limit

    found = {OURS: competitor(ours, 1e-5), "torch frank_wolfe loop": competitor(torch_loop, 2e-2)}
    aggregator = peers.torchjd("mgda_step")
    if aggregator is not None:
        found["torchjd"] = competitor(lambda: aggregator(rows), 2e-2)
    return found


def run_case(case: Case, effort: Effort, generator: torch.Generator) -> list[Row]:
    """Checks and measures all competitors of one case."""
    solver = case.num_columns == 0
    floor: dict[str, Callable[[], object]] = {}
    if solver:
        gram = solver_gram(case.num_tasks, generator)
        competitors = (pcgrad_competitors if case.kernel == "pcgrad" else min_norm_competitors)(gram)
        moved = 0
    else:
        rows = make_rows(case, generator)
        out = torch.empty(case.num_columns, dtype=case.dtype)
        floor |= readers(as_float32(rows))
        moved = case.row_bytes
        if case.kernel == "gram":
            competitors = gram_competitors(rows)
        else:
            floor |= writers(torch.empty_like(out))
            moved += out.nbytes
        if case.kernel == "combine":
            competitors = combine_competitors(rows, out)
        elif case.kernel.endswith("_step"):
            moved += case.row_bytes
            step = pcgrad_step_competitors if case.kernel == "pcgrad_step" else mgda_step_competitors
            competitors = step(case, rows, out)
    errors = {name: check() for name, (_, check, _) in competitors.items()}
    timings = measure({**{name: call for name, (call, _, _) in competitors.items()}, **floor}, effort)
    denominator, denominator_us = floor_of(case, timings) if floor else ("", None)
    found = []
    for name, (_, _, limit) in competitors.items():
        timing = timings[name]
        row = Row(
            case.kernel, name, case.num_tasks, case.num_columns, str(case.dtype).removeprefix("torch."),
            timing.median * 1e6, timing.p20 * 1e6, timing.p80 * 1e6,
            gb_per_s=moved / timing.median / 1e9 if moved else None,
            denominator=denominator, denominator_us=denominator_us,
        )  # fmt: skip
        found.append(judge(row, errors[name], limit, budget(case), budget_in_us=solver))
    compare(found)
    return found


def floor_of(case: Case, timings: dict[str, Timing]) -> tuple[str, float]:
    """The name and the microseconds of the least time in which a case's memory can be read and written."""
    read, read_time = fastest(timings, "read")
    if case.kernel == "gram":
        return read, read_time * 1e6
    write, write_time = fastest(timings, "write")
    reads = 2 if case.kernel.endswith("_step") else 1
    return f"{'2 x ' if reads == 2 else ''}{read} + {write}", (reads * read_time + write_time) * 1e6


def machine_rows(effort: Effort, max_bytes: int) -> list[Row]:
    """What the machine gives: a large read, write, copy and matrix product."""
    size = min(max_bytes, 1 << 28) // 4
    source, target = torch.ones(size), torch.ones(size)
    dtypes = {"matmul: float32": torch.float32, "matmul: float64": torch.float64}
    square = {name: torch.ones(1024, 1024, dtype=dtype) for name, dtype in dtypes.items()}
    timings = measure(
        {**readers(source), **writers(target), "copy": lambda: target.copy_(source),
         **{name: (lambda matrix=matrix: matrix @ matrix) for name, matrix in square.items()}},  # type: ignore[misc]
        effort,
    )  # fmt: skip
    found = []
    for name, timing in timings.items():
        kind, _, variant = name.partition(": ")
        product = kind == "matmul"
        row = Row(
            kind, f"torch {variant or 'copy_'}", 0, 1024 if product else size,
            variant if product else "float32", timing.median * 1e6, timing.p20 * 1e6, timing.p80 * 1e6,
        )  # fmt: skip
        if not product:
            row.gb_per_s = size * 4 * (2 if kind == "copy" else 1) / timing.median / 1e9
        found.append(row)
    return found


def largest_only(rows: list[Row]) -> list[Row]:
    """The rows of the largest N of every kernel, K and dtype."""
    largest: dict[tuple[str, int, str], int] = {}
    for row in rows:
        key = (row.kernel, row.K, row.dtype)
        largest[key] = max(row.N, largest.get(key, 0))
    return [row for row in rows if row.N == largest[row.kernel, row.K, row.dtype]]


def report(progress: str) -> None:
    """Shows where the run is, in one line that the next one replaces; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/kernels.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes and short repeats: a look, not a measurement")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL",
                        help=f"which to measure, of: {', '.join(KERNELS)} (default: all)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results",
                        help="folder of MACHINE-kernels.csv and .png (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--machine", help="name of the files (default: from the processor's name)")
    parser.add_argument("--threads", type=int, help="threads for every competitor (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the random rows (default: 0)")
    parser.add_argument("--max-bytes", type=float, default=4e8, help="largest K x N matrix in bytes (default: 4e8)")
    parser.add_argument("--all", action="store_true", help="print every size, not only the largest; the CSV has all")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected a positive number, found {options.threads}")
    if not options.max_bytes >= 1e4:
        parser.error(f"--max-bytes: expected at least 1e4, found {options.max_bytes:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the CSV and the picture, prints the table; 1 when one of our own results is wrong."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    effort = QUICK if options.quick else FULL
    max_bytes = int(min(options.max_bytes, 4e7) if options.quick else options.max_bytes)
    facts = environment(options.machine, quick=options.quick)
    options.output.mkdir(parents=True, exist_ok=True)
    print(mk.show_config(), end="\n\n")
    begin = time.perf_counter()
    cases = list(plan(options.kernels, max_bytes, options.quick))
    rows = machine_rows(effort, max_bytes)
    for done, case in enumerate(cases):
        report(f"[{done + 1}/{len(cases)}] {case.kernel}, K = {case.num_tasks}, N = {case.num_columns:,}")
        rows += run_case(case, effort, generator)
    report("")
    for row in rows:
        for name, value in facts.items():
            setattr(row, name, value)
    show(rows if options.all else largest_only(rows))
    csv_path = options.output / f"{facts['machine']}-kernels.csv"
    write_csv(rows, csv_path)
    print(f"{len(rows)} rows in {time.perf_counter() - begin:.0f} s: {csv_path}")
    picture = csv_path.with_suffix(".png")
    if plots.roofline(rows, picture):
        print(f"picture: {picture}")
    wrong = [row for row in rows if row.correct is False and row.provider == OURS]
    missed = [row for row in rows if row.within_budget is False]
    print(f"budgets: {sum(row.within_budget is True for row in rows)} kept, {len(missed)} missed; "
          f"wrong results of ours: {len(wrong)}")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
