import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from exact import DTYPES, Table, make_rows
from placement import rng_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import mtl_kernels as mk
from mtl_kernels import ops

OPS = torch.ops.mtl_kernels


def tables() -> dict[str, Table]:
    return {
        "dense": make_rows(3, [(50,)], seed=1),
        "ragged": make_rows(4, [(5,), (2, 3), (0,), (), (1,)], DTYPES, missing=0.3, seed=2),
        "one task": make_rows(1, [(5,)], [torch.bfloat16], seed=3),
        "no parameters": [[], []],
        "channels last": [[t.to(memory_format=torch.channels_last) for t in r] for r in make_rows(2, [(2, 3, 4, 4)])],
    }


NAMES = list(tables())


def flat(rows: Table) -> list[Tensor | None]:
    return [tensor for row in rows for tensor in row]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_gram(backend: str, name: str, device: torch.device) -> None:
    if name == "no parameters" and device.type != "cpu":
        pytest.skip("rows without a tensor are on the CPU")
    rows = tables()[name]
    opcheck(OPS.gram.default, (flat(rows), len(rows), None, backend))
    if name != "no parameters":
        opcheck(OPS.gram.default, (flat(rows), len(rows), list(range(len(rows[0]))), backend))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "no parameters"])
def test_opcheck_of_combine(backend: str, name: str) -> None:
    rows = tables()[name]
    weights = torch.randn(len(rows))
    opcheck(OPS.combine.default, (flat(rows), weights, len(rows), None, backend))
    grouped = torch.randn(2, len(rows), dtype=torch.float64)
    groups = [1, *(0 for _ in rows[0][1:])]
    opcheck(OPS.combine.default, (flat(rows), grouped, len(rows), groups, backend))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "no parameters"])
def test_opcheck_of_combine_out(backend: str, name: str) -> None:
    rows = tables()[name]
    likes = [next((t for t in column if t is not None), None) for column in zip(*rows, strict=True)]
    out = [torch.empty_like(like) for like in likes if like is not None]
    opcheck(OPS.combine_out.default, (flat(rows), torch.randn(len(rows)), len(rows), None, out, backend))


def test_opcheck_with_inputs_that_require_grad(backend: str) -> None:
    rows = [torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)]
    opcheck(OPS.gram.default, (rows, 2, None, backend))
    opcheck(OPS.combine.default, (rows, torch.randn(2, requires_grad=True), 2, None, backend))


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("solver", ["pcgrad", "min_norm"])
def test_opcheck_of_solve(backend: str, solver: str, lead: tuple[int, ...]) -> None:
    if backend == "triton" and lead != ():
        pytest.skip("slow in Triton's interpreter, and nothing new")
    matrix = torch.randn(*lead, 4, 6, dtype=torch.float64)
    options = [1.0, 0.0] if solver == "pcgrad" else [0.0, 0.0, 0.0]
    for active in (None, torch.tensor([True, False, True, True])):
        opcheck(OPS.solve.default, (matrix @ matrix.mT, backend, solver, options, active, rng_state(3), None))
    single = (matrix @ matrix.mT).float().requires_grad_()
    opcheck(OPS.solve.default, (single, backend, solver, options, None, rng_state(3), None))


def step(first: Tensor, second: Tensor, shared: Tensor, rng: Tensor) -> tuple[list[Tensor | None], Tensor, Tensor]:
    rows = [[first, None, shared], [None, second, shared * 2]]
    gram = mk.gram(rows)
    weights = mk.pcgrad_weights(gram, rng=rng)
    rng[1] += 1
    return mk.combine(rows, weights), mk.min_norm_weights(gram).weights, mk.cosines(gram)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_whole_step_compiles_to_one_graph(backend: str, compiler: str) -> None:
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    state, expected_state = rng_state(5), rng_state(5)
    with mk.use_backend(backend):
        for _ in range(3):
            tensors = [torch.randn(4, requires_grad=True), torch.randn(3, 2), torch.randn(5)]
            found, expected = compiled(*tensors, state), step(*tensors, expected_state)
            torch.testing.assert_close(found, expected)
            assert not any(t.requires_grad for t in found[0])
            assert torch.equal(state, expected_state)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
