"""What a training step costs relative to the K backward passes that the gradients of its tasks would take.

    python benchmarks/passes.py [--tasks 3 8 40] [--networks NAME ...] [--modes NAME ...] [--quick] [--output FOLDER]

On the networks of `benchmarks/networks.py` after some steps of training, in turn, repeat by repeat:

    plain sum            one backward pass of the summed losses
    K backwards          K passes, their gradients kept until the end of the step: the denominator
    harvest              `MultiTaskOptimizer`, PCGrad with a fixed order, as all that follow
    factored, ...        the same rows without gradients of weights, pass by pass, batched, or as it chooses
    last layers, ...     rows of the last layers alone (param groups with gram=False), whole or factored
    features             rows at the features
    TorchJD ...          its `mtl_backward`, and its engine for Gram matrices, where it is installed

The forward pass is in all of them, optimizer steps are in none. Exact modes are checked against a float64 copy of the
network: the largest error of the Gram matrix and of the weights, relative to their largest entries, and the length of
the error of the trunk's gradient. Others take weights from another problem: *cosine* is the largest difference of a
cosine of two tasks from that over all rows, *flips* the pairs of tasks whose sign differs, *turned* the angle between
the trunk's gradients. Peak memory, of the most tasks alone, is what a step takes above what it has after its forward
pass; on a CPU resident memory, each mode in a process of its own. The run fails where a mode of ours fails or has a
wrong gradient.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mtl_kernels
from benchmarks import checks, device, networks, plots, results, timing
from benchmarks.isolate import said
from benchmarks.meters import Allocated, Largest, Meter, Resident
from benchmarks.networks import NETWORKS, Shared
from benchmarks.workload import until_done
from mtl_optim import MultiTaskOptimizer, PCGrad, gram_groups

LIMIT = 1e-4
"""Of the error of an exact gradient."""
WARM_UP, BRIEF_WARM_UP = 60, 10
"""The most steps of training before anything is measured, and those of a quick look."""
TASKS, FEW_TASKS = (3, 8, 40), (3, 8)
QUICK_NETWORKS = ("perceptron, 32", "encoder, 8 x 16", "recommender")
"""A quick look leaves out those whose steps take longest, and the most tasks."""
COLUMNS = (
    "network", "K", "mode", "median_ms", "p20_ms", "p80_ms", "ratio_to_K_backwards", "peak_mb", "gram_error",
    "weights_error", "gradient_error", "cosine", "flips", "turned_degrees", "factored", "passes", "note",
)  # fmt: skip

Cells = dict[str, Any]


@dataclass
class Outcome:
    """What a step came to, in float64; None where a mode does not tell."""

    gram: Tensor | None = None
    weights: Tensor | None = None
    gradient: Tensor | None = None
    how: tuple[str, ...] = ()
    passes: str = ""


class Mode:
    """A way to the gradients of a step, on a network of its own."""

    def __init__(self, network: Shared) -> None:
        self.network = copy.deepcopy(network)

    def forward(self) -> tuple[list[Tensor], Tensor]:
        """The losses and the features."""
        self.network.zero_grad()
        features = self.network.features()
        return self.network.losses(features), features

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        raise NotImplementedError

    def step(self) -> None:
        self.backward(*self.forward())

    def outcome(self) -> Outcome:
        self.step()
        return Outcome()


class PlainSum(Mode):
    """One backward pass."""

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


class Backwards(Mode):
    """A backward pass for every loss, and nothing else."""

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        rows: list[list[Tensor | None]] = []
        parameters = list(self.network.parameters())
        for k, loss in enumerate(losses):
            self.network.zero_grad()
            loss.backward(retain_graph=k < len(losses) - 1)  # type: ignore[no-untyped-call]
            rows.append([parameter.grad for parameter in parameters])


class Ours(Mode):
    """`MultiTaskOptimizer` with some of its options."""

    def __init__(self, network: Shared, last: bool = False, at_features: bool = False, **options: str) -> None:
        super().__init__(network)
        own = self.network
        optimizer = torch.optim.SGD(gram_groups(own, own.last_part) if last else own.parameters(), lr=0.0)
        self.at_features = at_features
        self.optimizer = MultiTaskOptimizer(optimizer, PCGrad(order="fixed"), **options)  # type: ignore[arg-type]

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        self.optimizer.backward(losses, features=features if self.at_features else None)

    def outcome(self) -> Outcome:
        self.step()
        report = self.optimizer.report
        if report is None:
            raise RuntimeError("no report after a step")
        found = Outcome(report.gram, report.weights, gradient_of(self.network.trunk))
        if report.factoring is not None:
            found.how, found.passes = report.factoring.how, report.factoring.passes
        return found


class Autojac(Mode):
    """TorchJD's Jacobian of the trunk."""

    def __init__(self, network: Shared) -> None:
        from torchjd import aggregation, autojac  # type: ignore[import-not-found]

        super().__init__(network)
        self._autojac, self._aggregator = autojac, aggregation.PCGrad()

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        self._autojac.mtl_backward(losses, features=features)
        self._autojac.jac_to_grad(self.network.trunk.parameters(), self._aggregator)


