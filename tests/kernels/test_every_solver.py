"""What holds for every solver: one answer on every backend, masks, batches, scales, degenerate and broken problems."""

from typing import NamedTuple

import pytest
import torch
from placement import on_host, rng_state
from torch import Tensor
from torch.library import opcheck

import emulated
import mtl_kernels as mk
from mtl_kernels import ops
from mtl_kernels.backends import BACKENDS
from mtl_kernels.definitions.solving import DEFINITIONS


class Case(NamedTuple):
    """Options of a solver, and what is to be known of it.

    Attributes:
        solver: its name. options: in the order of its header.
        inputs: whether it takes an input of each task.
        power: w(c J) = c^power w(J); None where it is no power.
        residual: the largest certificate on ordinary problems.
    """

    solver: str
    options: tuple[float, ...]
    inputs: bool = False
    power: float | None = 0.0
    residual: float = 1e-10


CASES = [
    Case("aligned_mtl", (0.0, 0.0)),
    Case("aligned_mtl", (1.0, 0.0), inputs=True),
    *(Case("cagrad", options) for options in ((0.4, 0.0, 0.0), (2.0, 1.0, 1.0), (0.0, 2.0, 0.0))),
    Case("config", (0.0, 0.0)),
    Case("config", (4.0, 0.0), inputs=True),
    Case("dualproj", (1e-4,)),
    Case("dualproj", (0.0,), inputs=True),
    *(Case("fairgrad", (alpha,), power=-2 * alpha / (1 + alpha)) for alpha in (0.1, 2.0)),
    Case("imtl_g", (0.0,)),
    Case("gradvac", (1.0, 0.0, 0.5)),
    Case("gradvac", (0.0, 1.0, 0.01)),
    Case("krum", (0.0, 1.0)),
    Case("krum", (1.0, 2.0)),
    Case("min_norm", (0.0, 0.0, 0.0)),
    Case("min_norm", (1.0, 60.0, 0.0), residual=0.1),
    Case("modo", (0.1, 0.1), power=None),
    Case("nash_mtl", (0.0, 0.0), power=-1.0),
    Case("nash_mtl", (1.0, 1.0), power=-1.0),
    Case("pcd", (0.02, 0.999, 1e-8), power=None),
    Case("pcgrad", (1.0, 0.0)),
    Case("pcgrad", (0.0, 1.0)),
    *(Case("random_weights", (kind,)) for kind in (0.0, 1.0, 2.0, 3.0)),
    Case("sdmgrad", (0.3, 1.0, 0.5, 20.0, 1.0), inputs=True),
    Case("sdmgrad", (0.0, 0.1, 0.9, 5.0, 1.0)),
    Case("upgrad", (1e-4,)),
    Case("upgrad", (0.0,), inputs=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.solver}-{case.options}")


@pytest.fixture(params=["reference", "cpu", emulated.NAME, "triton", "cuda"])
def solved_by(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The name of a backend; solvers are compiled once for all instruction sets of a CPU."""
    name: str = request.param
    on_cpu = name in ("reference", "cpu", emulated.NAME)
    if on_cpu != (device.type == "cpu") and name != "reference":
        pytest.skip(f"{name} is not for {device.type}")
    reason = emulated.missing() if name == emulated.NAME else mk.available_backends()[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


def test_every_solver_has_a_case() -> None:
    assert {case.solver for case in CASES} == DEFINITIONS.keys()


@on_host
def ordinary(num_tasks: int, batch: int, seed: int = 0) -> Tensor:
    """Gram matrices of rows with a common part, of lengths between 1/3 and 3."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, num_tasks, num_tasks + 4, dtype=torch.float64, generator=generator)
    rows = (rows + 0.3) * torch.exp(torch.rand(batch, num_tasks, 1, dtype=torch.float64, generator=generator) * 2 - 1)
    return rows @ rows.mT


@on_host
def degenerate(num_tasks: int) -> Tensor:
    """Integer rows: all zero, one zero, two the same, two opposite, all the same, all multiples of one."""
    generator = torch.Generator().manual_seed(num_tasks)
    rows = torch.randint(-2, 3, (6, num_tasks, num_tasks + 1), generator=generator).double()
    rows[0] = 0
    rows[1, 0] = 0
    rows[2, -1] = rows[2, 0]
    rows[3, -1] = -rows[3, 0]
    rows[4] = rows[4, :1]
    rows[5] = rows[5, :1] * torch.arange(1, num_tasks + 1).view(-1, 1) * (-1) ** torch.arange(num_tasks).view(-1, 1)
    return rows @ rows.mT


def new_state(case: Case, gram: Tensor) -> Tensor | None:
    size = DEFINITIONS[case.solver].state_doubles(gram.shape[-1])
    return gram.new_zeros((*gram.shape[:-2], size)) if size else None


def solve(
    case: Case, gram: Tensor, active: Tensor | None = None, state: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    num_tasks = gram.shape[-1]
    inputs = 0.25 + torch.arange(num_tasks).double() % 4 if case.inputs else None
    rng = rng_state(5, 7) if DEFINITIONS[case.solver].needs_rng(case.options) else None
    call = mk.SolverCall(case.solver, case.options, active, rng, inputs, state)
    weights, certificate = ops.solve(gram, call, backend=backend)
    assert certificate is not None
    return weights, certificate


def assert_same_direction(case: Case, gram: Tensor, found: Tensor, expected: Tensor) -> None:
    """The same J'w up to 1e-7 of the longest weighted row, whatever the weights of dependent rows are.

    Or up to the rounding of weights of the usual size, where all of them cancel.
    """
    off = found - expected
    square = (off.unsqueeze(-2) @ gram @ off.unsqueeze(-1)).flatten(-3).clamp(min=0)
    longest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    weighted = (expected.square() * gram.diagonal(dim1=-2, dim2=-1)).amax(-1)
    usual = torch.where(longest > 0, longest, 1) ** (1 + (case.power or 0.0))
    assert (square <= 1e-14 * weighted + 1e-24 * usual).all(), (square / usual).sqrt().max()


@every_case
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_every_backend_has_the_answer_of_the_definition(case: Case, num_tasks: int, solved_by: str) -> None:
    ordinary_ones = ordinary(num_tasks, 4)
    gram = torch.cat((ordinary_ones, degenerate(num_tasks), ordinary_ones * 1e-24, ordinary_ones * 1e24))
    active = torch.ones(gram.shape[:-1], dtype=torch.bool)
    active[2, 0] = active[3] = False
    active[7:9, -1] = False
    states = [new_state(case, gram) for _ in range(2)]
    for _ in range(2):  # the second time from what the first one left
        found = solve(case, gram, active, states[0], solved_by)
        expected = solve(case, gram, active, states[1], "reference")
        assert found[0].isfinite().all() and (found[0][~active] == 0).all()
        assert_same_direction(case, gram, found[0], expected[0])
        if states[0] is not None:
            torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)


@every_case
def test_what_is_not_finite(case: Case, solved_by: str) -> None:
    gram = ordinary(4, 6)
    gram[1, 0, 0] = torch.inf
    gram[2, 1, 3] = gram[2, 3, 1] = torch.nan
    gram[3, 0, 0] = torch.nan
    active = torch.ones(6, 4, dtype=torch.bool)
    active[3, 0] = active[4] = False
    state = new_state(case, gram)
    before = None if state is None else state.normal_().abs_().clone()
    weights, certificate = solve(case, gram, active, state, solved_by)
    assert (weights[1:3] == 0.25).all() and certificate[1:3, 0].isnan().all()
    assert weights.isfinite().all() and weights[3, 0] == 0 and (weights[4] == 0).all()
    if state is not None and before is not None:
        assert all(torch.equal(state[n], before[n]) for n in (1, 2, 4))


@every_case
def test_scale(case: Case, solved_by: str) -> None:
    """Powers of two, by which solvers multiply without rounding: the same bits, or as close as their powers are."""
    gram = ordinary(5, 3)
    expected, _ = solve(case, gram, None, new_state(case, gram), solved_by)
    for exponent in (-80, -3, 80):
        scaled = gram * 2.0**exponent
        found, _ = solve(case, scaled, None, new_state(case, gram), solved_by)
        if case.power is not None:
            torch.testing.assert_close(found, expected * 2.0 ** (exponent / 2 * case.power), rtol=1e-9, atol=0)
        assert found.isfinite().all()


@every_case
def test_a_mask_is_as_if_the_others_were_not_there(case: Case, solved_by: str) -> None:
    if DEFINITIONS[case.solver].needs_rng(case.options):
        pytest.skip("draws by the number of the task")
    gram = ordinary(6, 1)[0]
    active = torch.tensor([True, False, True, True, False, True])
    gram[1] = gram[:, 1] = torch.nan
    weights, _ = solve(case, gram, active, new_state(case, gram), solved_by)
    among = gram[active][:, active]
    if case.inputs:
        pytest.skip("inputs by the number of the task")
    alone, _ = solve(case, among, None, new_state(case, among), solved_by)
    torch.testing.assert_close(weights[active], alone, rtol=1e-8, atol=1e-12)


@every_case
@pytest.mark.parametrize("num_tasks", [40, 128])
def test_many_tasks(case: Case, num_tasks: int, solved_by: str) -> None:
    if solved_by in (emulated.NAME, "reference", "triton"):
        pytest.skip("slow, and nothing new")
    gram = ordinary(num_tasks, 2)
    weights, certificate = solve(case, gram, None, new_state(case, gram), solved_by)
    assert weights.isfinite().all()
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    assert (certificate[:, 0] <= case.residual * scale.clamp(min=1)).all(), certificate


@every_case
def test_of_a_batch_each_is_solved_alone(case: Case, solved_by: str) -> None:
    gram = ordinary(5, 6)
    together, _ = solve(case, gram.view(2, 3, 5, 5), None, new_state(case, gram.view(2, 3, 5, 5)), solved_by)
    assert together.shape == (2, 3, 5)
    first, _ = solve(case, gram[:1], None, new_state(case, gram[:1]), solved_by)
    assert torch.equal(together[0, :1], first)


@every_case
def test_operator(case: Case) -> None:
    gram = ordinary(4, 2)
    inputs = torch.arange(1.0, 5.0).double() if case.inputs else None
    arguments = (gram, None, case.solver, list(case.options), None, rng_state(5, 7), inputs, new_state(case, gram))
    opcheck(torch.ops.mtl_kernels.solve, arguments)


@every_case
def test_compiled(case: Case) -> None:
    """As one operator that the compiler does not look into, whose state changes all the same."""
    torch._dynamo.reset()
    gram = ordinary(4, 2)
    states = [new_state(case, gram) for _ in range(2)]
    compiled = torch.compile(lambda gram, state: solve(case, gram, None, state)[0] * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(gram, states[0]), solve(case, gram, None, states[1])[0] * 2, rtol=0, atol=0)
    if states[0] is not None:
        assert torch.equal(*states) and states[0].any()


def test_states_that_do_not_fit() -> None:
    stateful = [case for case in CASES if DEFINITIONS[case.solver].state_doubles(3)]
    gram = ordinary(3, 2)
    for case in CASES if not stateful else stateful:
        size = DEFINITIONS[case.solver].state_doubles(3)
        for backend in [name for name in BACKENDS if BACKENDS[name].missing() is None]:
            if BACKENDS[backend].refusal(gram.device) is not None:
                continue
            with pytest.raises(ValueError, match=f"keeps a state of {size} numbers for 3 tasks, found {size + 1}"):
                solve(case, gram, None, gram.new_zeros(2, size + 1), backend)
    case = CASES[0]
    with pytest.raises(TypeError, match=r"state as a float64 tensor, found torch\.float32"):
        solve(case, gram, None, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"state of shape \[2, 'n'\], found \[3\]"):
        solve(case, gram, None, gram.new_zeros(3))
    with pytest.raises(ValueError, match="contiguous"):
        solve(case, gram, None, gram.new_zeros(3, 2).T)
