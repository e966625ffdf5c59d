"""How far each method is from an independent oracle, over generated cases.

    python -m benchmarks.agreement [METHOD ...] [--quick] [--cases 10000] [--out FOLDER]

Writes MACHINE-agreement.csv into a folder where one is given. Ends with 1 if any deviation is over its tolerance.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import results
from .oracles import Agreement, agreements

COLUMNS = ("method", "oracle", "cases", "median", "largest", "tolerance")
SEED = 20260101
CASES, FEW_CASES = 10000, 200
"""Of each oracle, and in a quick look."""


def run(agreement: Agreement, cases: int, seeds: Iterable[int] | None = None) -> dict[str, object]:
    """The deviations of an agreement: median, largest, and the seed of the case with the largest one."""
    chosen = range(SEED, SEED + cases) if seeds is None else list(seeds)
    found = np.array([agreement.deviation(np.random.default_rng(seed)) for seed in chosen])
    worst = int(np.argmax(np.where(np.isnan(found), np.inf, found)))
    return {
        "method": agreement.method,
        "oracle": agreement.oracle,
        "cases": len(found),
        "median": float(np.median(found)),
        "largest": float(found[worst]),
        "tolerance": agreement.tolerance,
        "seed": chosen[worst],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", help="all of them by default")
    parser.add_argument("--quick", action="store_true", help="few cases: a look, not a proof")
    parser.add_argument("--cases", type=int, help=f"of each oracle (default: {CASES}; with --quick {FEW_CASES})")
    parser.add_argument("--out", type=Path, help="a folder for the CSV")
    parser.add_argument("--machine", help="how the file is named")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = agreements()
    wanted = [one for one in known if not options.methods or one.method in options.methods]
    if missing := set(options.methods) - {one.method for one in known}:
        parser.error(
            f"no oracle for {', '.join(sorted(missing))}; there are {', '.join(sorted({one.method for one in known}))}"
        )
    cases = options.cases or (FEW_CASES if options.quick else CASES)
    console = Console()
    found = [run(one, cases) for one in track(wanted, "agreeing", console=console, transient=True)]
    table = Table(*COLUMNS)
    for row in found:
        cells = [f"{row[name]:.1e}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        table.add_row(*cells)
    console.print(table)
    if options.out is not None:
        facts = results.environment(options.machine, quick=options.quick)
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / f"{facts['machine']}-agreement.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *facts], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | facts for row in found)
    # Not below or at its tolerance, so that nan fails too.
    failed = [row for row in found if not float(str(row["largest"])) <= float(str(row["tolerance"]))]
    for row in failed:
        console.print(f"{row['method']} against {row['oracle']}: over the tolerance in the case of seed {row['seed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
