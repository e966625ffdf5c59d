"""The demo from images to table, picture and numbers."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations
from time import perf_counter
from typing import Any

import torch
from rich import progress as bars
from rich.console import Console
from rich.padding import Padding
from torch import Tensor

import mtl_kernels
from mtl_kernels import dispatch
from mtl_kernels.config import config

from . import data, plots
from .options import Options
from .specs import build, label
from .table import notes, table
from .tasks import TASKS
from .train import LEARNING_RATE, Run, time_one_backward, train

RESULTS = "results.json"
PICTURE = "demo.png"
MIN_WIDTH = 98
MOST_THREADS = 4


def run(options: Options) -> dict[str, Any]:
    """Trains with every method, prints the table, writes demo.png and results.json into ``options.output``.

    Returns:
        What results.json holds.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, MIN_WIDTH))
    backend = mtl_kernels.use_backend(options.backend) if options.backend else contextlib.nullcontext()
    start = perf_counter()
    with _threads(options.threads), backend:
        train_set, test_set = data.load(options.seed)
        runs = _train_all(train_set, test_set, options, console)
        one_backward = time_one_backward(train_set, options)
        results = _results(runs, options, one_backward)
    picture, numbers = options.output / PICTURE, options.output / RESULTS
    plots.draw(runs, picture)
    numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(table(runs, options))
    console.print(Padding(notes(options, results["threads"], one_backward), (0, 0, 1, 0)), style="dim")
    seconds = perf_counter() - start
    console.print(f"Wrote {picture} and {numbers} ({seconds:.0f} s).", markup=False, highlight=False, soft_wrap=True)
    return results


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    # OpenMP threads wait for each other by spinning: where another program wants a core too, a team on every
    # core runs a network this small many times slower. One core is therefore left free.
    torch.set_num_threads(wanted or max(1, min(MOST_THREADS, before - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_all(train_set: data.Pairs, test_set: data.Pairs, options: Options, console: Console) -> list[Run]:
    runs = []
    with _progress(console, options.quiet) as progress:
        names = [label(spec) for spec in options.methods]
        lines = [progress.add_task(name, total=options.steps, start=False, note="") for name in names]
        for spec, name, line in zip(options.methods, names, lines, strict=True):
            progress.start_task(line)

            def advance(accuracies: Tensor | None, line: bars.TaskID = line) -> None:
                if accuracies is not None:
                    progress.update(line, note=f"mean accuracy {100 * float(accuracies.mean()):.1f}%")
                progress.advance(line)

            method, transform = build(spec, options.seed)
            runs.append(train(method, name, train_set, test_set, options, advance, transform))
    return runs


def _progress(console: Console, quiet: bool) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description:<8}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
        console=console,
        disable=quiet,
        refresh_per_second=4,  # it draws from a thread beside what is being timed
    )


def _results(runs: Sequence[Run], options: Options, one_backward: float) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": LEARNING_RATE,
        "train_images": data.NUM_TRAIN,
        "test_images": data.NUM_TEST,
        "threads": torch.get_num_threads(),
        "backend": dispatch.resolve(torch.device("cpu"), options.backend).name,
        "machine": config(),
        "one_backward_ms": one_backward,
        "methods": {run.label: _numbers(run) for run in runs},
    }


def _numbers(run: Run) -> dict[str, Any]:
    tasks = list(TASKS)
    final = run.accuracies[-1]
    return {
        "options": run.method.config(),
        "transform": None if run.transform is None else repr(run.transform),
        "accuracy": dict(zip(tasks, final.tolist(), strict=True)),
        "mean_accuracy": float(final.mean()),
        "conflicting_steps": float(run.conflicts.double().mean()),
        "mean_cosine": {
            f"{tasks[i]}, {tasks[j]}": float(run.cosines[:, i, j].mean()) for i, j in combinations(range(len(tasks)), 2)
        },
        "ms": {part: _spread(values) for part, values in run.milliseconds.items()},
        "curve": {"step": run.evaluated} | {task: run.accuracies[:, k].tolist() for k, task in enumerate(tasks)},
    }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p20", "median", "p80"), values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": cuts[0], "median": statistics.median(values), "p80": cuts[-1]}
