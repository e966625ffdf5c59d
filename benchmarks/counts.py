"""Kernels, copies and waits of one call of each operation, K = 8, seen by a profiler.

In a process of its own: a profiler that was on once goes on slowing whatever the process times after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import mtl_kernels as mk
from benchmarks import device, isolate
from benchmarks.bench import Bench, untimed
from benchmarks.cases import make_inputs
from benchmarks.device import Call, Device
from benchmarks.plan import Case
from benchmarks.providers import SOLVERS, backend_of
from benchmarks.results import OURS

MOST_KERNELS = {"gram": 1, "combine": 1, "pcgrad_step": 2, "mgda_step": 2}
"""What is kept within a number of launches, and waits for nothing."""

SECONDS = 60
_FAILED = "counting"


def counted_calls(where: Device) -> dict[str, Call]:
    inputs = make_inputs(8, 100_000, torch.float32, 1, where)[0]
    gram = mk.gram(inputs.rows)

    def step(solver: str) -> None:
        name, options = SOLVERS[solver]
        weights = mk.gram_solve(inputs.rows, mk.SolverCall(name, options, rng=inputs.rng, advance_rng=True))[1]
        mk.combine(inputs.rows, weights, out=inputs.out)

    return {
        "gram": lambda: mk.gram(inputs.rows),
        "statistics": lambda: mk.statistics(inputs.rows),
        "combine": lambda: mk.combine(inputs.rows, inputs.weights, out=inputs.out),
        "pcgrad": lambda: mk.pcgrad_weights(gram, rng=inputs.rng),
        "min_norm": lambda: mk.min_norm_weights(gram),
        "pcgrad_step": lambda: step("pcgrad"),
        "mgda_step": lambda: step("min_norm"),
    }


def case_of(kernel: str) -> Case:
    return Case(kernel, 8, 100_000, torch.float32)


def measure_counts(bench: Bench) -> None:
    """Rows of what a process of its own counts."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", bench.where.device.type]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    for found in map(json.loads, filter(lambda text: text.startswith("{"), done.stdout.splitlines())):
        add_counts(bench, **found)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError("; ".join([text for text in said if text.startswith(_FAILED)] or said[-1:]))


def add_counts(bench: Bench, kernel: str, kernels: int, copies: int, syncs: int) -> None:
    row = untimed(case_of(kernel), OURS, "count")
    row.launches, row.copies, row.syncs = kernels, copies, syncs
    row.backend = backend_of(OURS, bench.where.device)
    if (most := MOST_KERNELS.get(kernel)) is not None:
        row.budget, row.within_budget = most, kernels <= most and syncs == 0
    bench.add([row])


def main(arguments: list[str] | None = None) -> int:
    """Prints one line of JSON for every call; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/counts.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    where, failed = device.find(parser.parse_args(arguments).device), False
    for kernel, call in counted_calls(where).items():
        try:
            counts = where.count(call)
        except Exception as error:
            failed = True
            print(f"{_FAILED} {kernel}: {isolate.said(error)}", file=sys.stderr)
            continue
        if counts is not None:
            found = {"kernel": kernel, "kernels": counts.kernels, "copies": counts.copies, "syncs": counts.syncs}
            print(json.dumps(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
