"""Metrics of a method on a workload by seed, from the tables; single-task and tuned trainings put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .delta import Spread, delta_m, mean_of, spread
from .jobs import TUNED

Rows = Sequence[dict[str, str]]
SUM = "sum"


@dataclasses.dataclass
class Scores:
    """Of one workload.

    Attributes:
        metrics: the name of every task's metric. higher: whether more of it is better.
        steps: after which trainings were evaluated.
        test: by method, seed and step the metric of every task.
    """

    metrics: dict[str, str]
    higher: dict[str, bool]
    steps: list[int]
    test: dict[str, dict[int, dict[int, dict[str, float]]]]

    @property
    def methods(self) -> list[str]:
        return list(self.test)

    def final(self, method: str) -> dict[int, dict[str, float]]:
        """By seed, at the end."""
        return {seed: points[self.steps[-1]] for seed, points in self.test[method].items()}

    def delta(self, method: str, baseline: str, step: int | None = None) -> Spread | None:
        """Delta-m in percent at a step, or at the end, against the baseline at the end; None without one of them."""
        if method not in self.test or baseline not in self.test:
            return None
        reference = mean_of(self.final(baseline).values())
        at = self.steps[-1] if step is None else step
        return spread([delta_m(points[at], reference, self.higher) for points in self.test[method].values()])


def read(rows: Rows) -> dict[str, Scores]:
    """By workload, from the rows of the table of curves.

    Of "tuned", each seed takes the training with the best Delta-m on the validation part against that of the sum, the
    sum itself among them.
    """
    return {name: _scores([row for row in rows if row["workload"] == name]) for name in _names(rows, "workload")}


def _names(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _scores(rows: Rows) -> Scores:
    known = {row["task"]: row for row in rows}
    metrics = {task: row["metric"] for task, row in known.items()}
    higher = {task: row["higher"] == "True" for task, row in known.items()}
    steps = sorted({int(row["step"]) for row in rows if row["split"] == "test"})
    found = Scores(metrics, higher, steps, {})
    for method in _names(rows, "method"):
        own = [row for row in rows if row["method"] == method]
        if method == TUNED:
            chosen = _chosen(rows, higher)
            own = [row for row in rows if (row["method"], row["part"]) == chosen.get(int(row["seed"]))]
        for row in own:
            if row["split"] == "test":
                seeds = found.test.setdefault(method, {})
                seeds.setdefault(int(row["seed"]), {}).setdefault(int(row["step"]), {})[row["task"]] = float(
                    row["value"]
                )
    for method, seeds in list(found.test.items()):  # without those that ended before, or lack a task
        whole = {seed: points for seed, points in seeds.items() if points.get(steps[-1], {}).keys() == known.keys()}
        if whole:
            found.test[method] = whole
        else:
            del found.test[method]
    kept = [set(points) for seeds in found.test.values() for points in seeds.values()]
    found.steps = sorted(set.intersection(*kept)) if kept else steps
    return found


def _chosen(rows: Rows, higher: dict[str, bool]) -> dict[int, tuple[str, str]]:
    """By seed the method and part that is best on the validation part, of the sum and what was tuned."""
    valid: dict[int, dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        if row["split"] == "valid" and row["method"] in (SUM, TUNED):
            own = valid.setdefault(int(row["seed"]), {}).setdefault((row["method"], row["part"]), {})
            own[row["task"]] = float(row["value"])
    return {
        seed: max(found, key=lambda name: delta_m(found[name], found[SUM, ""], higher))
        for seed, found in valid.items()
        if (SUM, "") in found
    }
