"""The roofline picture: bandwidth that each kernel reaches against what the machine gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import OURS, Row


def roofline(rows: Sequence[Row], path: Path) -> bool:
    """Draws GB/s over the size of the rows for gram and combine, one line per K; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [k for k in ("gram", "combine") if any(r.kernel == k and r.provider == OURS for r in rows)]
    if not kernels:
        return False
    figure, all_axes = pyplot.subplots(1, len(kernels), figsize=(6.5 * len(kernels), 4.8), squeeze=False, sharey=True)
    for axes, kernel in zip(all_axes[0], kernels, strict=True):
        shown = [r for r in rows if r.kernel == kernel and r.dtype == "float32" and r.correct and r.gb_per_s]
        tasks = sorted({r.K for r in shown})
        colors = pyplot.get_cmap("viridis")
        for place, num_tasks in enumerate(tasks):
            color = colors(place / max(1, len(tasks) - 1) * 0.9)
            for provider, style, width in ((OURS, "o-", 1.8), ("torch", "x:", 1.0)):
                line = sorted((r.K * r.N * 4, r.gb_per_s) for r in shown if r.K == num_tasks and r.provider == provider)
                if not line:
                    continue
                axes.plot(*zip(*line, strict=True), style, color=color, lw=width, ms=4,
                          label=f"K = {num_tasks}" if provider == OURS else None)  # fmt: skip
        floor = sorted((r.K * r.N * 4, _floor_rate(r)) for r in shown if r.provider == OURS)
        if floor:
            axes.plot(*zip(*floor, strict=True), "s", color="black", ms=3, mfc="none", label=_FLOOR[kernel])
        axes.plot([], [], "x:", color="gray", label=f"torch, {_TORCH[kernel]}")
        axes.set(xscale="log", xlabel="bytes of all K rows", title=f"{kernel}, float32")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    all_axes[0][0].set_ylabel("GB/s of the bytes that must be moved")
    first = next(r for r in rows if r.provider == OURS)
    figure.suptitle(f"{first.cpu}, {first.threads} threads, {first.instruction_set}; torch {first.torch}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


_FLOOR = {"gram": "threaded read of the same bytes", "combine": "read K N + write N"}
_TORCH = {"gram": "J @ J.T", "combine": "w @ J"}


def _floor_rate(row: Row) -> float:
    """GB/s at which the denominator moves the bytes of the row."""
    return row.gb_per_s * row.median_us / row.denominator_us if row.gb_per_s and row.denominator_us else 0.0