def test_a_step_compiles_with_inductor(backend: str) -> None:
    def combine(matrix: Tensor) -> Tensor:
        with_grad = matrix * 2
        weights = mk.min_norm_weights(mk.gram(with_grad, backend=backend), backend=backend).weights
        return mk.combine(with_grad, weights, backend=backend) + 1

    matrix = torch.randn(3, 40)
    torch.testing.assert_close(torch.compile(combine, fullgraph=True)(matrix), combine(matrix))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dense_rows_groups_and_out_compile(backend: str, compiler: str) -> None:
    def run(matrix: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        weights = mk.min_norm_weights(mk.gram(matrix, groups=[0], backend=backend), backend=backend).weights
        mk.combine(matrix, weights, out=out, groups=[0], backend=backend)
        return mk.combine(matrix, weights, groups=[0], backend=backend), out * 1

    matrix, out, expected_out = torch.randn(3, 20), torch.zeros(20), torch.zeros(20)
    found = torch.compile(run, fullgraph=True, backend=compiler)(matrix, out)
    torch.testing.assert_close(found, run(matrix, expected_out))
    torch.testing.assert_close(out, expected_out)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_in_place_over_the_first_row_compiles(backend: str, compiler: str) -> None:
    def run(first: Tensor, second: Tensor) -> Tensor:
        return mk.combine([[first], [second]], torch.ones(2), out=[first], backend=backend)[0]

    first, second = torch.randn(8), torch.randn(8)
    expected = first + second
    found = torch.compile(run, fullgraph=True, backend=compiler)(first, second)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dynamic_shapes_compile_once(backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return mk.combine([[a], [b]], torch.tensor([2.0, 1.0]), backend=backend)[0]

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for size in (5, 9, 20):
        a, b = torch.randn(size), torch.randn(size)
        torch.testing.assert_close(compiled(a, b), 2 * a + b)
    assert counter.frame_count == 1


def test_fake_tensors_have_the_right_shapes(backend: str) -> None:
    with FakeTensorMode() as mode:
        rows = [[torch.empty(3, 2), None], [torch.empty(3, 2), torch.empty(5, dtype=torch.bfloat16)]]
        gram = mk.gram(rows, backend=backend)
        assert gram.shape == (2, 2) and gram.dtype is torch.float64
        assert mk.gram(rows, groups=[0, 4], backend=backend).shape == (5, 2, 2)
        d = mk.combine(rows, torch.ones(2), backend=backend)
        assert [t.shape for t in d] == [(3, 2), (5,)] and [t.dtype for t in d] == [
            torch.float32,
            torch.bfloat16,
        ]
        assert mk.combine(torch.empty(4, 7), torch.ones(4), backend=backend).shape == (7,)
        assert mk.combine([[None, torch.empty(1)]] * 2, torch.ones(2), backend=backend)[0] is None
        assert mk.pcgrad_weights(torch.empty(3, 4, 4), order="fixed", backend=backend).shape == (3, 4)
        solution = mk.min_norm_weights(torch.empty(3, 2, 4, 4), backend=backend)
        assert solution.weights.shape == (3, 2, 4) and solution.gap.shape == solution.iterations.shape == (
            3,
            2,
        )
        assert all(t.fake_mode is mode for t in (gram, *d, *solution))
        with pytest.raises(ValueError, match="expected weights of shape"):
            mk.combine(rows, torch.ones(3), backend=backend)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def calls(rows: object) -> list[tuple[str, Callable[[], object]]]:
    table = rows if isinstance(rows, list) else [[row] for row in rows]  # type: ignore[attr-defined]
    out = [torch.empty(4)]
    return [
        ("mtl_kernels.gram.default", lambda: mk.gram(rows)),
        ("mtl_kernels.combine.default", lambda: mk.combine(rows, torch.ones(2))),
        ("mtl_kernels.combine_out.default", lambda: mk.combine(table, torch.ones(2), out=out)),
        ("mtl_kernels.solve.default", lambda: mk.min_norm_weights(torch.eye(2))),
    ]


def test_dispatch_modes_see_the_operators(backend: str) -> None:
    for rows in (torch.randn(2, 4), [[torch.randn(4)], [torch.randn(4)]]):
        for name, call in calls(rows):
            with mk.use_backend(backend), Recorder() as recorder:
                call()
            assert name in recorder.seen


class Wrapped(Tensor):
    """A subclass that counts the operators that reach it and computes on what it holds."""

    seen: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(str(func))
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_subclasses_go_through_the_operators(backend: str) -> None:
    first, second = torch.randn(4), torch.randn(4)
    rows = [[Wrapped(first), None], [Wrapped(second), torch.ones(2)]]
    plain = [[first, None], [second, torch.ones(2)]]
    Wrapped.seen.clear()
    torch.testing.assert_close(mk.gram(rows, backend=backend), mk.gram(plain, backend=backend))
    found = mk.combine(rows, torch.ones(2), backend=backend)
    torch.testing.assert_close(found, mk.combine(plain, torch.ones(2), backend=backend))
    assert {"mtl_kernels.gram.default", "mtl_kernels.combine.default"} <= set(Wrapped.seen)
    gram = mk.gram(plain)
    torch.testing.assert_close(
        mk.min_norm_weights(Wrapped(gram), backend=backend), mk.min_norm_weights(gram, backend=backend)
    )
    assert "mtl_kernels.solve.default" in Wrapped.seen


def test_an_argument_of_a_subclass_goes_through_the_operators(backend: str) -> None:
    rows, weights, out = [[torch.randn(4)], [torch.randn(4)]], torch.randn(2), torch.zeros(4)
    mk.combine(rows, weights, out=[Wrapped(out)], backend=backend)
    torch.testing.assert_close(out, mk.combine(rows, weights, backend=backend)[0])
    mk.combine(torch.stack([row[0] for row in rows]), weights, out=(dense := Wrapped(torch.zeros(4))), backend=backend)
    torch.testing.assert_close(dense.inner, out)
    gram, active = mk.gram(torch.randn(3, 5)), torch.tensor([True, False, True])
    expected = mk.min_norm_weights(gram, active=active, backend=backend).weights
    assert torch.equal(mk.min_norm_weights(gram, active=Wrapped(active), backend=backend).weights, expected)
    by_state = mk.pcgrad_weights(gram, rng=Wrapped(rng_state(3)), backend=backend)
    assert torch.equal(by_state, mk.pcgrad_weights(gram, rng=rng_state(3), backend=backend))


def test_a_table_of_subclasses_goes_through_the_operators(backend: str) -> None:
    first, second = torch.randn(4), torch.randn(4)
    table = mk.RowTable([[Wrapped(first)], [Wrapped(second)]])
    expected = mk.gram([[first], [second]], backend=backend)
    torch.testing.assert_close(mk.gram(table, backend=backend), expected)


def test_the_operator_shows_in_a_profile_of_compiled_code(backend: str) -> None:
    matrix = torch.randn(3, 20)
    compiled = torch.compile(lambda x: mk.gram(x * 1, backend=backend), fullgraph=True, backend="aot_eager")
    compiled(matrix)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        compiled(matrix)
    assert "mtl_kernels::gram" in {event.key for event in prof.key_averages()}


def test_eager_calls_give_what_the_operators_give(backend: str) -> None:
    rows = tables()["ragged"]
    weights = torch.randn(len(rows), dtype=torch.float64)
    assert torch.equal(mk.gram(rows, backend=backend), OPS.gram(flat(rows), len(rows), None, backend))
    direct = [t for t in mk.combine(rows, weights, backend=backend) if t is not None]
    by_op = OPS.combine(flat(rows), weights, len(rows), None, backend)
    assert all(torch.equal(a, b) for a, b in zip(direct, by_op, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(backend: str, mode: Callable[[], object]) -> None:
    with mode():  # type: ignore[attr-defined]
        matrix = torch.randn(3, 10)
        d = mk.combine(matrix, mk.min_norm_weights(mk.gram(matrix, backend=backend), backend=backend).weights)
        mk.combine(matrix, torch.ones(3), out=matrix[0], backend=backend)
    assert d.shape == (10,) and not d.requires_grad


def test_unknown_solver(backend: str) -> None:
    with pytest.raises(ValueError, match="nope"):
        ops.solve(torch.eye(2), mk.SolverCall("nope"), backend=backend)


def test_solve_never_reads_beyond_its_arguments() -> None:
    """In a process of its own: the compiled solvers get addresses and trust them."""
    code = """
import torch
import mtl_kernels
from mtl_kernels import SolverCall, ops
int64, count = torch.int64, 0
for backend, missing in mtl_kernels.available_backends().items():
    if missing is not None:
        continue
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    for solver, options, rng in (
        ("pcgrad", (1.0, 0.0), torch.zeros(2)),
        ("pcgrad", (1.0, 0.0), torch.zeros(1, dtype=int64)),
        ("pcgrad", (1.0, 0.0), torch.zeros(2, dtype=int64, device="meta")),
        ("pcgrad", (1.0,), None),
        ("min_norm", (0.0, 0.0), None),
        ("pcgrad", (), None),
    ):
        count += 1
        try:
            ops.solve(torch.eye(3), SolverCall(solver, options, rng=rng), backend=backend)
            print("took", backend, solver, options, rng, flush=True)
        except (ValueError, TypeError) as error:
            print("refused", error, flush=True)
print(count)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}{result.stderr}"
    count = result.stdout.splitlines()[-1]
    assert "took" not in result.stdout and result.stdout.count("refused") == int(count) >= 12


def test_rng_of_any_stride(backend: str) -> None:
    matrix = torch.randn(8, 4, dtype=torch.float64)
    strided = torch.tensor([7, -1, 9, -1])[::2]
    call = mk.SolverCall("pcgrad", (1.0, 0.0), rng=strided)
    found = ops.solve(matrix @ matrix.T, call, backend=backend)[0]
    assert torch.equal(found, mk.pcgrad_weights(matrix @ matrix.T, rng=rng_state(7, 9), backend=backend))
