"""What a measurement needs from the device it runs on, and a twin of it for the CPU.

Whatever is CUDA's own is here: events, graphs, memory, the size of the L2, the profiler.
"""

from __future__ import annotations

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
_BATCH = 10


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

    def free_bytes(self) -> int: ...

    def synchronize(self) -> None: ...

    def once(self, call: Call) -> float:
        """Seconds of one call until its work is done."""

    def kernel_time(self, calls: Sequence[Call], repeats: int, capturable: bool) -> tuple[Timing, str]:
        """Seconds of device time per call over a sequence of calls, and how it was taken: graph, events or clock."""

    def call_time(self, call: Call, repeats: int) -> Timing:
        """Seconds until a call returns to the host, with nothing else queued."""

    def latency(self, call: Call, repeats: int) -> Timing:
        """Seconds until the work of a single call is done."""

    def count(self, call: Call, before: Call | None = None) -> Counts | None:
        """What the profiler sees of one call, each made after ``before``; None where it sees no launches."""

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        """Starts a clock; calling the result stops it and gives a function that says the seconds, once all is done."""


class Host:
    """The CPU: calls are done when they return."""

    device = torch.device("cpu")
    name = "cpu"
    cache_bytes = 1 << 20

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        pass

    def once(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def kernel_time(self, calls: Sequence[Call], repeats: int, capturable: bool) -> tuple[Timing, str]:
        return summarize([self.once(lambda: [call() for call in calls]) / len(calls) for _ in range(repeats)]), "clock"

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
        self._stream = torch.cuda.Stream()

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

    def kernel_time(self, calls: Sequence[Call], repeats: int, capturable: bool) -> tuple[Timing, str]:
        graph = self._capture(calls) if capturable else None
        how = "events" if graph is None else "graph"

        def run() -> None:
            if graph is not None:
                graph.replay()
                return
            for call in calls:
                call()

        # The first run is there to be waited for: what follows is queued before it ends, so that no gap is timed
        # in which the device waits for the host.
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        run()
        for mark in marks[:-1]:
            mark.record()
            run()
        marks[-1].record()
        self.synchronize()
        return summarize([a.elapsed_time(b) / 1e3 / len(calls) for a, b in pairwise(marks)]), how

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
        """The calls as one graph; None if they cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        gc.disable()  # What a collection frees in the middle of a capture would break it.
        try:
            with torch.cuda.stream(self._stream):
                for call in dict.fromkeys(calls):
                    call()
                self.synchronize()
                # Not `with torch.cuda.graph(...)`, which empties the allocator's cache every time.
                graph.capture_begin()
                try:
                    for call in calls:
                        call()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            print(f"not captured: {str(error).splitlines()[0]}", flush=True)
            self._stream = torch.cuda.Stream()
            return None
        finally:
            gc.enable()
            self.synchronize()
        return graph

    def call_time(self, call: Call, repeats: int) -> Timing:
        seconds = []
        for _ in range(repeats):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(_BATCH):
                call()
            seconds.append((time.perf_counter() - begin) / _BATCH)
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
