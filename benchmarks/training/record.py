"""What is kept of a training: a file for each, and tables of all."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .jobs import Job

TABLES = ("train", "train-curves", "train-cosines")
"""Of runs, of metrics over steps, and of cosines between tasks."""


@dataclasses.dataclass
class Record:
    """What a training came to.

    Attributes:
        job: what was run.
        facts: numbers and names, a column of the table each; milliseconds are medians over the steps.
        curves: ``[step, {task: metric}]`` on the test part after every round.
        valid: the metrics on the validation part at the end.
        metrics: the name of every task's metric, and whether more of it is better.
        cosines: mean cosines over all steps ``[K][K]`` between tasks, nan where there are none; empty without them.
    """

    job: Job
    facts: dict[str, Any]
    curves: list[tuple[int, dict[str, float]]]
    valid: dict[str, float]
    metrics: dict[str, tuple[str, bool]]
    cosines: list[list[float]]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        found["curves"] = [(step, values) for step, values in found["curves"]]
        found["metrics"] = {task: (name, higher) for task, (name, higher) in found["metrics"].items()}
        return cls(**found | {"job": Job(**found["job"])})


def finished(job: Job, folder: Path) -> Record | None:
    """The record of a job that was run before; None if it was not.

    Raises:
        ValueError: there is one of another length.
    """
    path = folder / f"{job.file}.json"
    if not path.is_file():
        return None
    record = Record.read(path)
    if record.job != job:
        raise ValueError(
            f"{path} is of {record.job}, asked for was {job}; name another folder with --runs, or remove it"
        )
    return record


def write_tables(
    records: Sequence[Record], left_out: Sequence[tuple[Job, str]], folder: Path, machine: str
) -> list[Path]:
    """The three CSVs ``MACHINE-TABLE.csv`` of all records.

    In the first also what was left out, with the reason as a note.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{machine}-{table}.csv" for table in TABLES]
    missing = [_of(job) | {"note": reason} for job, reason in left_out]
    _write([*(_of(record.job) | record.facts for record in records), *missing], paths[0])
    _write([row for record in records for row in _curve(record)], paths[1])
    _write([row for record in records for row in _cosine_rows(record)], paths[2])
    return paths


def _of(job: Job) -> dict[str, Any]:
    return {"workload": job.workload, "method": job.method, "part": job.part, "seed": job.seed, "steps": job.steps}


def _curve(record: Record) -> Iterable[dict[str, Any]]:
    job = _of(record.job)
    del job["steps"]
    points = [("test", step, values) for step, values in record.curves]
    for split, step, values in [*points, ("valid", record.job.steps, record.valid)]:
        for task, value in values.items():
            name, higher = record.metrics[task]
            yield job | {"split": split, "step": step, "task": task, "metric": name, "higher": higher, "value": value}


def _cosine_rows(record: Record) -> Iterable[dict[str, Any]]:
    job = _of(record.job)
    for task, row in zip(record.metrics, record.cosines, strict=False):
        yield job | {"task": task, "cosines": " ".join(f"{value:.3f}" for value in row)}


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
