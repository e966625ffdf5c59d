"""The Triton backend: when it is there, and its kernels in the interpreter against the oracle, in small sizes."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from exact import DTYPES, check_combine, check_gram, dense, exact_gram, make_rows
from placement import on_host, rng_state
from torch import Tensor

import interpreter
import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS

REASON = BACKENDS["triton"].missing()
needs_triton = pytest.mark.skipif(REASON is not None, reason=f"backend triton: {REASON}")


@pytest.fixture(autouse=True)
def cpu_tensors_need_the_interpreter(device: torch.device) -> None:
    if REASON is None and BACKENDS["triton"].refusal(device) is not None:
        pytest.skip(f"backend triton does not run on {device.type} tensors here")


def weights_for(num_tasks: int) -> Tensor:
    return torch.randn(num_tasks, dtype=torch.float64)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tasks", "size"),
    # One step of aligned columns or more, and a rest, for every shape of program; the interpreter takes long for more.
    [(1, 530), (2, 300), (3, 150), (8, 70), (9, 45), (16, 33), (17, 70), (33, 40), (64, 16), (65, 33), (128, 20)],
)
def test_every_configuration(num_tasks: int, size: int, dtype: torch.dtype) -> None:
    rows, weights = make_rows(num_tasks, [(size,)], [dtype], seed=num_tasks), weights_for(num_tasks)
    check_gram(mk.gram(rows, backend="triton"), rows)
    check_combine(mk.combine(rows, weights, backend="triton"), rows, weights)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 17])
def test_combine_of_a_whole_block_and_a_rest(num_tasks: int, dtype: torch.dtype) -> None:
    rows, weights = make_rows(num_tasks, [(1300,)], [dtype], seed=num_tasks), weights_for(num_tasks)
    check_combine(mk.combine(rows, weights, backend="triton"), rows, weights)


@needs_triton
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 17])
def test_ragged_table_of_mixed_dtypes(num_tasks: int) -> None:
    shapes = [(0,), (1,), (3, 5), (), (130,), (2, 0, 4), (16,), (300,), (7, 1), (1, 1)]
    rows, weights = make_rows(num_tasks, shapes, DTYPES, missing=0.3, seed=num_tasks), weights_for(num_tasks)
    check_gram(mk.gram(rows, backend="triton"), rows)
    check_combine(mk.combine(rows, weights, backend="triton"), rows, weights)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_cut_into_several_programs(dtype: torch.dtype) -> None:
    rows, weights = make_rows(2, [(5,), (9000,), (70,)], [dtype], seed=3), weights_for(2)
    check_gram(mk.gram(rows, backend="triton"), rows)
    check_combine(mk.combine(rows, weights, backend="triton"), rows, weights)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride_and_alignment(dtype: torch.dtype) -> None:
    storage = dense(make_rows(4, [(160,)], [dtype], seed=3))
    for matrix in (
        storage[:, :133],
        storage.flatten()[3:603].view(3, 200)[:, 1:80],
        storage[:1, 5:].expand(5, 155),
        storage.flatten().as_strided((6, 64), (1, 1)),
    ):
        rows, weights = [[row.clone()] for row in matrix], weights_for(matrix.shape[0])
        check_gram(mk.gram(matrix, backend="triton"), rows)
        check_combine([mk.combine(matrix, weights, backend="triton")], rows, weights)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "size"), [(1, 530), (3, 1300), (7, 33)])
def test_operations_on_columns(num_tasks: int, size: int, dtype: torch.dtype) -> None:
    rows = make_rows(num_tasks, [(3,), (size,), (5,)], [dtype], missing=0.1, seed=num_tasks)
    leak, rng = torch.rand(num_tasks), rng_state(5, 1 << 40)
    for trim in {0, min(1, (num_tasks - 1) // 2), (num_tasks - 1) // 2}:
        expected = mk.trimmed_mean(rows, trim, backend="reference")
        check_close(mk.trimmed_mean(rows, trim, backend="triton"), expected)
    for share in (None, leak):
        expected = mk.graddrop(rows, rng, leak=share, backend="reference")
        check_close(mk.graddrop(rows, rng, leak=share, backend="triton"), expected)


@needs_triton
@pytest.mark.parametrize(("dtype", "state_dtype"), [*zip(DTYPES, [*DTYPES[2:], *DTYPES[:2]], strict=True)], ids=str)
def test_operations_on_states(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    shapes, groups = [(1,), (1100,), (2100,), (70,)], [2, 0, 2, 0]
    rows = make_rows(3, shapes, [dtype], missing=0.2, seed=1)
    keep, gain = torch.tensor([[0.5, 1.0, 0.0], [0.0] * 3, [1.0, 0.5, 0.25]]), torch.tensor([[0.5, 0.0, 1.0]] * 3)
    found = []
    for backend in ("triton", "reference"):
        state = [[torch.full(shape, 0.5).to(state_dtype) for shape in shapes] for _ in range(3)]
        squares = [[tensor.clone() for tensor in states] for states in state]
        sums = mk.update_average(state, rows, keep, gain, groups=groups, backend=backend)
        excess = mk.accumulate_squares(squares, rows, gain, groups=groups, backend=backend)
        torch.testing.assert_close(sums[1], torch.zeros(3, dtype=torch.float64))
        found.append([t for states in [*state, *squares] for t in states] + [sums, excess])
    check_close(*found)


def check_close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """One unit in the last place, where float64 sums differ in theirs."""
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            unit = torch.finfo(ours.dtype).eps if ours.dtype is not torch.float64 else 1e-13
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=unit, atol=1e-13)


@needs_triton
@pytest.mark.parametrize("num_tasks", [2, 12])
def test_groups(num_tasks: int) -> None:
    shapes, groups = [(5,), (200,), (2, 2), (1,), (0,), (170,), (17,)], [0, 2, 0, 2, 1, 4, 2]
    rows = make_rows(num_tasks, shapes, DTYPES, missing=0.2, seed=6)
    found = mk.gram(rows, groups=groups, backend="triton")
    for group in range(5):
        members = [p for p, g in enumerate(groups) if g == group]
        torch.testing.assert_close(found[group], exact_gram(rows, members), rtol=2e-7, atol=1e-6)
        if members:
            alone = [[row[p] for p in members] for row in rows]
            assert torch.equal(found[group], mk.gram(alone, backend="triton")), "a group does not depend on the others"
    assert torch.equal(found, found.mT)
    weights = torch.randn(5, num_tasks, dtype=torch.float64)
    check_combine(mk.combine(rows, weights, groups=groups, backend="triton"), rows, weights[groups])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 2])
def test_in_place(dtype: torch.dtype, which: int) -> None:
    rows, weights = make_rows(3, [(1200,)], [dtype], seed=7), weights_for(3)
    matrix = dense(rows)
    kept = matrix.clone()
    mk.combine(matrix, weights, out=matrix[which], backend="triton")
    check_combine([matrix[which]], rows, weights)
    others = torch.arange(3) != which
    assert torch.equal(matrix[others], kept[others])


@on_host
def values_of_every_size(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, generator=generator) * torch.exp(12 * torch.randn(count, generator=generator))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounds_once_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.cat(
        [values_of_every_size(1500).to(dtype), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)]
    )
    ones = torch.ones_like(values)
    for small in (2.0**-60, -(2.0**-60), 0.0):
        # Halfway between two numbers of 16 bits, and just beside it: rounding to float32 first would lose that.
        weights = torch.tensor([1 + torch.finfo(dtype).eps / 2, small], dtype=torch.float64)
        found = mk.combine(torch.stack([values, ones]), weights, backend="triton")
        exact = values.double() * weights[0] + small
        expected = torch.tensor([nearest(x, dtype) for x in exact.tolist()], dtype=dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=0), expected.nan_to_num(nan=0))


def nearest(x: float, dtype: torch.dtype) -> float:
    """``x`` rounded to nearest even, in exact arithmetic."""
    if not math.isfinite(x) or x == 0:
        return x
    info = torch.finfo(dtype)
    unit = max(math.frexp(x)[1] + math.frexp(info.eps)[1] - 2, math.frexp(info.smallest_normal * info.eps)[1] - 1)
    rounded = math.ldexp(round(math.ldexp(x, -unit)), unit)
    return rounded if abs(rounded) <= info.max else math.copysign(math.inf, x)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_entries(value: float, dtype: torch.dtype) -> None:
    matrix = dense(make_rows(3, [(133,)], [dtype], seed=8)).clone()
    matrix[1, 70] = value
    found = mk.gram(matrix, backend="triton")
    assert not found[1].isfinite().any() and not found[:, 1].isfinite().any()
    assert found[[0, 0, 2, 2], [0, 2, 0, 2]].isfinite().all()
    combined = mk.combine(matrix, torch.ones(3), backend="triton")
    assert torch.equal(combined.isfinite(), torch.arange(133) != 70)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_none_is_not_zero_times_something(dtype: torch.dtype) -> None:
    bad, good = torch.tensor([math.nan, 1.0], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    found = mk.gram([[bad], [None], [good]], backend="triton")
    assert not found[1].any() and not found[:, 1].any()
    assert found[0, 0].isnan() and found[0, 2].isnan() and found[2, 2] == 5
    combined = mk.combine([[None], [good]], torch.tensor([math.nan, 2.0]), backend="triton")
    assert combined[0].tolist() == [2, 4]


@needs_triton
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-70, 2.0**64, 2.0**120])
def test_bfloat16_whose_squares_leave_float32(scale: float) -> None:
    base = make_rows(3, [(140,)], [torch.bfloat16], seed=9)
    rows = [[base[0][0] * scale], [base[1][0]], [base[2][0] / 4 * scale]]
    check_gram(mk.gram(dense(rows), backend="triton"), rows)


@needs_triton
def test_every_bfloat16_and_float16_is_read_and_written() -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, 7, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        found = mk.combine(values[None], torch.ones(1), backend="triton")
        finite = ~values.isnan()
        assert torch.equal(found[finite], values[finite]) and found[~finite].isnan().all()


@needs_triton
@pytest.mark.parametrize("num_tasks", [2, 8])
def test_near_parallel_rows_keep_their_difference(num_tasks: int) -> None:
    first, noise = torch.randn(2000), torch.randn(num_tasks, 2000)
    noise *= first.norm() / noise.norm(dim=1, keepdim=True)
    rows = first + 1e-3 * noise
    gram = mk.gram(rows, backend="triton")
    for i, j in itertools.combinations(range(num_tasks), 2):
        expected = (rows[i].double() - rows[j].double()).square().sum()
        assert (gram[i, i] - 2 * gram[i, j] + gram[j, j] - expected).abs() <= 0.05 * expected


@needs_triton
def test_same_bits_from_run_to_run() -> None:
    rows = make_rows(6, [(600,), (3,), (900,)], DTYPES, missing=0.1, seed=7)
    first = mk.gram(rows, backend="triton")
    assert torch.equal(first, mk.gram(rows, backend="triton"))


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_no_triton() -> None:
    assert run("import sys, mtl_kernels; print('triton' in sys.modules)") == "False"


def test_the_cpu_path_imports_no_triton() -> None:
    code = "import sys, torch, mtl_kernels as mk; mk.gram(torch.ones(2, 3)); print('triton' in sys.modules)"
    assert run(code, TRITON_INTERPRET="0") == "False"


def test_without_the_package_the_reason_says_so() -> None:
    code = """
import sys; sys.modules["triton"] = None
import torch, mtl_kernels as mk
print(mk.available_backends()["triton"])
try:
    mk.gram(torch.ones(2, 3), backend="triton")
except RuntimeError as error:
    print(error)
"""
    reason, error = run(code).splitlines()
    assert "triton is not installed; pip install" in reason
    assert error == f"backend 'triton' is not available: {reason}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_says_so() -> None:
    code = "import mtl_kernels as mk; print(mk.available_backends()['triton'])"
    interpreter.require_triton()
    assert "torch finds no GPU" in run(code, TRITON_INTERPRET="0")


@needs_triton
def test_the_interpreter_is_never_chosen_by_itself() -> None:
    assert not BACKENDS["triton"].automatic_on(torch.device("cpu"))  # type: ignore[attr-defined]
    assert BACKENDS["triton"].refusal(torch.device("meta")) is not None
