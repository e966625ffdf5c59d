"""What a step costs that does not take K whole backward passes, and how far its problem is from that over all rows.

    python benchmarks/shortcuts.py [--tasks 8 40] [--quick] [--output FOLDER]

On the network of `benchmarks/steps.py` after some steps of training: PCGrad over all rows, over the rows of the last
layers (param groups with gram=False), and over gradients at the features. Times are those of a step without the
optimizer, forward included, measured in turn. *Cosine* is the largest error of a cosine between two tasks, *flips* the
pairs whose sign differs, *turned* the angle between the gradient of the trunk and that of a step over all rows.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mtl_kernels
from benchmarks import results, timing
from benchmarks.workload import Workload
from mtl_optim import MultiTaskOptimizer, PCGrad, gram_groups

COLUMNS = ("way", "K", "median_ms", "p20_ms", "p80_ms", "ratio_to_K_backwards", "cosine", "flips", "turned_degrees")
WARM_UP = 30
"""Steps of training before anything is compared: at first all tasks agree."""


class Way:
    """A step, with an optimizer of its own over the same network."""

    def __init__(self, workload: Workload, groups: Any, at_features: bool = False) -> None:
        self.workload, self.at_features = workload, at_features
        self.optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.0), PCGrad(order="fixed"))

    def step(self) -> None:
        network, labels = self.workload.network, self.workload.labels
        network.zero_grad()
        features = network.trunk(self.workload.images).relu()
        losses = [nn.functional.cross_entropy(head(features), labels[k]) for k, head in enumerate(network.heads)]
        self.optimizer.backward(losses, features=features if self.at_features else None)

    def outcome(self) -> tuple[Tensor, Tensor]:
        """The cosines, and the gradient of the trunk."""
        self.step()
        report = self.optimizer.report
        if report is None:
            raise RuntimeError("no report after a step")
        trunk = self.workload.network.trunk.parameters()
        return report.cosines, torch.cat([p.grad.flatten() for p in trunk if p.grad is not None]).double()


def ways(workload: Workload) -> dict[str, Way]:
    """By name, that over all rows first."""
    network = workload.network
    layers = [layer for layer in network.trunk if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return {
        "all rows": Way(workload, network.parameters()),
        "gram=False: first convolution": Way(workload, gram_groups(network, layers[1])),
        "gram=False: convolutions": Way(workload, gram_groups(network, layers[4])),
        "gram=False: all but the last layer": Way(workload, gram_groups(network, layers[5])),
        "features": Way(workload, network.parameters(), at_features=True),
    }


def train(workload: Workload) -> None:
    """Some plain steps towards labels that the images determine."""
    network, images = workload.network, workload.images
    teacher = torch.randn(images[0].numel(), workload.num_tasks * 10, generator=torch.Generator().manual_seed(1))
    scores = (images.flatten(1) @ teacher).view(len(images), workload.num_tasks, 10)
    workload.labels = scores.argmax(-1).T.contiguous()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(WARM_UP):
        workload.plain_sum()
        optimizer.step()


def measure(num_tasks: int, effort: timing.Effort) -> list[dict[str, Any]]:
    """The rows of one K."""
    workload = Workload(num_tasks, PCGrad(order="fixed"))
    train(workload)
    found = ways(workload)
    outcomes = {name: way.outcome() for name, way in found.items()}
    calls: dict[str, Callable[[], object]] = {
        "plain sum": workload.plain_sum,
        "K backwards": workload.backwards,
        **{name: way.step for name, way in found.items()},
    }
    timings = timing.measure(calls, effort)
    cosines, gradient = outcomes["all rows"]
    rows = []
    for name, seconds in timings.items():
        row: dict[str, Any] = {"way": name, "K": num_tasks, "median_ms": seconds.median * 1e3}
        row |= {"p20_ms": seconds.p20 * 1e3, "p80_ms": seconds.p80 * 1e3}
        row["ratio_to_K_backwards"] = seconds.median / timings["K backwards"].median
        if name in outcomes:
            own, turned = outcomes[name]
            pairs = torch.triu(torch.ones_like(own, dtype=torch.bool), 1)
            cosine = float(nn.functional.cosine_similarity(turned, gradient, dim=0).clamp(-1, 1))
            row["cosine"] = float((own - cosines).abs()[pairs].max())
            row["flips"] = int((((own < 0) != (cosines < 0)) & pairs).sum())
            row["turned_degrees"] = math.degrees(math.acos(cosine))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 40])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--machine", help="how the file is named")
    options = parser.parse_args(arguments)
    if min(options.tasks) < 2 or max(options.tasks) > mtl_kernels.MAX_TASKS:
        parser.error(f"expected --tasks from 2 to {mtl_kernels.MAX_TASKS}")
    facts = results.environment(options.machine)
    rows = [
        row for num_tasks in options.tasks for row in measure(num_tasks, timing.QUICK if options.quick else timing.FULL)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / f"{facts['machine']}-shortcuts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, **facts} for row in rows
        )
    table = Table(*COLUMNS)
    for row in rows:
        cells = [row.get(name, "") for name in COLUMNS]
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
