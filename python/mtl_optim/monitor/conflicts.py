"""Which tasks fight, on average: cosines, norms and weights over many steps, for the price of some additions a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn

import mtl_kernels

from ..cuda_graphs import capturing
from .records import ConflictRecord
from .report import Report

_DECAY = 0.9
_STATE_VERSION = 1
_NOTHING = "nothing was recorded yet; a record is made every so many steps, and by close()"


class Writer(Protocol):
    """What is used of a `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class Watched(Protocol):
    """What is used of a `MultiTaskOptimizer`."""

    @property
    def report(self) -> Report | None: ...

    @property
    def param_groups(self) -> Any: ...

    def register_step_post_hook(self, hook: Any) -> Any: ...


class ConflictMonitor:
    """Watches the combinations of an optimizer, one a step; no backward pass, and no wait between its records.

    ::

        monitor = ConflictMonitor(opt, every=100, jsonl="conflicts.jsonl", writer=SummaryWriter(), model=model)
        ...                                   # training
        print(monitor.groups())               # which tasks to train together
        monitor.heatmap("conflicts.png")

    A step of one task, one whose weights were reused (``refresh_every``), and one whose gradients were not finite say
    nothing new and do not count. On several ranks all have the same report: make one on rank 0. After a replay of a
    CUDA graph, in which no Python runs, call `update`. A checkpoint that holds `state_dict` lets it go on.

    Args:
        optimizer: the `MultiTaskOptimizer`, whose step hooks call `update`.
        every: steps of an interval, at whose end the host waits for the sums and makes a record.
        jsonl: a file to which records are appended, a line each.
        writer: a TensorBoard writer, or anything with ``add_scalar(tag, value, step)``.
        model: names the problems of ``granularity="parameter"`` by its parameters.

    Attributes:
        history: the records so far.

    Raises:
        TypeError, ValueError: another kind of optimizer, or ``every`` is no positive integer.
    """

    def __init__(
        self,
        optimizer: Watched,
        *,
        every: int = 100,
        jsonl: str | Path | None = None,
        writer: Writer | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if not hasattr(optimizer, "report"):
            raise TypeError(
                f"ConflictMonitor: expected a MultiTaskOptimizer, found {type(optimizer).__name__}; an optimizer of "
                "one loss has no tasks to watch"
            )
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"ConflictMonitor: expected every as an integer, found {every!r}")
        if every < 1:
            raise ValueError(f"ConflictMonitor: expected every >= 1, found {every}")
        self.history: list[ConflictRecord] = []
        self._optimizer, self._every, self._writer = optimizer, every, writer
        self._names = {} if model is None else {id(param): name for name, param in model.named_parameters()}
        self._file: IO[str] | None = None if jsonl is None else open(jsonl, "a", encoding="utf-8")
        self._last: Report | None = None
        self._sums: _Sums | None = None
        self._steps = 0
        self._averages: dict[tuple[str, str], float] = {}
        self._hook = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _stepped(self) -> None:
        report = self._optimizer.report
        if report is not None and report is not self._last and not capturing():
            self._last = report
            self.update()

    def update(self) -> None:
        """Counts the last report of the optimizer."""
        report = self._optimizer.report
        if report is None or report.age:
            return
        self._steps += 1
        if self._sums is None or not self._sums.fits(report):
            self._record()
            self._sums = _Sums(report.tasks, report.problems, report.gram.device)
        self._sums.to(report.gram.device)
        self._sums.add(report)
        if self._steps % self._every == 0:
            self._record()

    def close(self) -> None:
        """Makes a record of what is left, stops watching, and closes the file."""
        self._record()
        self._hook.remove()
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """The records, and what was added up since the last one, on its device; fit for ``weights_only=True``."""
        return {
            "version": _STATE_VERSION,
            "steps": self._steps,
            "history": [record.plain() for record in self.history],
            "sums": None if self._sums is None else self._sums.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned. Files and writers have what was written before.

        Raises:
            ValueError: of another version, or no such state; everything stays as it was.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(
                f"ConflictMonitor: expected a state of version {_STATE_VERSION}, found {version!r}; load what "
                "state_dict() of this or an older mtl_optim returned"
            )
        try:
            history = [ConflictRecord.of(plain) for plain in state_dict["history"]]
            sums = None if state_dict["sums"] is None else _Sums.of(state_dict["sums"])
            steps = int(state_dict["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"ConflictMonitor: expected what state_dict() returned, found it damaged: {error!r}"
            ) from error
        self.history, self._sums, self._steps = history, sums, steps
        self._averages = {}
        for record in history:
            self._average(record)

    def __enter__(self) -> ConflictMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all records."""
        return tuple(dict.fromkeys(name for record in self.history for name in record.tasks))

    @property
    def cosines(self) -> Tensor:
        """Running averages over the records, each of which counts a tenth against those before it: float64 ``[K, K]``.

        nan for pairs that were never in one step.
        """
        names = self.tasks
        return torch.tensor(
            [[self._averages.get((a, b), math.nan) for b in names] for a in names], dtype=torch.float64
        ).reshape(len(names), len(names))

    def groups(self, number: int | None = None, above: float = 0.0) -> list[list[str]]:
        """Tasks to train together: average-linkage clusters of the averaged cosines.

        Args:
            number: how many groups; None for as many as `above` leaves.
            above: groups are merged as long as the mean cosine between their tasks is at least this.

        Returns:
            Names, by the group of the first task first. A pair that was never in one step counts as orthogonal.

        Raises:
            ValueError: no record was made yet, or ``number`` is out of range.
            ImportError: SciPy is not installed.
        """
        names = self.tasks
        if not names:
            raise ValueError(
                "ConflictMonitor.groups(): nothing was recorded yet; call close() or wait for `every` steps"
            )
        if number is not None and not 1 <= number <= len(names):
            raise ValueError(f"ConflictMonitor.groups(): expected 1 to {len(names)} groups, found {number}")
        if len(names) == 1:
            return [list(names)]
        from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]

        cosines = self.cosines.nan_to_num(0.0).numpy()
        distances = [1 - cosines[i, j] for i in range(len(names)) for j in range(i + 1, len(names))]
        tree = linkage(distances, method="average")
        labels = fcluster(tree, 1 - above, "distance") if number is None else fcluster(tree, number, "maxclust")
        found: dict[int, list[str]] = {}
        for name, label in zip(names, labels.tolist(), strict=True):
            found.setdefault(label, []).append(name)
        return list(found.values())

    def heatmap(self, path: str | Path) -> None:
        """Writes a picture of the averaged cosines.

        Raises:
            ValueError: no record was made yet.
            ImportError: Matplotlib is not installed.
        """
        self._check_recorded("heatmap")
        from .plots import heatmap

        heatmap(self.tasks, self.cosines.tolist(), Path(path))

    def timeline(self, path: str | Path) -> None:
        """Writes a picture of conflicts, norms and weights over the steps.

        Raises:
            ValueError: no record was made yet.
            ImportError: Matplotlib is not installed.
        """
        self._check_recorded("timeline")
        from .plots import timeline

        timeline(self.history, Path(path))

    def _check_recorded(self, what: str) -> None:
        if not self.history:
            raise ValueError(f"ConflictMonitor.{what}(): {_NOTHING}")

    def _record(self) -> None:
        """Reads the sums: the one place where the host waits."""
        sums, self._sums = self._sums, None
        if sums is None or (record := sums.record(self._steps, self._problem_names(sums.problems))) is None:
            return
        self.history.append(record)
        self._average(record)
        if self._file is not None:
            self._file.write(record.json() + "\n")
            self._file.flush()
        if self._writer is not None:
            for tag, value in record.scalars():
                self._writer.add_scalar(tag, value, record.step)

    def _average(self, record: ConflictRecord) -> None:
        for i, a in enumerate(record.tasks):
            for j, b in enumerate(record.tasks):
                if not math.isnan(new := record.cosines[i][j]):
                    old = self._averages.get((a, b), new)
                    self._averages[a, b] = _DECAY * old + (1 - _DECAY) * new

    def _problem_names(self, problems: Sequence[int]) -> list[str]:
        """Of parameters those of the model; of others their numbers."""
        if not self._names:
            return [str(problem) for problem in problems]
        groups = self._optimizer.param_groups
        managed = [p for group in groups if group.get("mtl", True) for p in group["params"] if p.requires_grad]
        return [
            self._names.get(id(managed[problem]), str(problem)) if problem < len(managed) else str(problem)
            for problem in problems
        ]


class _Sums:
    """Of reports with the same tasks and problems, on their device."""

    def __init__(self, tasks: tuple[str, ...], problems: tuple[int, ...], device: torch.device) -> None:
        self.tasks, self.problems = tasks, problems
        number = len(tasks)
        self._pairs = torch.zeros((3, number, number), dtype=torch.float64, device=device)
        self._of_tasks = torch.zeros((3, number), dtype=torch.float64, device=device)
        self._layers = torch.zeros((2, len(problems), number, number), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, state_dict: dict[str, Any]) -> _Sums:
        """Those of a state, as they are there."""
        sums = [state_dict[name].clone() for name in ("pairs", "of_tasks", "layers")]
        made = cls(tuple(state_dict["tasks"]), tuple(state_dict["problems"]), sums[0].device)
        expected = [made._pairs, made._of_tasks, made._layers]
        if [(one.shape, one.dtype) for one in sums] != [(one.shape, one.dtype) for one in expected]:
            raise ValueError(f"sums of shapes {[tuple(one.shape) for one in sums]} for {len(made.tasks)} tasks")
        made._pairs, made._of_tasks, made._layers = sums
        return made

    def state_dict(self) -> dict[str, Any]:
        """For `of`."""
        sums = {"pairs": self._pairs, "of_tasks": self._of_tasks, "layers": self._layers}
        return {
            "tasks": list(self.tasks),
            "problems": list(self.problems),
            **{name: one.clone() for name, one in sums.items()},
        }

    def to(self, device: torch.device) -> None:
        """Moves them, where they are elsewhere: they may be those of a checkpoint."""
        self._pairs, self._of_tasks, self._layers = (
            one.to(device) for one in (self._pairs, self._of_tasks, self._layers)
        )

    def fits(self, report: Report) -> bool:
        """Whether a report can be added."""
        return (report.tasks, report.problems) == (self.tasks, self.problems)

    def add(self, report: Report) -> None:
        """Adds a report; one that is not finite, or of a task alone, adds nothing."""
        gram, mask, weights = report.gram, report.mask, report.weights
        if report.problems:
            there = (mask.unsqueeze(-1) & mask.unsqueeze(-2) & gram.isfinite().all()).double()
            self._layers += torch.stack((there, there * mtl_kernels.cosines(gram).nan_to_num()))
            weights = None if weights is None else torch.where(mask, weights, 0.0).sum(0) / mask.sum(0).clamp(min=1)
            gram, mask = gram.sum(0), mask.any(0)
        good = mask & gram.isfinite().all() & (mask.sum() > 1)
        there = (good.unsqueeze(-1) & good.unsqueeze(-2)).double()
        cosines = mtl_kernels.cosines(gram).nan_to_num()
        self._pairs += torch.stack((there, there * cosines, there * (cosines < 0)))
        here = good.double()
        own = torch.full_like(here, math.nan) if weights is None else weights
        norms = mtl_kernels.norms(gram).nan_to_num()
        self._of_tasks += torch.stack((here, here * norms, torch.where(good, own, 0.0)))

    def record(self, step: int, names: Sequence[str]) -> ConflictRecord | None:
        """The means; None where nothing was added."""
        pairs, of_tasks = self._pairs.cpu(), self._of_tasks.cpu()
        if not bool(of_tasks[0].any()):
            return None
        layers = self._layers.cpu()
        return ConflictRecord(
            step,
            self.tasks,
            (pairs[1] / pairs[0]).tolist(),
            (pairs[2] / pairs[0]).tolist(),
            (of_tasks[1] / of_tasks[0]).tolist(),
            (of_tasks[2] / of_tasks[0]).tolist(),
            dict(zip(names, (layers[1] / layers[0]).tolist(), strict=True)),
        )
