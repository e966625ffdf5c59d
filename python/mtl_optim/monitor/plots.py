"""Pictures of what a `ConflictMonitor` has seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .records import ConflictRecord

_MOST_NUMBERS = 12
"""Tasks up to which cosines are written into the cells, and lines are named."""


def heatmap(tasks: Sequence[str], cosines: list[list[float]], path: Path) -> None:
    """Averaged cosines, red where tasks conflict."""
    size = 2.5 + 0.45 * len(tasks)
    figure = Figure(figsize=(size + 1, size), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)
    if len(tasks) <= _MOST_NUMBERS:
        for i, row in enumerate(cosines):
            for j, value in enumerate(row):
                if value == value:  # not nan
                    dark = abs(value) > 0.6
                    axes.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("conflict  ←  cosine  →  agreement")
    figure.savefig(path, bbox_inches="tight")


def timeline(history: Sequence[ConflictRecord], path: Path) -> None:
    """Conflicts, norms and weights over the steps."""
    figure = Figure(figsize=(8, 7), dpi=130, layout="constrained")
    above, middle, below = figure.subplots(3, sharex=True)
    steps = [record.step for record in history]
    above.plot(steps, [record.conflict_fraction for record in history], color="k", marker=".")
    above.set_ylabel("pairs in conflict")
    above.set_ylim(-0.02, 1.02)
    names = list(dict.fromkeys(name for record in history for name in record.tasks))
    for name in names:
        there = [(record, record.tasks.index(name)) for record in history if name in record.tasks]
        at = [record.step for record, _ in there]
        middle.plot(at, [record.norms[k] for record, k in there], marker=".", label=name)
        below.plot(at, [record.weights[k] for record, k in there], marker=".")
    middle.set_ylabel("norm")
    if any(value > 0 for record in history for value in record.norms):
        middle.set_yscale("log")
    below.set_ylabel("weight")
    below.set_xlabel("step")
    if len(names) <= _MOST_NUMBERS:
        figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, bbox_inches="tight")
