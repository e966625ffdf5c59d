"""The table the demo ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from .data import NUM_TEST
from .options import Options
from .tasks import TASKS
from .train import Run


def table(runs: Sequence[Run], options: Options) -> Table:
    """One line per method."""
    result = Table(
        title=f"Accuracy on {NUM_TEST} test images after {options.steps} steps, and median ms per step",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    result.add_column("method", overflow="fold", min_width=20)
    for column in (*TASKS, "mean"):
        result.add_column(column.replace("-", "-\n"), justify="right")
    for column in ("steps in\nconflict", "forward +\nbackward", "combine", "step"):
        result.add_column(column, justify="right")
    for run in runs:
        final = run.accuracies[-1]
        result.add_row(
            run.label.replace("(", "\n(", 1),
            *(f"{100 * value:.1f}%" for value in (*final.tolist(), float(final.mean()))),
            f"{100 * float(run.conflicts.double().mean()):.0f}%",
            *(f"{run.median(part):.2f}" for part in run.milliseconds),
        )
    return result


def notes(options: Options, threads: int, one_backward: float) -> str:
    """How to read the table."""
    plural = "" if threads == 1 else "s"
    return (
        f"One run each, seed {options.seed}, {threads} thread{plural}; other seeds give other numbers, so "
        "read nothing into small differences. In conflict: the gradients of at least one pair of tasks, over "
        f"the shared trunk, have a negative cosine. Every method here runs {len(TASKS)} backward passes a batch, so "
        "that conflicts can be seen; a plain sum of the losses needs one, and its forward + backward "
        f"takes {one_backward:.2f} ms here."
    )
