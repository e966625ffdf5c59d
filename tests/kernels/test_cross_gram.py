"""The products of the rows of two tables: entries of the Gram matrix of both."""

import math

import numpy as np
import pytest
import torch
from exact import DTYPES, EPSILON, Table, dense, exact_gram, make_rows, numel, torch_gram
from torch.utils._python_dispatch import TorchDispatchMode

import mtl_kernels as mk


def check(found: torch.Tensor, a: Table, b: Table) -> None:
    """The error rule of `gram`: at most twice torch's, relative to the rows' lengths."""
    rows = [*a, *b]
    exact, by_torch = exact_gram(rows).cpu(), torch_gram(rows).cpu()
    length = exact.diagonal().sqrt()
    scale = (length[: len(a), None] * length[None, len(a) :]).clamp(min=1e-300)
    block = np.s_[: len(a), len(a) :]
    ours = ((found.cpu() - exact[block]).abs() / scale).max()
    torchs = ((by_torch - exact)[block].abs() / scale).max()
    assert found.dtype is torch.float64 and found.is_contiguous()
    assert ours <= 2 * torchs + 4 * EPSILON * (1 + math.sqrt(numel(rows)))
    if all(t is None or t.dtype is not torch.float64 for row in rows for t in row):
        assert ours <= 1e-7 * len(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), [(1, 1), (2, 4097), (5, 2048), (8, 300), (40, 60)])
def test_dense_rows(implementation: str, num_tasks: int, size: int, dtype: torch.dtype) -> None:
    a, b = (make_rows(num_tasks, [(size,)], [dtype], seed=seed) for seed in (num_tasks, size + 50))
    found = mk.cross_gram(dense(a), dense(b), backend=implementation)
    check(found, a, b)
    both = mk.gram(torch.cat([dense(a), dense(b)]), backend=implementation)
    assert torch.equal(found, both[:num_tasks, num_tasks:])


@pytest.mark.parametrize(("num_a", "num_b"), [(3, 2), (64, 65), (65, 64), (128, 128), (128, 1), (100, 70)])
def test_many_rows(num_a: int, num_b: int) -> None:
    """From 128 in all on, from parts of 64 each."""
    a, b = (make_rows(num, [(5,), (2,)], seed=num, missing=0.1) for num in (num_a, num_b))
    found = mk.cross_gram(a, b)
    assert found.shape == (num_a, num_b)
    flat_a, flat_b = (torch.cat([_column(rows, p, size) for p, size in enumerate((5, 2))], 1) for rows in (a, b))
    torch.testing.assert_close(found, flat_a @ flat_b.T, rtol=0, atol=1e-13)


def _column(rows: Table, p: int, size: int) -> torch.Tensor:
    """One parameter as float64 [K, size], zeros for None."""
    return torch.stack([torch.zeros(size) if row[p] is None else row[p] for row in rows]).double()


def test_ragged_tables_and_groups(backend: str) -> None:
    shapes, groups = [(3, 5), (), (130,), (0,), (16,)], [1, 0, 1, 2, 0]
    a, b = (make_rows(4, shapes, DTYPES, missing=0.3, seed=seed) for seed in (3, 4))
    found = mk.cross_gram(mk.RowTable(a), b, groups=groups, backend=backend)
    assert found.shape == (3, 4, 4)
    for group in range(3):
        params = [p for p, g in enumerate(groups) if g == group]
        expected = exact_gram([*a, *b], params)[:4, 4:]
        torch.testing.assert_close(found[group], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sum(0), mk.cross_gram(a, b, backend=backend), rtol=1e-6, atol=1e-6)


def test_it_is_the_transpose_the_other_way_round(backend: str) -> None:
    a, b = torch.randn(5, 400), torch.randn(5, 400)
    torch.testing.assert_close(mk.cross_gram(a, b, backend=backend), mk.cross_gram(b, a, backend=backend).T)
    torch.testing.assert_close(mk.cross_gram(a, a, backend=backend), mk.gram(a, backend=backend))


def test_captured_tables_are_read_as_they_are() -> None:
    a, b = (make_rows(3, [(4,), (5,)], seed=seed) for seed in (1, 2))
    tables = [mk.RowTable(rows, captured=True) for rows in (a, b)]
    assert torch.equal(mk.cross_gram(*tables), mk.cross_gram(a, b))


def test_under_a_dispatch_mode() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    a, b = torch.randn(3, 50), torch.randn(3, 50)
    expected = mk.cross_gram(a, b)
    with Watching():
        found = mk.cross_gram(a, b)
    assert torch.equal(found, expected) and torch.ops.mtl_kernels.gram.default in seen


@pytest.mark.parametrize(
    ("rows_b", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, "shape"),
        (torch.ones(3, 4, dtype=torch.float64), TypeError, "float64"),
        (torch.ones(4), ValueError, r"\[K, N\]"),
        (torch.ones(129, 4), ValueError, "1 to 128 tasks, found 129"),
        ([], ValueError, "found 0"),
        ([[torch.ones(4), None]] * 3, ValueError, "2 parameters where row 0 has 1|2 parameters"),
    ],
)
def test_rows_that_do_not_fit(rows_b, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        mk.cross_gram(torch.ones(3, 4), rows_b)
