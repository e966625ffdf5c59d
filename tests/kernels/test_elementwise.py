"""Operations on the rows element by element, against the papers' formulas in NumPy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exact import DTYPES, Table, dense, make_rows, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placement import host, on_host, rng_state
from torch import Tensor
from torch.library import opcheck

import mtl_kernels as mk
from benchmarks.oracles.projections import WORD, philox4x32_10

SHAPES = [(0,), (1,), (3, 5), (), (130,), (2, 0, 4), (16,), (1000,), (7, 1), (1, 1)]
SIZES = [
    *((k, 131) for k in (1, 2, 3, 4, 8, 9, 17, 24)),
    *((8, n) for n in (1, 5, 1100)),
    (33, 300),
    (65, 40),
    (128, 70),
]
STATE_DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def copies(rows: Table) -> Table:
    return [[None if t is None else t.clone() for t in row] for row in rows]


def same_bits(rows: Table, others: Table) -> bool:
    pairs = [pair for row, other in zip(rows, others, strict=True) for pair in zip(row, other, strict=True)]
    return all(b is None if a is None else torch.equal(a, b) for a, b in pairs)


def flat(tensor: Tensor) -> np.ndarray:
    """Elements in the order of memory, which they fill: float64."""
    return host(tensor.detach().as_strided((tensor.numel(),), (1,)).double())


def columns(rows: Table) -> list[np.ndarray | None]:
    """The K values of every element, parameter by parameter, in the order of memory: float64 [K, n], 0 for None."""
    found: list[np.ndarray | None] = []
    for column in zip(*mk.RowTable(rows).entries, strict=True):
        there = [t for t in column if t is not None]
        found.append(np.stack([0 * flat(there[0]) if t is None else flat(t) for t in column]) if there else None)
    return found


def uniforms(seed: int, step: int, count: int) -> np.ndarray:
    """U of every element by the generator in Python integers."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        counter = [step & WORD, step >> 32 & WORD, block >> 32, block & WORD]
        words += philox4x32_10(counter, [seed & WORD, seed >> 32 & WORD])
    return (np.array(words[:count], dtype=np.float64) + 0.5) * 2.0**-32


def graddrop_oracle(rows: Table, seed: int, step: int, leak: np.ndarray | None = None) -> list[np.ndarray | None]:
    """Algorithm 1 of Chen 2020, one column of numbers at a time."""
    leaks = np.zeros(len(rows)) if leak is None else leak
    matrices = columns(rows)
    thresholds = iter(uniforms(seed, step, sum(0 if m is None else m.shape[1] for m in matrices)))
    found: list[np.ndarray | None] = []
    for matrix in matrices:
        if matrix is None:
            found.append(None)
            continue
        d = np.zeros(matrix.shape[1])
        for n, g in enumerate(matrix.T):
            total = size = 0.0
            for value in g:
                total, size = total + value, size + abs(value)
            purity = 0.5 if size == 0 else 0.5 * (1 + total / size)
            threshold = next(thresholds)
            kept = (purity > threshold) * (g > 0) + (purity < threshold) * (g < 0)
            d[n] = math.fsum((leaks + (1 - leaks) * kept) * g)
        found.append(d)
    return found


def trimmed_mean_oracle(rows: Table, trim: int) -> list[np.ndarray | None]:
    return [
        None
        if matrix is None
        else np.array([math.fsum(sorted(g)[trim : len(g) - trim]) / (len(g) - 2 * trim) for g in matrix.T])
        for matrix in columns(rows)
    ]


@on_host
def check(found: Any, expected: list[np.ndarray | None], rows: Table) -> None:
    """Half a unit in the last place of the output, and the rounding of K + 2 operations of float64."""
    found = [found] if isinstance(found, Tensor) else found
    for p, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        if truth is None:
            assert ours is None
            continue
        like = next(row[p] for row in rows if row[p] is not None)
        assert ours.dtype is like.dtype and ours.shape == like.shape and not ours.requires_grad
        sizes = np.abs(columns([[row[p]] for row in rows])[0]).sum(0)
        info = torch.finfo(ours.dtype)
        unit = info.eps * np.ldexp(1.0, np.frexp(truth)[1] - 1)
        bound = 0.5 * np.maximum(unit, info.smallest_normal * info.eps) + (len(rows) + 2) * 2.0**-52 * sizes
        assert (np.abs(flat(ours) - truth) <= bound).all()


