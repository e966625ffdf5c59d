"""One training, in rounds: steps, evaluation, and now and then a checkpoint from which it goes on to the bit."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mtl_optim import MultiTaskOptimizer

from ..meters import Largest, Meter, Resident
from ..workloads import registry
from ..workloads.workload import Workload
from . import breakdown, peers
from .jobs import PLAIN, SINGLE, Job, Recipe, recipe
from .record import Record, finished
from .steppers import Combined, Plain, Seconds, Stepper, set_rate

MEASURED = 2
"""The step at which peak memory is measured: those before have made what is kept."""

Advance = Callable[[int, str], None]
"""Called after every round with the steps done and the metrics as text."""


def stepper_of(job: Job, workload: Workload) -> Stepper:
    """What carries a job out.

    Raises:
        TypeError, ValueError: a method that is not known or not for these tasks.
        ImportError: a peer that is not installed.
    """
    if job.method in (PLAIN, SINGLE):
        return Plain(workload, job.part)
    if "/" in job.method:
        return peers.make(job.method, workload, job.seed)
    return Combined(workload, recipe(job, [task.name for task in workload.tasks]))


def trained(
    job: Job,
    runs: Path,
    save_every: float,
    facts: Mapping[str, Any],
    begun: Callable[[int], None] = lambda done: None,
    advance: Advance = lambda done, note: None,
) -> Record:
    """The record of a job, which is carried out where it was not before.

    Args:
        runs: the folder of records and checkpoints.
        save_every: see `Run`.
        facts: columns that are added to the record.
        begun: called with the number of steps that were done before.
        advance: see `Run.go`.
    """
    if (record := finished(job, runs)) is not None:
        return record
    run = Run(job, runs / f"{job.file}.pt", save_every)
    begun(run.done)
    record = run.go(advance)
    record.facts |= facts
    record.write(runs / f"{job.file}.json")
    run.forget()
    return record


class Run:
    """A training that stands at some step.

    Args:
        checkpoint: the file from which it goes on, and which it leaves.
        save_every: seconds between two checkpoints.
    """

    def __init__(self, job: Job, checkpoint: Path, save_every: float) -> None:
        self.job, self._checkpoint, self._save_every = job, checkpoint, save_every
        saved = self._saved()
        torch.manual_seed(job.seed)
        random.seed(job.seed)
        self.workload = registry.build(job.workload, job.seed)
        if saved is not None:
            self.workload.load_state_dict(saved["workload"])
        self.stepper = stepper_of(job, self.workload)
        self.done = 0
        self.curves: list[tuple[int, dict[str, float]]] = []
        self.cosines: list[Any] = []
        self.seconds: list[tuple[float, ...]] = []
        self.peak: float | None = None
        self.trained_for = 0.0
        if saved is not None:
            self._resume(saved)

    def _saved(self) -> dict[str, Any] | None:
        if not self._checkpoint.is_file():
            return None
        saved: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        if saved["job"] != str(self.job):
            raise ValueError(f"{self._checkpoint} is of {saved['job']}, asked for was {self.job}; remove it")
        return saved

    def _resume(self, saved: dict[str, Any]) -> None:
        self.stepper.optimizer.load_state_dict(saved["optimizer"])
        for name in ("done", "curves", "cosines", "seconds", "peak", "trained_for"):
            setattr(self, name, saved[name])
        torch.set_rng_state(saved["torch"])
        random.setstate(saved["random"])

    def save(self) -> None:
        """Writes a checkpoint, whole or not at all."""
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_suffix(".partial")
        kept = {name: getattr(self, name) for name in ("done", "curves", "cosines", "seconds", "peak", "trained_for")}
        state = {"workload": self.workload.state_dict(), "optimizer": self.stepper.optimizer.state_dict()}
        now = {"job": str(self.job), "torch": torch.get_rng_state(), "random": random.getstate()}
        torch.save(kept | state | now, partial)
        partial.replace(self._checkpoint)

    def go(self, advance: Advance) -> Record:
        """Trains to the end."""
        begin = saved_at = perf_counter()
        until_now = self.trained_for
        for end in self.job.ends:
            if end <= self.done:
                continue
            self._round(end)
            self.trained_for = until_now + perf_counter() - begin
            if end < self.job.steps and perf_counter() - saved_at >= self._save_every:
                self.save()
                saved_at = perf_counter()
            advance(end, "  ".join(f"{value:.3g}" for value in list(self.curves[-1][1].values())[:4]))
        return self._record()

    def forget(self) -> None:
        """Removes the checkpoint, once the record is kept."""
        self._checkpoint.unlink(missing_ok=True)

    def _round(self, end: int) -> None:
        monitor = self.stepper.monitor(end - self.done)
        while self.done < end:
            set_rate(self.stepper.optimizer, self.workload.learning_rate, self.done, self.job.steps)
            self.seconds.append(tuple(self._measured() if self.done == MEASURED else self.stepper.step(self.done)))
            self.done += 1
        if monitor is not None:
            monitor.close()
            self.cosines += [record.cosines for record in monitor.history]
        self.curves.append((end, self._kept(self.workload.metrics())))
        if end < self.job.steps:
            self.workload.after_round(self.stepper.optimizer, monitor)

    def _measured(self) -> Seconds:
        meter: Meter = Resident()
        try:
            Resident.reset()
        except OSError:
            meter = Largest()
        meter.begin()
        found = self.stepper.step(self.done)
        self.peak = meter.end() / 1e6
        return found

    def _anew(self) -> tuple[Recipe, MultiTaskOptimizer]:
        """The method with its state at the beginning, and an optimizer with it."""
        found = recipe(self.job, [task.name for task in self.workload.tasks])
        return found, Combined(self.workload, found).optimizer

    def _kept(self, metrics: dict[str, float]) -> dict[str, float]:
        return {self.job.part: metrics[self.job.part]} if self.job.method == SINGLE else metrics

    def _record(self) -> Record:
        workload, entry = self.workload, registry.find(self.job.workload)
        params = [p for group in workload.param_groups() for p in group["params"]]
        facts: dict[str, Any] = {
            "K": len(workload.tasks), "sharing": entry.sharing, "data": workload.source, "batch": workload.batch_size,
            "parameters": sum(p.numel() for p in params), "seconds": self.trained_for,
        }  # fmt: skip
        middle = self.seconds[min(5, len(self.seconds) // 2) :]
        for name, values in zip(Seconds._fields, zip(*middle, strict=True), strict=True):
            facts[f"{name}_ms"] = 1e3 * statistics.median(values)
        facts["peak_mb"] = self.peak
        if isinstance(self.stepper, Combined):
            facts |= breakdown.parts(workload, *self._anew())
            facts["conflicts"] = _conflicts(self.cosines) if facts["shared"] else None
        elif not isinstance(self.stepper, Plain):
            facts |= peers.agreement(self.job)
        tasks = [task for task in workload.tasks if self.job.method != SINGLE or task.name == self.job.part]
        metrics = {task.name: (task.metric, task.higher) for task in tasks}
        valid = self._kept(workload.metrics("valid"))
        return Record(self.job, facts, self.curves, valid, metrics, _mean(self.cosines))


def _mean(matrices: list[list[list[float]]]) -> list[list[float]]:
    """Of matrices of one shape; nan where all are."""
    return torch.tensor(matrices, dtype=torch.float64).nanmean(0).tolist() if matrices else []


def _conflicts(matrices: list[list[list[float]]]) -> float | None:
    """The share of pairs of tasks whose mean cosine is below 0; None without pairs."""
    mean = _mean(matrices)
    pairs = [value for i, row in enumerate(mean) for value in row[:i] if not math.isnan(value)]
    return sum(value < 0 for value in pairs) / len(pairs) if pairs else None
