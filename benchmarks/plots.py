"""Pictures: bandwidth of kernels against what the machine gives, times of solvers, steps against K backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import OURS, Row


def roofline(rows: Sequence[Row], path: Path, dtypes: Sequence[str] = ("float32",)) -> bool:
    """Draws GB/s over the size of the rows for gram and combine, one line per K; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.measure in _KERNEL_TIMES and row.correct and row.gb_per_s]
    kernels = [k for k in ("gram", "combine") if any(r.kernel == k and r.provider == OURS for r in rows)]
    if not kernels:
        return False
    figure, all_axes = pyplot.subplots(
        len(dtypes), len(kernels), figsize=(6.5 * len(kernels), 4.8 * len(dtypes)), squeeze=False, sharey=True
    )
    for line, dtype in zip(all_axes, dtypes, strict=True):
        for axes, kernel in zip(line, kernels, strict=True):
            _panel(axes, [r for r in rows if r.kernel == kernel and r.dtype == dtype], pyplot.get_cmap("viridis"))
            axes.set(xscale="log", xlabel="bytes of all K rows", title=f"{kernel}, {dtype}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize=8)
        line[0].set_ylabel("GB/s of the bytes that must be moved")
    first = next(r for r in rows if r.provider == OURS)
    where = f"{first.cpu}, {first.threads} threads, {first.instruction_set}"
    figure.suptitle(f"{where if first.device in ('', 'cpu') else first.device}; torch {first.torch}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _panel(axes: Any, rows: Sequence[Row], colors: Any) -> None:
    """One kernel at one dtype: ours, torch, and what the memory gives."""
    tasks = sorted({row.K for row in rows})
    others = [name for name in _TORCH if any(row.provider == name for row in rows)][:1]
    for place, num_tasks in enumerate(tasks):
        color = colors(place / max(1, len(tasks) - 1) * 0.9)
        for provider, style, width in ((OURS, "o-", 1.8), *((other, "x:", 1.0) for other in others)):
            points = sorted((r.row_bytes, r.gb_per_s) for r in rows if r.K == num_tasks and r.provider == provider)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, lw=width, ms=4,
                          label=f"K = {num_tasks}" if provider == OURS else None)  # fmt: skip
    ours = [row for row in rows if row.provider == OURS and row.denominator_us]
    if ours:
        floor = sorted((row.row_bytes, _floor_rate(row)) for row in ours)
        axes.plot(*zip(*floor, strict=True), "s", color="black", ms=3, mfc="none", label=_floor_name(ours[0]))
    if others:
        axes.plot([], [], "x:", color="gray", label=others[0])


_KERNEL_TIMES = ("", "clock", "graph", "events")
_TORCH = ("torch", "torch.mm float32 out", "torch.mm")


def _floor_name(row: Row) -> str:
    if row.denominator.startswith("copy"):
        return row.denominator
    return {"gram": "threaded read of the same bytes", "combine": "read K N + write N"}[row.kernel]


def _floor_rate(row: Row) -> float:
    """GB/s at which the denominator moves the bytes of the row."""
    return row.gb_per_s * row.median_us / row.denominator_us if row.gb_per_s and row.denominator_us else 0.0


def solves(rows: Sequence[dict[str, Any]], path: Path, where: str) -> bool:
    """Draws the time of a solve over K, ours and others, a panel for each method; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = sorted({row["method"] for row in rows})
    if not methods:
        return False
    across = min(6, len(methods))
    down = -(-len(methods) // across)
    figure, all_axes = pyplot.subplots(
        down, across, figsize=(2.6 * across, 2.2 * down), squeeze=False, sharex=True, sharey=True
    )
    styles = {OURS: ("o-", "C0"), "torchjd": ("s--", "C1"), "LibMTL": ("^:", "C2")}
    lines: dict[str, Any] = {}
    for axes, method in zip(all_axes.flat, methods, strict=False):
        for provider, (style, color) in styles.items():
            own = [r for r in rows if r["method"] == method and r["provider"] == provider and r["batch"] == 1]
            points = sorted((row["K"], row["median_us"]) for row in own)
            if points:
                (lines[provider],) = axes.plot(*zip(*points, strict=True), style, color=color, ms=3, lw=1.2)
        axes.set(xscale="log", yscale="log", title=method)
        axes.title.set_size(8)
        axes.grid(alpha=0.3)
    for axes in list(all_axes.flat)[len(methods) :]:
        axes.set_visible(False)
    for line in all_axes:
        line[0].set_ylabel("us a solve")
    figure.legend(lines.values(), lines.keys(), loc="lower right", fontsize=8)
    figure.suptitle(f"Time of the weights over K, one thread; {where}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def passes(rows: Sequence[dict[str, Any]], path: Path, where: str) -> bool:
    """Draws steps relative to K backward passes over K, a panel for each network; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "ratio_to_K_backwards" in row]
    panels = list(dict.fromkeys(row["network"] for row in rows))
    if not panels:
        return False
    modes = [mode for mode in dict.fromkeys(row["mode"] for row in rows) if mode != "K backwards"]
    tasks = sorted({row["K"] for row in rows})
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, all_axes = pyplot.subplots(
        down, across, figsize=(4.2 * across, 3.4 * down + 0.6), squeeze=False, sharex=True, sharey=True
    )
    lines: dict[str, Any] = {}
    for axes, network in zip(all_axes.flat, panels, strict=False):
        axes.axhline(1, color="black", lw=0.8)
        for place, mode in enumerate(modes):
            own = [row for row in rows if row["network"] == network and row["mode"] == mode]
            points = sorted((row["K"], row["ratio_to_K_backwards"]) for row in own)
            if points:
                style = f"{'osD^vP*Xh<>'[place % 11]}{'-' if 'factored' in mode else '--'}"
                (lines[mode],) = axes.plot(*zip(*points, strict=True), style, color=f"C{place}", ms=5, lw=1.3)
        axes.set(xscale="log", yscale="log", title=network)
        axes.title.set_size(9)
        axes.set_xticks(tasks, [str(num_tasks) for num_tasks in tasks], minor=False)
        axes.minorticks_off()
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if _among(rows, tick)]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(alpha=0.3)
    for axes in list(all_axes.flat)[len(panels) :]:
        axes.set_visible(False)
    for line in all_axes:
        line[0].set_ylabel("a step / K backwards")
    for axes in all_axes[-1]:
        axes.set_xlabel("K")
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=min(5, len(lines)), fontsize=8)
    figure.suptitle(f"A training step relative to K backward passes; {where}", fontsize=9)
    figure.tight_layout(rect=(0, 0.6 / (3.4 * down + 0.6), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _among(rows: Sequence[dict[str, Any]], tick: float) -> bool:
    """Whether a tick is near some ratio."""
    found = [row["ratio_to_K_backwards"] for row in rows]
    return bool(0.6 * min(found) <= tick <= 1.6 * max(found))
