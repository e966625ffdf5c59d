"""What is the CUDA backend's own: its caches, captures, and what it says when something is missing."""

import contextlib
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from exact import DTYPES, exact_combine, make_rows, torch_combine

import emulated
import mtl_kernels as mk
from mtl_kernels import dispatch, uploads
from mtl_kernels.backends import BACKENDS, cuda
from mtl_kernels.call import StateCall
from mtl_kernels.rows import RowTable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_choice_is_kept() -> Iterator[None]:
    dispatch._resolved.clear()
    yield
    dispatch._resolved.clear()


@pytest.fixture
def backend(cpu_only: None) -> cuda.CudaBackend:
    """The backend over the host emulation, with nothing kept yet."""
    if (reason := emulated.missing()) is not None:
        pytest.skip(reason)
    return cuda.CudaBackend("emulated", BACKENDS[emulated.NAME]._module, "cpu")


def gram(backend: cuda.CudaBackend, table: RowTable) -> torch.Tensor:
    out = torch.full((1, table.num_tasks, table.num_tasks), torch.nan, dtype=torch.float64)
    backend.gram_into(table, [0] * table.num_params, out)
    return out[0]


def test_plans_follow_sizes_and_tables_addresses(backend: cuda.CudaBackend) -> None:
    kept = backend._kept(CPU, 0)
    rows = make_rows(3, [(40,), (7, 9)], seed=0)
    first = gram(backend, RowTable(rows))
    assert (len(kept._plans), len(kept._tables)) == (1, 1)
    for row in rows:
        for tensor in row:
            tensor.mul_(2)
    torch.testing.assert_close(gram(backend, RowTable(rows)), 4 * first)
    assert (len(kept._plans), len(kept._tables)) == (1, 1)
    moved = [[tensor.clone() for tensor in row] for row in rows]
    torch.testing.assert_close(gram(backend, RowTable(moved)), 4 * first)
    assert (len(kept._plans), len(kept._tables)) == (1, 2)
    gram(backend, RowTable([row[:1] for row in moved]))
    assert (len(kept._plans), len(kept._tables)) == (2, 3)


def test_what_is_kept_is_bounded(backend: cuda.CudaBackend) -> None:
    matrix = torch.randn(2, 300)
    for columns in range(1, 100):
        gram(backend, RowTable(matrix[:, :columns]))
    kept = backend._kept(CPU, 0)
    assert len(kept._plans) == uploads.KEPT and len(kept._tables) <= uploads.KEPT


