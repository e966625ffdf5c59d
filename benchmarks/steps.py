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
missing, or where on a GPU other than the CUDA kernels ran.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mtl_kernels
from benchmarks import device, results, timing
from benchmarks.device import Device, Host
from benchmarks.results import OURS
from mtl_kernels import dispatch
from mtl_optim import MGDA, Method, MultiTaskOptimizer, PCGrad

BUDGET = 1.05
LIMIT = 1e-5
COLUMNS = ("method", "provider", "K", "median_ms", "p20_ms", "p80_ms", "combine_ms", "ratio_to_K_backwards",
           "within_budget", "launches", "copies", "syncs", "correct", "backend", "note")  # fmt: skip


class Network(nn.Module):
    """A trunk of four convolutions and a wide layer, and K heads."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 256))
        self.heads = nn.ModuleList(nn.Linear(256, 10) for _ in range(num_tasks))

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        features = self.trunk(images).relu()
        return [nn.functional.cross_entropy(head(features), labels[k]) for k, head in enumerate(self.heads)]


class Workload:
    """One network with its batch, and the ways to get its gradients."""

    def __init__(self, num_tasks: int, method: Method, where: Device | None = None) -> None:
        self.where = where or Host()
        self.num_tasks = num_tasks
        generator = torch.Generator().manual_seed(num_tasks)
        torch.manual_seed(num_tasks)
        self.network = Network(num_tasks).to(self.where.device)
        self.images = torch.randn(64, 3, 32, 32, generator=generator).to(self.where.device)
        self.labels = torch.randint(10, (num_tasks, 64), generator=generator).to(self.where.device)
        self.method = method
        self.optimizer = MultiTaskOptimizer(torch.optim.SGD(self.network.parameters(), lr=0.0), method)
        self.combination: list[Callable[[], float]] = []

    def losses(self) -> list[Tensor]:
        self.network.zero_grad()
        return self.network.losses(self.images, self.labels)

    def plain_sum(self) -> None:
        torch.stack(self.losses()).sum().backward()  # type: ignore[no-untyped-call]

    def backwards(self) -> list[list[Tensor | None]]:
        losses, rows = self.losses(), []
        parameters = list(self.network.parameters())
        for k, loss in enumerate(losses):
            for parameter in parameters:
                parameter.grad = None
            loss.backward(retain_graph=k < len(losses) - 1)  # type: ignore[no-untyped-call]
            rows.append([parameter.grad for parameter in parameters])
        return rows

    def capture(self) -> None:
        self.optimizer.zero_grad()
        losses = self.network.losses(self.images, self.labels)
        self.optimizer.backward(losses, accumulate=True)

    def ours(self) -> None:
        self.capture()
        stop = self.where.stopwatch()
        self.optimizer.combine()
        self.combination.append(stop())

    def counts(self) -> device.Counts | None:
        """What the combination launches, copies and waits for."""

        def counted() -> None:
            self.optimizer.combine()

        return self.where.count(counted, before=self.capture)

    def torchjd(self) -> Callable[[], None] | None:
        try:
            from torchjd import aggregation, autojac
        except ImportError:
            return None
        aggregator = {"pcgrad": aggregation.PCGrad, "mgda": aggregation.MGDA}[self.method.name]()

        def step() -> None:
            features = self.network.trunk(self.images).relu()
            self.network.zero_grad()
            losses = [
                nn.functional.cross_entropy(head(features), self.labels[k]) for k, head in enumerate(self.network.heads)
            ]
            autojac.mtl_backward(losses, features=features)
            autojac.jac_to_grad(self.network.trunk.parameters(), aggregator)

        return step

    def error(self) -> float:
        """Relative error of the trunk's gradient against a float64 combination with the weights of the report."""
        self.ours()
        trunk = list(self.network.trunk.parameters())
        found = torch.cat([parameter.grad.flatten() for parameter in trunk if parameter.grad is not None]).double()
        losses = self.network.losses(self.images, self.labels)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, trunk, retain_graph=True)]) for loss in losses
        ]
        report = self.optimizer.report
        if report is None:
            raise RuntimeError("no report after a step")
        expected = torch.stack([row.double() for row in rows]).T @ report.weights
        return float((found - expected).norm() / expected.norm())


def until_done(call: Callable[[], object], where: Device) -> Callable[[], None]:
    """The call and the wait for its work."""

    def run() -> None:
        call()
        where.synchronize()

    return run


class Report:
    """The CSV, written anew with every row that comes or grows."""

    def __init__(self, path: Path, environment: dict[str, str | int]) -> None:
        self.path, self.environment = path, environment
        self.rows: list[dict[str, object]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: object) -> dict[str, object]:
        self.rows.append({**dict.fromkeys(COLUMNS, ""), **values, **self.environment})
        print({name: value for name, value in values.items() if value != ""}, flush=True)
        self.write()
        return self.rows[-1]

    def write(self) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *self.environment], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def measure(workload: Workload, effort: timing.Effort, report: Report) -> dict[str, object]:
    """Checks and times one workload; the row of ours."""
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
    mine: dict[str, object] = {}
    for provider, found in timings.items():
        ours = provider == OURS
        ratio = found.median / floor if correct or not ours else None
        row = report.add(
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
        mine = row if ours else mine
    return mine


def main(given: list[str] | None = None) -> int:
    """Measures every workload and writes the CSV; 1 with a fault."""
    parser = argparse.ArgumentParser(description="What combining gradients adds to a training step.")
    parser.add_argument("--tasks", type=int, nargs="+", default=[3, 8, 40], help="numbers of tasks (default: 3 8 40)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV")
    parser.add_argument("--machine", default=None, help="name of the file (default: from the processor's name)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="few repeats: a look, not a measurement")
    arguments = parser.parse_args(given)
    where = device.find(arguments.device)
    environment = results.environment(arguments.machine, where.name)
    torch.backends.cudnn.deterministic = True  # or the rows that are checked would not be those that were combined
    torch.backends.cudnn.allow_tf32 = False
    on_gpu = where.device.type == "cuda"
    effort = timing.QUICK if arguments.quick else timing.Effort(15, 5, 1e-3, 3.0 if on_gpu else 12.0)
    print(mtl_kernels.show_config())
    report = Report(arguments.output / f"{environment['machine']}-steps.csv", environment)
    measured: list[tuple[Workload, dict[str, object]]] = []
    for num_tasks, method in itertools.product(arguments.tasks, (PCGrad(), MGDA())):
        try:
            workload = Workload(num_tasks, method, where)
            measured.append((workload, measure(workload, effort, report)))
        except Exception as error:
            report.add(method=method.name, provider=OURS, K=num_tasks, note=f"failed: {type(error).__name__}: {error}")
    for workload, row in measured:
        try:
            counts = workload.counts()
        except Exception as error:
            row["note"] = f"counting failed: {type(error).__name__}: {error}"
        else:
            if counts is not None:
                row.update(launches=counts.kernels, copies=counts.copies, syncs=counts.syncs)
        report.write()
    print(f"wrote {report.path}")
    faults = [row for row in report.rows if row["correct"] is False or row["note"]]
    faults += [row for row in report.rows if on_gpu and row["backend"] not in ("", "cuda")]
    for row in faults:
        shown = ("method", "K", "provider", "correct", "backend", "note")
        print("FAULT:", ", ".join(f"{name} {row[name]}" for name in shown if row[name] != ""))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
