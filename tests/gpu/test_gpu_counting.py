"""What the benchmark asks of its device, without one: counts of a trace, captures, the twin on the CPU."""

import contextlib
import gc

import pytest
import torch

from benchmarks import counts, device, steps
from benchmarks.device import Counts, Host, counts_of, repeats_for
from mtl_optim import PCGrad


def trace(*events: tuple[str, str, float]) -> list[dict[str, object]]:
    label: dict[str, object] = {"cat": "user_annotation", "name": "counted call", "ts": 100.0, "dur": 50.0}
    on_device = {"cat": "gpu_user_annotation", "name": "counted call", "ts": 120.0, "dur": 90.0}
    return [{"ph": "M"}, on_device, label, *({"cat": c, "name": n, "ts": t, "dur": 1.0} for c, n, t in events)]


def test_counting_the_events_of_a_trace() -> None:
    found = counts_of(
        trace(
            ("cuda_runtime", "cudaDeviceSynchronize", 10.0),
            ("cuda_runtime", "cudaLaunchKernel", 101.0),
            ("cuda_driver", "cuLaunchKernelEx", 102.0),
            ("cuda_runtime", "cudaStreamSynchronize", 110.0),
            ("cuda_runtime", "cudaStreamWaitEvent", 111.0),
            ("cuda_runtime", "cudaMemcpyAsync", 112.0),
            ("cuda_runtime", "cudaMemcpy", 113.0),
            ("kernel", "gram", 130.0),
            ("kernel", "combine", 160.0),
            ("gpu_memcpy", "Memcpy DtoH", 170.0),
            ("gpu_memset", "Memset", 171.0),
            ("cuda_runtime", "cudaDeviceSynchronize", 151.0),
        )
    )
    assert found == Counts(kernels=2, copies=2, syncs=2)
    assert counts_of(trace()) == Counts(0, 0, 0)


def test_the_twin_of_the_device() -> None:
    where = Host()
    seen: list[int] = []
    timing, how = where.kernel_time([lambda: seen.append(0), lambda: seen.append(1)], 3)
    assert seen == [0, 1] * (1 + 3) and how == "clock" and timing.p20 <= timing.median <= timing.p80
    stop = where.stopwatch()
    assert 0 <= stop()() < 60
    assert where.count(lambda: seen.append(3), before=lambda: seen.append(2)) is None and seen[-2:] == [2, 3]
    assert where.free_bytes() > 0 and where.call_time(lambda: None, 2).median >= 0


def test_a_capture_that_fails_is_ended_for_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    class Graph:
        def capture_begin(self, pool: object) -> None:
            done.append(("begin", pool))

        def capture_end(self) -> None:
            raise RuntimeError("previous error during capture\nmore")

        def reset(self) -> None:
            done.append("reset")

    def release(index: int, pool: object) -> None:
        raise RuntimeError("this torch did it already")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *which: done.append(which), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    where = device.Cuda.__new__(device.Cuda)
    where.device, where._failed, where._stream = torch.device("cuda", 0), [], None
    monkeypatch.setattr(where, "synchronize", lambda: None)
    assert where._capture([lambda: done.append("call")]) is None
    assert done == ["call", ("begin", (0, 7)), "call", "reset", (0, (0, 7))]
    assert len(where._failed) == 1 and where._stream is not None, "the graph lives on: torch may ask it still"
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("once", "repeats"), [(1e-9, 15), (1e-3, 15), (0.01, 5), (0.02, 3), (0.049, 3), (0.051, 1), (2.0, 1), (0.0, 15)]
)
def test_slow_calls_are_repeated_less(once: float, repeats: int) -> None:
    assert repeats_for(once, 15) == repeats and repeats_for(once, 1) == 1


def test_the_calls_that_are_counted_run() -> None:
    called = counts.counted_calls(Host())
    assert set(counts.MOST_KERNELS) < set(called)
    for call in called.values():
        call()


def test_the_steps_of_a_workload_are_counted() -> None:
    workload = steps.Workload(2, PCGrad())
    assert workload.counts() is None
    assert workload.optimizer.report is not None