def trims(num_tasks: int) -> list[int]:
    """None, one, two, the most, and one between."""
    most = (num_tasks - 1) // 2
    return sorted({0, min(1, most), min(2, most), min(3, most), most * 2 // 3, most})


@functools.cache
def dropped(num_tasks: int, size: int, dtype: torch.dtype) -> tuple[Table, Tensor | None, list[np.ndarray | None]]:
    """Rows, what they leak, and what is expected of them: found once for all backends."""
    rows = make_rows(num_tasks, [(size,)], [dtype], seed=size)
    leak = torch.rand(num_tasks, dtype=torch.float64) if num_tasks % 2 else None
    return rows, leak, graddrop_oracle(rows, 5, 1 << 33, None if leak is None else host(leak))


@functools.cache
def trimmed(num_tasks: int, size: int, dtype: torch.dtype) -> tuple[Table, dict[int, list[np.ndarray | None]]]:
    rows = make_rows(num_tasks, [(size,)], [dtype], seed=size)
    return rows, {trim: trimmed_mean_oracle(rows, trim) for trim in trims(num_tasks)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), SIZES)
def test_graddrop_of_dense_rows(implementation: str, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    rows, leak, expected = dropped(num_tasks, size, dtype)
    check(mk.graddrop(dense(rows), rng_state(5, 1 << 33), leak=leak, backend=implementation), expected, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), SIZES)
def test_trimmed_mean_of_dense_rows(implementation: str, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    rows, expected = trimmed(num_tasks, size, dtype)
    for trim, mean in expected.items():
        check(mk.trimmed_mean(dense(rows), trim, backend=implementation), mean, rows)


@pytest.mark.parametrize("num_tasks", [3, 8, 17])
def test_ragged_tables_of_mixed_dtypes(implementation: str, num_tasks: int) -> None:
    rows = make_rows(num_tasks, SHAPES, DTYPES, missing=0.4, seed=num_tasks)
    leak = torch.rand(num_tasks)
    found = mk.graddrop(rows, rng_state(-3, 7), leak=leak, backend=implementation)
    check(found, graddrop_oracle(rows, -3, 7, host(leak.double())), rows)
    for trim in trims(num_tasks):
        check(mk.trimmed_mean(rows, trim, backend=implementation), trimmed_mean_oracle(rows, trim), rows)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), seed=st.integers(-(2**63), 2**64 - 1), part=st.floats(0, 1))
