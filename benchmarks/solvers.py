"""Time and certificate of every method's weights, on K x K problems, beside TorchJD and LibMTL where installed.

    python benchmarks/solvers.py [METHOD ...] [--quick] [--out FOLDER]

Writes MACHINE-solvers.csv and a plot; prints a table. All providers of a case are timed in turn, repeat by repeat. Ours
is the call that `MultiTaskOptimizer` makes, on one thread for one problem, also on a batch of 64; the others know no
batches. Gram matrices are those of K random rows of 1.5 K + 1 columns with a common part, the longest of length 1.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import libraries, plots, results, timing
from benchmarks.results import OURS, format_time
from mtl_optim import Method, get_method, list_methods
from mtl_optim.methods.rows import RowMethod
from mtl_optim.methods.wrappers import Wrapper

TASKS, FEW_TASKS = (2, 8, 40, 128), (2, 8, 40)
"""Numbers of tasks, and those of a quick look."""
BATCHES = (1, 64)
BUDGETS = {8: 200.0, 40: 5000.0}
"""Microseconds a problem that any method may take; those of two methods are tighter."""
OWN_BUDGETS = {("pcgrad", 8): 5.0, ("pcgrad", 40): 100.0, ("mgda", 8): 20.0}
ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "constant": lambda num_tasks: {"weights": [1.0] * num_tasks},
    "crmogm": lambda num_tasks: {"method": get_method("mgda")},
    "krum": lambda num_tasks: {"n_byzantine": 1},
    "normalized": lambda num_tasks: {"method": get_method("mgda")},
}
"""Options without a default."""
COLUMNS = ("method", "provider", "K", "batch", "median_us", "p20_us", "p80_us", "times_ours", "budget_us",
           "within_budget", "gap", "iterations", "note")  # fmt: skip

Cells = dict[str, Any]


def draw_rows(num_tasks: int, generator: torch.Generator) -> Tensor:
    """float64 rows, the longest of length 1, that share a part and conflict in some pairs."""
    num_columns = num_tasks + num_tasks // 2 + 1
    rows = torch.randn(num_tasks, num_columns, dtype=torch.float64, generator=generator)
    rows += 0.2 * torch.randn(num_columns, dtype=torch.float64, generator=generator)
    return rows / rows.norm(dim=1).max()


def solving() -> list[str]:
    """The methods whose weights come from a Gram matrix, or from the products of two batches in its place."""
    return [info.name for info in list_methods() if not isinstance(make(info.name, 2), RowMethod)]


def cases(wanted: list[str], tasks: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Every method with a solve, or those that are wanted, and every K."""
    return ((name, num_tasks) for name in solving() if not wanted or name in wanted for num_tasks in tasks)


def make(name: str, num_tasks: int) -> Method | str:
    """The method with its defaults for K tasks, or why there is none."""
    try:
        return get_method(name, **ARGUMENTS.get(name, lambda num_tasks: {})(num_tasks))
    except (TypeError, ValueError) as error:
        return str(error)


