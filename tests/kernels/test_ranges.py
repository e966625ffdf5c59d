"""float64 rows whose squares over- or underflow: solvers see them scaled, and nothing takes them for broken."""

import pytest
import torch
from placement import rng_state

import mtl_kernels as mk

SOLVERS = [
    ("min_norm", (0.0, 0.0, 0.0)),
    ("min_norm", (1.0, 30.0, 0.0)),
    ("pcgrad", (0.0, 0.0)),
    ("pcgrad", (1.0, 0.0)),
]

pytestmark = pytest.mark.usefixtures("cpu_only")


def rows_of(exponent: int, *, seed: int = 0) -> list[list[torch.Tensor | None]]:
    torch.manual_seed(seed)
    scale = 2.0**exponent
    rows: list[list[torch.Tensor | None]] = [
        [torch.randn(7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64), torch.randn(4)] for _ in range(4)
    ]
    rows[2][1] = None
    return [[None if t is None else t * scale if t.dtype is torch.float64 else t for t in row] for row in rows]


@pytest.mark.parametrize("groups", [None, [0, 1, 1], [1, 0, 2]])
@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("exponent", [-1000, -600, 520, 900, 1015])
def test_weights_are_those_of_scaled_rows(
    implementation: str, exponent: int, solver: str, options: tuple[float, ...], groups: list[int] | None
) -> None:
    if implementation == "emulated":
        pytest.skip("stands for a GPU, where the Gram matrix is not looked at")
    rows, plain = (rows_of(n) for n in (exponent, 0))
    for row in (*rows, *plain):
        row[2] = None  # float32 rows stay as they are, and would weigh differently
    call = mk.SolverCall(solver, options, rng=rng_state(3))
    gram, weights, certificate = mk.gram_solve(rows, call, groups=groups, backend=implementation)
    _, expected, _ = mk.gram_solve(plain, call, groups=groups, backend=implementation)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-15)
    once_more = mk.gram(rows, groups=groups, backend=implementation)
    torch.testing.assert_close(gram, once_more, rtol=0, atol=0, equal_nan=True)
    assert solver != "min_norm" or not certificate.isnan().any()


def test_every_group_has_its_own_scale(implementation: str) -> None:
    if implementation == "emulated":
        pytest.skip("stands for a GPU, where the Gram matrix is not looked at")
    matrix = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    rows = [[matrix[k] * 1e200, matrix[k] * 1e-200, matrix[k]] for k in range(2)]
    call = mk.SolverCall("min_norm", (0.0, 0.0, 0.0))
    _, weights, certificate = mk.gram_solve(rows, call, groups=[0, 1, 2], backend=implementation)
    expected = mk.min_norm_weights(matrix @ matrix.T).weights
    torch.testing.assert_close(weights, expected.expand(3, 2), rtol=1e-14, atol=0)
    assert not certificate.isnan().any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_that_are_not_finite_stay_so(implementation: str, bad: float) -> None:
    rows = torch.ones(3, 5, dtype=torch.float64) * 1e200
    rows[1, 2] = bad
    _, weights, certificate = mk.gram_solve(rows, mk.SolverCall("min_norm", (0.0, 0.0, 0.0)), backend=implementation)
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert certificate[0].isnan()


def test_zero_rows_are_zero(implementation: str) -> None:
    _, weights, certificate = mk.gram_solve(
        torch.zeros(3, 5, dtype=torch.float64), mk.SolverCall("min_norm", (0.0, 0.0, 0.0)), backend=implementation
    )
    assert weights.tolist() == [1, 0, 0] and certificate.tolist() == [0, 0]


@pytest.mark.parametrize("batched", [False, True])
def test_weights_beyond_float64(implementation: str, batched: bool) -> None:
    """A projection by -1e300 / 1e-300: a host says so, a GPU lets it reach the gradient."""
    gram = torch.tensor([[1e300, -1e300], [-1e300, 1e-300]], dtype=torch.float64)
    if batched:
        gram = torch.stack((torch.eye(2, dtype=torch.float64), gram))
    if implementation in ("emulated", "triton"):
        weights = mk.pcgrad_weights(gram, order="fixed", backend=implementation)
        assert not weights.reshape(-1, 2)[-1].isfinite().all()
        return
    with pytest.raises(ValueError, match=f"'pcgrad' has no finite weights for problem {int(batched)} although its"):
        mk.pcgrad_weights(gram, order="fixed", backend=implementation)
