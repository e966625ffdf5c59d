"""Pictures of the tables: tasks against each other, Delta-m over steps, cost over K, and cosines between tasks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ..documents.source import read_table
from . import scores
from .jobs import PLAIN, SINGLE
from .record import TABLES
from .scores import SUM, Scores

matplotlib.use("Agg")
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette; markers serve without colour."""
MARKERS = "os^Dv*PX<>"
ACROSS = 4
LADDER = re.compile(r"attributes-(\d+)")
_NAMES = ("pareto", "curves", "costs", "cosines")


def draw(folder: Path, machine: str) -> list[Path]:
    """Writes ``MACHINE-train-NAME.png`` from the tables in a folder; those that there is something for.

    Raises:
        FileNotFoundError: the tables are not there.
    """
    runs, curves, cosines = (read_table(folder / f"{machine}-{table}.csv") for table in TABLES)
    found = scores.read(curves)
    pictures = (
        _panels(found, _pareto, lambda one: len(one.metrics) >= 2, "first task", ""),
        _panels(found, _curves, lambda one: one.delta(SUM, _baseline(one)) is not None, "step", "Delta-m, %"),
        _costs(runs),
        _cosines(cosines),
    )
    written = []
    for name, figure in zip(_NAMES, pictures, strict=True):
        if figure is not None:
            written.append(folder / f"{machine}-train-{name}.png")
            figure.savefig(written[-1], dpi=110, bbox_inches="tight")
    return written


def _baseline(one: Scores) -> str:
    return SINGLE if SINGLE in one.test else SUM


def _style(place: int) -> dict[str, Any]:
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}


def _panels(
    found: dict[str, Scores],
    panel: Callable[[Any, Scores, list[str]], None],
    wanted: Callable[[Scores], bool],
    across: str,
    up: str,
) -> Figure | None:
    """A panel for each workload, one legend for all."""
    shown = {name: one for name, one in found.items() if wanted(one)}
    if not shown:
        return None
    methods = list(dict.fromkeys(m for one in shown.values() for m in one.methods if "/" not in m and m != PLAIN))
    columns = min(ACROSS, len(shown))
    down = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * down + 0.6), layout="constrained")
    every = figure.subplots(down, columns, squeeze=False)
    for axes, (name, one) in zip(every.flat, shown.items(), strict=False):
        panel(axes, one, methods)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.set_xlabel(axes.get_xlabel() or across, fontsize=7)
        axes.set_ylabel(axes.get_ylabel() or up, fontsize=7)
    for axes in list(every.flat)[len(shown) :]:
        axes.set_visible(False)
    lines = {label: line for axes in every.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=8
    )
    return figure


def _pareto(axes: Any, one: Scores, methods: list[str]) -> None:
    """The second task against the first, a point a seed."""
    first, second = list(one.metrics)[:2]
    for place, method in enumerate(methods):
        if method in one.test:
            ends = one.final(method).values()
            axes.plot(
                [end[first] for end in ends], [end[second] for end in ends], ls="", ms=5, label=method, **_style(place)
            )
    for task, label, invert in (
        (first, axes.set_xlabel, axes.invert_xaxis),
        (second, axes.set_ylabel, axes.invert_yaxis),
    ):
        label(f"{task}, {one.metrics[task]}{'' if one.higher[task] else ' (axis turned)'}")
        if not one.higher[task]:
            invert()


def _curves(axes: Any, one: Scores, methods: list[str]) -> None:
    """Delta-m against the single-task trainings, where there are some, else against the sum."""
    base = _baseline(one)
    for place, method in enumerate(methods):
        points = [(step, one.delta(method, base, step)) for step in one.steps]
        there = [(step, found) for step, found in points if found is not None]
        if there and method != SINGLE:
            axes.plot([s for s, _ in there], [f.mean for _, f in there], ms=3, lw=1.2, label=method, **_style(place))
            axes.fill_between([s for s, _ in there], [f.least for _, f in there], [f.most for _, f in there],
                              alpha=0.12, color=COLORS[place % len(COLORS)], lw=0)  # fmt: skip
    axes.axhline(0, color="black", lw=0.7)
    last = [found for m in one.methods if (found := one.delta(m, base)) is not None]
    lowest = min(found.least for found in last)
    axes.set_ylim(bottom=lowest - 0.5 * abs(lowest) - 5)


def _costs(runs: Sequence[dict[str, str]]) -> Figure | None:
    """Milliseconds of a step, and of its combination, over K."""
    own = [(int(at[1]), row) for row in runs if (at := LADDER.fullmatch(row["workload"])) and row.get("forward_ms")]
    own = [(number, row) for number, row in own if row["method"] not in (SINGLE, "tuned")]
    if len({number for number, _ in own}) < 2:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    parts = ("forward_ms", "passes_ms", "combination_ms", "optimizer_ms")
    titles = ("a step", "combination (LibMTL: after its passes)", "peak memory of a step, MB")
    for place, method in enumerate(dict.fromkeys(row["method"] for _, row in own)):
        values: dict[int, list[tuple[float, float, float]]] = {}
        for number, row in own:
            if row["method"] == method:
                whole = sum(float(row[part]) for part in parts)
                values.setdefault(number, []).append(
                    (whole, float(row["combination_ms"]), float(row["peak_mb"] or "nan"))
                )
        for axes, cells in zip(panels, range(3), strict=True):
            points = [(k, statistics.median(v[cells] for v in found)) for k, found in sorted(values.items())]
            points = [(k, value) for k, value in points if value > 0]
            if points:
                style = "--" if "/" in method else ":" if method == PLAIN else "-"
                axes.plot(*zip(*points, strict=True), ls=style, ms=4, label=method, **_style(place))
    tasks = sorted({number for number, _ in own})
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="K", title=title)
        axes.title.set_size(9)
        axes.set_xticks(tasks, [str(number) for number in tasks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    return figure


def _cosines(rows: Sequence[dict[str, str]]) -> Figure | None:
    """Of the trainings with the plain sum, mean over steps and seeds."""
    rows = [row for row in rows if row["method"] == SUM and row["cosines"]]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    if not names:
        return None
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(2.9 * across + 1, 2.7 * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False)
    image = None
    for axes, name in zip(every.flat, names, strict=False):
        tasks = list(dict.fromkeys(row["task"] for row in rows if row["workload"] == name))
        matrix = [_mean([row["cosines"] for row in rows if (row["workload"], row["task"]) == (name, t)]) for t in tasks]
        image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu")
        axes.set_title(name, fontsize=9)
        few = len(tasks) <= 8
        axes.set_xticks(range(len(tasks)) if few else [], tasks if few else [], rotation=90, fontsize=6)
        axes.set_yticks(range(len(tasks)) if few else [], tasks if few else [], fontsize=6)
        for i, line in enumerate(matrix if len(tasks) <= 4 else []):
            for j, value in enumerate(line):
                axes.text(
                    j, i, f"{value:+.2f}", ha="center", va="center", fontsize=7, color="w" if abs(value) > 0.6 else "k"
                )
    for axes in list(every.flat)[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=every, shrink=0.5)
    bar.set_label("conflict  ←  cosine  →  agreement")
    return figure


def _mean(cells: Sequence[str]) -> list[float]:
    columns = zip(*([float(value) for value in cell.split()] for cell in cells), strict=True)
    return [sum(column) / len(column) for column in columns]