def test_any_table(implementation: str, rows: Table, seed: int, part: float) -> None:
    trim = round(part * ((len(rows) - 1) // 2))
    check(mk.trimmed_mean(rows, trim, backend=implementation), trimmed_mean_oracle(rows, trim), rows)
    check(mk.graddrop(rows, rng_state(seed), backend=implementation), graddrop_oracle(rows, seed, 0), rows)


def test_graddrop_decides_alike_on_every_backend(implementation: str) -> None:
    """Signs as balanced as they can be, so that the last bit of P decides."""
    values = torch.randint(-3, 4, (6, 40_000)).double()
    found = mk.graddrop(values, rng_state(9), backend=implementation)
    assert torch.equal(found, mk.graddrop(values, rng_state(9), backend="reference"))
    assert not torch.equal(found, mk.graddrop(values, rng_state(9, 1), backend=implementation))
    halves = torch.tensor([[1.0], [-1.0]]).expand(2, 40_000)
    kept = mk.graddrop(halves, rng_state(1), backend=implementation)
    assert kept.abs().eq(1).all() and abs(kept.mean()) < 5 / math.sqrt(40_000)


def test_graddrop_keeps_values_of_one_sign_whole(implementation: str) -> None:
    matrix = torch.rand(5, 3000) + 0.1
    torch.testing.assert_close(mk.graddrop(matrix, rng_state(2), backend=implementation), matrix.sum(0))
    torch.testing.assert_close(mk.graddrop(-matrix, rng_state(2), backend=implementation), -matrix.sum(0))
    zeros = torch.zeros(3, 100)
    assert not mk.graddrop(zeros, rng_state(2), backend=implementation).any()
    leak = torch.ones(5)
    mixed = torch.randn(5, 3000)
    torch.testing.assert_close(mk.graddrop(mixed, rng_state(2), leak=leak, backend=implementation), mixed.sum(0))


def test_graddrop_numbers_elements_through_the_parameters(implementation: str) -> None:
    """One parameter or many, and at any place of a matrix: the same numbers."""
    matrix = torch.randn(4, 3001)
    whole = mk.graddrop(matrix, rng_state(4), backend=implementation)
    cuts = [1, 2, 5, 1000, 3, 900, 1, 1089]
    parts = mk.graddrop([list(row.split(cuts)) for row in matrix], rng_state(4), backend=implementation)
    assert torch.equal(torch.cat([part.flatten() for part in parts]), whole)
    storage = torch.zeros(4, 3005)
    storage[:, 3:3004] = matrix
    assert torch.equal(mk.graddrop(storage[:, 3:3004], rng_state(4), backend=implementation), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride_and_alignment(implementation: str, dtype: torch.dtype) -> None:
    storage = dense(make_rows(5, [(400,)], [dtype], seed=3))
    for matrix in (
        storage[:, :133],
        storage.flatten()[3:603].view(3, 200)[:, 1:180],
        storage[:1, 5:].expand(5, 395),
        storage[:, ::2],
        storage.flatten().as_strided((6, 64), (1, 1)),
    ):
        rows = [[row.clone()] for row in matrix]
        check(mk.trimmed_mean(matrix, 1, backend=implementation), trimmed_mean_oracle(rows, 1), rows)
        check(mk.graddrop(matrix, rng_state(6), backend=implementation), graddrop_oracle(rows, 6, 0), rows)
        state = [[torch.zeros_like(row[0])] for row in rows]
        ones = torch.ones(len(rows), dtype=torch.float64)
        mk.update_average(state, matrix, ones, ones, backend=implementation)
        assert all(torch.equal(kept[0], row[0]) for kept, row in zip(state, rows, strict=True))


def column_operations() -> dict[str, Callable[..., Any]]:
    return {
        "graddrop": lambda rows, **kwargs: mk.graddrop(rows, rng_state(8), **kwargs),
        "trimmed_mean": lambda rows, **kwargs: mk.trimmed_mean(rows, 1, **kwargs),
        "trimmed_mean_of_many": lambda rows, **kwargs: mk.trimmed_mean(rows, 8, **kwargs),
    }


OPERATIONS = list(column_operations())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 8, 16])
def test_in_place_over_a_row(implementation: str, operation: str, dtype: torch.dtype, which: int) -> None:
    run, matrix = column_operations()[operation], dense(make_rows(17, [(1300,)], [dtype], seed=7))
    kept = matrix.clone()
    expected = run(matrix, backend=implementation)
    found = run(matrix, out=matrix[which], backend=implementation)
    assert found.data_ptr() == matrix[which].data_ptr() and torch.equal(matrix[which], expected)
    others = torch.arange(17) != which
    assert torch.equal(matrix[others], kept[others]) and not torch.equal(expected, kept[which])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_of_its_own_and_of_another_layout(implementation: str, operation: str) -> None:
    run, rows = column_operations()[operation], make_rows(17, [(6, 4), (300,)], missing=0.1, seed=12)
    kept, expected = copies(rows), run(rows, backend=implementation)
    for out in ([torch.zeros(6, 4), torch.zeros(300)], [torch.zeros(4, 6).T, torch.zeros(600)[::2]]):
        found = run(rows, out=out, backend=implementation)
        assert all(a is b for a, b in zip(found, out, strict=True)) and all(map(torch.equal, out, expected))
    assert same_bits(rows, kept)
    leaf = torch.zeros(300, requires_grad=True)
    run([row[1:] for row in rows], out=[leaf], backend=implementation)
    assert leaf.is_leaf and leaf.requires_grad


def test_layouts_are_kept(implementation: str) -> None:
    rows = make_rows(5, [(4, 3, 5, 5)], seed=4)
    laid_out = [[row[0].to(memory_format=torch.channels_last)] for row in rows]
    found = mk.trimmed_mean(laid_out, 2, backend=implementation)
    check(found, trimmed_mean_oracle(laid_out, 2), laid_out)
    assert found[0].stride() == laid_out[0][0].stride()
    in_memory_order = [[t.permute(0, 2, 3, 1).contiguous() for t in row] for row in rows]
    dropped = mk.graddrop(laid_out, rng_state(3), backend=implementation)
    expected = mk.graddrop(in_memory_order, rng_state(3), backend=implementation)
    assert torch.equal(dropped[0], expected[0].permute(0, 3, 1, 2))


def test_nothing_to_do(implementation: str, device: torch.device) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    for empty in (torch.empty(3, 0), [[None, torch.empty(0)]] * 3):
        for found in (mk.trimmed_mean(empty, 1, backend=implementation), mk.graddrop(empty, rng_state(1))):
            assert (found if isinstance(found, Tensor) else found[1]).shape == (0,)
    state = torch.empty(3, 0)
    assert mk.update_average(state, torch.empty(3, 0), ones, ones, backend=implementation).tolist() == [0, 0, 0]
    assert mk.accumulate_squares(state, torch.empty(3, 0), ones, backend=implementation).tolist() == [0, 0, 0]
    if device.type == "cpu":
        assert mk.trimmed_mean([[], [], []], 1, backend=implementation) == []
        assert mk.update_average([[], []], [[], []], ones[:2], ones[:2], backend=implementation).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 5, 9, 20])
