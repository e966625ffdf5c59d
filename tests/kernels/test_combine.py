import math
import subprocess
import sys

import pytest
import torch
from exact import DTYPES, Table, check_combine, dense, exact_combine, make_rows, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placement import free_bytes, on_host, zero_pages
from torch import Tensor

import mtl_kernels as mk

SIZES = [
    *((1, n) for n in (1, 17, 5000)),
    *((2, n) for n in (1, 7, 8, 9, 511, 513, 20011)),
    *((k, 131) for k in (3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25)),
    *((k, 1100) for k in (8, 9, 17)),
    (33, 600),
    (64, 90),
    (127, 30),
    (128, 70),
]


@on_host
def weights_for(num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * num_tasks)
    return torch.randn(num_tasks, generator=generator, dtype=torch.float64)


def copies(rows: Table) -> Table:
    return [[None if t is None else t.clone() for t in row] for row in rows]


def same_bits(rows: Table, others: Table) -> bool:
    pairs = [pair for row, other in zip(rows, others, strict=True) for pair in zip(row, other, strict=True)]
    return all(b is None if a is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), SIZES)
def test_dense_rows(implementation: str, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    rows, weights = make_rows(num_tasks, [(size,)], [dtype], seed=size), weights_for(num_tasks)
    found = mk.combine(dense(rows), weights, backend=implementation)
    assert isinstance(found, Tensor)
    check_combine([found], rows, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 9])
def test_outputs_larger_than_the_caches(implementation: str, num_tasks: int, dtype: torch.dtype) -> None:
    if implementation == "reference":
        pytest.skip("about stores past the caches, which the compiled ones have")
    size = (9 << 19) // dtype.itemsize + 13
    used = torch.arange(0, size - 3, 9973)
    rows, weights = make_rows(num_tasks, [(used.numel(),)], [dtype], seed=1), weights_for(num_tasks)
    matrix = torch.zeros(num_tasks, size, dtype=dtype)
    matrix[:, used] = dense(rows)
    for start in (0, 3):
        out = torch.full((size,), 7, dtype=dtype)[start:]
        mk.combine(matrix[:, : size - start], weights, out=out, backend=implementation)
        check_combine([out[used]], rows, weights)
        assert torch.count_nonzero(out) <= used.numel()


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 17])
def test_ragged_table_of_mixed_dtypes(implementation: str, num_tasks: int) -> None:
    shapes = [(0,), (1,), (3, 5), (), (130,), (2, 0, 4), (16,), (1000,), (7, 1), (1, 1)]
    rows = make_rows(num_tasks, shapes, DTYPES, missing=0.4, seed=num_tasks)
    weights = weights_for(num_tasks)
    check_combine(mk.combine(rows, weights, backend=implementation), rows, weights)


def test_many_tiny_parameters(implementation: str) -> None:
    rows, weights = (
        make_rows(5, [(1 + p % 7,) for p in range(350)], DTYPES, missing=0.2, seed=1),
        weights_for(5),
    )
    check_combine(mk.combine(rows, weights, backend=implementation), rows, weights)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), seed=st.integers(0, 99))