def measure(name: str, num_tasks: int, effort: timing.Effort) -> list[Cells]:
    """The rows of one method at one K."""
    generator = torch.Generator().manual_seed(num_tasks)
    rows = torch.stack([draw_rows(num_tasks, generator) for _ in range(max(BATCHES))])
    grams = rows @ rows.mT
    case = {"method": name, "K": num_tasks}
    found = []
    for batch in BATCHES:
        method = make(name, num_tasks)
        if isinstance(method, str):
            return [{**case, "provider": OURS, "note": method}]
        gram = grams[0] if batch == 1 else grams
        losses = torch.ones(num_tasks, dtype=torch.float64) if method.needs_losses else None
        given = {} if losses is None else {"losses": losses}
        try:
            solution = method.solve(gram, **given)
        except ValueError as error:  # so many tasks are not for this method
            return [{**case, "provider": OURS, "batch": batch, "note": str(error)}]
        functions: dict[str, Callable[[], object]] = {OURS: lambda: method.solve(gram, **given)}  # noqa: B023
        if batch == 1 and not isinstance(method, Wrapper):
            peers = {
                "torchjd": libraries.torchjd(name, gram, rows[0]),
                "LibMTL": libraries.libmtl(name, rows[0].float()),
            }
            functions |= {peer: call for peer, call in peers.items() if call is not None}
        failed = {peer: reason for peer, call in functions.items() if (reason := _failure(call)) is not None}
        timings = timing.measure({peer: call for peer, call in functions.items() if peer not in failed}, effort)
        for peer, seconds in timings.items():
            row = {**case, "provider": peer, "batch": batch, "median_us": seconds.median * 1e6,
                   "p20_us": seconds.p20 * 1e6, "p80_us": seconds.p80 * 1e6}  # fmt: skip
            if peer == OURS:
                budget = OWN_BUDGETS.get((name, num_tasks), BUDGETS.get(num_tasks))
                if budget is not None:
                    row |= {"budget_us": budget, "within_budget": row["median_us"] / batch <= budget}
                if solution.gap is not None and solution.iterations is not None:
                    row |= {"gap": solution.gap.max().item(), "iterations": int(solution.iterations.max())}
            elif OURS in timings:
                row["times_ours"] = seconds.median / timings[OURS].median
            found.append(row)
        found += [{**case, "provider": peer, "batch": batch, "note": reason} for peer, reason in failed.items()]
    return found


def _failure(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # whatever another library raises: the row says so
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def table(rows: list[Cells]) -> Table:
    """A line for each method and provider, a column for each K and batch."""
    columns = [(num_tasks, batch) for batch in BATCHES for num_tasks in TASKS]
    made = Table("method", "", *(f"K={k}" + (f" x{b}" if b > 1 else "") for k, b in columns), "largest gap")
    lines: dict[tuple[str, str], list[Cells]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["provider"]), []).append(row)
    for (name, provider), own in lines.items():
        at = {(row["K"], row.get("batch")): row for row in own}
        cells = [_cell(at.get(column)) for column in columns]
        gaps = [row["gap"] for row in own if "gap" in row]
        made.add_row(name, provider, *cells, f"{max(gaps):.0e}" if gaps else "")
    return made


def _cell(row: Cells | None) -> str:
    if row is None or "median_us" not in row:
        return ""
    text = format_time(row["median_us"])
    if "times_ours" in row:
        text += f" ({row['times_ours']:.0f}x)"
    return f"{text} !" if row.get("within_budget") is False else text


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where one of ours failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", help="all with a solve by default")
    parser.add_argument("--quick", action="store_true", help="few tasks and repeats: a look, not a measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--machine", help="how the files are named")
    options = parser.parse_args(arguments)
    if unknown := set(options.methods) - {info.name for info in list_methods()}:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    if rowwise := set(options.methods) - set(solving()):
        parser.error(f"no solve to measure, they go by the rows: {', '.join(sorted(rowwise))}")
    torch.set_num_threads(1)
    facts = results.environment(options.machine, quick=options.quick)
    rows: list[Cells] = []
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{facts['machine']}-solvers.csv"
    for name, num_tasks in cases(options.methods, FEW_TASKS if options.quick else TASKS):
        for row in measure(name, num_tasks, timing.QUICK if options.quick else timing.FULL):
            rows.append(row)
            time = format_time(row["median_us"]) if "median_us" in row else row["note"]
            print(f"{name} K={num_tasks} batch={row.get('batch', '')} {row['provider']}: {time}", flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**{k: _short(v) for k, v in row.items()}, **facts} for row in rows)
    Console(width=200).print(table(rows))
    plots.solves([row for row in rows if "median_us" in row], path.with_suffix(".png"), str(facts["cpu"]))
    failed = [row for row in rows if row["provider"] == OURS and "Error" in str(row.get("note", ""))]
    return 1 if failed else 0


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
