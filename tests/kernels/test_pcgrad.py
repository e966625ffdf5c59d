import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placement import backends, host, rng_state

import mtl_kernels as mk
from benchmarks.oracles import projections as oracles
from strategies import row_matrices

words = st.integers(-(2**63), 2**63 - 1)


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(rows @ rows.T)


def assert_same_direction(rows: np.ndarray, weights: torch.Tensor, expected: np.ndarray) -> None:
    error = np.linalg.norm(rows.T @ host(weights) - expected)
    assert error <= 1e-12 * len(rows) * np.linalg.norm(rows, axis=1).sum()


@given(row_matrices(), backends, words, words)
def test_random_order_is_the_full_space_definition(rows, backend, seed, step):
    weights = mk.pcgrad_weights(gram_of(rows), rng=rng_state(seed, step), backend=backend)
    orders = [oracles.pcgrad_order(seed, step, 0, i, len(rows)) for i in range(len(rows))]
    assert_same_direction(rows, weights, oracles.pcgrad_direction(rows, orders))


@given(row_matrices(max_tasks=12), backends, st.sampled_from(["sum", "mean"]))
def test_fixed_order_is_the_full_space_definition(rows, backend, reduction):
    weights = mk.pcgrad_weights(gram_of(rows), order="fixed", reduction=reduction, backend=backend)
    orders = [[j for j in range(len(rows)) if j != i] for i in range(len(rows))]
    expected = oracles.pcgrad_direction(rows, orders)
    assert_same_direction(rows, weights, expected / len(rows) if reduction == "mean" else expected)


@given(row_matrices(max_exponent=10), backends, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(rows, backend, exponent):
    rng = rng_state(1)
    weights = mk.pcgrad_weights(gram_of(rows), rng=rng, backend=backend)
    assert torch.equal(mk.pcgrad_weights(gram_of(rows) * 4.0**exponent, rng=rng, backend=backend), weights)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 33, 128])
def test_no_conflict_is_the_plain_sum(backend, num_tasks):
    rows = torch.rand(num_tasks, 2 * num_tasks, dtype=torch.float64)
    assert torch.equal(mk.pcgrad_weights(rows @ rows.T, backend=backend), torch.ones(num_tasks, dtype=torch.float64))
    mean = mk.pcgrad_weights(rows @ rows.T, reduction="mean", backend=backend)
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / num_tasks), rtol=1e-15, atol=0)


def test_two_conflicting_tasks_in_closed_form(backend):
    gram = torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
    weights = mk.pcgrad_weights(gram, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([1 + 1 / 4, 1 + 1 / 1], dtype=torch.float64))


def test_batched_is_one_problem_at_a_time(backend):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram = rows @ rows.mT
    weights = mk.pcgrad_weights(gram, order="fixed", backend=backend)
    assert weights.shape == (3, 4, 6)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(weights[i, j], mk.pcgrad_weights(gram[i, j], order="fixed", backend=backend))
    random = mk.pcgrad_weights(gram, rng=rng_state(9, 1), backend=backend)
    for problem, (matrix, found) in enumerate(zip(rows.flatten(0, 1), random.flatten(0, 1), strict=True)):
        orders = [oracles.pcgrad_order(9, 1, problem, i, 6) for i in range(6)]
        assert_same_direction(host(matrix), found, oracles.pcgrad_direction(host(matrix), orders))


def test_inactive_tasks_take_no_part(backend):
    rows = torch.randn(7, 9, dtype=torch.float64)
    active = torch.tensor([True, False, True, True, False, True, False])
    gram = rows @ rows.T
    gram[1, :] = gram[:, 1] = torch.nan
    weights = mk.pcgrad_weights(gram, order="fixed", reduction="mean", active=active, backend=backend)
    alone = mk.pcgrad_weights(gram[active][:, active].contiguous(), order="fixed", reduction="mean", backend=backend)
    assert torch.equal(weights[~active], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(weights[active], alone)

    random = mk.pcgrad_weights(gram, rng=rng_state(4), active=active, backend=backend)
    remaining = active.nonzero().flatten().tolist()
    orders = [[j for j in oracles.pcgrad_order(4, 0, 0, i, 7) if active[j]] for i in remaining]
    renumbered = [[remaining.index(j) for j in order] for order in orders]
    expected = oracles.pcgrad_direction(host(rows[active]), renumbered)
    assert_same_direction(host(rows[active]), random[active], expected)


def test_active_mask_of_each_problem(backend):
    rows = torch.randn(5, 4, 6, dtype=torch.float64)
    gram = rows @ rows.mT
    active = torch.rand(5, 4) < 0.6
    active[0] = False
    weights = mk.pcgrad_weights(gram, order="fixed", active=active, backend=backend)
    for problem in range(5):
        alone = mk.pcgrad_weights(gram[problem], order="fixed", active=active[problem], backend=backend)
        torch.testing.assert_close(weights[problem], alone)
    assert not weights[~active].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_gives_uniform_weights(backend, value):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    weights = mk.pcgrad_weights(gram, active=torch.tensor([True, True, True, False]), backend=backend)
    assert weights[0].tolist() == [1 / 3, 1 / 3, 1 / 3, 0]
    assert weights[1].tolist() == [1, 1, 1, 0]


def test_zero_duplicate_and_anti_parallel_rows(backend):
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    weights = mk.pcgrad_weights(rows @ rows.T, order="fixed", backend=backend)
    assert weights.isfinite().all() and weights[2] == 1
    assert (rows.T @ weights).abs().max() < 1e-15


@pytest.mark.parametrize("num_tasks", [2, 5, 40, 128])
def test_backends_agree_on_the_same_state(backend, num_tasks):
    rows = torch.randn(3, num_tasks, num_tasks + 3, dtype=torch.float64)
    gram = rows @ rows.mT
    rng = rng_state(123456789012345, 2**40)
    expected = mk.reference.pcgrad_weights(gram, rng=rng)
    torch.testing.assert_close(mk.pcgrad_weights(gram, rng=rng, backend=backend), expected, rtol=1e-11, atol=1e-11)
    assert rng.tolist() == [123456789012345, 2**40]


@pytest.fixture
def conflicting_gram():
    """Rows that sum to zero: most pairs are in conflict, so that no two orders give the same weights."""
    rows = torch.randn(8, 10, dtype=torch.float64)
    rows -= rows.mean(0)
    return rows @ rows.T


def test_the_order_depends_on_seed_and_step(backend, conflicting_gram):
    states = [(seed, step) for seed in (0, 1) for step in (0, 1)]
    weights = {s: mk.pcgrad_weights(conflicting_gram, rng=rng_state(*s), backend=backend) for s in states}
    assert len({tuple(w.tolist()) for w in weights.values()}) == 4
    again = mk.pcgrad_weights(conflicting_gram, rng=rng_state(1, 1), backend=backend)
    assert torch.equal(weights[1, 1], again)


def test_without_a_state_the_default_generator_decides(backend, conflicting_gram):
    torch.manual_seed(3)
    first, second = (mk.pcgrad_weights(conflicting_gram, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(mk.pcgrad_weights(conflicting_gram, backend=backend), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": "shuffled"}, ValueError, '"random" or "fixed"'),
        ({"reduction": "max"}, ValueError, '"sum" or "mean"'),
        ({"rng": 3}, TypeError, "int64"),
        ({"rng": torch.zeros(2)}, TypeError, "int64"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \[2\]"),
        ({"rng": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "meta"),
        ({"active": torch.ones(3, dtype=torch.bool)}, ValueError, "active"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        mk.pcgrad_weights(torch.eye(2, dtype=torch.float64), **arguments)
