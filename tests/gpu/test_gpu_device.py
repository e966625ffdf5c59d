"""What the benchmark takes from CUDA: events, graphs and the profiler say what is known beforehand."""

import functools
import time

import pytest
import torch

from benchmarks import device
from benchmarks.device import Counts, Cuda

pytestmark = pytest.mark.gpu

GB = 1 << 30


@pytest.fixture(scope="module")
def where() -> Cuda:
    found = device.find("cuda")
    assert isinstance(found, Cuda)
    return found


def test_the_facts_of_the_device(where: Cuda) -> None:
    assert where.name == torch.cuda.get_device_name() and 1 << 20 < where.cache_bytes < GB
    assert 0 < where.free_bytes() <= torch.cuda.get_device_properties(0).total_memory


def test_a_graph_times_the_kernels(where: Cuda) -> None:
    source = torch.randn(GB // 4, device=where.device)
    target = torch.empty_like(source)
    timing, how = where.kernel_time([functools.partial(target.copy_, source)], 5)
    assert how == "graph" and torch.equal(source, target)
    once = min(where.once(functools.partial(target.copy_, source)) for _ in range(5))
    assert 0.5 * once < timing.median < 1.1 * once, "host clock and events agree on 2 GB moved"
    assert timing.p20 <= timing.median <= timing.p80


def test_every_call_of_the_sequence_is_timed(where: Cuda) -> None:
    tensors = [torch.zeros(1 << 20, device=where.device) for _ in range(3)]
    calls = [functools.partial(tensors[i % 3].add_, 1) for i in range(6)]
    _, how = where.kernel_time(calls, 2)
    assert how == "graph"
    # Each call once to warm up; then two replays to see how long they take, one that leads in, and two that are timed.
    # A capture itself runs nothing.
    assert [tensor[0].item() for tensor in tensors] == [2 + 2 * (2 + 1 + 2)] * 3


def test_what_waits_for_the_device_is_timed_between_events(where: Cuda, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = torch.ones(1000, device=where.device)
    timing, how = where.kernel_time([lambda: tensor.sum().item()], 3)
    assert how == "events" and timing.median > 0
    assert "not captured" in capsys.readouterr().out
    timing, how = where.kernel_time([lambda: tensor.add_(1)], 3)
    assert how == "graph", "a capture that failed does not spoil the next one"


def test_memory_returns_after_a_capture_that_failed(where: Cuda) -> None:
    where.kernel_time([lambda: torch.ones(1000, device=where.device).sum()], 1)  # whatever is set up once
    before = where.free_bytes()

    def call() -> None:
        torch.empty(GB // 4, device=where.device).fill_(1).sum().item()

    for _ in range(2):
        held = torch.empty(GB // 4, device=where.device)
        _, how = where.kernel_time([call], 1)
        assert how == "events"
        assert where.free_bytes() <= before - held.nbytes + (64 << 20)
        del held
        assert where.free_bytes() >= before - (64 << 20), "of the pool of the capture and of all other memory"


def test_a_call_returns_before_its_work_is_done(where: Cuda) -> None:
    matrix = torch.randn(8192, 8192, device=where.device)
    call = functools.partial(torch.mm, matrix, matrix)
    call()
    assert where.call_time(call, 3).median < 0.5 * where.latency(call, 3).median


def test_a_stopwatch_needs_no_wait(where: Cuda) -> None:
    matrix = torch.randn(4096, 4096, device=where.device)
    matrix @ matrix
    where.synchronize()
    begin = time.perf_counter()
    stop = where.stopwatch()
    for _ in range(20):
        matrix @ matrix
    read = stop()
    where.synchronize()
    assert 0 < read() <= time.perf_counter() - begin


def test_counts(where: Cuda) -> None:
    x = torch.ones(1000, device=where.device)
    on_host = torch.ones(1000).pin_memory()
    assert where.count(lambda: x.add_(1)) == Counts(kernels=1, copies=0, syncs=0)
    assert where.count(lambda: x.add_(1).mul_(2), before=lambda: x.sub_(1)) == Counts(kernels=2, copies=0, syncs=0)
    assert where.count(lambda: x.copy_(on_host, non_blocking=True)) == Counts(kernels=0, copies=1, syncs=0)
    found = where.count(lambda: x[0].item())
    assert found is not None and (found.kernels, found.copies) == (0, 1) and found.syncs >= 1
