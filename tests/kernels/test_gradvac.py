import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placement import backends, here, host, rng_state

import mtl_kernels as mk
from benchmarks.oracles.projections import gradvac_step, pcgrad_order
from strategies import row_matrices

words = st.integers(-(2**63), 2**63 - 1)


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(rows @ rows.T)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def assert_is_step(rows, weights, before, after, orders, beta) -> None:
    """The direction and the targets of the definition on vectors, as far as a Gram matrix tells."""
    expected, targets, left = gradvac_step(rows, orders, before, beta)
    weights = host(weights)
    off = np.linalg.norm(rows.T @ weights - expected)
    assert off * left <= 1e-14 * len(rows) * (np.abs(weights) @ np.linalg.norm(rows, axis=1))
    assert np.abs(host(after) - targets).max() * left <= 1e-14 * len(rows)


@given(row_matrices(), backends, words, words, st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.integers(0, 2**31))
def test_random_order_is_the_full_space_definition(rows, backend, seed, step, beta, draw):
    targets = np.random.default_rng(draw).uniform(-1, 1, (len(rows), len(rows)))
    state = torch.as_tensor(targets.copy(), device=here())
    weights = mk.gradvac_weights(gram_of(rows), state=state, beta=beta, rng=rng_state(seed, step), backend=backend)
    orders = [pcgrad_order(seed, step, 0, i, len(rows)) for i in range(len(rows))]
    assert_is_step(rows, weights, targets, state, orders, beta)


@given(row_matrices(max_tasks=12, kinds=("plain", "conflicting", "low_rank")), backends)
def test_targets_go_from_step_to_step(rows, backend):
    state, before = zeros(len(rows), len(rows)), np.zeros((len(rows), len(rows)))
    orders = [[j for j in range(len(rows)) if j != i] for i in range(len(rows))]
    for step in range(4):
        now = np.roll(rows, step, axis=0)
        weights = mk.gradvac_weights(gram_of(now), state=state, order="fixed", backend=backend)
        assert_is_step(now, weights, before, state, orders, 0.5)
        before = host(state).copy()
    assert (np.abs(before) <= 1).all()


@given(row_matrices(kinds=("plain", "low_rank", "conflicting", "integers", "zero_rows")), backends, words)
def test_targets_of_zero_that_stay_make_it_pcgrad(rows, backend, seed):
    rng, state = rng_state(seed), zeros(len(rows), len(rows))
    for reduction in ("sum", "mean"):
        weights = mk.gradvac_weights(gram_of(rows), state=state, beta=0, reduction=reduction, rng=rng, backend=backend)
        expected = mk.pcgrad_weights(gram_of(rows), reduction=reduction, rng=rng, backend=backend)
        # But where a row has cancelled to rounding, of which PCGrad goes on projecting what is left.
        off = rows.T @ (host(weights) - host(expected))
        assert np.linalg.norm(off) <= 1e-6 * (np.abs(host(expected)) @ np.linalg.norm(rows, axis=1))
    assert not state.any()


def test_two_tasks_are_brought_to_their_targets(backend):
    rows = np.array([[2.0, 0.0, 0.0], [0.3, 1.0, 0.0]])
    state = torch.tensor([[0.0, 0.6], [0.8, 0.0]], dtype=torch.float64)
    weights = host(mk.gradvac_weights(gram_of(rows), state=state, beta=0.25, reduction="mean", backend=backend)) * 2
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit[0] @ unit[1]
    np.testing.assert_allclose(host(state)[[0, 1], [1, 0]], [0.75 * 0.6 + 0.25 * cosine, 0.75 * 0.8 + 0.25 * cosine])
    first, second = rows[0] + (weights[1] - 1) * rows[1], rows[1] + (weights[0] - 1) * rows[0]
    assert first @ unit[1] / np.linalg.norm(first) == pytest.approx(0.6)
    assert second @ unit[0] / np.linalg.norm(second) == pytest.approx(0.8)


