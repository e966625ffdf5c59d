"""Row tables to test with, and what the kernels must find for them, summed without rounding error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from placement import on_host
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPSILON = torch.finfo(torch.float64).eps

Table = list[list[Tensor | None]]


@on_host
def make_rows(
    num_tasks: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    missing: float = 0.0,
    seed: int = 0,
) -> Table:
    """K rows of normal entries; parameter p has ``dtypes[p % len(dtypes)]``, a share ``missing`` is None."""
    generator = torch.Generator().manual_seed(seed)

    def entry(p: int, shape: tuple[int, ...]) -> Tensor | None:
        if torch.rand((), generator=generator) < missing:
            return None
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtypes[p % len(dtypes)])

    return [[entry(p, shape) for p, shape in enumerate(shapes)] for _ in range(num_tasks)]


def numel(rows: Table) -> int:
    """N, the elements of the parameters that some task reaches."""
    return sum(next((t.numel() for t in column if t is not None), 0) for column in zip(*rows, strict=True))


def _product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 tensors whose sum is x * y exactly (Dekker 1971)."""
    product = x * y
    x_high, y_high = ((v * 134217729.0) - ((v * 134217729.0) - v) for v in (x, y))
    x_low, y_low = x - x_high, y - y_high
    return product, ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


@on_host
def exact_gram(rows: Table, params: Sequence[int] | None = None) -> Tensor:
    """The Gram matrix over some parameters, each entry rounded once: float64 [K, K]."""
    num_tasks = len(rows)
    params = range(len(rows[0])) if params is None else params
    flat = [[None if row[p] is None else row[p].detach().double().flatten() for p in params] for row in rows]
    wide = [any(row[p] is not None and row[p].dtype is torch.float64 for row in rows) for p in params]
    result = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    for i in range(num_tasks):
        for j in range(i + 1):
            terms: list[float] = []
            for a, b, is_wide in zip(flat[i], flat[j], wide, strict=True):
                if a is not None and b is not None:
                    product, error = _product(a, b) if is_wide else (a * b, None)
                    terms += product.tolist()
                    terms += [] if error is None else error.tolist()
            result[i, j] = result[j, i] = math.fsum(terms)
    return result


