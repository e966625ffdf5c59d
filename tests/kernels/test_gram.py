import functools
import math

import pytest
import torch
from exact import DTYPES, Table, check_gram, dense, exact_gram, make_rows, tables
from hypothesis import HealthCheck, given, settings
from placement import free_bytes, on_host, zero_pages

import emulated
import mtl_kernels as mk

SIZES = [
    *((1, n) for n in (1, 2, 63, 5000)),
    *((2, n) for n in (1, 15, 16, 17, 1023, 4097, 20011)),
    *((k, 129) for k in (3, 4, 5, 6, 7, 9, 10, 11, 12, 15, 16)),
    *((k, n) for k in (5, 8) for n in (3, 2048, 6001)),
    *((17, n) for n in (31, 2100)),
    *((k, 200) for k in (33, 40)),
    (64, 140),
    (127, 20),
    (128, 50),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), SIZES)
def test_dense_rows(implementation: str, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    if num_tasks > 40 and implementation == "reference" and dtype is not torch.float64:
        pytest.skip("the reference converts to float64 first: one dtype says it all, and the oracle is slow")
    rows = make_rows(num_tasks, [(size,)], [dtype], seed=num_tasks * size)
    check_gram(mk.gram(dense(rows), backend=implementation), rows)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 17])
def test_ragged_table_of_mixed_dtypes(implementation: str, num_tasks: int) -> None:
    shapes = [(0,), (1,), (3, 5), (), (130,), (2, 0, 4), (16,), (1000,), (7, 1), (1, 1)]
    rows = make_rows(num_tasks, shapes, DTYPES, missing=0.3, seed=num_tasks)
    check_gram(mk.gram(rows, backend=implementation), rows)


@pytest.mark.parametrize("num_tasks", [2, 6, 9])
def test_many_tiny_parameters_share_blocks(implementation: str, num_tasks: int) -> None:
    rows = make_rows(num_tasks, [(1 + p % 7,) for p in range(350)], DTYPES[:2], missing=0.2, seed=1)
    check_gram(mk.gram(rows, backend=implementation), rows)


