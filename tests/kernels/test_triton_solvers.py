"""The Triton solvers where the tests of all backends are too slow for the interpreter, in small sizes."""

from itertools import pairwise

import pytest
import torch
from placement import rng_state

import mtl_kernels as mk
from mtl_kernels.backends import BACKENDS

REASON = BACKENDS["triton"].missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend triton: {REASON}")


@pytest.fixture(autouse=True)
def cpu_tensors_need_the_interpreter(device: torch.device) -> None:
    if BACKENDS["triton"].refusal(device) is not None:
        pytest.skip(f"backend triton does not run on {device.type} tensors here")


def random_gram(num_tasks: int, *batch: int) -> torch.Tensor:
    rows = torch.randn(*batch, num_tasks, num_tasks + 3, dtype=torch.float64)
    return rows @ rows.mT


@pytest.mark.parametrize("num_tasks", [9, 32, 40])
def test_pcgrad_of_every_configuration(num_tasks: int) -> None:
    gram, rng = random_gram(num_tasks), rng_state(1, 2)
    torch.testing.assert_close(
        mk.pcgrad_weights(gram, rng=rng, backend="triton"), mk.reference.pcgrad_weights(gram, rng=rng),
        rtol=1e-11, atol=1e-11,
    )  # fmt: skip


@pytest.mark.parametrize("num_tasks", [9, 32, 40])
@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
def test_min_norm_of_every_configuration(num_tasks: int, solver: str) -> None:
    # Rows that point the same way: few enter the support, which is what the interpreter takes long for.
    rows = torch.randn(num_tasks, 12, dtype=torch.float64) + 1.5
    gram = rows @ rows.mT
    max_iters = None if solver == "exact" else 12
    found = mk.min_norm_weights(gram, solver=solver, max_iters=max_iters, backend="triton")
    expected = mk.reference.min_norm_weights(gram, solver=solver, max_iters=max_iters)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-11)
    assert found.iterations == expected.iterations
    torch.testing.assert_close(found.gap, expected.gap, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
def test_batched_is_one_problem_at_a_time(solver: str) -> None:
    gram = random_gram(5, 2, 2)
    max_iters = None if solver == "exact" else 20
    active = torch.rand(2, 2, 5) < 0.7
    batched = mk.min_norm_weights(gram, solver=solver, max_iters=max_iters, active=active, backend="triton")
    for i in range(2):
        for j in range(2):
            alone = mk.min_norm_weights(
                gram[i, j], solver=solver, max_iters=max_iters, active=active[i, j], backend="triton"
            )
            assert torch.equal(batched.weights[i, j], alone.weights)
            assert batched.iterations[i, j] == alone.iterations and batched.gap[i, j] == alone.gap


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
def test_more_iterations_never_raise_the_value(solver: str) -> None:
    gram = random_gram(8)
    weights = [mk.min_norm_weights(gram, solver=solver, max_iters=n, backend="triton").weights for n in range(1, 9)]
    values = [float(w @ gram @ w) for w in weights]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))


def test_no_conflict_is_the_plain_sum() -> None:
    rows = torch.rand(40, 80, dtype=torch.float64)
    assert torch.equal(mk.pcgrad_weights(rows @ rows.T, backend="triton"), torch.ones(40, dtype=torch.float64))


def test_an_empty_batch() -> None:
    gram = torch.zeros(0, 3, 3, dtype=torch.float64)
    assert mk.pcgrad_weights(gram, order="fixed", backend="triton").shape == (0, 3)
    assert mk.min_norm_weights(gram, backend="triton").weights.shape == (0, 3)


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
@pytest.mark.parametrize("diagonal", [(1e308, 1.7e308), (6e307, 1e308), (5e-324, 1e-310), (1e-320, 1.0)])
def test_the_ends_of_the_range(solver: str, diagonal: tuple[float, float]) -> None:
    gram = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    found = mk.min_norm_weights(gram, solver=solver, backend="triton")
    expected = mk.reference.min_norm_weights(gram, solver=solver)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=1e-12)
    assert found.gap.isfinite() and found.gap <= 1e-6 * gram.max()


def test_a_matrix_that_is_no_gram_matrix_ends() -> None:
    for off in (1e300, -1e300, 1e150):
        gram = torch.tensor([[1e-320, off], [off, 1.0]], dtype=torch.float64)
        weights = mk.min_norm_weights(gram, backend="triton").weights
        assert weights.shape == (2,)
