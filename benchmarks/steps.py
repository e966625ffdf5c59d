"""What a training step costs: K backward passes, and what combining their gradients adds.

A convolutional trunk (3.5 M shared parameters) with K linear heads, batch 64. In turn, repeat by repeat:

    plain sum        one backward pass of the summed losses, the floor for a user who does not combine
    K backwards      the K passes that per-task gradients need, whatever is done with them: the denominator
    mtl-kernels      `MultiTaskOptimizer.backward`; the part spent in `combine` is also reported apart
    torchjd          `torchjd.autojac` with the same aggregator, where it is installed

The forward pass is in all of them. Optimizer steps are in none. Every row is checked: the gradients of the trunk agree
with a float64 combination of rows from `torch.autograd.grad`, or the row shows no ratio. On a GPU a repeat ends when
its work is done, the combination is timed between events, and its kernels, copies and waits of the host are counted:
after everything was timed, for a profiler slows what follows it. The run fails where gradients of ours are wrong or
missing, or where on a GPU other than the CUDA kernels ran. A workload that takes its process down there is noted as
failed, and a new process goes on behind it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mtl_kernels
from benchmarks import device, isolate, results, timing
from benchmarks.results import OURS
from benchmarks.workload import Workload, until_done
from mtl_kernels import dispatch
from mtl_optim import MGDA, PCGrad

BUDGET = 1.05
TASKS, FEW_TASKS = (3, 8, 40), (3, 8)
"""Numbers of tasks, and those of a quick look."""
LIMIT = 1e-5
COLUMNS = ("method", "provider", "K", "median_ms", "p20_ms", "p80_ms", "combine_ms", "ratio_to_K_backwards",
           "within_budget", "launches", "copies", "syncs", "correct", "backend", "note")  # fmt: skip
_KEY = ("method", "provider", "K")
_PIECE = 40.0
"""Seconds that one workload may take."""

Cells = dict[str, object]


class Report:
    """The CSV, written anew with every row that comes or grows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts = folder, dict[str, str | int]()
        self.rows: list[Cells] = []

    @property
    def path(self) -> Path:
        return self.folder / f"{self.facts.get('machine', 'unknown')}-steps.csv"

    def take(self, what: str, value: object) -> None:
        """What `work` sends: facts of the machine, rows, and what is to be added to a row that is there."""
        if what == "facts" and isinstance(value, dict):
            self.facts = value
        elif what == "row" and isinstance(value, dict):
            known = next((row for row in self.rows if all(row[name] == value[name] for name in _KEY)), None)
            if known is None:
                self.rows.append({**dict.fromkeys(COLUMNS, ""), **value})
            else:
                known.update(value)
            print({name: text for name, text in value.items() if text != ""}, flush=True)
            self.write()

    def lose(self, piece: object, reason: str) -> None:
        """Notes a workload that took its process down."""
        if isinstance(piece, Piece):
            self.take("row", failure(piece, f"{reason}; its process was lost"))

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *self.facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **self.facts} for row in self.rows)


def measure(workload: Workload, effort: timing.Effort, send: isolate.Receive) -> None:
    """Checks and times one workload."""
    where, correct = workload.where, workload.error() < LIMIT
    functions: dict[str, Callable[[], object]] = {
        "plain sum": workload.plain_sum,
        "K backwards": workload.backwards,
        OURS: workload.ours,
    }
    if (peer := workload.torchjd()) is not None:
        functions["torchjd"] = peer
    workload.combination.clear()
    timings = timing.measure({name: until_done(call, where) for name, call in functions.items()}, effort)
    where.synchronize()
    combination = statistics.median(read() for read in workload.combination)
    floor = timings["K backwards"].median
    for provider, found in timings.items():
        ours = provider == OURS
        ratio = found.median / floor if correct or not ours else None
        row: Cells = dict(
            method=workload.method.name,
            provider=provider,
            K=workload.num_tasks,
            median_ms=round(found.median * 1e3, 3),
            p20_ms=round(found.p20 * 1e3, 3),
            p80_ms=round(found.p80 * 1e3, 3),
            combine_ms=round(combination * 1e3, 3) if ours else "",
            ratio_to_K_backwards="" if ratio is None else round(ratio, 3),
            within_budget="" if ratio is None or not ours else ratio <= BUDGET,
            correct=correct if ours else "",
            backend=dispatch.resolve(where.device, None).name if ours else "",
        )
        send("row", row)


