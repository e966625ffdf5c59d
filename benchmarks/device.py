"""What a measurement needs from the device it runs on, and a twin of it for the CPU.

Whatever is CUDA's own is here: events, graphs, memory, the size of the L2, the profiler.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from .timing import Timing, summarize

Call = Callable[[], object]

_LABEL = "counted call"
_TIMED = 0.05
"""Seconds for which a sequence of calls is timed."""
_BATCH = 10
_SLOW_CALL = 1e-3
"""From here on a call is timed alone: the clock and the wait before it no longer matter."""


@dataclass(frozen=True)
class Counts:
    """What one call did: kernels, copies and fills on the device; waits of the host for the device."""

    kernels: int
    copies: int
    syncs: int


class Device(Protocol):
    """A place to measure on."""

    device: torch.device
    name: str
    cache_bytes: int
    """The largest cache: inputs that are read again after less than this may be found there."""
    memory_bytes: int

    def free_bytes(self) -> int: ...

    def synchronize(self) -> None: ...

    def once(self, call: Call) -> float:
        """Seconds of one call until its work is done."""

    def kernel_time(self, calls: Sequence[Call], most: int) -> tuple[Timing, str]:
        """Seconds of device time per call over a sequence of calls, and how it was taken: graph, events or clock.

        The sequence is repeated for 50 ms, at most ``most`` times. Calls that wait for the device cannot be captured.
        """

    def call_time(self, call: Call, repeats: int) -> Timing:
        """Seconds until a call returns to the host, with nothing else queued."""

    def latency(self, call: Call, repeats: int) -> Timing:
        """Seconds until the work of a single call is done."""

    def count(self, call: Call, before: Call | None = None) -> Counts | None:
        """What the profiler sees of one call, each made after ``before``; None where it sees no launches."""

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        """Starts a clock; calling the result stops it and gives a function that says the seconds, once all is done."""


def repeats_for(once: float, most: int) -> int:
    """How often a sequence that takes ``once`` seconds is timed; three times at the least, a very slow one once."""
    return max(1 if once > _TIMED else min(3, most), min(most, int(_TIMED / max(once, 1e-9))))


class Host:
    """The CPU: calls are done when they return."""

    device = torch.device("cpu")
    name = "cpu"
    cache_bytes = 1 << 20
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def once(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def kernel_time(self, calls: Sequence[Call], most: int) -> tuple[Timing, str]:
        def run() -> None:
            for call in calls:
                call()

        repeats = repeats_for(self.once(run), most)
        return summarize([self.once(run) / len(calls) for _ in range(repeats)]), "clock"

    def call_time(self, call: Call, repeats: int) -> Timing:
        return summarize([self.once(call) for _ in range(repeats)])

    latency = call_time

    def count(self, call: Call, before: Call | None = None) -> Counts | None:
        if before is not None:
            before()
        call()
        return None

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop


class Cuda:
    """One GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.cache_bytes: int = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.memory_bytes: int = properties.total_memory
        self._stream = torch.cuda.Stream()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def once(self, call: Call) -> float:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def kernel_time(self, calls: Sequence[Call], most: int) -> tuple[Timing, str]:
        graph = self._capture(calls)
        how = "events" if graph is None else "graph"

        def run() -> None:
            if graph is not None:
                graph.replay()
                return
            for call in calls:
                call()

        once = self.once(run)
        if once < _TIMED / 5:  # the first replay also uploads the graph
            once = self.once(run)
        # One more run is there to be waited for: what follows is queued before it ends, so that no gap is timed
        # in which the device waits for the host.
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats_for(once, most) + 1)]
        run()
        for mark in marks[:-1]:
            mark.record()
            run()
        marks[-1].record()
        self.synchronize()
        return summarize([a.elapsed_time(b) / 1e3 / len(calls) for a, b in pairwise(marks)]), how

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
        """The calls as one graph; None if they cannot be captured."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        failure = ""
        self.synchronize()
        gc.disable()  # What a collection frees in the middle of a capture would break it.
        try:
            with torch.cuda.stream(self._stream):
                for call in dict.fromkeys(calls):
                    call()
                self.synchronize()
                try:
                    _record(graph, pool, calls)
                except RuntimeError as error:
                    failure = str(error.__context__ or error).splitlines()[0]
        finally:
            gc.enable()
            self.synchronize()
        if not failure:
            return graph
        print(f"not captured: {failure}", flush=True)
        self._abandon(graph, pool)
        return None

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Ends for the allocator a capture that failed.

        Up to torch 2.12 capture_end does not (pytorch#180395), and the process would return no memory from then on;
        nor did the graph let go of its pool (pytorch#190348).
        """
        graph.reset()
        self._failed.append(graph)  # the allocator of pinned memory still asks it which stream is captured
        self._stream = torch.cuda.Stream()
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            if not hasattr(torch._C, name):
                print(f"torch {torch.__version__} has no {name}: memory that is freed may stay reserved", flush=True)
                return
            with contextlib.suppress(RuntimeError):  # where torch did it itself
                getattr(torch._C, name)(self.device.index, pool)

    def call_time(self, call: Call, repeats: int) -> Timing:
        batch = _BATCH if self.once(call) < _SLOW_CALL else 1
        seconds = []
        for _ in range(repeats):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(batch):
                call()
            seconds.append((time.perf_counter() - begin) / batch)
        self.synchronize()
        return summarize(seconds)

    def latency(self, call: Call, repeats: int) -> Timing:
        return summarize([self.once(call) for _ in range(repeats)])

    def count(self, call: Call, before: Call | None = None) -> Counts | None:
        self._trace(call, before)  # warms the call up; and the first trace of a process may miss events
        return counts_of(self._trace(call, before))

    def _trace(self, call: Call, before: Call | None) -> Sequence[Mapping[str, Any]]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        if before is not None:
            before()
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function(_LABEL):
                call()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events: list[Mapping[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return events

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def stop() -> Callable[[], float]:
            end.record()
            return lambda: begin.elapsed_time(end) / 1e3

        return stop


def _record(graph: torch.cuda.CUDAGraph, pool: Any, calls: Sequence[Call]) -> None:
    # Not `with torch.cuda.graph(...)`, which empties the allocator's cache every time.
    graph.capture_begin(pool=pool)
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()


def counts_of(events: Sequence[Mapping[str, Any]]) -> Counts:
    """Counts from the events of a trace in Chrome's format; waits only within the labelled range on the host."""
    label = next(e for e in events if e.get("name") == _LABEL and e.get("cat") == "user_annotation")
    begin, end = label["ts"], label["ts"] + label["dur"]
    kinds = [event.get("cat") for event in events]

    def waits(event: Mapping[str, Any]) -> bool:
        name = str(event.get("name"))
        blocking = "Synchronize" in name or name in ("cudaMemcpy", "cudaMemcpy2D", "cudaMemset")
        return event.get("cat") in ("cuda_runtime", "cuda_driver") and blocking and begin <= event["ts"] <= end

    return Counts(kinds.count("kernel"), kinds.count("gpu_memcpy") + kinds.count("gpu_memset"), sum(map(waits, events)))


def find(name: str) -> Device:
    """The device of that name, "cpu" or "cuda"."""
    if name == "cpu":
        return Host()
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device")
    return Cuda()