def test_values_that_are_not_finite(implementation: str, num_tasks: int, dtype: torch.dtype) -> None:
    matrix = dense(make_rows(num_tasks, [(300,)], [dtype], seed=8)).clone()
    finite = mk.trimmed_mean(matrix, 1, backend=implementation)
    matrix[1, 70], matrix[2, 90], matrix[0, 295] = math.inf, -math.inf, math.nan
    at = torch.zeros(300, dtype=torch.bool)
    at[[70, 90, 295]] = True
    dropped = mk.graddrop(matrix, rng_state(1), backend=implementation)
    assert torch.equal(dropped.isfinite(), ~at) and dropped[295].isnan()
    plain = mk.trimmed_mean(matrix, 0, backend=implementation)
    assert plain[70] == math.inf and plain[90] == -math.inf and plain[295].isnan()
    for trim in range(1, (num_tasks - 1) // 2 + 1):
        trimmed = mk.trimmed_mean(matrix, trim, backend=implementation)
        assert trimmed.isnan().nonzero().flatten().tolist() == [295] and trimmed[[70, 90]].isfinite().all()
        if trim == 1:
            assert torch.equal(trimmed[~at], finite[~at])
    matrix[0, 70] = -math.inf
    assert mk.trimmed_mean(matrix, 0, backend=implementation)[70].isnan()
    matrix[:, 70] = math.inf
    assert mk.trimmed_mean(matrix, 1, backend=implementation)[70] == math.inf


def test_an_outlier_costs_no_digit(implementation: str) -> None:
    matrix = torch.randn(9, 200, dtype=torch.float64)
    outliers = matrix.clone()
    outliers[3], outliers[4] = 1e300, -1e250
    expected = trimmed_mean_oracle([[row] for row in outliers], 1)[0]
    found = mk.trimmed_mean(outliers, 1, backend=implementation)
    np.testing.assert_allclose(host(found), expected, rtol=0, atol=1e-14)


def test_equal_values(implementation: str) -> None:
    matrix = torch.randint(-1, 2, (11, 500)).float()
    for trim in range(6):
        check(
            mk.trimmed_mean(matrix, trim, backend=implementation),
            trimmed_mean_oracle([[row] for row in matrix], trim),
            [[row] for row in matrix],
        )


def with_state(rows: Table, dtypes: list[torch.dtype], seed: int) -> Table:
    """A state for rows: some entries more than these have, of dtypes of its own."""
    generator = torch.Generator().manual_seed(seed)
    state: Table = []
    for k, row in enumerate(rows):
        state.append([])
        for p, tensor in enumerate(row):
            like = next((other[p] for other in rows if other[p] is not None), None)
            if like is None or (tensor is None and (k + p) % 3 == 0):
                state[k].append(None)
                continue
            values = torch.rand(like.shape, generator=generator, device="cpu").to(dtypes[p % len(dtypes)])
            state[k].append(values.to(like.device))
    return state


def nearest(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 rounded once, by exact scaling."""
    info = torch.finfo(dtype)
    least = np.frexp(info.smallest_normal * info.eps)[1] - 1
    unit = np.maximum(np.frexp(x)[1] + int(np.log2(info.eps)) - 1, least)
    return np.ldexp(np.rint(np.ldexp(x, -unit)), unit) if dtype is not torch.float64 else x


@on_host
def check_state(
    found: Table, before: Table, rows: Table, new: Callable[[int, int, np.ndarray, np.ndarray], Any]
) -> None:
    """Every state is ``new(k, p, s, g)`` rounded once; a unit of float64 before that may decide a tie."""
    for k, (states, olds, row) in enumerate(zip(found, before, rows, strict=True)):
        for p, (ours, old, g) in enumerate(zip(states, olds, row, strict=True)):
            if old is None:
                assert ours is None
                continue
            assert ours.dtype is old.dtype and ours.shape == old.shape
            grads = np.zeros(old.numel()) if g is None else host(g.double()).reshape(-1)
            exact = new(k, p, host(old.double()).reshape(-1), grads)
            slack = 4 * 2.0**-52 * (np.abs(exact) + np.abs(host(old.double()).reshape(-1)) + 1e-30)
            ours_ = host(ours.double()).reshape(-1)
            low, high = nearest(exact - slack, old.dtype), nearest(exact + slack, old.dtype)
            assert ((low <= ours_) & (ours_ <= high)).all()


@on_host
def sums_of(state: Table, rows: Table, groups: list[int], term: Callable[..., np.ndarray]) -> np.ndarray:
    """float64 [S, K] of ``term(s, g)``."""
    sums = np.zeros((max(groups, default=0) + 1, len(state)))
    for k, (states, row) in enumerate(zip(state, rows, strict=True)):
        for p, (kept, g) in enumerate(zip(states, row, strict=True)):
            if kept is not None:
                s = host(kept.double()).reshape(-1)
                sums[groups[p], k] += math.fsum(term(s, 0 * s if g is None else host(g.double()).reshape(-1)))
    return sums


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), [(1, 1), (3, 1100), (2, 20_011), (128, 10)])
def test_update_average_of_dense_rows(
    implementation: str, num_tasks: int, size: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    rows = dense(make_rows(num_tasks, [(size,)], [dtype], seed=size))
    state = dense(make_rows(num_tasks, [(size,)], [state_dtype], seed=size + 1))
    before, keep, gain = state.clone(), torch.rand(num_tasks).double(), torch.randn(num_tasks)
    squares = mk.update_average(state, rows, keep, gain, backend=implementation)
    as_rows = [[[row] for row in matrix] for matrix in (state, before, rows)]
    factors = host(keep), host(gain.double())
    check_state(*as_rows, lambda k, p, s, g: factors[0][k] * s + factors[1][k] * g)
    assert squares.dtype is torch.float64 and squares.shape == (num_tasks,)
    expected = sums_of(as_rows[0], as_rows[2], [0], lambda s, g: s * s)[0]
    np.testing.assert_allclose(host(squares), expected, rtol=1e-13)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtypes", [DTYPES, [torch.float32], DTYPES[::2]], ids=str)
@pytest.mark.parametrize("call", ["average", "squares"])
@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_states_of_ragged_tables(
    implementation: str, num_tasks: int, call: str, dtypes: list[torch.dtype], grouped: bool
) -> None:
    rows = make_rows(num_tasks, [*SHAPES, (5000,)], DTYPES, missing=0.3, seed=num_tasks)
    groups = [2, 0, 2, 0, 0, 4, 2, 0, 2, 2, 0] if grouped else [0] * 11
    shape = (5, num_tasks) if grouped else (num_tasks,)
    options: dict[str, Any] = {"groups": groups if grouped else None, "backend": implementation}
    state, keep, gain = with_state(rows, dtypes, seed=3), torch.rand(shape), torch.rand(shape, dtype=torch.float64)
    before = copies(state)
    kept, gained = (host(t.double().reshape(-1, num_tasks)) for t in (keep, gain))
    if call == "average":
        sums = mk.update_average(state, rows, keep, gain, **options)
        check_state(state, before, rows, lambda k, p, s, g: kept[groups[p], k] * s + gained[groups[p], k] * g)
        expected = sums_of(state, rows, groups, lambda s, g: s * s)
    else:
        sums = mk.accumulate_squares(state, rows, gain, eps=1e-3, **options)
        check_state(state, before, rows, lambda k, p, s, g: s + gained[groups[p], k] * g * g)
        expected = sums_of(state, rows, groups, lambda s, g: g * g / np.sqrt(s + 1e-3))
    assert sums.shape == shape and sums.dtype is torch.float64
    np.testing.assert_allclose(host(sums).reshape(-1, num_tasks), expected, rtol=1e-13)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), seed=st.integers(0, 99))
def test_states_of_any_table(implementation: str, rows: Table, seed: int) -> None:
    """Rows of any layout, and a state that is contiguous."""
    state = with_state(rows, STATE_DTYPES, seed)
    before = copies(state)
    gain = torch.rand(len(rows))
    squares = mk.update_average(state, rows, 1 - gain, gain, backend=implementation)
    factors = host((1 - gain).double()), host(gain.double())
    check_state(state, before, rows, lambda k, p, s, g: factors[0][k] * s + factors[1][k] * g)
    expected = sums_of(state, rows, [0] * len(rows[0]), lambda s, g: s * s)[0]
    np.testing.assert_allclose(host(squares), expected, rtol=1e-13)


@pytest.mark.parametrize("call", ["average", "squares"])
def test_states_of_another_layout_are_updated_too(implementation: str, call: str) -> None:
    rows = [[t.to(memory_format=torch.channels_last) for t in row] for row in make_rows(3, [(2, 3, 4, 5)], seed=5)]
    ones = torch.ones(3, dtype=torch.float64)

    def updated(state: Table) -> tuple[Tensor, Table]:
        if call == "average":
            return mk.update_average(state, rows, ones / 2, ones, backend=implementation), state
        return mk.accumulate_squares(state, rows, ones, backend=implementation), state

    values = [torch.rand(2, 3, 4, 5) for _ in range(3)]
    sums, state = updated([[v.to(memory_format=torch.channels_last)] for v in values])
    for lay_out in (
        torch.clone,
        lambda v: torch.stack([v, v], dim=-1)[..., 0],
        lambda v: v.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        other_sums, other = updated([[lay_out(v)] for v in values])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(state, other, strict=True))
        torch.testing.assert_close(other_sums, sums, rtol=1e-14, atol=0)
    table = mk.RowTable([[v.to(memory_format=torch.channels_last)] for v in values])
    updated(table)  # type: ignore[arg-type]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(state, table.entries, strict=True))


def test_a_state_no_row_reaches_decays(implementation: str) -> None:
    ones = torch.ones(2, dtype=torch.float64)
    state = [[torch.ones(3), torch.full((5,), 4.0)], [torch.ones(3), None]]
    rows = [[torch.ones(3), None], [None, None]]
    squares = mk.update_average(state, rows, ones / 2, ones, backend=implementation)
    assert state[0][0].tolist() == [1.5] * 3 and state[1][0].tolist() == [0.5] * 3 and state[0][1].tolist() == [2] * 5
    assert squares.tolist() == [3 * 2.25 + 20, 0.75]
    sums = mk.accumulate_squares(state, rows, ones, backend=implementation)
    assert state[0][0].tolist() == [2.5] * 3 and state[0][1].tolist() == [2] * 5 and sums[1] == 0


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_factors_of_zero_and_one(implementation: str, dtype: torch.dtype) -> None:
    bad = torch.tensor([[math.nan, math.inf, 1.0, -0.0] * 609] * 4)
    state = (torch.rand(4, 2436) + 0.5).to(dtype)
    state[0, 3] = -0.0
    before = state.clone()
    keep, gain = torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    squares = mk.update_average(state, bad, keep, gain, backend=implementation)
    assert torch.equal(state[0], before[0]) and torch.equal(state[0].signbit(), before[0].signbit())
    assert torch.equal(state[1], (before[1].double() / 2).to(dtype)) and not state[2].any()
    assert squares[:3].isfinite().all() and not squares[3].isfinite()
    assert torch.equal(state[3].isfinite(), bad[3].isfinite())
    lost = torch.full((1, 1207), math.nan, dtype=dtype)
    mk.update_average(lost, torch.ones(1, 1207), torch.zeros(1), torch.ones(1), backend=implementation)
    assert lost.eq(1).all()
    kept = before.clone()
    sums = mk.accumulate_squares(kept, bad, torch.tensor([0.0, 0.0, 0.0, 1.0]), backend=implementation)
    assert torch.equal(kept[:3], before[:3]) and torch.equal(kept[0].signbit(), before[0].signbit())
    assert torch.equal(kept[3].isfinite(), bad[3].isfinite()) and not sums[3].isfinite()


def test_the_root_of_nothing(implementation: str) -> None:
    state = torch.zeros(1, 40)
    sums = mk.accumulate_squares(state, torch.zeros(1, 40), torch.ones(1), backend=implementation)
    assert sums.item() == 0 and not state.any()
    sums = mk.accumulate_squares(state, torch.full((1, 40), 1e-4), torch.zeros(1), backend=implementation)
    assert sums.item() == pytest.approx(40 * 1e-8 / math.sqrt(1e-7), rel=1e-6)


def test_same_bits_for_any_number_of_threads(implementation: str, threads: None) -> None:
    if implementation == "reference":
        pytest.skip("torch's sums may depend on its threads")
    rows = make_rows(9, [(40_001,), (3,), (9_000,)], DTYPES, missing=0.1, seed=7)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        state, squares = with_state(rows, STATE_DTYPES, 1), with_state(rows, STATE_DTYPES, 1)
        ones = torch.full((9,), 0.3)
        results.append(
            [
                *mk.graddrop(rows, rng_state(3), backend=implementation),
                *mk.trimmed_mean(rows, 2, backend=implementation),
                *mk.trimmed_mean(rows, 4, backend=implementation),
                mk.update_average(state, rows, ones, ones, backend=implementation),
                mk.accumulate_squares(squares, rows, ones, backend=implementation),
                *(tensor for states in [*state, *squares] for tensor in states if tensor is not None),
            ]
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.usefixtures("cpu_only")
def test_rows_and_states_are_not_copied(backend: str) -> None:
    if backend != "cpu":
        pytest.skip("counts what the compiled backend allocates through torch")
    matrix, out = torch.randn(8, 200_000)[:, 1:], torch.empty(199_999)
    state, half = torch.zeros(8, 199_999, dtype=torch.bfloat16), torch.full((8,), 0.5, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        mk.graddrop(matrix, rng_state(1), leak=half, out=out, backend=backend)
        mk.trimmed_mean(matrix, 2, out=matrix[3], backend=backend)
        mk.update_average(state, matrix, half, half, backend=backend)
        mk.accumulate_squares(state, matrix, half, backend=backend)
    events = prof.profiler.kineto_results.events()
    assert sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]") < 4096


def test_halves_are_rounded_once(implementation: str) -> None:
    """A value halfway between two of 16 bits, and one that is next to halfway by less than float32 shows."""
    for dtype in (torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        rows = torch.tensor([[1.0] * 33, [eps / 2] * 33, [2.0**-40] * 33], dtype=torch.float64)
        state = torch.zeros(3, 33, dtype=dtype)
        halves = [[row.to(dtype)] for row in rows]
        if dtype is torch.bfloat16:
            found = mk.graddrop(halves, rng_state(1), backend=implementation)[0]
            assert found.double().eq(1 + eps).all(), "rounding to float32 first would lose the last row"
        weights = torch.tensor([1 + eps / 2 + 2.0**-40] * 3, dtype=torch.float64)
        mk.update_average(state, torch.ones(3, 33), weights, weights, backend=implementation)
        assert state.double().eq(1 + eps).all()


def test_opcheck(backend: str) -> None:
    ops = torch.ops.mtl_kernels
    rows = make_rows(3, [(5,), (2, 3), (0,), ()], DTYPES, missing=0.3, seed=2)
    flat_rows, likes = [t for row in rows for t in row], mk.RowTable(rows).like
    leak = torch.rand(3, dtype=torch.float64)
    opcheck(ops.reduce_columns.default, (flat_rows, 3, backend, "graddrop", leak, rng_state(3), 0))
    out = [torch.empty_like(like) for like in likes if like is not None]
    opcheck(ops.reduce_columns_out.default, (flat_rows, 3, out, backend, "trimmed_mean", None, None, 1))
    state = [t for row in with_state(rows, STATE_DTYPES, 2) for t in row]
    present, there = [t for t in state if t is not None], [t is not None for t in state]
    for groups, call in (
        (None, ("average", leak, leak, 0.0)),
        ([0, 1, 0, 1], ("squares", leak.expand(2, -1), None, 1e-7)),
    ):
        opcheck(ops.update_state.default, (present, there, flat_rows, 3, groups, backend, *call))


def test_compiled_code_updates_states(backend: str) -> None:
    def step(rows: Tensor, average: list[Tensor], squares: Tensor, rng: Tensor, out: Tensor) -> tuple[Any, ...]:
        gain = torch.full((3,), 0.5, dtype=torch.float64)
        lists = [[row] for row in (rows * 2).unbind(0)]
        norms = mk.update_average([[a] for a in average], lists, 1 - gain, gain, backend=backend)
        sums = mk.accumulate_squares(squares, rows, gain, backend=backend)
        mk.trimmed_mean(rows, 1, out=out, backend=backend)
        return (
            norms,
            sums,
            mk.graddrop(lists, rng, leak=gain, backend=backend)[0],
            mk.graddrop(rows, rng, backend=backend),
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    states = [([torch.zeros(20) for _ in range(3)], torch.zeros(3, 20), torch.zeros(20)) for _ in range(2)]
    for n in range(2):
        rows = torch.randn(3, 20)
        results = []
        for run, (average, squares, out) in zip((compiled, step), states, strict=True):
            results.append(run(rows, average, squares, rng_state(3, n), out))
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(states[0], states[1])
    assert all(a.any() for a in states[0][0]) and states[0][1].any() and states[0][2].any()


def test_versions_tell_autograd_of_the_change(backend: str) -> None:
    state, ones = torch.zeros(2, 5), torch.ones(2)
    single = [[torch.zeros(5)], [torch.zeros(5)]]
    before = state._version, single[0][0]._version
    mk.update_average(state, torch.ones(2, 5), ones, ones, backend=backend)
    mk.accumulate_squares(single, torch.ones(2, 5), ones, backend=backend)
    assert state._version > before[0] and single[0][0]._version > before[1]


BAD_COLUMNS: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (lambda rows: mk.trimmed_mean(rows, 2), ValueError, r"trim = 2 of 4 rows .* at least 2 trim \+ 1 rows"),
    (lambda rows: mk.trimmed_mean(rows, -1), ValueError, "trim = -1"),
    (lambda rows: mk.trimmed_mean(rows, 1.0), TypeError, "expected trim as an integer, found float"),
    (lambda rows: mk.trimmed_mean(rows, True), TypeError, "expected trim as an integer, found bool"),
    (lambda rows: mk.trimmed_mean(rows, 1, out=torch.zeros(5)), ValueError, r"out\[0\] is \[5\]"),
    (lambda rows: mk.trimmed_mean(rows, 1, out=torch.zeros(6).double()), TypeError, "the rows torch.float32"),
    (lambda rows: mk.trimmed_mean(rows, 1, out=rows.flatten()[3:9]), ValueError, "out overlaps"),
    (lambda rows: mk.graddrop(rows, None), TypeError, "expected rng as an int64 tensor, found NoneType"),
    (lambda rows: mk.graddrop(rows, torch.zeros(2)), TypeError, "found torch.float32; use rng_state"),
    (lambda rows: mk.graddrop(rows, torch.zeros(3, dtype=torch.int64)), ValueError, r"rng of shape \[2\], found \[3\]"),
    (lambda rows: mk.graddrop(rows, rng_state(1).to("meta")), ValueError, "rng is on meta, the rows on"),
    (
        lambda rows: mk.graddrop(rows, rng_state(1), leak=torch.zeros(3)),
        ValueError,
        r"leak of shape \[4\]",
    ),
    (lambda rows: mk.graddrop(rows, rng_state(1), leak=0.5), TypeError, "expected leak as a tensor, found float"),
    (lambda rows: mk.graddrop(torch.zeros(129, 1), rng_state(1)), ValueError, "expected 1 to 128 tasks, found 129"),
    (lambda rows: mk.graddrop(rows.int(), rng_state(1)), TypeError, "torch.int32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_COLUMNS)
def test_arguments_that_do_not_fit(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    rows = torch.ones(4, 6)
    with pytest.raises(error, match=message):
        call(rows)
    assert rows.eq(1).all()


def test_states_that_do_not_fit(backend: str) -> None:
    rows, ones = [[torch.ones(4), None], [torch.ones(4), torch.ones(2)]], torch.ones(2)
    good = [[torch.ones(4), None], [torch.ones(4), torch.ones(2)]]
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (good[:1], ones, ones, ValueError, "the state is of 1 tasks"),
        ([row[:1] for row in good], ones, ones, ValueError, "1 parameters, the rows of 2 and 2"),
        ([good[0], [good[1][0], None]], ones, ones, ValueError, "the state of parameter 1 is missing"),
        ([[None, None], good[1]], ones, ones, ValueError, "the state of task 0, parameter 0 is missing"),
        (
            [[torch.ones(5), None], [torch.ones(5), torch.ones(2)]],
            ones,
            ones,
            ValueError,
            r"is \[5\] .* expected \[4\]",
        ),
        ([[torch.ones(4).int(), None], [torch.ones(4).int(), None]], ones, ones, TypeError, "torch.int32"),
        ([[rows[0][0], None], good[1]], ones, ones, ValueError, "state overlaps other memory"),
        ([good[1], good[1]], ones, ones, ValueError, "state overlaps other memory"),
        (good, torch.ones(3), ones, ValueError, r"keep of shape \[2\], found \[3\]"),
        (good, ones, ones[None], ValueError, r"gain of shape \[2\], found \[1, 2\]"),
        (good, ones, ones.int(), TypeError, "gain of floating dtype"),
        (good, ones, 1.0, TypeError, "expected gain as a tensor, found float"),
        (good, None, ones, TypeError, "expected keep as a tensor, found NoneType"),
        (good, ones.to("meta"), ones, ValueError, "found keep on meta"),
    ]
    for state, keep, gain, error, message in cases:
        with pytest.raises(error, match=message):
            mk.update_average(state, rows, keep, gain, backend=backend)
    for eps in (-1e-9, math.nan, math.inf, "0"):
        with pytest.raises(ValueError, match="expected eps as a finite number"):
            mk.accumulate_squares(good, rows, ones, eps=eps, backend=backend)  # type: ignore[arg-type]
    assert all(t is None or t.eq(1).all() for row in [*good, *rows] for t in row)


def test_a_state_of_copies_is_refused() -> None:
    ones = torch.ones(3)
    transposed, strided = torch.zeros(5, 3).T, torch.zeros(6)
    with pytest.raises(ValueError, match="found a RowTable of copies"):
        mk.update_average(mk.RowTable(transposed), torch.ones(3, 5), ones, ones)
    with pytest.raises(ValueError, match="found a RowTable of copies"):
        mk.accumulate_squares(mk.RowTable([[strided[::2]]]), [[ones]], torch.ones(1))
    mixed = [[torch.zeros(4, 3)], [torch.zeros(3, 4).T]]
    with pytest.raises(ValueError, match="found a RowTable of copies"):
        mk.update_average(mk.RowTable(mixed), [[torch.ones(4, 3)]] * 2, torch.ones(2), torch.ones(2))
    mk.update_average(mixed, [[torch.ones(4, 3)]] * 2, torch.ones(2), torch.ones(2))
    assert [float(row[0].sum()) for row in mixed] == [12.0, 12.0] and not transposed.any() and not strided.any()


def test_states_of_other_layouts_that_overlap_are_refused() -> None:
    memory = torch.zeros(6)
    rows = [[torch.ones(3)], [torch.full((3,), 5.0)]]
    with pytest.raises(ValueError, match="state overlaps itself or other memory"):
        mk.update_average([[memory[::2]], [memory[::2]]], rows, torch.ones(2), torch.ones(2))
    assert not memory.any()
    mk.update_average([[memory[::2]], [memory[1::2]]], rows, torch.ones(2), torch.ones(2))
    assert memory.tolist() == [1.0, 5.0] * 3
