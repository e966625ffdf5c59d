"""Operations that a backend may fuse: statistics, gram with a solver behind it, and the epilogues of combine."""

import itertools

import pytest
import torch
from exact import make_rows
from placement import rng_state

import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS
from mtl_kernels.definitions import sums

SHAPES = [(37, 5), (8,), (3, 3, 3), (257,), (1,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 3]])
@pytest.mark.parametrize("num_tasks", [1, 3, 12])
def test_statistics(backend: str, num_tasks: int, groups: list[int] | None) -> None:
    rows = make_rows(num_tasks, SHAPES, missing=0.2, seed=1)
    if num_tasks > 1:
        rows[1] = [None if t is None else torch.zeros_like(t) for t in rows[1]]
    found = mk.statistics(rows, groups=groups, backend=backend)
    assert torch.equal(found.gram, mk.gram(rows, groups=groups, backend=backend))
    torch.testing.assert_close(found.norms, mk.norms(found.gram), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.cosines, mk.cosines(found.gram), rtol=1e-13, atol=1e-15)
    assert torch.equal(found.cosines, found.cosines.mT)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_statistics_of_what_is_not_finite(backend: str, bad: float) -> None:
    matrix = torch.randn(3, 40)
    matrix[1, 7] = bad
    found = mk.statistics(matrix, backend=backend)
    assert not found.norms[1].isfinite() and found.norms[[0, 2]].isfinite().all()
    assert torch.equal(found.cosines.isnan(), mk.cosines(found.gram).isnan())


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 2]])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 20])
@pytest.mark.parametrize("solver", ["pcgrad", "min_norm"])
def test_gram_solve_is_gram_and_solve(backend: str, solver: str, num_tasks: int, groups: list[int] | None) -> None:
    if backend == "triton" and num_tasks == 20:
        pytest.skip("slow in Triton's interpreter, and nothing new")
    rows = make_rows(num_tasks, SHAPES, missing=0.1, seed=2)
    rng, options = rng_state(5, 3), (1.0, 0.0) if solver == "pcgrad" else (0.0, 0.0, 0.0)
    active = torch.ones(num_tasks, dtype=torch.bool)
    active[num_tasks // 2 :: 3] = num_tasks < 3
    for mask in (None, active):
        call = mk.SolverCall(solver, options, mask, rng)
        gram, weights, certificate = mk.gram_solve(rows, call, groups=groups, backend=backend)
        assert torch.equal(gram, mk.gram(rows, groups=groups, backend=backend))
        expected, expected_certificate = mk.ops.solve(gram, call, backend=backend)
        assert torch.equal(weights, expected)
        assert torch.equal(certificate, expected_certificate)
    assert rng.tolist() == [5, 3]


def test_gram_solve_advances_the_generator_once(backend: str) -> None:
    rows, rng = make_rows(4, SHAPES, seed=3), rng_state(7, 1)
    call = mk.SolverCall("pcgrad", (1.0, 0.0), rng=rng, advance_rng=True)
    first = mk.gram_solve(rows, call, groups=[0, 1, 2, 3, 4], backend=backend)
    assert rng.tolist() == [7, 2]
    call = mk.SolverCall("pcgrad", (1.0, 0.0), rng=rng_state(7, 1))
    again = mk.gram_solve(rows, call, groups=[0, 1, 2, 3, 4], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gram_solve_bad_input(backend: str) -> None:
    with pytest.raises(ValueError, match="advance_rng needs an rng state"):
        mk.gram_solve(torch.ones(2, 3), mk.SolverCall("pcgrad", (0.0, 0.0), advance_rng=True), backend=backend)
    with pytest.raises(ValueError, match="unknown solver"):
        mk.gram_solve(torch.ones(2, 3), mk.SolverCall("nothing"), backend=backend)
    with pytest.raises(TypeError, match="expected a SolverCall, found 'pcgrad'"):
        mk.gram_solve(torch.ones(2, 3), "pcgrad", backend=backend)
    with pytest.raises((ValueError, TypeError), match="active"):
        mk.gram_solve(torch.ones(2, 3), mk.SolverCall("pcgrad", (0.0, 0.0), torch.ones(3)), backend=backend)


def expected_combination(
    matrix: torch.Tensor, weights: torch.Tensor, scale: float, before: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    total = scale * (weights.double() @ matrix.double())
    return (total if before is None else total + before.double()).to(dtype)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_cast_scale_and_accumulate(
    backend: str, rows_dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool
) -> None:
    torch.manual_seed(4)
    matrix, weights = torch.randn(5, 1003).to(rows_dtype), torch.randn(5, dtype=torch.float64)
    before = torch.randn(1003).to(out_dtype)
    out = before.clone()
    scale = torch.tensor(0.125, dtype=torch.float32)
    found = mk.combine(matrix, weights, out=out, scale=scale, accumulate=accumulate, backend=backend)
    assert found is out
    expected = expected_combination(matrix, weights, 0.125, before if accumulate else None, out_dtype)
    # The sums differ in their last bits, which can tip one rounding.
    torch.testing.assert_close(out, expected, rtol=torch.finfo(out_dtype).eps, atol=1e-12)
    assert (out != expected).float().mean() < (1 if out_dtype == torch.float64 else 0.01)


def test_rounds_once(backend: str) -> None:
    """A sum just above the middle of two bfloat16 neighbours; through float it would fall to the even one."""
    matrix = torch.tensor([[1.0], [2.0**-8], [2.0**-40]])
    out = torch.empty(1, dtype=torch.bfloat16)
    mk.combine(matrix, torch.ones(3), out=out, backend=backend)
    assert out.item() == 1 + 2.0**-7


def exact_sums(num_tasks: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights whose sums are exact in float64, halfway between two 16-bit numbers or just beside it."""
    rows = torch.randint(-63, 64, (num_tasks, size)).to(dtype)
    weights = 1 + 2.0 ** -torch.randint(8, 12, (num_tasks,)).double()
    rows[-1] = torch.randint(-1, 2, (size,)).to(dtype)
    weights[-1] = 2.0**-35
    return rows, weights


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [2, 3, 11])
def test_the_same_bits_as_the_reference(
    implementation: str, num_tasks: int, rows_dtype: torch.dtype, accumulate: bool
) -> None:
    check_same_bits(implementation, num_tasks, 1541, rows_dtype, accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows_dtype", DTYPES)
def test_the_same_bits_as_the_reference_from_triton(backend: str, rows_dtype: torch.dtype, accumulate: bool) -> None:
    if backend == "triton":
        check_same_bits(backend, 3, 1300, rows_dtype, accumulate)


def check_same_bits(backend: str, num_tasks: int, size: int, rows_dtype: torch.dtype, accumulate: bool) -> None:
    rows, weights = exact_sums(num_tasks, size, rows_dtype)
    for out_dtype in DTYPES:
        before = torch.randint(-63, 64, (size,)).to(out_dtype)
        found, expected = before.clone(), before.clone()
        mk.combine(rows, weights, out=found, accumulate=accumulate, backend=backend)
        mk.combine(rows, weights, out=expected, accumulate=accumulate, backend="reference")
        assert torch.equal(found, expected), out_dtype


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_long_outputs_that_start_anywhere(implementation: str, out_dtype: torch.dtype) -> None:
    """Past the cache, where the CPU's kernels write whole lines."""
    size = (5 << 20) // out_dtype.itemsize
    rows, weights = exact_sums(3, size, torch.float32 if out_dtype is torch.float64 else torch.bfloat16)
    memory = torch.full((size + 64,), 7.0, dtype=out_dtype)
    for offset in (0, 3):
        memory.fill_(7)
        mk.combine(rows, weights, out=memory[offset : offset + size], backend=implementation)
        total = weights @ rows.double()
        torch.testing.assert_close(memory[offset : offset + size].double(), total, rtol=2.0**-7, atol=2.0**-7)
        assert (memory[:offset] == 7).all() and (memory[offset + size :] == 7).all()


def test_a_backend_asked_for_computes_it_itself(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        pytest.skip("about the others")

    def fail(*arguments: object) -> None:
        pytest.fail("ran the reference")

    monkeypatch.setattr(BACKENDS["reference"], "combine_into", fail)
    monkeypatch.setattr(sums, "combine_into", fail)
    rows, flag = torch.ones(2, 3), torch.zeros(1)
    for dtype in DTYPES:
        out = torch.ones(3, dtype=dtype)
        for accumulate, expected in ((False, 3), (True, 6)):
            mk.combine(
                rows, torch.ones(2), out=out, scale=torch.full((1,), 1.5), found_inf=flag, accumulate=accumulate,
                backend=backend,
            )  # fmt: skip
            assert out.tolist() == [expected] * 3


@pytest.mark.parametrize(("solver", "number"), [("pcgrad", 2), ("min_norm", 3)])
def test_the_number_of_options(backend: str, solver: str, number: int) -> None:
    for wrong in (0, number - 1, number + 1):
        message = f"solver '{solver}' takes {number} options, found {wrong}"
        with pytest.raises(ValueError, match=message):
            mk.ops.solve(torch.eye(2, dtype=torch.float64), mk.SolverCall(solver, (0.0,) * wrong), backend=backend)
        with pytest.raises(ValueError, match=message):
            mk.gram_solve(torch.ones(2, 3), mk.SolverCall(solver, (0.0,) * wrong), backend=backend)


def test_a_random_order_needs_a_state(backend: str) -> None:
    with pytest.raises(ValueError, match="solver 'pcgrad' needs an rng state with these options"):
        mk.gram_solve(torch.ones(2, 3), mk.SolverCall("pcgrad", (1.0, 0.0)), backend=backend)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1.0])
def test_found_inf(backend: str, value: float) -> None:
    rows = make_rows(3, SHAPES, [torch.float32], seed=5)
    rows[2][3].view(-1)[200] = value
    for start in (0.0, 1.0):
        flag = torch.full((1,), start)
        mk.combine(rows, torch.ones(3), found_inf=flag, backend=backend)
        assert flag.item() == (1.0 if value != 1 else start)


def test_found_inf_sees_what_overflows_in_the_output(backend: str) -> None:
    flag, out = torch.zeros(()), torch.empty(9, dtype=torch.float16)
    mk.combine(torch.full((2, 9), 4e4), torch.ones(2), out=out, found_inf=flag, backend=backend)
    assert flag.item() == 1 and out.isinf().all()


def test_groups_and_layouts(backend: str) -> None:
    rows = make_rows(3, SHAPES, [torch.float32], missing=0.2, seed=6)
    weights = torch.randn(2, 3)
    groups = [0, 1, 0, 1, 1]
    plain = mk.combine(rows, weights, groups=groups, backend=backend)
    before = [None if t is None else torch.randn(t.shape[::-1]).permute(*reversed(range(t.dim()))) for t in plain]
    out = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in before]
    mk.combine(rows, weights, out=out, groups=groups, accumulate=True, backend=backend)
    for found, start, added in zip(out, before, plain, strict=True):
        if added is not None:
            torch.testing.assert_close(found, start + added, rtol=1e-6, atol=1e-6)


def test_bad_epilogues(backend: str) -> None:
    matrix, weights, out = torch.ones(2, 3), torch.ones(2), torch.zeros(3)
    with pytest.raises(ValueError, match="pass out as well"):
        mk.combine(matrix, weights, accumulate=True, backend=backend)
    with pytest.raises(ValueError, match="one element"):
        mk.combine(matrix, weights, scale=torch.ones(2), backend=backend)
    with pytest.raises(TypeError, match="floating"):
        mk.combine(matrix, weights, scale=torch.ones(1, dtype=torch.int64), backend=backend)
    with pytest.raises(TypeError, match="float32"):
        mk.combine(matrix, weights, found_inf=torch.zeros(1, dtype=torch.float64), backend=backend)
    with pytest.raises(TypeError, match="as a tensor"):
        mk.combine(matrix, weights, scale=0.5, backend=backend)
    with pytest.raises(ValueError, match="overlaps"):
        mk.combine(matrix, weights, out=matrix[0], accumulate=True, backend=backend)
    with pytest.raises(ValueError, match="overlaps"):
        half = matrix[0].view(torch.bfloat16)[:3]
        mk.combine(matrix, weights, out=half, backend=backend)
    assert torch.equal(out, torch.zeros(3)) and torch.equal(matrix, torch.ones(2, 3))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_they_compile(backend: str, compiler: str) -> None:
    matrix, rng = torch.randn(3, 50), rng_state(1)

    def step(matrix: torch.Tensor, rng: torch.Tensor, out: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        call = mk.SolverCall("pcgrad", (1.0, 0.0), rng=rng, advance_rng=True)
        _, weights, _ = mk.gram_solve(matrix, call, backend=backend)
        scale = torch.full((1,), 0.5)
        mk.combine(matrix, weights, out=out, scale=scale, found_inf=flag, accumulate=True, backend=backend)
        return (
            mk.statistics(matrix, backend=backend).cosines
            + mk.combine(matrix, weights, scale=scale, backend=backend).sum()
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        state, out, flag = rng.clone(), torch.ones(50), torch.zeros(1)
        results.append((function(matrix, state, out, flag), out, flag, state))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert results[0][3].tolist() == [1, 1]
