"""Trains the workloads of `benchmarks/workloads` with methods and seeds; tables, pictures, and docs/evidence.md.

    python benchmarks/train.py --quick --peers      # every workload, some methods, two seeds, short trainings
    python benchmarks/train.py --workloads digits --methods single sum tuned pcgrad mgda --seeds 5
    python benchmarks/train.py --data nyuv2=FOLDER --workloads nyuv2

Every training goes through the same loop. What is finished is kept in ``--runs``, and what was stopped goes on at its
last checkpoint: the same command again does the rest. The data of a training, its initialisation and its batches
depend on the seed alone, so that methods are compared on the same ones. One thread, unless ``--threads`` says
otherwise. Baselines whose time is not shown are trained first, side by side; everything else has the machine to itself.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.isolate import said
from benchmarks.results import environment
from benchmarks.training import evidence, pictures
from benchmarks.training.ahead import train_ahead
from benchmarks.training.jobs import Job, UnfitError
from benchmarks.training.options import Options, parse, plan
from benchmarks.training.record import Record, write_tables
from benchmarks.training.run import trained
from benchmarks.workloads.data.splits import DataMissingError


def train(jobs: Sequence[Job], options: Options, console: Console) -> tuple[list[Record], list[tuple[Job, str]]]:
    """The records of all jobs, and what was left out: methods that are not for so many tasks, and peers that fail."""
    facts = environment(options.machine, quick=options.quick)
    gc.freeze()  # or what is loaded would be looked through before every measurement of memory
    records, left_out = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console) as bars:
        whole = bars.add_task("trainings", total=len(jobs), note="")
        own = bars.add_task("baselines", total=None, note="")
        train_ahead(
            jobs, options.runs, options.save_every, facts, options.workers, options.threads,
            lambda note: bars.update(own, note=note),
        )  # fmt: skip
        for job in jobs:
            name = " ".join((job.workload, job.method, job.part, f"seed {job.seed}"))
            bars.reset(own, total=job.steps, description=name, note="")
            try:
                record = trained(
                    job, options.runs, options.save_every, facts, lambda done: bars.update(own, completed=done),
                    lambda done, note: bars.update(own, completed=done, note=note),
                )  # fmt: skip
                records.append(record)
            except UnfitError as error:
                left_out.append((job, str(error)))
            except Exception as error:
                if "/" not in job.method:
                    raise
                left_out.append((job, said(error)))
            bars.advance(whole)
    return records, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes everything; 1 where the data of a workload is not here."""
    options, console = parse(arguments), Console()
    machine = str(environment(options.machine)["machine"])
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    written: list[Path] = []
    try:
        if not options.report_only:
            jobs, left_out = plan(options)
            records, failed = train(jobs, options, console)
            written += write_tables(records, [*left_out, *failed], options.output, machine)
        written += pictures.draw(options.output, machine)
        written.append(evidence.write(options.output, machine, options.docs))
    except DataMissingError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    finally:
        torch.set_num_threads(before)
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
