"""The picture of a demo run: learning curves, and the cosines between task gradients over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .tasks import TASKS
from .train import Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette, safe with any colour vision; markers and dashes serve without colour."""
MARKERS = "os^Dv*PX<>"
DASHES = ("-", "--", "-.", ":")
LEGEND_COLUMNS = 4
MAX_COLUMNS = 200
"""Of a heatmap; more steps than that are averaged in bins."""
INK = "#333333"
PAIRS = list(combinations(range(len(TASKS)), 2))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the PNG."""
    strip, legend = 0.95, 0.25 * math.ceil(len(runs) / LEGEND_COLUMNS)
    figure = Figure(figsize=(11, 4.6 + legend + strip * len(runs)), dpi=130, layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[3.6 + legend, 1.0 + strip * len(runs)])
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    above.suptitle("Test accuracy", x=0.01, ha="left", fontweight="bold", color=INK)
    panels = above.subplots(1, len(TASKS), sharey=True)
    for k, task in enumerate(TASKS):
        _curves(panels[k], runs, k)
        panels[k].set_title(task, fontsize=10, color=INK)
    panels[0].set_ylabel("accuracy", color=INK)
    lines, labels = panels[0].get_legend_handles_labels()
    above.legend(lines, labels, frameon=False, loc="outside lower center", fontsize=9, ncols=LEGEND_COLUMNS)

    below.suptitle("Cosine between task gradients of the shared trunk", x=0.01, ha="left", fontweight="bold", color=INK)
    strips = below.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    binned = [_binned(run.cosines) for run in runs]
    limit = max(0.1, math.ceil(10 * max(float(cosines.abs().max()) for cosines in binned)) / 10)
    for axes, run, cosines in zip(strips, runs, binned, strict=True):
        image = _heatmap(axes, run, cosines, limit)
    per_column = len(runs[0].cosines) / binned[0].shape[1]
    note = f" (each column is the mean of {per_column:.3g})" if per_column > 1 else ""
    strips[-1].set_xlabel(f"step{note}", color=INK)
    bar = below.colorbar(image, ax=list(strips), pad=0.01, fraction=0.03, aspect=12 * len(runs))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("conflict  ←  cosine  →  agreement", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    figure.savefig(path)


def _curves(axes: Axes, runs: Sequence[Run], k: int) -> None:
    for i, run in enumerate(runs):
        axes.plot(
            run.evaluated,
            run.accuracies[:, k].tolist(),
            label=run.label,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)],
            markersize=4,
            linewidth=1.5,
        )
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)


def _heatmap(axes: Axes, run: Run, cosines: Tensor, limit: float) -> AxesImage:
    """One line per pair of tasks; red where the gradients oppose each other."""
    names = list(TASKS)
    image = axes.imshow(
        cosines.tolist(),
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(0, len(run.cosines), len(PAIRS), 0),
    )
    axes.set_yticks([row + 0.5 for row in range(len(PAIRS))], [f"{names[i]}, {names[j]}" for i, j in PAIRS])
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    share = 100 * float(run.conflicts.double().mean())
    axes.set_title(
        f"{run.label}: at least one pair in conflict in {share:.0f}% of the steps",
        fontsize=9,
        loc="left",
        color=INK,
    )
    return image


def _binned(cosines: Tensor) -> Tensor:
    """``[pairs, columns]`` from ``[steps, K, K]``: neighbouring steps averaged to at most MAX_COLUMNS."""
    pairs = torch.stack([cosines[:, i, j] for i, j in PAIRS])
    chunks = pairs.tensor_split(min(MAX_COLUMNS, len(cosines)), dim=1)
    return torch.stack([chunk.mean(1) for chunk in chunks], dim=1).nan_to_num()