@pytest.mark.parametrize("length", [1000, 1008, 1023, 1024, 1025, 1040, 2047, 2048, 2049, 3071])
def test_parameters_that_end_around_the_borders_of_blocks(implementation: str, length: int) -> None:
    rows = make_rows(3, [(5,), (length,), (1,), (length,), (11,)], missing=0.1, seed=length)
    check_gram(mk.gram(rows, backend=implementation), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride_and_alignment_of_dense_rows(implementation: str, dtype: torch.dtype) -> None:
    storage = dense(make_rows(4, [(400,)], [dtype], seed=3))
    views = {
        "row stride above N": storage[:, :133],
        "misaligned": storage.flatten()[3:603].view(3, 200)[:, 1:180],
        "expanded": storage[:1, 5:].expand(5, 395),
        "every other row": storage[::2],
        "columns reversed in memory": storage[:, :50].T.contiguous().T,
        "every other column": storage[:, ::2],
        "overlapping rows": storage.flatten().as_strided((6, 64), (1, 1)),
        "one column": storage[:, 7:8],
        "negative view": torch._neg_view(storage),
    }
    for matrix in views.values():
        check_gram(mk.gram(matrix, backend=implementation), [[row.clone()] for row in matrix])


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_no_element_size_divides(implementation: str, offset: int) -> None:
    if implementation == emulated.NAME:
        pytest.skip("a GPU does not read there: see test_cuda.py")
    storage = bytearray(4 * 515)
    values = torch.randn(2, 257)
    storage[offset : offset + 4 * 514] = values.numpy().tobytes()
    matrix = torch.frombuffer(storage, dtype=torch.float32, count=514, offset=offset).view(2, 257)
    check_gram(mk.gram(matrix, backend=implementation), [[row] for row in values])


def test_layouts_of_parameters(implementation: str) -> None:
    rows = make_rows(3, [(4, 3, 5, 5), (6, 8), (2, 3, 4)], seed=4)
    expected = exact_gram(rows)
    channels_last = [[row[0].to(memory_format=torch.channels_last), row[1].T.contiguous().T, row[2]] for row in rows]
    differing = [channels_last[0], rows[1], channels_last[2]]
    gapped = [[torch.stack([t, t], dim=-1)[..., 0] for t in row] for row in rows]
    for table in (channels_last, differing, [rows[0], channels_last[1], gapped[2]], gapped):
        found = mk.gram(table, backend=implementation)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


def test_expanded_entries(implementation: str) -> None:
    rows: Table = [[torch.ones(()).expand(3, 4)], [torch.arange(3.0)[:, None].expand(3, 4)]]
    assert mk.gram(rows, backend=implementation).tolist() == [[12, 12], [12, 20]]


def test_nothing_to_sum(implementation: str) -> None:
    for rows in (torch.empty(3, 0), [[torch.empty(0), None]] * 3):
        assert torch.equal(mk.gram(rows, backend=implementation), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.usefixtures("cpu_only")
def test_rows_without_a_tensor_are_on_the_cpu(implementation: str) -> None:
    for rows in ([[], [], []], [[None, None]] * 3):
        assert torch.equal(mk.gram(rows, backend=implementation), torch.zeros(3, 3, dtype=torch.float64))
    assert mk.gram([[], []], groups=[], backend=implementation).shape == (1, 2, 2)


def test_a_task_that_reaches_nothing_has_a_zero_row(implementation: str) -> None:
    rows = make_rows(4, [(30,), (40,)], seed=5)
    rows[2] = [None, None]
    found = mk.gram(rows, backend=implementation)
    assert not found[2].any() and not found[:, 2].any()
    check_gram(found, rows)


@pytest.mark.parametrize("num_tasks", [2, 5, 12])
def test_groups_split_the_sum(implementation: str, num_tasks: int) -> None:
    shapes = [(5,), (3000,), (2, 2), (1,), (0,), (2500,), (17,)]
    groups = [0, 2, 0, 2, 1, 4, 2]
    rows = make_rows(num_tasks, shapes, DTYPES, missing=0.2, seed=6)
    found = mk.gram(rows, groups=groups, backend=implementation)
    assert found.shape == (5, num_tasks, num_tasks)
    for group in range(5):
        expected = exact_gram(rows, [p for p, g in enumerate(groups) if g == group])
        torch.testing.assert_close(found[group], expected, rtol=1e-12, atol=1e-11)
    assert not found[3].any() and not found[1].any()
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("num_tasks", [2, 12])
def test_a_group_beside_larger_ones_is_summed_as_on_its_own(implementation: str, num_tasks: int) -> None:
    first = torch.randn(num_tasks, 4)
    small = first[:1] + 1e-3 * first
    large = torch.randn(num_tasks, 1 << 16)
    rows = [[a, b] for a, b in zip(small, large, strict=True)]
    found = mk.gram(rows, groups=[2, 0], backend=implementation)
    # To the bit on a CPU; elsewhere the groups of a call share the device, and the order of their sums with it.
    rtol = 0 if implementation in ("cpu", "reference") else 1e-13
    torch.testing.assert_close(found[2], mk.gram(small, backend=implementation), rtol=rtol, atol=0)
    torch.testing.assert_close(found[0], mk.gram(large, backend=implementation), rtol=rtol, atol=1e4 * rtol)
    assert not found[1].any()


def test_few_rows_are_summed_in_float64(implementation: str) -> None:
    """Four short parameters hold nearly all of the gradient, beside a long one."""
    first = [torch.randn(1) for _ in range(4)]
    rows = [[a * (1 + k * 2.0**-12) for a in first] + [1e-6 * torch.randn(1 << 16)] for k in range(4)]
    exact = exact_gram(rows, range(5))
    torch.testing.assert_close(mk.gram(rows, backend=implementation), exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_tasks", [2, 6, 7, 16])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(
    implementation: str, num_tasks: int, threads: None
) -> None:
    rows = make_rows(num_tasks, [(40_001,), (3,), (9_000,)], DTYPES[:2], missing=0.1, seed=7)
    results = []
    for count in (1, 2, 2, 1, 3, 2):
        torch.set_num_threads(count)
        results += [mk.gram(rows, backend=implementation) for _ in range(3)]
    if implementation == "reference":
        results = results[:3]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("num_tasks", [2, 6, 16, 40])
def test_same_bits_from_run_to_run(implementation: str, num_tasks: int) -> None:
    rows = make_rows(num_tasks, [(40_001,), (3,), (9_000,)], DTYPES, missing=0.1, seed=7)
    first = mk.gram(rows, backend=implementation)
    assert all(torch.equal(first, mk.gram(rows, backend=implementation)) for _ in range(5))


LONG = 40_009


@on_host
def long_rows(kind: str, num_tasks: int) -> torch.Tensor:
    """Float32 rows of a length at which kernels may sum in float32 for a while."""
    generator = torch.Generator().manual_seed(num_tasks)
    rows = torch.randn(num_tasks, LONG, generator=generator)
    if kind == "heavy tails":
        rows *= torch.randn(LONG, generator=generator).abs().pow(4)
    elif kind == "one large layer":
        rows[:, 700:1200] *= 1e4
    elif kind == "sparse":
        rows *= torch.rand(LONG, generator=generator) < 1e-3
    elif kind == "constant":
        rows = torch.linspace(0.1, 0.9, num_tasks)[:, None].expand(-1, LONG)
    elif kind == "positive":
        rows = rows.abs() + 0.1
    elif kind == "zero row":
        rows[1] = 0
    elif kind.startswith("scale"):
        rows *= float(kind.split()[1])
    elif kind == "rows of very different scale":
        rows *= torch.logspace(-17, 17, num_tasks)[:, None]
    return rows.contiguous()


LONG_KINDS = ["normal", "heavy tails", "one large layer", "sparse", "constant", "positive", "zero row"]
LONG_KINDS += [
    "scale 1e-18",
    "scale 1e-15",
    "scale 1e-13",
    "scale 1e15",
    "scale 1e17",
    "rows of very different scale",
]


@functools.cache
def exact_long_gram(kind: str, num_tasks: int) -> torch.Tensor:
    return exact_gram([[row] for row in long_rows(kind, num_tasks)])


@pytest.mark.parametrize("num_tasks", [5, 8, 13])
@pytest.mark.parametrize("kind", LONG_KINDS)
def test_long_rows(implementation: str, kind: str, num_tasks: int) -> None:
    rows = long_rows(kind, num_tasks)
    exact = exact_long_gram(kind, num_tasks)
    found = mk.gram(rows, backend=implementation)
    assert torch.equal(found, found.T) and found.isfinite().all()
    length = exact.diagonal().sqrt()
    scale = (length[:, None] * length[None, :]).clamp(min=1e-300)
    assert ((found - exact).abs() / scale).max() <= 1e-7 * num_tasks


@on_host
def noise_rows(num_tasks: int, size: int) -> torch.Tensor:
    return torch.randn(num_tasks, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one large layer", "sparse", "constant", "positive"])
@pytest.mark.parametrize("num_tasks", [2, 8, 16])
@pytest.mark.parametrize("size", [1_000, LONG, 1_000_000])
def test_near_parallel_rows_keep_their_difference(implementation: str, size: int, num_tasks: int, kind: str) -> None:
    if size > LONG and (num_tasks > 8 or implementation == "reference"):
        pytest.skip("large, and nothing new")
    first = long_rows(kind, num_tasks)[0].repeat(size // LONG + 1)[:size]
    noise = noise_rows(num_tasks, size)
    noise *= first.norm() / noise.norm(dim=1, keepdim=True)
    rows = first + 1e-3 * noise
    gram = mk.gram(rows, backend=implementation)
    for i, j in ((0, 1), (num_tasks - 2, num_tasks - 1), (0, num_tasks - 1)):
        found = gram[i, i] - 2 * gram[i, j] + gram[j, j]
        expected = (rows[i].double() - rows[j].double()).square().sum()
        assert (found - expected).abs() <= 0.05 * expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_propagate(implementation: str, value: float, dtype: torch.dtype) -> None:
    for place in (0, 70, 132):
        matrix = dense(make_rows(3, [(133,)], [dtype], seed=8)).clone()
        matrix[1, place] = value
        found = mk.gram(matrix, backend=implementation)
        assert not found[1].isfinite().any() and not found[:, 1].isfinite().any()
        assert found[[0, 0, 2, 2], [0, 2, 0, 2]].isfinite().all()


def test_non_finite_entries_where_another_task_has_none(implementation: str) -> None:
    rows: Table = [[torch.tensor([math.nan, 1.0])], [None], [torch.tensor([1.0, 2.0])]]
    found = mk.gram(rows, backend=implementation)
    assert not found[1].any() and not found[:, 1].any(), "None counts as zero, whatever the other rows hold"
    assert found[0, 0].isnan() and found[0, 2].isnan() and found[2, 2] == 5


def test_every_half_and_bfloat16_value(implementation: str) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        values = values[values.isfinite() & (values.abs() < 1e18)]
        ones = torch.ones(64, dtype=dtype)
        column = values.double().square().sum()
        found = mk.gram([[values, ones], [None, ones]], backend=implementation)
        torch.testing.assert_close(found[0, 0], column + 64, rtol=5e-7, atol=0)
        exact = exact_gram([[values], [torch.ones_like(values)]])
        found = mk.gram(torch.stack([values, torch.ones_like(values)]), backend=implementation)
        assert (found - exact).abs()[0, 1] <= 2e-7 * (exact[0, 0] * exact[1, 1]).sqrt()


def test_extreme_scales(implementation: str) -> None:
    for dtype, scale in (
        (torch.float32, 1e-22),
        (torch.float32, 1e30),
        (torch.float64, 1e-140),
        (torch.float64, 1e140),
    ):
        rows = [[row[0] * scale] for row in make_rows(3, [(200,)], [dtype], seed=9)]
        found, expected = mk.gram(rows, backend=implementation), exact_gram(rows)
        assert found.isfinite().all()
        assert ((found - expected).abs() <= 1e-12 * expected.diagonal().max()).all()


def test_rows_may_be_a_table_a_tuple_or_parameters(implementation: str) -> None:
    rows = make_rows(3, [(20,), (5, 2)], missing=0.2, seed=10)
    expected = mk.gram(rows, backend=implementation)
    assert torch.equal(mk.gram(mk.RowTable(rows), backend=implementation), expected)
    assert torch.equal(mk.gram(tuple(map(tuple, rows)), backend=implementation), expected)
    parameters = [[None if t is None else torch.nn.Parameter(t) for t in row] for row in rows]
    found = mk.gram(parameters, backend=implementation)
    assert torch.equal(found, expected) and not found.requires_grad


def test_rows_that_require_grad(implementation: str) -> None:
    matrix = torch.randn(3, 10, requires_grad=True)
    for rows in (matrix, matrix * 2, [[row] for row in matrix.unbind()]):
        found = mk.gram(rows, backend=implementation)
        assert not found.requires_grad and found.grad_fn is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables())
def test_any_table(implementation: str, rows: Table) -> None:
    check_gram(mk.gram(rows, backend=implementation), rows)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_than_2_to_31_elements(backend: str, device: torch.device) -> None:
    if (backend, device.type) not in {("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")}:
        pytest.skip(f"backend {backend} is too slow here")
    if free_bytes() < 6e9:
        pytest.skip("needs 6 GB of memory")
    size = (1 << 31) + 5_000
    row = zero_pages(size, torch.float16)
    row[-3:] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)
    row[(1 << 31) - 1] = 4.0
    assert mk.gram(row[None], backend=backend).item() == 30
    expanded = row[size // 2 - 100 :].expand(2, -1)
    assert expanded.numel() > 1 << 31
    assert torch.equal(mk.gram(expanded, backend=backend), torch.full((2, 2), 30.0, dtype=torch.float64))


def test_rows_further_apart_than_2_to_31_bytes(backend: str) -> None:
    storage = zero_pages((1 << 31) + 10, torch.bfloat16)
    matrix = storage.as_strided((2, 5), (1 << 31, 1))
    matrix.copy_(torch.arange(10.0).view(2, 5))
    assert mk.gram(matrix, backend=backend).tolist() == [[30, 80], [80, 255]]


def test_cosines_and_norms(backend: str) -> None:
    rows = make_rows(6, [(50,)], seed=11)
    rows[3] = [None]
    rows[4] = [rows[0][0] * 3]
    rows[5] = [rows[0][0] * -0.5]
    gram = mk.gram(rows, backend=backend)
    length, cosine = mk.norms(gram), mk.cosines(gram)
    torch.testing.assert_close(length, gram.diagonal().sqrt())
    assert torch.equal(cosine.diagonal(), torch.tensor([1.0, 1, 1, 0, 1, 1], dtype=torch.float64))
    assert not cosine[3].any() and not cosine[:, 3].any()
    assert (cosine.abs() <= 1).all() and torch.equal(cosine, cosine.T)
    torch.testing.assert_close(cosine[0, 4:], torch.tensor([1.0, -1.0], dtype=torch.float64))
    batch = torch.stack([gram, 4 * gram])
    assert torch.equal(mk.cosines(batch)[1], cosine) and mk.norms(batch).shape == (2, 6)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e30, 1e160, 1e300])
def test_cosines_do_not_depend_on_scale(scale: float) -> None:
    gram = mk.gram(torch.stack([torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, -2.0]), torch.ones(3)]))
    torch.testing.assert_close(mk.cosines(gram * scale), mk.cosines(gram), rtol=1e-12, atol=1e-12)
    assert torch.equal(mk.cosines(gram * scale).diagonal(), torch.ones(3, dtype=torch.float64))


def test_cosines_of_rows_of_very_different_scale() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    rows *= torch.tensor([[1e-150], [1e150]], dtype=torch.float64)
    found = mk.cosines(mk.gram(rows))
    torch.testing.assert_close(found[0, 1].item(), 3 / math.sqrt(10), rtol=1e-12, atol=0)


def test_cosines_of_a_non_finite_gram() -> None:
    gram = mk.gram(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]))
    found = mk.cosines(gram)
    assert found[0].isnan().all() and found[1, 1] == 1
