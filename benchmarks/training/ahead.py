"""Trainings whose time is not shown, side by side: baselines that are there for what they reach alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from .jobs import SINGLE, TUNED, Job
from .record import finished
from .run import trained

UNTIMED = (SINGLE, TUNED)


def train_ahead(
    jobs: Sequence[Job],
    runs: Path,
    save_every: float,
    facts: Mapping[str, Any],
    workers: int,
    threads: int,
    advance: Callable[[str], None],
) -> None:
    """Carries out the jobs that are not timed, in processes of their own; their records are in ``runs`` then.

    Args:
        runs, save_every, facts: see `trained`.
        workers: processes; nothing is done where one is asked for.
        threads: of each.
        advance: called with the number that is left, in words.
    """
    due = [job for job in jobs if job.method in UNTIMED and finished(job, runs) is None]
    if workers < 2 or len(due) < 2:
        return
    advance(f"{len(due)} left")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(trained, job, runs, save_every, facts) for job in due]
        try:
            for number, one in enumerate(as_completed(waiting), 1):
                one.result()
                advance(f"{len(due) - number} left")
        finally:
            pool.shutdown(cancel_futures=True)
