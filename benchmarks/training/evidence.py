"""docs/evidence.md: what the tables of `benchmarks/train.py` show, and nothing that they do not."""

from __future__ import annotations

import os
from pathlib import Path

from ..documents.markdown import table
from ..documents.source import Rows, distinct, read_table, setting
from . import scores
from .costs import HEAD as COST_HEAD
from .costs import cost_rows, peer_rows, value, where_time_goes
from .jobs import PLAIN, SINGLE
from .pictures import LADDER
from .record import TABLES
from .scores import SUM, Scores
from .verdict import lines as verdict


def write(folder: Path, machine: str, page: Path) -> Path:
    """Writes the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(folder, machine, page), encoding="utf-8")
    return page


def text(folder: Path, machine: str, page: Path) -> str:
    """The page from the tables ``MACHINE-train*.csv`` of a folder, whose pictures it shows."""
    every, curves, _ = (read_table(folder / f"{machine}-{table}.csv") for table in TABLES)
    runs = [row for row in every if row["K"]]
    found = scores.read(curves)
    where = os.path.relpath(folder, page.parent)

    def picture(name: str, title: str) -> list[str]:
        there = (folder / f"{machine}-train-{name}.png").is_file()
        return [f"![{title}]({where}/{machine}-train-{name}.png)", ""] if there else []

    parts = [
        "# Evidence: trainings on the workloads",
        "",
        _setting(runs),
        "",
        *_workloads(runs),
        *_deltas(found),
        *picture("curves", "Delta-m over steps"),
        *picture("pareto", "The first two tasks against each other"),
        *verdict(runs, found),
        *_costs(runs),
        *picture("costs", "Cost over K"),
        *_peers(runs),
        "## Cosines between tasks",
        "",
        "Of the trainings with the plain sum, mean over steps and seeds, over the shared parameters.",
        "",
        *picture("cosines", "Cosines between tasks"),
        *_left_out([row for row in every if not row["K"]]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _setting(runs: Rows) -> str:
    """Machine, versions, and what was run."""
    return (
        f"Machine: {setting(runs)} {len(runs):,} trainings, {len(distinct(runs, 'seed'))} seeds.\n"
        "This page is written by `benchmarks/train.py` from `benchmarks/results/*-train*.csv`:\n\n"
        "    python benchmarks/train.py --quick --peers     # trains, draws and writes\n"
        "    python benchmarks/train.py --report-only       # from the tables that are there\n\n"
        "Trainings are short, networks small and seeds few: this shows what is equal, what is not, and what it "
        "costs; it is no "
        "ranking of methods. Data, initialisation and batches of a training depend on the seed alone; Adam with "
        "a cosine "
        "schedule; nothing is tuned but where it says so."
    )


def _workloads(runs: Rows) -> list[str]:
    rows = []
    for name in distinct(runs, "workload"):
        own = [row for row in runs if row["workload"] == name]
        row = next((row for row in own if row.get("shared")), own[0])
        cells = (f"{int(row[column]):,}" if row.get(column) else "" for column in ("parameters", "shared"))
        conflicts = value([row for row in own if row["method"] == SUM], "conflicts")
        share = "" if conflicts is None else f"{100 * conflicts:.0f} %"
        rows.append([name, row["sharing"], row["data"], row["K"], *cells, row["steps"], row["batch"], share])
    head = ("workload", "shared", "data", "K", "parameters", "of them shared", "steps", "batch", "in conflict")
    said = (
        "*In conflict*: of the pairs of tasks, those whose mean cosine is below 0 in the trainings with the plain sum."
    )
    return ["## Workloads", "", said, "", *table(head, rows)]


def _deltas(found: dict[str, Scores]) -> list[str]:
    lines = [
        "## Delta-m",
        "",
        "Percent, mean over tasks of the relative difference to a baseline, positive is better (Maninis et al. "
        "2019, arXiv "
        "1904.08918), on test data; plus or minus the standard deviation over seeds. The baseline is the mean "
        "over its seeds, so "
        "its own column shows the spread that seeds alone make. *tuned*: the best on validation data of equal "
        "and drawn fixed "
        "weights.",
        "",
    ]
    for base, title in ((SINGLE, "Against a network for every task"), (SUM, "Against the plain sum of the losses")):
        shown = {name: one for name, one in found.items() if base in one.test and not _of_ladder(name, one)}
        methods = list(dict.fromkeys(m for one in shown.values() for m in one.methods if "/" not in m and m != PLAIN))
        methods = [m for m in methods if not (base == SUM and m == SINGLE)]
        rows = [[name, *(_cell(one, method, base) for method in methods)] for name, one in shown.items()]
        if rows:
            lines += [f"### {title}", "", *table(("workload", *methods), rows)]
    return lines


def _of_ladder(name: str, one: Scores) -> bool:
    """Whether a workload is there for its cost alone."""
    return bool(LADDER.fullmatch(name)) and SINGLE not in one.test


def _cell(one: Scores, method: str, base: str) -> str:
    found = one.delta(method, base)
    if found is None or found.mean != found.mean:
        return ""
    return f"{found.mean:+.1f}" + ("" if found.deviation != found.deviation else f" ± {found.deviation:.1f}")


def _costs(runs: Rows) -> list[str]:
    rows, over = cost_rows(runs)
    if not rows:
        return []
    return [
        "## What a step costs",
        "",
        "Medians over the steps and seeds, in milliseconds. *passes*: the K backward passes, and that of an "
        "auxiliary loss, with what taking their gradients costs; *combination*: from these to `.grad`. Memory is the "
        "peak of a step above what was there before it.",
        "",
        "The columns behind are of one batch after the training. *K passes*: K backward passes over one graph and "
        "nothing else, their gradients kept; *`backward`*: `opt.backward(losses)` over the same graph, in turn with "
        "them; *more*: the one over the other, 5 % being the aim; *gram*, *solve*, *combine*: the kernels by "
        "themselves; *Python*: what `backward` takes beyond the passes and these.",
        "",
        *table(COST_HEAD, rows),
        *where_time_goes(over, len(rows)),
    ]


def _peers(runs: Rows) -> list[str]:
    head, rows = peer_rows(runs)
    if not rows:
        return []
    return [
        "## Other libraries in the same run",
        "",
        "The same model, data, seeds and Adam: milliseconds of a whole step, with its peak memory in MB in "
        "brackets, and what a "
        "peer takes over ours. *apart*: the distance of the two combined gradients after "
        "some plain steps, both of length 1; *length* that of the peer's over ours. With more than two tasks, "
        "methods that draw "
        "an order have no common result.",
        "",
        *table(head, rows),
    ]


def _left_out(rows: Rows) -> list[str]:
    """A line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reasons.setdefault((row["method"], row["note"]), []).append(row["workload"])
    said = [f"- {method} on {', '.join(dict.fromkeys(names))}: {note}" for (method, note), names in reasons.items()]
    return ["## Left out", "", *said, ""] if said else []