class Autogram(Mode):
    """TorchJD's Gram matrix over the trunk, and a weighted pass."""

    def __init__(self, network: Shared) -> None:
        from torchjd import aggregation, autogram

        super().__init__(network)
        self._engine = autogram.Engine(self.network.trunk, batch_dim=None)
        self._weighting = aggregation.PCGradWeighting()
        self._gram: Tensor | None = None

    def backward(self, losses: list[Tensor], features: Tensor) -> None:
        stacked = torch.stack(losses)
        self._gram = self._engine.compute_gramian(stacked)
        stacked.backward(self._weighting(self._gram))  # type: ignore[no-untyped-call]

    def outcome(self) -> Outcome:
        self.step()
        return Outcome(self._gram)


FLOOR, WHOLE = "K backwards", "harvest"
"""What times and what problems are compared with."""
EXACT: dict[str, Callable[[Shared], Mode]] = {
    WHOLE: Ours,
    "factored": functools.partial(Ours, capture="factored"),
    "factored, loop": functools.partial(Ours, capture="factored", passes="loop"),
    "factored, batched": functools.partial(Ours, capture="factored", passes="batched"),
}
APPROXIMATE: dict[str, Callable[[Shared], Mode]] = {
    "last layers": functools.partial(Ours, last=True),
    "last layers, factored": functools.partial(Ours, last=True, capture="factored"),
    "features": functools.partial(Ours, at_features=True),
}
PEERS: dict[str, Callable[[Shared], Mode]] = {"TorchJD mtl_backward": Autojac, "TorchJD Gram engine": Autogram}
MODES: dict[str, Callable[[Shared], Mode]] = {
    "plain sum": PlainSum, FLOOR: Backwards, **EXACT, **APPROXIMATE, **PEERS
}  # fmt: skip


