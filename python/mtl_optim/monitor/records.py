"""What a `ConflictMonitor` keeps of an interval."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class ConflictRecord:
    """Means over the steps of one interval; nan for tasks, and pairs of tasks, that were in none of them.

    Attributes:
        step: steps seen by its end. tasks: the K names.
        cosines, conflicts: ``[K][K]``, the mean cosine and the share of steps in which it was negative.
        norms, weights: ``[K]``.
        layers: by the name of a problem (a param group or parameter, with a granularity other than "model"), its mean
            cosines ``[K][K]``.
    """

    step: int
    tasks: tuple[str, ...]
    cosines: list[list[float]]
    conflicts: list[list[float]]
    norms: list[float]
    weights: list[float]
    layers: dict[str, list[list[float]]]

    @property
    def conflict_fraction(self) -> float:
        """The share of pairs in conflict, a mean over steps and pairs; nan without pairs."""
        found = [value for i, row in enumerate(self.conflicts) for value in row[:i] if not math.isnan(value)]
        return sum(found) / len(found) if found else math.nan

    def scalars(self) -> list[tuple[str, float]]:
        """What there is to plot, by a tag."""
        found = [("conflicts/fraction of pairs", self.conflict_fraction)]
        for k, name in enumerate(self.tasks):
            found += [(f"norms/{name}", self.norms[k]), (f"weights/{name}", self.weights[k])]
            found += [(f"cosines/{self.tasks[i]}, {name}", self.cosines[i][k]) for i in range(k)]
        return [(tag, value) for tag, value in found if not math.isnan(value)]

    def json(self) -> str:
        """One line; null where there is nothing."""
        return json.dumps(_without_nan(dataclasses.asdict(self)))

    def plain(self) -> dict[str, Any]:
        """Of lists, dicts and numbers alone, for `of`."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> ConflictRecord:
        """The record that was made `plain`."""
        return cls(**{**plain, "tasks": tuple(plain["tasks"])})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