def test_tables_whose_addresses_change_are_bounded_in_bytes(
    backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "KEPT_BYTES", 10 * 8 * 3)
    kept, matrix = backend._kept(CPU, 0), torch.randn(3, 100)
    for column in range(30):
        gram(backend, RowTable(matrix[:, column:]))
    assert len(kept._tables) == 10


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """Runs ``work(n)`` side by side, and raises what any of them raised."""
    errors: list[BaseException] = []

    def run(n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_share_a_stream_take_turns(backend: cuda.CudaBackend) -> None:
    """Their launches, of one call one for each dtype, share counters and workspace."""
    shapes = [[(300 * n + 40,), (70,), (9, 9), (5,)] for n in range(4)]
    tables = [RowTable(make_rows(2 + 9 * (n % 2), shapes[n], DTYPES, seed=n)) for n in range(4)]
    expected = [gram(backend, table) for table in tables]
    weights = [torch.randn(1, table.num_tasks, dtype=torch.float64) for table in tables]
    combined = [[torch.empty_like(tensor) for tensor in table.like] for table in tables]
    for table, w, out in zip(tables, weights, combined, strict=True):
        backend.combine_into(table, w, [0] * 4, out)
    backend._streams.clear()

    def work(n: int) -> None:
        out = [torch.empty_like(tensor) for tensor in tables[n].like]
        for _ in range(40):
            assert torch.equal(gram(backend, tables[n]), expected[n])
            backend.combine_into(tables[n], weights[n], [0] * 4, out)
            assert all(map(torch.equal, out, combined[n]))

    in_threads(len(tables), work)
    assert len(backend._streams) == 1


def test_threads_whose_tables_leave_the_cache(backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "KEPT", 2)
    tables = [RowTable(torch.randn(3, 40 + n)) for n in range(5)]
    expected = [gram(backend, table) for table in tables]

    def work(n: int) -> None:
        for i in range(200):
            at = (n + i) % len(tables)
            assert torch.equal(gram(backend, tables[at]), expected[at])

    in_threads(4, work)


def test_a_capture_on_another_device_than_the_current_one(
    backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(cuda, "capturing", lambda device: asked.append(device) or True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    stream, handle = backend._stream(torch.device("cuda", 1))
    assert isinstance(stream, cuda._Capture) and handle == 7 and asked == [torch.device("cuda", 1)]


def test_a_capture_uses_nothing_that_is_kept(backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    table = RowTable(make_rows(12, [(40,), (7, 9)], seed=1))
    expected = gram(backend, table)
    before = [tensor.clone() for tensor in backend._kept(CPU, 0)._workspace.values()]
    captured: list[object] = []
    device = torch.device("cpu", 0)
    capture = cuda._Capture(device, backend._module.DeviceCopy, captured)
    monkeypatch.setattr(backend, "_stream", lambda device: (capture, 0))
    assert torch.equal(gram(backend, table), expected)
    assert len(captured) == 3  # plan, addresses, counters: alive for as long as a replay may come
    after = backend._kept(CPU, 0)._workspace.values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    out = [torch.empty_like(tensor) for tensor in table.like]
    weights = torch.randn(1, 12, dtype=torch.float64)
    backend.combine_into(table, weights, [0, 0], out)
    for found, wanted in zip(out, mk.combine(table, weights[0], backend="reference"), strict=True):
        torch.testing.assert_close(found, wanted)


def averaged(backend: cuda.CudaBackend, table: RowTable) -> tuple[torch.Tensor, ...]:
    """Squares and states of an average that was one everywhere."""
    state = [[torch.ones_like(tensor) for tensor in row] for row in table.entries]
    half, sums = torch.full((1, table.num_tasks), 0.5, dtype=torch.float64), torch.full((1, table.num_tasks), torch.nan)
    sums = sums.double()
    backend.update_state(table, RowTable(state), StateCall("average", half, half), [0] * table.num_params, sums)
    return (sums, *(tensor for states in state for tensor in states))


def test_states_in_a_capture_and_after_a_failed_launch(
    backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = RowTable(make_rows(5, [(40,), (7, 9), (3000,)], DTYPES, seed=1))
    expected = averaged(backend, table)
    kept = backend._kept(CPU, 0)
    kept._workspace[torch.int32].fill_(1)  # as a launch leaves them that did not finish

    def fail(*arguments: object) -> None:
        raise RuntimeError("update_state: an illegal memory access was encountered")

    real = backend._module
    monkeypatch.setattr(backend, "_module", SimpleNamespace(**{**vars(real), "update_state": fail}))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        averaged(backend, table)
    monkeypatch.setattr(backend, "_module", real)
    assert all(map(torch.equal, averaged(backend, table), expected))
    captured: list[object] = []
    capture = cuda._Capture(torch.device("cpu", 0), real.DeviceCopy, captured)
    monkeypatch.setattr(backend, "_stream", lambda device: (capture, 0))
    assert all(map(torch.equal, averaged(backend, table), expected))
    assert len(captured) == 4  # plan, addresses of rows and of states, counters


def test_a_failed_launch_starts_from_zero_counters(backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    table = RowTable(torch.randn(3, 50))
    expected = gram(backend, table)
    kept = backend._kept(CPU, 0)
    kept._workspace[torch.int32].fill_(1)  # as a launch leaves them that did not finish

    def fail(*arguments: object) -> None:
        raise RuntimeError("gram: an illegal memory access was encountered")

    real = backend._module
    monkeypatch.setattr(backend, "_module", SimpleNamespace(**{**vars(real), "gram": fail}))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gram(backend, table)
    monkeypatch.setattr(backend, "_module", real)
    assert torch.equal(gram(backend, table), expected)


def at_odd_addresses(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same numbers, ``offset`` bytes beyond where an allocation begins."""
    storage = bytearray(values.nbytes + 16)
    odd = torch.frombuffer(storage, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    return odd.copy_(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_the_element_size_does_not_divide(backend: cuda.CudaBackend, dtype: torch.dtype) -> None:
    """Refused before anything runs, for rows and outputs; any other address is taken."""
    weights, groups = torch.ones(1, 3, dtype=torch.float64), [0, 0]
    plain = [[torch.full((9,), 1.0), torch.full((5,), 2.0, dtype=dtype)] for _ in range(3)]
    out = [torch.full((9,), 7.0), torch.full((5,), 7.0, dtype=dtype)]
    for offset in range(1, 9):
        odd = [*plain[:2], [plain[2][0], at_odd_addresses(plain[2][1], offset)]]
        odd_out = [out[0], at_odd_addresses(out[1], offset)]
        if offset % dtype.itemsize == 0:
            assert torch.equal(gram(backend, RowTable(odd)), gram(backend, RowTable(plain)))
            backend.combine_into(RowTable(odd), weights, groups, odd_out)
            assert odd_out[0].eq(3).all() and odd_out[1].eq(6).all()
            out[0].fill_(7)
            continue
        told = f"parameter 1 lies at an address that its element size {dtype.itemsize} does not divide"
        with pytest.raises(ValueError, match=f"row 2, {told}"):
            gram(backend, RowTable(odd))
        with pytest.raises(ValueError, match=f"row 2, {told}"):
            backend.combine_into(RowTable(odd), weights, groups, out)
        with pytest.raises(ValueError, match=f"out, {told}"):
            backend.combine_into(RowTable(plain), weights, groups, odd_out)
        for rows, state in ((odd, plain), (plain, odd)):
            call, sums = StateCall("squares", weights), torch.zeros(1, 3, dtype=torch.float64)
            with pytest.raises(ValueError, match=f"row 2, {told}"):
                backend.update_state(RowTable(rows), RowTable(state), call, groups, sums)
        assert torch.cat([out[0], odd_out[0], odd_out[1].float()]).eq(7).all()


def test_one_address_of_elements_of_two_sizes(backend: cuda.CudaBackend) -> None:
    """What is known to be right for one dtype is not for another."""
    halves = at_odd_addresses(torch.ones(1, 8, dtype=torch.bfloat16), 2)
    gram(backend, RowTable(halves))
    floats = RowTable(torch.ones(1, 4))
    floats._addresses = RowTable(halves).addresses
    with pytest.raises(ValueError, match="element size 4 does not divide"):
        gram(backend, floats)


@contextlib.contextmanager
def emulated_device(
    backend: cuda.CudaBackend, single_to_double_ratio: int = 2, captures: bool = False
) -> Iterator[None]:
    """How much faster than float64 its float32 is; whether another thread captures a stream."""
    library = ctypes.CDLL(backend._module.__file__)
    library.emulation_set_device(single_to_double_ratio, captures)
    try:
        yield
    finally:
        library.emulation_set_device(2, False)


@pytest.mark.parametrize("num_tasks", [1, 2, 9, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_float_where_double_is_slow(backend: cuda.CudaBackend, dtype: torch.dtype, num_tasks: int) -> None:
    """At most twice torch's error at the row dtype; float64, of rows or output, is as exact as ever."""
    rows = make_rows(num_tasks, [(20_000,)], [dtype], seed=num_tasks)
    weights = torch.randn(num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(num_tasks))
    (exact,), (by_torch,) = exact_combine(rows, weights), torch_combine(rows, weights)
    for out_dtype in (dtype, torch.float64):
        in_double, out = torch.empty(2, 20_000, dtype=out_dtype)
        backend.combine_into(RowTable(rows), weights[None], [0], [in_double])
        with emulated_device(backend, single_to_double_ratio=64):
            other = cuda.CudaBackend("emulated", backend._module, "cpu")  # plans belong to a device
            other.combine_into(RowTable(rows), weights[None], [0], [out])
        if torch.float64 in (dtype, out_dtype):
            assert torch.equal(out, in_double)
        else:
            error = (out.double() - exact).abs().max()
            assert error <= 2 * (by_torch.double() - exact).abs().max()
            assert dtype is not torch.float32 or not torch.equal(out, in_double), "sums in double"


def test_a_capture_in_another_thread_goes_on(backend: cuda.CudaBackend) -> None:
    with emulated_device(backend, captures=True):
        assert backend._module.unsupported(0) is None


def test_no_memory_for_the_workspace(backend: cuda.CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    table = RowTable(torch.randn(3, 50))
    out = torch.full((1, 3, 3), 7.0, dtype=torch.float64)

    def full(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        backend.gram_into(table, [0], out)
    monkeypatch.undo()
    assert (out == 7).all()
    backend.gram_into(table, [0], out)
    torch.testing.assert_close(out[0], mk.gram(table, backend="reference"))


def test_says_what_is_missing(cpu_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(missing=lambda: "no NVIDIA driver was found", unsupported=lambda device: None)
    monkeypatch.setitem(BACKENDS, "cuda", cuda.CudaBackend("cuda", module))
    assert mk.available_backends()["cuda"] == "no NVIDIA driver was found"
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: no NVIDIA driver was found"):
        mk.gram(torch.ones(2, 3), backend="cuda")
    with pytest.raises(RuntimeError, match="no NVIDIA driver"), mk.use_backend("cuda"):
        pass
    assert mk.gram(torch.ones(2, 3)).shape == (2, 2)  # the automatic choice goes on to the next


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = cuda.CudaBackend()
    backend._module = None
    monkeypatch.setattr(cuda, "_reason", "the extension module mtl_kernels._cuda was not built")
    assert "not built" in str(backend.missing())


def test_the_reason_names_the_toolkit() -> None:
    code = """
import sys; sys.modules["mtl_kernels._cuda"] = None
from mtl_kernels.backends import cuda
print(cuda.CudaBackend().missing())
"""
    reason = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "nvcc 12.0 or newer" in reason and "MTL_KERNELS_CUDA=1" in reason


def test_an_architecture_that_is_not_in_the_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "mtl_kernels._cuda was built for the architectures 80, this GPU is sm_75; reinstall from source with ..."
    module = SimpleNamespace(missing=lambda: None, unsupported=lambda device: reason)
    backend = cuda.CudaBackend("cuda", module, device_type="cpu")
    monkeypatch.setitem(BACKENDS, "cuda", backend)
    with pytest.raises(RuntimeError, match="this GPU is sm_75; reinstall from source"):
        mk.dispatch._choose(CPU, "cuda")
    assert mk.dispatch._choose(CPU, "auto") is not backend


def test_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        BACKENDS, "cuda", cuda.CudaBackend("cuda", SimpleNamespace(missing=lambda: None, unsupported=lambda d: None))
    )
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot take cpu tensors: it runs on cuda tensors"):
        mk.dispatch._choose(CPU, "cuda")


@pytest.mark.gpu
def test_rows_on_two_devices() -> None:
    with pytest.raises(ValueError, match="move all rows"):
        mk.gram([[torch.ones(3, device="cuda")], [torch.ones(3)]])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_launches_inside_a_graph(num_tasks: int) -> None:
    if (reason := mk.available_backends()["cuda"]) is not None:
        pytest.skip(reason)
    rows = torch.randn(num_tasks, 100_003, device="cuda")
    out, rng = torch.empty(100_003, device="cuda"), mk.rng_state(3, device="cuda")

    def step() -> torch.Tensor:
        call = mk.SolverCall("pcgrad", (1.0, 0.0), rng=rng, advance_rng=True)
        _, weights, _ = mk.gram_solve(rows, call, backend="cuda")
        mk.combine(rows, weights, out=out, backend="cuda")
        return weights

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = step()
    for _ in range(3):
        rows.normal_()
        rng.copy_(mk.rng_state(3, 5, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        found = weights.clone(), out.clone()
        rng.copy_(mk.rng_state(3, 5, device="cuda"))
        assert torch.equal(found[0], step()) and torch.equal(found[1], out)


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    if (reason := mk.available_backends()["cuda"]) is not None:
        pytest.skip(reason)
    sets = [torch.randn(8, 1_000_001, device="cuda") for _ in range(2)]
    expected = [mk.gram(rows, backend="cuda") for rows in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for rows, stream in zip(sets, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(mk.gram(rows, backend="cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_rows_is_used() -> None:
    rows = torch.randn(4, 1000, device="cuda:1")
    assert mk.gram(rows, backend="cuda").device == rows.device and torch.cuda.current_device() == 0