def test_cosines_above_the_targets_are_noted_and_change_nothing(backend):
    rows = torch.rand(5, 12, dtype=torch.float64) + 0.5
    state = zeros(5, 5)
    weights = mk.gradvac_weights(rows @ rows.T, state=state, backend=backend)
    assert weights.tolist() == [1] * 5
    cosines = mk.cosines(rows @ rows.T) / 2
    torch.testing.assert_close(state, cosines - cosines.diagonal().diag(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("target", [1.0, 1 - 1e-16, 0.999999])
def test_a_target_of_one_divides_by_nothing(backend, target):
    """What no finite multiple reaches adds nothing; what one does may be far."""
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    state = torch.full((2, 2), target, dtype=torch.float64, device=here())
    weights = mk.gradvac_weights(gram_of(rows), state=state, backend=backend)
    reached = target / np.sqrt(1 - target**2) if target < 1 - 1e-15 else 0.0
    np.testing.assert_allclose(host(weights), [1 + reached] * 2, rtol=1e-9)
    assert state[0, 1] == target / 2


def test_equal_opposite_and_zero_rows(backend):
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    state = torch.full((5, 5), 0.25, dtype=torch.float64, device=here())
    weights = host(mk.gradvac_weights(gram_of(rows), state=state, order="fixed", backend=backend))
    targets = host(state)
    assert np.isfinite(weights).all()
    assert (targets[3] == 0.25).all() and (targets[:, 3] == 0.25).all()  # of a zero row
    # The first gradient is opposite to the third, becomes zero there and meets the last one as such.
    assert targets[0].tolist() == [0.25, 0.625, -0.375, 0.25, 0.25]
    assert targets[4, 0] == 0.125


@given(row_matrices(max_exponent=10), backends, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(rows, backend, exponent):
    rng, states = rng_state(1), [torch.full((len(rows), len(rows)), 0.3, dtype=torch.float64) for _ in range(2)]
    states = [state.to(here()) for state in states]
    weights = mk.gradvac_weights(gram_of(rows), state=states[0], rng=rng, backend=backend)
    scaled = mk.gradvac_weights(gram_of(rows) * 4.0**exponent, state=states[1], rng=rng, backend=backend)
    assert torch.equal(weights, scaled) and torch.equal(*states)


def test_batched_is_one_problem_at_a_time(backend):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram, state = rows @ rows.mT, torch.rand(3, 4, 6, 6, dtype=torch.float64) - 0.5
    alone = state.clone()
    weights = mk.gradvac_weights(gram, state=state, order="fixed", backend=backend)
    for i in range(3):
        for j in range(4):
            one = mk.gradvac_weights(gram[i, j], state=alone[i, j], order="fixed", backend=backend)
            torch.testing.assert_close(weights[i, j], one, rtol=1e-14, atol=0)
            torch.testing.assert_close(state[i, j], alone[i, j], rtol=1e-14, atol=0)


def test_inactive_tasks_take_no_part(backend):
    rows = torch.randn(7, 9, dtype=torch.float64)
    active = torch.tensor([True, False, True, True, False, True, False])
    gram = rows @ rows.T
    gram[1, :] = gram[:, 1] = torch.nan
    state = torch.full((7, 7), 0.5, dtype=torch.float64)
    weights = mk.gradvac_weights(gram, state=state, order="fixed", reduction="mean", active=active, backend=backend)
    among = torch.full((4, 4), 0.5, dtype=torch.float64)
    alone = mk.gradvac_weights(
        gram[active][:, active].contiguous(), state=among, order="fixed", reduction="mean", backend=backend
    )
    assert torch.equal(weights[~active], zeros(3))
    torch.testing.assert_close(weights[active], alone)
    torch.testing.assert_close(state[active][:, active], among)
    assert (state[~active] == 0.5).all() and (state[:, ~active] == 0.5).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_leaves_the_targets(backend, value):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    state = torch.full((2, 4, 4), -0.5, dtype=torch.float64)
    active = torch.tensor([True, True, True, False])
    weights = mk.gradvac_weights(gram, state=state, active=active, backend=backend)
    assert weights.tolist() == [[1 / 3, 1 / 3, 1 / 3, 0], [1, 1, 1, 0]]
    assert (state[0] == -0.5).all() and state[1, 0, 1] == -0.25


@functools.cache
def by_reference(num_tasks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram matrices of two problems, and their weights and state after a step."""
    rows = torch.randn(2, num_tasks, num_tasks + 3, dtype=torch.float64)
    gram, state = rows @ rows.mT, zeros(2, num_tasks, num_tasks) + 0.1
    return gram, mk.reference.gradvac_weights(gram, state=state, rng=rng_state(123456789012345, 2**40)), state


@pytest.mark.parametrize("num_tasks", [2, 5, 40, 128])
def test_backends_agree_on_the_same_state(backend, num_tasks):
    gram, expected, after = by_reference(num_tasks)
    rng, state = rng_state(123456789012345, 2**40), zeros(2, num_tasks, num_tasks) + 0.1
    found = mk.gradvac_weights(gram, state=state, rng=rng, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, after, rtol=1e-10, atol=1e-12)
    assert rng.tolist() == [123456789012345, 2**40]


STATE = torch.zeros(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": "shuffled"}, ValueError, '"random" or "fixed"'),
        ({"reduction": "max"}, ValueError, '"sum" or "mean"'),
        ({"beta": 1.5}, ValueError, r"beta as a number in \[0, 1\], found 1.5"),
        ({"beta": float("nan")}, ValueError, "beta"),
        ({"beta": True}, ValueError, "beta"),
        ({"state": 3}, TypeError, "state as a tensor of targets"),
        ({"state": torch.zeros(2, 2)}, TypeError, r"float64 tensor, found torch\.float32"),
        ({"state": torch.zeros(4).double()}, ValueError, r"shape of the Gram matrix, \[2, 2\], found \[4\]"),
        ({"state": torch.zeros(2, 4).double()[:, ::2]}, ValueError, "contiguous"),
        ({"rng": torch.zeros(2)}, TypeError, "int64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        mk.gradvac_weights(torch.eye(2, dtype=torch.float64), **{"state": STATE.to(here()), **arguments})
