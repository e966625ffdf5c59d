"""The results of `make gpu` in one page: what failed and what fell short first, then the numbers beside torch's."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .stages import Stage

OURS = "mtl-kernels"
_KERNEL_TIMES = ("graph", "events", "clock")
_NOT_A_RIVAL = ("torch copy_", "torch._foreach_norm, norms only")
_TABLES = ("gram", "combine", "pcgrad_step", "mgda_step")
_MOST_NAMES = 20

Cells = dict[str, str]
"""A row of a CSV."""


def summary(wanted: Sequence[Stage], out: Path, facts: Iterable[str], since: float = 0.0) -> str:
    """The folder in one page, as far as its files were written since a time: those of an earlier run may lie there."""
    lines = ["# GPU report", *failures(wanted), "", *(f"- {fact}" for fact in facts)]
    stages = [[s.name, s.result, f"{s.seconds:.0f}", s.tests] for s in wanted]
    lines += table("", ("stage", "result", "seconds", "tests"), stages)
    for stage in wanted:
        if stage.failed_tests:
            shown, more = stage.failed_tests[:_MOST_NAMES], len(stage.failed_tests) - _MOST_NAMES
            lines += ["", f"Failed in {stage.name}: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"]
    written = sorted(path for path in out.glob("*.csv") if path.stat().st_mtime >= since)
    read = {path.name: read_csv(path) for path in written}
    steps = [row for name, found in read.items() if name.endswith("-steps.csv") for row in found]
    passes = [row for name, found in read.items() if name.endswith("-passes.csv") for row in found]
    rows = [row for name, found in read.items() if not name.endswith(("-steps.csv", "-passes.csv")) for row in found]
    lines += losses(rows, steps, passes)
    for kernel in _TABLES:
        lines += kernel_table(rows, kernel)
    if any(row["backend"] == "triton" for row in rows):
        lines += ["", "Triton's kernel times are with the copies of its tables to the device, which every replay makes "
                      "again; an eager call makes them once."]  # fmt: skip
    lines += calls_table(rows)
    counted = [
        [row["kernel"], row["launches"], row["copies"], row["syncs"], row["within_budget"]]
        for row in rows
        if row["measure"] == "count"
    ]
    lines += table("What one call does, K = 8", ("call", "kernels", "copies", "waits", "budget kept"), counted)
    lines += steps_table(steps)
    lines += passes_table(passes)
    for stage in wanted:
        if stage.result.startswith("failed"):
            lines += ["", f"## The end of: {stage.name}", "", "```", *stage.tail, "```"]
    return "\n".join(lines) + "\n"


def failures(wanted: Sequence[Stage]) -> list[str]:
    """What whoever reads no further must know."""
    failed = [stage for stage in wanted if stage.result.startswith("failed")]
    lines = [f"**Failed: {', '.join(stage.name for stage in failed)}.**"] if failed else []
    lines += [f"**{stage.doubt[0].upper()}{stage.doubt[1:]}.**" for stage in failed if stage.doubt]
    return [text for line in lines for text in ("", line)]


def losses(rows: Sequence[Cells], steps: Sequence[Cells], passes: Sequence[Cells]) -> list[str]:
    """Everything that did not go as it should have."""
    wrong = [[*_name(row), row["provider"], row["measure"], row["error"]] for row in _wrong(rows)]
    wrong += [["training step", row["K"], "", "", row["provider"], row["method"], ""] for row in _wrong(steps)]
    missed = [[*_name(row), row["measure"], *_against(row)] for row in rows if row["within_budget"] == "False"]
    missed += [["training step", row["K"], "", row["method"], "of K backwards", row["ratio_to_K_backwards"], "1.05"]
               for row in steps if row["within_budget"] == "False"]  # fmt: skip
    notes = [[row["measure"], *_name(row), row["batch"], row["provider"], row["note"]]
             for row in rows if row["measure"] in ("failed", "missing", "left out")]  # fmt: skip
    notes += [["failed", "training step", row["K"], "", row["method"], "", row["provider"], row["note"]]
              for row in steps if row["note"]]  # fmt: skip
    notes += [["passes", row["network"], row["K"], "", "", "", row["mode"], row["note"]]
              for row in passes if row["note"]]  # fmt: skip
    if not rows and not steps and not passes:
        return []
    if not (wrong or missed or notes):
        return ["", "Nothing was wrong, failed, left out or beyond its budget."]
    what = ("kernel", "K", "N", "dtype")
    return [
        *table("Wrong results", (*what, "provider", "measured", "error"), wrong),
        *table("Budgets missed", (*what, "measured", "found", "budget"), missed),
        *table("Not measured", ("", *what, "batch", "provider", "why"), sorted(notes, key=lambda note: note[0])),
    ]


def kernel_table(rows: Sequence[Cells], kernel: str) -> list[str]:
    """Ours against a copy of the same bytes, the best of torch, and Triton."""
    timed = [row for row in rows if row["kernel"] == kernel and row["measure"] in _KERNEL_TIMES]
    ours = sorted((row for row in timed if row["provider"] == OURS),
                  key=lambda row: (row["dtype"], int(row["N"]), int(row["K"])))  # fmt: skip
    cells = []
    for row in ours:
        beside = [other for other in timed if _name(other) == _name(row)]
        share = f"{1 / float(row['ratio']):.2f}" if row["ratio"] else ""
        triton = next((other for other in beside if other["provider"] == f"{OURS} triton"), None)
        cells.append([
            row["K"], row["N"], row["dtype"], row["median_us"], row["gb_per_s"], _checked(row, share),
            _against(row)[1] if row["within_budget"] else "", row["within_budget"], *_best(beside),
            "" if triton is None else _checked(triton, _times(triton)),
        ])  # fmt: skip
    head = ("K", "N", "dtype", "us", "GB/s", "of a copy", "budget", "kept", "best of torch", "us", "/ ours",
            "triton / ours")  # fmt: skip
    backends = ", ".join(sorted({row["backend"] for row in ours}))
    return table(f"{kernel} ({backends})", head, cells)


def calls_table(rows: Sequence[Cells]) -> list[str]:
    """Times of whole calls: of the smallest rows, and of solvers on one problem."""
    called = [row for row in rows if row["measure"] in ("call", "latency")]
    small = [row for row in called if row["N"] == "10000" or row["batch"] == "1"]
    cells = []
    for row in small:
        if row["provider"] == OURS:
            beside = [other for other in small if _name(other) == _name(row) and other["measure"] == row["measure"]]
            cells.append([row["kernel"], row["K"], row["dtype"], row["measure"], _checked(row, row["median_us"]),
                          row["budget"], row["within_budget"], *_best(beside)])  # fmt: skip
    head = ("kernel", "K", "dtype", "what", "us", "budget", "kept", "best other", "us", "/ ours")
    return table("Calls at N = 10000 and solvers of one problem", head, cells)


def steps_table(steps: Sequence[Cells]) -> list[str]:
    """Training steps against their K backward passes."""
    cells = [
        [row["K"], row["method"], row["provider"], row["median_ms"], row["combine_ms"],
         _checked(row, row["ratio_to_K_backwards"]), row["within_budget"], row["launches"], row["copies"], row["syncs"]]
        for row in steps
    ]  # fmt: skip
    head = ("K", "method", "provider", "ms", "of which combine", "/ K backwards", "budget kept", "kernels", "copies",
            "waits")  # fmt: skip
    return table("Training steps", head, cells)


def passes_table(passes: Sequence[Cells]) -> list[str]:
    """Ways to take a training step against its K backward passes."""
    columns = ("network", "K", "mode", "median_ms", "ratio_to_K_backwards", "peak_mb", "gradient_error", "factored",
               "passes")  # fmt: skip
    head = ("network", "K", "mode", "ms", "/ K backwards", "peak MB", "error of the gradient", "factored", "passes")
    return table("Passes of a step", head, [[row[name] for name in columns] for row in passes if row["median_ms"]])


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; none without rows."""
    if not rows:
        return []
    lines = ["", f"## {title}"] if title else []
    return [*lines, "", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def _name(row: Cells) -> tuple[str, ...]:
    return row["kernel"], row["K"], row["N"], row["dtype"]


def _wrong(rows: Sequence[Cells]) -> Iterator[Cells]:
    return (row for row in rows if row["correct"] == "False")


def _checked(row: Cells, text: str) -> str:
    return "WRONG" if row["correct"] == "False" else text


def _times(row: Cells) -> str:
    return f"{float(row['times_ours']):.2f}" if row["times_ours"] else ""


def _best(beside: Sequence[Cells]) -> tuple[str, str, str]:
    """The fastest of those that are not ours: its name, microseconds, and how many times ours that is."""
    rivals = [row for row in beside if not row["provider"].startswith(OURS) and row["provider"] not in _NOT_A_RIVAL]
    right = sorted((row for row in rivals if row["correct"] != "False"), key=lambda row: float(row["median_us"]))
    if not right:
        return (", ".join(row["provider"] for row in rivals), "WRONG" if rivals else "", "")
    return right[0]["provider"], right[0]["median_us"], _times(right[0])


def _against(row: Cells) -> tuple[str, str]:
    """What was found and what it must be, in the unit of the budget."""
    if row["measure"] == "count":
        return f"{row['launches']} kernels, {row['syncs']} waits", f"{row['budget']} kernels, no wait"
    if row["kernel"].endswith("_step"):
        return f"{row['median_us']} us", f"{row['budget']} us"
    return f"{1 / float(row['ratio']):.2f} of a copy", f"{1 / float(row['budget']):.2f}"


def read_csv(path: Path) -> list[Cells]:
    try:
        with path.open(newline="") as file:
            return [{name: value or "" for name, value in row.items()} for row in csv.DictReader(file)]
    except OSError:
        return []