def count(workload: Workload, send: isolate.Receive) -> None:
    """Adds to the row of a workload what its combination launches."""
    if (found := workload.counts()) is not None:
        counts = {"launches": found.kernels, "copies": found.copies, "syncs": found.syncs}
        send("row", {"method": workload.method.name, "provider": OURS, "K": workload.num_tasks, **counts})


class Piece(NamedTuple):
    """What is tried at once."""

    num_tasks: int
    method: str
    counted: bool = False


def work(attempts: isolate.Attempts, given: argparse.Namespace, rows: Sequence[Cells]) -> None:
    """Measures what was not tried yet, in a process that may be lost; ``rows`` are those of the processes before."""
    where = device.find(given.device)
    attempts.wait = where.synchronize
    attempts.send("facts", results.environment(given.machine, where.name, given.quick))
    torch.backends.cudnn.deterministic = True  # or the rows that are checked would not be those that were combined
    torch.backends.cudnn.allow_tf32 = False
    on_gpu = where.device.type == "cuda"
    effort = timing.QUICK if given.quick else timing.Effort(15, 5, 1e-3, 3.0 if on_gpu else 12.0)
    print(mtl_kernels.show_config(), flush=True)
    timed = {(row["K"], row["method"]) for row in rows if row["provider"] == OURS and row["median_ms"] != ""}
    for counted, num_tasks, method in itertools.product((False, True), given.tasks, (PCGrad(), MGDA())):
        name = Piece(num_tasks, method.name, counted)
        if counted and name[:2] not in timed:
            continue

        def piece() -> None:
            workload = Workload(num_tasks, method, where)  # noqa: B023
            if counted:  # noqa: B023
                count(workload, attempts.send)
            else:
                measure(workload, effort, attempts.send)

        if why := attempts.attempt(name, piece, _PIECE):
            attempts.send("row", failure(name, why))
        elif not counted:
            timed.add(name[:2])


def failure(piece: Piece, why: str) -> Cells:
    note = f"{'counting ' if piece.counted else ''}failed: {why}"
    return {"method": piece.method, "provider": OURS, "K": piece.num_tasks, "note": note}


def main(given: list[str] | None = None, work: isolate.Work = work) -> int:
    """Measures every workload and writes the CSV; 1 with a fault."""
    parser = argparse.ArgumentParser(description="What combining gradients adds to a training step.")
    parser.add_argument("--tasks", type=int, nargs="+",
                        help="numbers of tasks (default: 3 8 40; with --quick 3 8)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV")
    parser.add_argument("--machine", default=None, help="name of the file (default: from the processor's name)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="few tasks and repeats: a look, not a measurement")
    arguments = parser.parse_args(given)
    arguments.tasks = arguments.tasks or list(FEW_TASKS if arguments.quick else TASKS)
    report, on_gpu, stopped = Report(arguments.output), arguments.device == "cuda", ""
    try:
        if on_gpu:
            stopped = isolate.run(work, (arguments, report.rows), report.take, report.lose)
        else:
            stopped = isolate.run_here(work, (arguments, report.rows), report.take)
    except KeyboardInterrupt:
        stopped = "interrupted"
    for num_tasks, method in itertools.product(arguments.tasks, (PCGrad(), MGDA())):
        if not any((row["K"], row["method"]) == (num_tasks, method.name) for row in report.rows):
            report.take("row", failure(Piece(num_tasks, method.name), stopped or "nothing was measured"))
    print(f"wrote {report.path}")
    faults = [row for row in report.rows if row["correct"] is False or row["note"]]
    faults += [row for row in report.rows if on_gpu and row["backend"] not in ("", "cuda")]
    for row in faults:
        shown = ("method", "K", "provider", "correct", "backend", "note")
        print("FAULT:", ", ".join(f"{name} {row[name]}" for name in shown if row[name] != ""))
    return 1 if faults or stopped else 0


if __name__ == "__main__":
    raise SystemExit(main())