def test_any_table(implementation: str, rows: Table, seed: int) -> None:
    weights = weights_for(len(rows), seed)
    check_combine(mk.combine(rows, weights, backend=implementation), rows, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride_and_alignment_of_dense_rows(implementation: str, dtype: torch.dtype) -> None:
    storage = dense(make_rows(4, [(400,)], [dtype], seed=3))
    for matrix in (
        storage[:, :133],
        storage.flatten()[3:603].view(3, 200)[:, 1:180],
        storage[:1, 5:].expand(5, 395),
        storage[:, :50].T.contiguous().T,
        storage[:, ::2],
        storage.flatten().as_strided((6, 64), (1, 1)),
    ):
        weights = weights_for(matrix.shape[0])
        found = mk.combine(matrix, weights, backend=implementation)
        check_combine([found], [[row.clone()] for row in matrix], weights)


@pytest.mark.usefixtures("cpu_only")
def test_addresses_that_no_element_size_divides() -> None:
    """In a process of its own: a store that needs alignment ends the process."""
    code = """
import torch, mtl_kernels as mk
size = 1_500_000
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    values = torch.ones(2, size, dtype=dtype)
    for count, offset in ((100, 1), (size, 1), (size, 3)):
        storage = bytearray(dtype.itemsize * size + 64)
        out = torch.frombuffer(storage, dtype=dtype, count=count, offset=offset)
        mk.combine(values[:, :count], torch.tensor([1.0, 2.0]), out=out)
        assert (out == 3).all(), (dtype, count, offset)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"


def test_layouts_are_kept(implementation: str) -> None:
    rows, weights = make_rows(3, [(4, 3, 5, 5), (6, 8)], seed=4), weights_for(3)
    laid_out = [[row[0].to(memory_format=torch.channels_last), row[1].T.contiguous().T] for row in rows]
    found = mk.combine(laid_out, weights, backend=implementation)
    check_combine(found, rows, weights)
    assert [t.stride() for t in found] == [t.stride() for t in laid_out[0]]
    differing = [laid_out[0], rows[1], [rows[2][0], laid_out[2][1]]]
    check_combine(mk.combine(differing, weights, backend=implementation), rows, weights)
    gapped = [[torch.stack([t, t], dim=-1)[..., 0] for t in row] for row in rows]
    check_combine(mk.combine(gapped, weights, backend=implementation), rows, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_every_dtype_are_used_in_float64(implementation: str, dtype: torch.dtype) -> None:
    rows, weights = make_rows(4, [(60,)], DTYPES[1:2]), weights_for(4).to(dtype)
    check_combine([mk.combine(dense(rows), weights, backend=implementation)], rows, weights.double())
    strided = torch.stack([weights, weights], dim=-1)[:, 0]
    check_combine([mk.combine(dense(rows), strided, backend=implementation)], rows, weights.double())


def test_weight_one_copies_every_bit(implementation: str) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        found = mk.combine(values[None], torch.ones(1), backend=implementation)
        finite = ~values.isnan()
        assert torch.equal(found[finite], values[finite]) and found[~finite].isnan().all()
        assert torch.equal(
            found[finite].double().signbit() | (values[finite] == 0),
            values[finite].double().signbit() | (values[finite] == 0),
        )


@on_host
def values_of_every_size(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, generator=generator) * torch.exp(8 * torch.randn(count, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounds_to_nearest_even_and_overflows_to_infinity(implementation: str, dtype: torch.dtype) -> None:
    values = values_of_every_size(4000).to(dtype)
    for weight in (1.5, 1 / 3, 1 + torch.finfo(dtype).eps / 2, 2.0**-20, 2.0**20):
        found = mk.combine(values[None], torch.tensor([weight], dtype=torch.float64), backend=implementation)
        assert torch.equal(found.cpu(), (values.cpu().double() * weight).to(dtype))


def test_groups_choose_the_weights(implementation: str) -> None:
    shapes, groups = [(5,), (3000,), (2, 2), (1,), (0,), (17,)], [0, 2, 0, 2, 1, 2]
    rows = make_rows(4, shapes, DTYPES, missing=0.2, seed=6)
    weights = torch.stack([weights_for(4, seed) for seed in range(3)])
    check_combine(mk.combine(rows, weights, groups=groups, backend=implementation), rows, weights[groups])


def test_nothing_to_combine(implementation: str, device: torch.device) -> None:
    weights = torch.ones(3)
    assert mk.combine(torch.empty(3, 0), weights, backend=implementation).shape == (0,)
    if device.type == "cpu":
        assert mk.combine([[], [], []], weights, backend=implementation) == []
    found = mk.combine([[None, torch.empty(0)]] * 3, weights, backend=implementation)
    assert found[0] is None and found[1].shape == (0,)


@pytest.mark.parametrize("which", [0, 1, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 130, 6_000])
def test_in_place_over_a_row(implementation: str, dtype: torch.dtype, which: int, size: int) -> None:
    rows, weights = make_rows(17, [(size,)], [dtype], seed=7), weights_for(17)
    matrix = dense(rows)
    kept = matrix.clone()
    address = matrix.data_ptr()
    found = mk.combine(matrix, weights, out=matrix[which], backend=implementation)
    assert found.data_ptr() == address + which * matrix.stride(0) * matrix.element_size()
    check_combine([matrix[which]], rows, weights)
    others = torch.arange(17) != which
    assert torch.equal(matrix[others], kept[others])


@pytest.mark.parametrize("which", [0, 2])
def test_in_place_over_the_tensors_of_a_task(implementation: str, which: int) -> None:
    rows, weights = make_rows(3, [(6, 4), (0,), (3000,), (1,), ()], DTYPES, seed=8), weights_for(3)
    table = copies(rows)
    found = mk.combine(table, weights, out=table[which], backend=implementation)
    assert all(a is b for a, b in zip(found, table[which], strict=True))
    check_combine(found, rows, weights)
    for k in {0, 1, 2} - {which}:
        assert all(torch.equal(a, b) for a, b in zip(table[k], rows[k], strict=True))


def test_in_place_where_the_first_task_is_absent(implementation: str) -> None:
    rows, weights = make_rows(3, [(40,), (50,)], seed=9), weights_for(3)
    rows[0][1] = None
    table = copies(rows)
    out = [table[0][0], table[1][1]]
    check_combine(mk.combine(table, weights, out=out, backend=implementation), rows, weights)


def test_in_place_over_rows_with_memory_of_their_own_order(implementation: str) -> None:
    rows, weights = make_rows(3, [(6, 8)], seed=10), weights_for(3)
    for first, second in (("plain", "transposed"), ("transposed", "plain"), ("transposed", "transposed")):
        for which in range(3):
            lay_out = {"plain": lambda t: t.clone(), "transposed": lambda t: t.T.contiguous().T}
            table = [
                [lay_out[first](rows[0][0])],
                [lay_out[second](rows[1][0])],
                [lay_out[second](rows[2][0])],
            ]
            found = mk.combine(table, weights, out=table[which], backend=implementation)
            assert found[0] is table[which][0]
            check_combine(found, rows, weights)
    columns = dense(make_rows(3, [(9,)], seed=11)).T.contiguous().T
    expected = exact_combine([[row.clone()] for row in columns], weights)[0]
    mk.combine(columns, weights, out=columns[0], backend=implementation)
    torch.testing.assert_close(columns[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_in_place_over_expanded_rows(implementation: str) -> None:
    row = torch.arange(5000.0)
    mk.combine(row.expand(3, -1), torch.tensor([1.0, 2.0, 4.0]), out=row, backend=implementation)
    assert torch.equal(row, 7 * torch.arange(5000.0))


def test_out_of_its_own(implementation: str) -> None:
    rows, weights = make_rows(3, [(6, 4), (300,), (5,)], missing=0.3, seed=12), weights_for(3)
    reached = [any(row[p] is not None for row in rows) for p in range(3)]
    kept = copies(rows)
    out = [
        torch.full(shape, math.nan) if there else None
        for shape, there in zip([(6, 4), (300,), (5,)], reached, strict=True)
    ]
    found = mk.combine(rows, weights, out=out, backend=implementation)
    assert all(a is b for a, b in zip(found, out, strict=True))
    check_combine(out, rows, weights)
    assert same_bits(rows, kept)


def test_out_with_another_layout(implementation: str) -> None:
    rows, weights = make_rows(3, [(6, 4)], seed=13), weights_for(3)
    for out in (torch.zeros(4, 6).T, torch.zeros(6, 8)[:, ::2], torch.zeros(7, 4)[1:]):
        mk.combine(rows, weights, out=[out], backend=implementation)
        check_combine([out], rows, weights)
    vector = torch.zeros(48)
    flat = [[row[0].flatten()] for row in rows]
    mk.combine(dense(flat), weights, out=vector[::2], backend=implementation)
    check_combine([vector[::2]], flat, weights)
    assert not vector[1::2].any()


def test_out_that_overlaps_a_row_in_part_is_refused(backend: str) -> None:
    storage = torch.arange(20.0)
    kept = storage.clone()
    for matrix, out in (
        (storage.as_strided((2, 8), (10, 1)), storage[1:9]),
        (storage.as_strided((2, 8), (10, 1)), storage[5:13]),
        (storage.as_strided((2, 8), (2, 1)), storage[:8]),
        (storage.as_strided((2, 8), (2, 1)), storage[2:10]),
    ):
        with pytest.raises(ValueError, match="overlap"):
            mk.combine(matrix, torch.ones(2), out=out, backend=backend)
        assert torch.equal(storage, kept)


def test_out_that_is_the_row_of_another_parameter_is_refused(backend: str) -> None:
    rows = make_rows(2, [(5,), (5,)], seed=14)
    kept = copies(rows)
    shared = torch.zeros(5)
    for out in ([rows[0][1], rows[0][0]], [shared, shared]):
        with pytest.raises(ValueError, match="overlap"):
            mk.combine(rows, torch.ones(2), out=out, backend=backend)
        assert same_bits(rows, kept)


def test_same_bits_for_any_number_of_threads(implementation: str, threads: None) -> None:
    rows, weights = make_rows(9, [(40_001,), (3,), (9_000,)], DTYPES, missing=0.1, seed=7), weights_for(9)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(mk.combine(rows, weights, backend=implementation))
    for other in results[1:]:
        assert same_bits([results[0]], [other])


def test_every_thread_flushes_denormals_as_the_calling_one_does(implementation: str, threads: None) -> None:
    rows, weights = torch.full((2, 1 << 20), 1e-39), torch.ones(2)
    torch.set_num_threads(2)
    kept = mk.combine(rows, weights, backend=implementation)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor flushes no denormals")
        flushed = [mk.combine(rows, weights, backend=implementation) for _ in range(20)]
    finally:
        torch.set_flush_denormal(False)
    assert kept.view(torch.int32).all()
    if implementation == "cpu":
        assert not any(out.view(torch.int32).any() for out in flushed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_entries_reach_the_result(implementation: str, value: float, dtype: torch.dtype) -> None:
    matrix = torch.ones(9, 200, dtype=dtype)
    matrix[4, 131] = value
    found = mk.combine(matrix, torch.ones(9), backend=implementation)
    assert torch.equal(found.isfinite(), torch.arange(200) != 131)
    assert not mk.combine(torch.ones(2, 20, dtype=dtype), torch.tensor([1.0, value])).isfinite().any()


def test_a_task_that_is_none_does_not_spread_its_weight(implementation: str) -> None:
    found = mk.combine([[None], [torch.ones(3)]], torch.tensor([math.nan, 2.0]), backend=implementation)
    assert found[0].tolist() == [2, 2, 2]


def test_outputs_never_require_grad(implementation: str) -> None:
    matrix, weights = torch.randn(3, 10, requires_grad=True), torch.ones(3, requires_grad=True)
    parameters = [[torch.nn.Parameter(torch.ones(4))] for _ in range(3)]
    for found in (
        mk.combine(matrix, weights, backend=implementation),
        mk.combine(matrix * 2, weights * 2, backend=implementation),
        mk.combine(parameters, weights, backend=implementation)[0],
    ):
        assert not found.requires_grad and found.grad_fn is None


def test_out_may_be_a_leaf_that_requires_grad(implementation: str) -> None:
    leaf = torch.zeros(4, requires_grad=True)
    mk.combine(torch.ones(2, 4), torch.ones(2), out=leaf, backend=implementation)
    assert leaf.tolist() == [2, 2, 2, 2] and leaf.is_leaf and leaf.requires_grad


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_than_2_to_31_elements(backend: str, device: torch.device) -> None:
    if (backend, device.type) not in {("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")}:
        pytest.skip(f"backend {backend} is too slow here")
    if free_bytes() < 8e9:
        pytest.skip("needs 8 GB of memory")
    size = (1 << 31) + 5_000
    row = zero_pages(size, torch.float16)
    row[-3:] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)
    row[(1 << 31) - 1] = 4.0
    mk.combine(row[None], torch.tensor([2.0]), out=row, backend=backend)
    assert row[-4:].tolist() == [0, 2, 4, 6] and row[(1 << 31) - 2 : (1 << 31) + 1].tolist() == [0, 8, 0]
    assert not row[:1000].any()


def allocated_bytes(prof: torch.profiler.profile) -> int:
    """Everything that was allocated on the CPU while the profiler ran, whether or not it was freed again."""
    return sum(max(0, e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.usefixtures("cpu_only")
def test_rows_are_not_copied(backend: str) -> None:
    num_tasks, shapes = 4, [(1000, 300), (4, 3, 5, 5), (200_000,)]
    rows = make_rows(num_tasks, shapes, [torch.bfloat16, torch.float32], seed=15)
    rows[0][1] = None
    rows = [
        [None if t is None else t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in r] for r in rows
    ]
    matrix, weights = torch.randn(num_tasks, 500_000)[:, 1:], weights_for(num_tasks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        mk.gram(rows, backend=backend)
        mk.gram(matrix, backend=backend)
        mk.combine(rows, weights, out=rows[1], backend=backend)
        mk.combine(matrix, weights, out=matrix[0], backend=backend)
    if backend == "cpu":
        assert allocated_bytes(prof) < 4096
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        found = mk.combine(matrix, weights, backend=backend)
    assert allocated_bytes(prof) >= found.nbytes, "the profiler counts"
    if backend == "cpu":
        assert allocated_bytes(prof) < found.nbytes + 4096


def test_rows_are_not_copied_on_a_gpu(backend: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("counts the memory of a GPU")
    rows = make_rows(4, [(1000, 300), (4, 3, 5, 5), (200_000,)], [torch.bfloat16, torch.float32], seed=15)
    rows[0][1] = None
    matrix, weights = torch.randn(4, 500_000)[:, 1:], weights_for(4)

    def work() -> None:
        for table, out in ((rows, rows[1]), (matrix, matrix[0])):
            mk.gram(table, backend=backend)
            mk.combine(table, weights, out=out, backend=backend)

    work()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    if backend != "reference":
        assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_outputs_of_other_layouts_that_overlap_are_refused(backend: str) -> None:
    rows = [[torch.ones(3), 10 * torch.ones(3)]]
    weights = torch.ones(1, dtype=torch.float64)
    memory = torch.zeros(6)
    columns = torch.zeros(3, 2)
    for out in (
        [memory[0:6:2], memory[0:6:2]],
        [memory[:3], memory[0:6:2]],
        [memory[:3], memory[5:].expand(3)],
        [memory.as_strided((3,), (0,)), memory[3:]],
    ):
        with pytest.raises(ValueError, match="out overlaps itself or other memory"):
            mk.combine(rows, weights, out=out, backend=backend)
        assert not memory.any()
    mk.combine(rows, weights, out=[columns[:, 0], columns[:, 1]], backend=backend)
    assert columns.tolist() == [[1.0, 10.0]] * 3
    mk.combine(rows, weights, out=[memory[0:6:2], memory[1:6:2]], backend=backend)
    assert memory.tolist() == [1.0, 10.0] * 3
