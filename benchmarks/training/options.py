"""What `benchmarks/train.py` can be told, and the trainings that come of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ..provenance import ROOT
from ..workloads import registry
from ..workloads.data.folders import VARIABLES
from . import peers
from .jobs import PLAIN, SINGLE, TUNED, Job, UnfitError, recipe

QUICK_METHODS = (SINGLE, "sum", TUNED, "pcgrad", "mgda", "upgrad")
METHODS = (
    *QUICK_METHODS,
    "cagrad",
    "nashmtl",
    "imtlg",
    "alignedmtl",
    "fairgrad",
    "randomweights",
    "uncertaintyweighting",
)
LADDER = ("attributes-2", "attributes-8", "attributes-20")
"""With `attributes-40`, what shows cost over K; no baselines are trained for them."""
PEERS = ("pcgrad", "mgda", "cagrad", "upgrad")
"""Whose counterparts are trained with ``--peers``."""
BESIDE_STEPS = 25
"""Of plain steps and peers that ``--peers`` adds: for what they cost, and whether they agree."""
QUICK_TASKS = {"libmtl/mgda": 8}
"""Peers whose steps take so long beyond so many tasks that a quick grid is without them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """See `parse`."""

    workloads: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    steps: int | None
    rounds: int
    draws: int
    quick: bool
    peers: bool
    threads: int
    workers: int
    runs: Path
    output: Path
    docs: Path
    machine: str | None
    save_every: float
    report_only: bool


def parse(arguments: Sequence[str] | None) -> Options:
    """The command line; ``--data`` is put into the environment, where the loaders look."""
    parser = argparse.ArgumentParser(description="Trains workloads with methods; writes tables, pictures and a page.")
    known = ", ".join(registry.WORKLOADS | registry.INSTALLED)
    add = parser.add_argument
    # fmt: off
    add("--workloads", nargs="+", metavar="NAME", help=f"of {known}, attributes-K, and with --data "
        f"{', '.join(registry.GIVEN)} (default: all whose data is here)")
    add("--methods", nargs="+", metavar="SPEC", help="as get_method knows them, mgda:normalize=l2; single, tuned, "
        f"plain; torchjd/NAME, libmtl/NAME (default: {' '.join(METHODS)}; with --quick {' '.join(QUICK_METHODS)})")
    add("--quick", action="store_true", help="short trainings, few methods, two seeds: the grid in some ten minutes")
    add("--peers", action="store_true", help="also plain steps, and TorchJD and LibMTL where they are installed")
    add("--seeds", type=int, help="trainings of each (default: 3; with --quick 2)")
    add("--steps", type=int, help="of a training (default: the workload's own)")
    add("--rounds", type=int, help="evaluations of a training (default: 20; with --quick 4)")
    add("--draws", type=int, help="fixed weights that are tried beside equal ones (default: 8; with --quick 2)")
    add("--data", action="append", default=[], metavar="NAME=FOLDER", help=f"where {', '.join(VARIABLES)} lie")
    add("--threads", type=int, default=1, help="of the CPU (default: 1)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that train networks for single tasks and "
        "tuned weights, whose time is not shown (default: one for each core)")
    add("--runs", type=Path, help="folder of finished and unfinished trainings (default: build/train; with --quick "
        "build/train-quick)")
    add("--save-every", type=float, default=20.0, help="seconds between checkpoints (default: 20)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of tables and pictures")
    add("--docs", type=Path, default=ROOT / "docs" / "evidence.md", help="the page (default: docs/evidence.md)")
    add("--machine", help="name of the files (default: from the processor's name)")
    add("--report-only", action="store_true", help="pictures and page from tables that are there; trains nothing")
    # fmt: on
    given = parser.parse_args(arguments)
    for text in given.data:
        name, _, folder = text.partition("=")
        if name not in VARIABLES or not folder:
            parser.error(f"expected --data NAME=FOLDER with a name of {', '.join(VARIABLES)}, found {text!r}")
        os.environ[VARIABLES[name]] = folder
    quick = given.quick
    options = Options(
        workloads=tuple(given.workloads or [*registry.names(), *LADDER]),
        methods=tuple(given.methods or (QUICK_METHODS if quick else METHODS)),
        seeds=given.seeds or (2 if quick else 3),
        steps=given.steps,
        rounds=given.rounds or (4 if quick else 20),
        draws=given.draws or (2 if quick else 8),
        quick=quick,
        peers=given.peers,
        threads=given.threads,
        workers=given.workers,
        runs=given.runs or ROOT / "build" / ("train-quick" if quick else "train"),
        output=given.output,
        docs=given.docs,
        machine=given.machine,
        save_every=given.save_every,
        report_only=given.report_only,
    )
    for name, least in (("seeds", 1), ("rounds", 1), ("draws", 1), ("threads", 1), ("workers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} is out of range; expected at least {least}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps} is out of range; expected at least 1")
    try:
        for name in options.workloads:
            registry.find(name)
        for method in options.methods:
            _check(method)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return options


def _check(method: str) -> None:
    """Raise TypeError or ValueError for a spec that no number of tasks makes right."""
    if "/" in method:
        peers.check(method)
    elif method not in (SINGLE, TUNED, PLAIN):
        with contextlib.suppress(UnfitError):
            recipe(Job("", method, 0, 1, 1), [str(k) for k in range(8)])


def plan(options: Options) -> tuple[list[Job], list[tuple[Job, str]]]:
    """All trainings, workload by workload, methods in turn; and what a quick grid leaves out, with the reason.

    Raises:
        DataMissingError: the data of a workload that was asked for is not here.
    """
    beside: list[str] = []
    if options.peers:
        ours = [name for name in PEERS if name in options.methods]
        beside = [name for name in (PLAIN, *peers.available(ours)) if name not in options.methods]
    jobs: list[Job] = []
    left_out: list[tuple[Job, str]] = []
    for name in options.workloads:
        workload = registry.build(name, 0)
        steps = options.steps or (workload.quick_steps if options.quick else workload.steps)
        for seed in range(options.seeds):
            for method in options.methods:
                parts = [""]
                if name in LADDER and method in (SINGLE, TUNED):
                    continue
                if method == SINGLE:
                    parts = [task.name for task in workload.tasks] if workload.single_task else []
                elif method == TUNED:
                    parts = [str(number) for number in range(options.draws)]
                jobs += [Job(name, method, seed, steps, min(options.rounds, steps), part) for part in parts]
            if seed == 0 or not options.quick:
                others = [Job(name, method, seed, min(steps, BESIDE_STEPS), 1) for method in beside]
                reasons = {job: _too_long(job, len(workload.tasks)) if options.quick else "" for job in others}
                jobs += [job for job, reason in reasons.items() if not reason]
                left_out += [(job, reason) for job, reason in reasons.items() if reason]
    return jobs, left_out


def _too_long(job: Job, num_tasks: int) -> str:
    """Why a quick grid is without a peer; empty where it has it."""
    most = QUICK_TASKS.get(job.method, num_tasks)
    return f"more than {most} tasks take it too long for --quick" if num_tasks > most else ""
