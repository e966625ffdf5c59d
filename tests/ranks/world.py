"""Several processes as the ranks of a run, which go on from one scenario to the next."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

_MISSING = "record_event"
"""What fully_shard calls of a stream, and streams of a CPU lack in torch 2.6."""
SECONDS = 300
"""What a scenario may take, also on a machine that is busy."""


class World:
    """Ranks over gloo that meet in a file, so that no port is fixed.

    Args:
        size: how many.
        timeout: seconds after which a collective gives up.
    """

    def __init__(self, size: int, timeout: float = 120) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(size):
            here, there = context.Pipe()
            given = (rank, size, os.path.join(self._folder.name, "store"), timeout, there)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before

    def run(self, scenario: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """What a function of a module returns on every rank.

        Raises:
            RuntimeError: it raises on one of them, or does not return in time.
        """
        found = self.outcomes(scenario, *args, **options)
        for rank, (good, value) in enumerate(found):
            if not good:
                raise RuntimeError(f"rank {rank}: {value}")
        return [value for _, value in found]

    def outcomes(self, scenario: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[bool, Any]]:
        """For every rank whether the function returned, and what; else the text of its error."""
        for pipe in self._pipes:
            pipe.send((scenario, args, options))
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.close()
                raise RuntimeError(f"rank {rank} of {scenario} did not return within {SECONDS} s")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append((False, "the process is gone"))
        if any(not good and _MISSING in value for good, value in found) and not hasattr(torch.cpu.Stream, _MISSING):
            pytest.skip(
                f"fully_shard of torch {torch.__version__} does not run on a CPU: no torch.cpu.Stream.{_MISSING}"
            )
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    warnings.simplefilter("ignore")
    while True:
        try:
            scenario, args, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, scenario(*args, **options)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