@on_host
def torch_gram(rows: Table) -> Tensor:
    """The same computed by torch at the dtype of the rows, parameter by parameter."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for matrix in _matrices(rows):
        if matrix is not None:
            total += (matrix @ matrix.T).double()
    return total


@on_host
def exact_combine(rows: Table, weights: Tensor) -> list[Tensor | None]:
    """sum_k w_k g_k in pairs of float64 numbers (Knuth's two-sum); weights [K] or one [K] per parameter."""
    results: list[Tensor | None] = []
    for p, matrix in enumerate(_matrices(rows)):
        if matrix is None:
            results.append(None)
            continue
        w = (weights if weights.dim() == 1 else weights[p]).double()
        total = rest = torch.zeros(matrix.shape[1], dtype=torch.float64)
        for w_k, row in zip(w, matrix.double(), strict=True):
            product, error = _product(row, w_k)
            previous, total = total, total + product
            shown = total - previous
            rest = rest + ((previous - (total - shown)) + (product - shown)) + error
        like = next(row[p] for row in rows if row[p] is not None)
        results.append((total + rest).reshape(like.shape))
    return results


@on_host
def torch_combine(rows: Table, weights: Tensor) -> list[Tensor | None]:
    """The same computed by torch at the dtype of the rows."""
    results: list[Tensor | None] = []
    for p, matrix in enumerate(_matrices(rows)):
        w = weights if weights.dim() == 1 else weights[p]
        like = next((row[p] for row in rows if row[p] is not None), None)
        results.append(None if matrix is None or like is None else (w.to(matrix.dtype) @ matrix).reshape(like.shape))
    return results


def _matrices(rows: Table) -> list[Tensor | None]:
    """Every parameter as [K, n], zeros for None."""
    matrices: list[Tensor | None] = []
    for column in zip(*rows, strict=True):
        like = next((t for t in column if t is not None), None)
        if like is None:
            matrices.append(None)
            continue
        matrices.append(torch.stack([(torch.zeros_like(like) if t is None else t).detach().flatten() for t in column]))
    return matrices


@on_host
def check_gram(found: Tensor, rows: Table) -> None:
    """At most twice torch's error at the row dtype plus a floor ~ sqrt(N), relative to the rows' lengths."""
    exact, by_torch = exact_gram(rows), torch_gram(rows)
    assert found.dtype is torch.float64 and found.shape == exact.shape
    assert torch.equal(found, found.T), "not symmetric to the bit"
    length = exact.diagonal().sqrt()
    scale = length[:, None] * length[None, :]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ours = ((found - exact).abs() / scale).max()
    torchs = ((by_torch - exact).abs() / scale).nan_to_num(posinf=0).max()
    assert ours <= 2 * torchs + 4 * EPSILON * (1 + math.sqrt(numel(rows)))
    if all(t is None or t.dtype is not torch.float64 for row in rows for t in row):
        assert ours <= 1e-7 * len(rows)


@on_host
def check_combine(found: Sequence[Tensor | None], rows: Table, weights: Tensor) -> None:
    """At most twice torch's error, and half a unit in the last place but for the rounding of float64 sums."""
    exact, by_torch = exact_combine(rows, weights), torch_combine(rows, weights)
    assert len(found) == len(exact)
    for p, (ours, truth, theirs) in enumerate(zip(found, exact, by_torch, strict=True)):
        if truth is None or ours is None or theirs is None:
            assert ours is None and truth is None
            continue
        like = next(row[p] for row in rows if row[p] is not None)
        assert ours.dtype is like.dtype and ours.shape == like.shape and not ours.requires_grad
        if truth.numel() == 0:
            continue
        info = torch.finfo(ours.dtype)
        error = (ours.double() - truth).abs()
        w = (weights if weights.dim() == 1 else weights[p]).double().abs()
        sums = sum(
            (w_k * row[p].detach().double().abs() for w_k, row in zip(w, rows, strict=True) if row[p] is not None),
            start=torch.zeros_like(truth),
        )
        rounding = 4 * EPSILON * math.sqrt(len(rows)) * sums
        unit = info.eps * torch.ldexp(torch.ones_like(truth), torch.frexp(truth)[1] - 1)
        unit = unit.clamp(min=info.smallest_normal * info.eps)
        assert (error <= 0.51 * unit + rounding).all()
        assert error.max() <= 2 * (theirs.double() - truth).abs().max() + 0.51 * unit.max() + rounding.max()


def dense(rows: Table) -> Tensor:
    """The one parameter of the rows as [K, N]."""
    return torch.stack([row[0] for row in rows])


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Row tables of any shape, dtype, layout and scale."""
    num_tasks = draw(st.integers(1, 12))
    num_params = draw(st.integers(0, 6))
    shape = st.lists(st.integers(0, 7), max_size=3).map(tuple) | st.integers(0, 2100).map(lambda n: (n,))
    shapes = [draw(shape) for _ in range(num_params)]
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(num_params)] or [torch.float32]
    rows = make_rows(
        num_tasks, shapes, dtypes, missing=draw(st.sampled_from([0, 0.3, 1])), seed=draw(st.integers(0, 99))
    )
    layout = draw(st.sampled_from(["plain", "transposed", "gapped", "mixed"]))
    scale = 2.0 ** draw(st.integers(-8, 8))

    def lay_out(k: int, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t * scale
        chosen = ["plain", "transposed", "gapped"][k % 3] if layout == "mixed" else layout
        if chosen == "transposed" and t.dim() >= 2:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if chosen == "gapped":
            return torch.stack([t, t], dim=-1)[..., 1]
        return t

    return [[lay_out(k, t) for t in row] for k, row in enumerate(rows)]