def gradient_of(trunk: nn.Module) -> Tensor:
    """All of it in float64."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trunk.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).double()


def reference(network: Shared) -> Outcome:
    """What an exact step comes to, from a float64 copy."""
    exact = networks.exact_copy(network)
    trunk, losses = list(exact.trunk.parameters()), exact.losses(exact.features())
    num_tasks = len(losses)
    rows = losses[0].new_empty(num_tasks, sum(parameter.numel() for parameter in trunk))
    for row, loss in zip(rows, losses, strict=True):
        torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trunk, retain_graph=True)], out=row)
    gram = rows @ rows.T
    weights = checks.pcgrad_weights(gram, [range(num_tasks)] * num_tasks).to(gram.device)
    return Outcome(gram, weights, weights @ rows)


def errors(found: Outcome, exact: Outcome) -> Cells:
    """How far a step is from the exact one, in what it tells."""
    cells: Cells = {}
    if found.gram is not None and exact.gram is not None:
        cells["gram_error"] = float((found.gram.double() - exact.gram).abs().max() / exact.gram.abs().max())
    if found.weights is not None and exact.weights is not None:
        cells["weights_error"] = checks.weights_error(found.weights, exact.weights)
    if found.gradient is not None and exact.gradient is not None:
        cells["gradient_error"] = float((found.gradient - exact.gradient).norm() / exact.gradient.norm())
    return cells


def apart(found: Outcome, whole: Outcome) -> Cells:
    """How far the problem of a step, and what it comes to, are from that over all rows."""
    if found.gram is None or whole.gram is None or found.gradient is None or whole.gradient is None:
        return {}
    own, expected = mtl_kernels.cosines(found.gram), mtl_kernels.cosines(whole.gram)
    pairs = torch.ones_like(own, dtype=torch.bool).triu(1)
    ends = (gradient / gradient.norm() for gradient in (found.gradient, whole.gradient))
    chord = float(torch.dist(*ends))
    return {
        "cosine": float((own - expected).abs()[pairs].max()),
        "flips": int((((own < 0) != (expected < 0)) & pairs).sum()),
        "turned_degrees": math.degrees(2 * math.asin(min(1.0, chord / 2))),
    }


def peak(mode: Mode, warm: Mode, meter: Meter) -> float:
    """MB of a step of a mode; a step of ``warm`` loads what a first step loads."""
    warm.step()
    warm.network.zero_grad()
    losses, features = mode.forward()
    meter.begin()
    mode.backward(losses, features)
    return meter.end() / 1e6


def peak_here(network: str, num_tasks: int, mode: str, threads: int) -> float:
    """MB of a step in this process, which has done nothing yet."""
    torch.set_num_threads(threads)
    built = networks.build(network, num_tasks)
    made = MODES[mode](built)
    try:
        Resident.reset()
    except OSError:
        return peak(made, PlainSum(built), Largest())
    return peak(made, made, Resident())


def peak_apart(network: str, num_tasks: int, mode: str, threads: int) -> float:
    """The same in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([networks.__name__, mtl_kernels.__name__, "mtl_optim"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(peak_here, network, num_tasks, mode, threads).result()


@dataclass
class Run:
    """What is measured on every network, and how; peak memory for one number of tasks, or none."""

    modes: Sequence[str]
    where: device.Device
    effort: timing.Effort
    warm_up: int
    threads: int
    memory: int

    def measure(self, name: str, num_tasks: int) -> list[Cells]:
        """The rows of one network at one K."""
        network = networks.build(name, num_tasks).to(self.where.device)
        networks.train(network, self.warm_up)
        rows: dict[str, Cells] = {}
        made: dict[str, Mode] = {}
        outcomes: dict[str, Outcome] = {}
        for mode in self.modes:
            rows[mode] = {"network": name, "K": num_tasks, "mode": mode}
            try:
                made[mode] = MODES[mode](network)
                made[mode].step()
                outcomes[mode] = made[mode].outcome()  # of a step like those that are timed: first ones may differ
                self.where.synchronize()
            except Exception as error:  # the row says so
                made.pop(mode, None)
                rows[mode]["note"] = said(error)
        compare(rows, outcomes, reference(network))
        timings = timing.measure({mode: until_done(one.step, self.where) for mode, one in made.items()}, self.effort)
        floor = timings[FLOOR].median if FLOOR in timings else None
        for mode, seconds in timings.items():
            row = rows[mode]
            row |= {"median_ms": seconds.median * 1e3, "p20_ms": seconds.p20 * 1e3, "p80_ms": seconds.p80 * 1e3}
            if floor is not None and "note" not in row:
                row["ratio_to_K_backwards"] = seconds.median / floor
        if num_tasks == self.memory:
            for mode, one in made.items():
                try:
                    rows[mode]["peak_mb"] = self.peak(one, name, num_tasks, mode)
                except Exception as error:
                    rows[mode]["note"] = f"memory: {said(error)}"
        return list(rows.values())

    def peak(self, made: Mode, name: str, num_tasks: int, mode: str) -> float:
        if self.where.device.type == "cuda":
            return peak(made, made, Allocated())
        return peak_apart(name, num_tasks, mode, self.threads)


def compare(rows: dict[str, Cells], outcomes: dict[str, Outcome], exact: Outcome) -> None:
    """Adds to rows how far the outcomes are from the exact one; a wrong one is noted."""
    for mode, found in outcomes.items():
        row = rows[mode]
        if mode not in APPROXIMATE:
            row |= errors(found, exact)
        elif WHOLE in outcomes:
            row |= apart(found, outcomes[WHOLE])
        if mode in EXACT and not row["gradient_error"] <= LIMIT:
            row["note"] = f"wrong: the error of the gradient is {row['gradient_error']:.1e}"
        shared = [how for how in found.how if how.startswith(("factored", "dense"))]
        if found.how:
            row["factored"] = f"{sum(how.startswith('factored') for how in shared)} of {len(shared)}"
            row["passes"] = found.passes


def available(wanted: Sequence[str] | None) -> list[str]:
    """Those that are asked for and what they are compared with; the peers where they can be imported."""
    chosen = [mode for mode in MODES if wanted is None or mode in wanted]
    try:
        import torchjd  # noqa: F401
    except ImportError as error:
        if left_out := [mode for mode in chosen if mode in PEERS]:
            print(f"left out: {', '.join(left_out)} ({error})", flush=True)
        chosen = [mode for mode in chosen if mode not in PEERS]
    needed = {FLOOR, *(WHOLE for mode in chosen if mode in APPROXIMATE)}
    return [mode for mode in MODES if mode in chosen or mode in needed]


def show(rows: Sequence[Cells]) -> None:
    """Prints a table, a section for each network and K; without rich the rows that were printed must do."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return
    heads = {"ratio_to_K_backwards": "/ K backwards", "turned_degrees": "turned", "p20_ms": "", "p80_ms": ""}
    shown = [name for name in COLUMNS if heads.get(name, name)]
    table = Table(*(heads.get(name, name.replace("_", " ")) for name in shown))
    before = None
    for row in rows:
        if before not in (None, (row["network"], row["K"])):
            table.add_section()
        before = row["network"], row["K"]
        cells = [row.get(name, "") for name in shown]
        style = "red" if "note" in row else "bold" if row["mode"] in EXACT else None
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells), style=style)
    Console(width=220).print(table)


def write(rows: Sequence[Cells], facts: dict[str, str | int], path: Path) -> None:
    """The CSV, anew."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**_short(row), **facts} for row in rows)


def _short(row: Cells) -> Cells:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+",
                        help="numbers of tasks (default: 3 8 40; with --quick 3 8)")  # fmt: skip
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), metavar="NETWORK",
                        help=f"of {'; '.join(NETWORKS)} (default: all; with --quick "
                        f"{'; '.join(QUICK_NETWORKS)})")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE",
                        help=f"of {'; '.join(MODES)} (default: all)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few cases and short repeats: a look, not a measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the files")
    parser.add_argument("--machine", help="name of the files (default: from the processor's name)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would take longer")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(FEW_TASKS if options.quick else TASKS)
    options.networks = options.networks or list(QUICK_NETWORKS if options.quick else NETWORKS)
    if min(options.tasks) < 2 or max(options.tasks) > mtl_kernels.MAX_TASKS:
        parser.error(f"expected --tasks from 2 to {mtl_kernels.MAX_TASKS}")
    if options.threads < 1:
        parser.error("expected --threads of 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a mode of ours failed or is wrong."""
    begin = time.perf_counter()
    options = parse(arguments)
    where = device.find(options.device)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    on_gpu = where.device.type == "cuda"
    effort = timing.QUICK if options.quick else timing.Effort(15, 5, 1e-3, 3.0 if on_gpu else 12.0)
    run = Run(available(options.modes), where, effort, BRIEF_WARM_UP if options.quick else WARM_UP, options.threads,
              0 if options.no_memory else max(options.tasks))  # fmt: skip
    facts = results.environment(options.machine, where.name, options.quick)
    path = options.output / f"{facts['machine']}-passes.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Cells] = []
    per_task = 0.0
    for num_tasks in options.tasks:
        for name in options.networks:
            start = time.perf_counter()
            if start - begin + per_task * num_tasks > options.seconds:
                found = [{"network": name, "K": num_tasks, "mode": "", "note": "left out: no time left"}]
            else:
                found = run.measure(name, num_tasks)
                per_task = max(per_task, (time.perf_counter() - start) / num_tasks)
            for row in found:
                print(_short(row), flush=True)
            rows += found
            write(rows, facts, path)
    rows.sort(key=lambda row: list(NETWORKS).index(row["network"]))
    write(rows, facts, path)
    show(rows)
    plots.passes(rows, path.with_suffix(".png"), str(facts["cpu"] if not on_gpu else facts["device"]))
    faults = [row for row in rows if "note" in row and row["mode"] not in ("", *PEERS)]
    for row in faults:
        print(f"FAULT: {row['network']}, K {row['K']}, {row['mode']}: {row['note']}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
