"""What a step costs on several ranks: by arithmetic for large models, and measured on this machine over gloo.

    python benchmarks/scaling.py [--tasks 4 8 40] [--parameters 1e8 ...] [--ranks 8 ...] [--bytes 4] [--output FOLDER]
    python benchmarks/scaling.py --measure [--tasks 8] [--quick] [--output FOLDER]

The first evaluates `benchmarks/traffic.py`, as does the table of docs/scaling.md. The second takes steps of the
convolutional network of `benchmarks/networks.py` on ranks of one thread, in turn, repeat by repeat:

    K backwards      K passes on every rank, their gradients kept: the first part of the denominator
    bytes            the collectives of a step and nothing else, of the same sizes: its second part
    ours             `MultiTaskOptimizer`, PCGrad with a fixed order, by data_parallel= and reduce=
    DDP, plain sum   one backward pass of the summed losses through DistributedDataParallel

A repeat begins on all ranks together, and lasts until the last of them is done.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import networks, results, timing
from benchmarks.passes import Backwards
from benchmarks.traffic import MODES, Step
from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.distributed import collectives

COLUMNS = ("K", "N", "R", "mode", "sent_gb", "gram_mb", "held_gb", "moved_gb")
MEASURED = ("network", "K", "ranks", "mode", "median_ms", "p20_ms", "p80_ms", "ratio", "note")
NAMES = {"gram=False": "gram=False, a tenth counts", "refresh_every": "refresh_every=10", "features": "features, 1e6"}
NETWORK = "convolutional"
BUDGET = 1.1
"""Of a step, over its passes and its bytes."""
REPEATS, BRIEF_REPEATS = 15, 5
"""Of a measurement, and of a quick look."""

Facts = dict[str, str | int]


def evaluate(tasks: int, parameters: float, ranks: int, bytes_each: int) -> Iterator[dict[str, Any]]:
    """The rows of one size."""
    step = Step(tasks, parameters, ranks)
    for mode, traffic in MODES.items():
        yield {
            "K": tasks, "N": parameters, "R": ranks, "mode": NAMES.get(mode, mode),
            "sent_gb": traffic.sent(step) * bytes_each / 1e9,
            "gram_mb": 0.0 if "plain" in mode else step.gram_bytes / 1e6,
            "held_gb": traffic.held(step) * bytes_each / 1e9,
            "moved_gb": traffic.moved(step) * bytes_each / 1e9,
        }  # fmt: skip


class Summed(nn.Module):
    """All losses in one, for DistributedDataParallel."""

    def __init__(self, network: networks.Shared) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> Tensor:
        return torch.stack(self.network.losses(self.network.features())).sum()


def ours(network: networks.Shared, reduce: str) -> Callable[[], object]:
    own = copy.deepcopy(network)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(own.parameters(), lr=0.0),
        PCGrad(order="fixed"),
        data_parallel=dist.group.WORLD,
        reduce=reduce,  # type: ignore[arg-type]
    )

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(own.losses(own.features()))

    return step


def bytes_alone(network: networks.Shared, tasks: int, reduce: str) -> Callable[[], object]:
    """The collectives of a step by themselves, as few and as large as there are."""
    ranks, shared = dist.get_world_size(), sum(p.numel() for p in network.trunk.parameters())
    heads = torch.zeros(sum(p.numel() for p in network.heads.parameters()) // tasks)
    whole = torch.zeros(-(-shared // ranks) * ranks)
    piece = torch.zeros(len(whole) // ranks)

    def send() -> None:
        for _ in range(tasks):
            if reduce == "scatter":
                collectives.reduce_scatter(whole, ranks, None)
            else:
                collectives.all_reduce(whole, None)
            collectives.all_reduce(heads, None)
        if reduce == "scatter":
            collectives.all_gather(piece, ranks, None)

    return send


def rank(index: int, ranks: int, store: str, tasks: int, repeats: int, path: str, facts: Facts) -> None:
    """Measures as one of the ranks; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=ranks)
    torch.manual_seed(0)
    network = networks.build(NETWORK, tasks)
    functions: dict[str, Callable[[], object]] = {"K backwards": Backwards(network).step}
    for reduce in ("scatter", "all"):
        functions[f"bytes, {reduce}"] = bytes_alone(network, tasks, reduce)
        functions[f"ours, {reduce}"] = ours(network, reduce)
    model = nn.parallel.DistributedDataParallel(Summed(copy.deepcopy(network)))

    def plain() -> None:
        model.zero_grad()
        model().backward()

    functions["DDP, plain sum"] = plain
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-2, repeats):
        for name in list(functions)[:: 1 if repeat % 2 else -1]:
            dist.barrier()
            begin = time.perf_counter()
            functions[name]()
            dist.barrier()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begin)
    if index == 0:
        write(Path(path), seconds, tasks, ranks, facts)
    dist.destroy_process_group()


def write(path: Path, seconds: dict[str, list[float]], tasks: int, ranks: int, facts: Facts) -> None:
    found = {name: timing.summarize(times) for name, times in seconds.items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*MEASURED, *facts], lineterminator="\n")
        writer.writeheader()
        for name, one in found.items():
            row = {
                "network": NETWORK, "K": tasks, "ranks": ranks, "mode": name, "median_ms": f"{one.median * 1e3:.2f}",
                "p20_ms": f"{one.p20 * 1e3:.2f}", "p80_ms": f"{one.p80 * 1e3:.2f}",
            }  # fmt: skip
            if name.startswith("ours"):
                floor = found["K backwards"].median + found[name.replace("ours", "bytes")].median
                row |= {"ratio": f"{one.median / floor:.3f}", "note": f"over K backwards and bytes; budget {BUDGET}"}
            writer.writerow(row | facts)


def measure(tasks: int, ranks: int, repeats: int, path: Path, facts: Facts) -> None:
    """Runs the ranks on this machine, a thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank, (ranks, os.path.join(folder, "store"), tasks, repeats, str(path), facts | {"threads": 1}), ranks)


def show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        values = (row.get(name, "") for name in columns)
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8, 40])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e8, 1e9, 1e10, 1e11])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--bytes", type=int, default=4, help="of an element of a gradient")
    parser.add_argument("--measure", action="store_true", help="take steps on two ranks of this machine")
    parser.add_argument("--quick", action="store_true", help=f"{BRIEF_REPEATS} repeats: a look, not a measurement")
    parser.add_argument("--repeats", type=int, help=f"(default: {REPEATS}; with --quick {BRIEF_REPEATS})")
    parser.add_argument("--output", type=Path, help="folder of the CSV (--measure: benchmarks/results)")
    parser.add_argument("--machine", help="the name of this machine in file names")
    given = parser.parse_args(arguments)
    if given.measure:
        folder = given.output or Path(__file__).resolve().parent / "results"
        folder.mkdir(parents=True, exist_ok=True)
        facts = results.environment(given.machine, quick=given.quick)
        path = folder / f"{facts['machine']}-scaling.csv"
        repeats = given.repeats or (BRIEF_REPEATS if given.quick else REPEATS)
        measure(given.tasks[0] if len(given.tasks) == 1 else 8, 2, repeats, path, facts)
        with path.open() as file:
            show("two ranks over gloo", list(csv.DictReader(file)), MEASURED)
        return 0
    rows = [
        row
        for tasks in given.tasks
        for parameters, ranks in zip(given.parameters, given.ranks, strict=False)
        for row in evaluate(tasks, parameters, ranks, given.bytes)
    ]
    show("a rank, a step", rows, COLUMNS)
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        with (given.output / "scaling.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
