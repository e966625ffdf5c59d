from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host

import mtl_kernels as mk
from benchmarks.oracles.convex import min_norm
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(rows @ rows.T)


def value_of(rows: np.ndarray, weights: np.ndarray) -> float:
    """w'Gw from the rows, so that cancellation in G does not hide."""
    return float(np.square(rows.T @ weights).sum())


def unit_of(rows: np.ndarray, weights: np.ndarray) -> float:
    """sum_k w_k n_k; the rounding of w'Gw is EPSILON times its square."""
    return float(np.linalg.norm(rows, axis=1) @ weights)


def check(rows: np.ndarray, weights: np.ndarray) -> None:
    """On the simplex, and no further above an independent optimum than the rounding of G explains."""
    assert weights.min() >= 0
    assert abs(weights.sum() - 1) <= 4 * EPSILON
    try:
        expected = min_norm(rows)
    except RuntimeError:
        assume(False)
    unit = max(unit_of(rows, weights), unit_of(rows, expected))
    slack = 100 * EPSILON * len(rows) * unit**2
    assert value_of(rows, weights) <= value_of(rows, expected) * (1 + 1e-10) + slack


@given(row_matrices(), backends)
def test_exact_is_as_good_as_an_independent_solver(rows, backend):
    check(rows, host(mk.min_norm_weights(gram_of(rows), backend=backend).weights))


@given(row_matrices(min_tasks=9, max_tasks=30, max_columns=40), backends)
def test_exact_with_many_tasks(rows, backend):
    solution = mk.min_norm_weights(gram_of(rows), backend=backend)
    check(rows, host(solution.weights))
    assert solution.iterations <= 4 * len(rows)


@given(row_matrices(), backends, st.sampled_from(["exact", "frank_wolfe"]))
def test_the_certificate_is_its_definition(rows, backend, solver):
    gram = gram_of(rows)
    weights, gap, iterations = mk.min_norm_weights(gram, solver=solver, max_iters=50, backend=backend)
    products = gram @ weights
    rounding = 10 * EPSILON * len(rows) * unit_of(rows, host(weights)) * np.linalg.norm(rows, axis=1).max()
    assert gap.dtype is torch.float64 and iterations.dtype is torch.int64
    assert gap >= 0
    assert abs(gap - (weights @ products - products.min()).clamp(min=0)) <= rounding
    if solver == "exact":
        assert gap <= 100 * rounding


@given(row_matrices(min_tasks=2), backends, st.randoms(use_true_random=False))
def test_permuting_the_tasks_permutes_the_problem(rows, backend, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    weights = host(mk.min_norm_weights(gram_of(rows[order]), backend=backend).weights)
    back = np.empty_like(weights)
    back[order] = weights
    check(rows, back)


@given(row_matrices(max_exponent=10), backends, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(rows, backend, exponent):
    gram = gram_of(rows)
    for solver in ("exact", "frank_wolfe"):
        plain = mk.min_norm_weights(gram, solver=solver, max_iters=20, backend=backend)
        scaled = mk.min_norm_weights(gram * 4.0**exponent, solver=solver, max_iters=20, backend=backend)
        assert torch.equal(plain.weights, scaled.weights)
        assert torch.equal(plain.gap * 4.0**exponent, scaled.gap)


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_any_scale_gives_the_same_weights(backend, scale):
    rows = np.random.default_rng(0).standard_normal((6, 20))
    plain = mk.min_norm_weights(gram_of(rows), backend=backend).weights
    scaled = mk.min_norm_weights(gram_of(rows * scale), backend=backend).weights
    torch.testing.assert_close(plain, scaled, rtol=1e-12, atol=0)


@given(backends, st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-0.99, 0.99))
def test_two_tasks_in_closed_form(backend, first, second, cosine):
    dot = first * second * cosine
    gram = torch.tensor([[first**2, dot], [dot, second**2]], dtype=torch.float64)
    share = np.clip((second**2 - dot) / (first**2 + second**2 - 2 * dot), 0, 1)
    for solver in ("exact", "frank_wolfe"):
        weights = mk.min_norm_weights(gram, solver=solver, tol=0.0, backend=backend).weights
        np.testing.assert_allclose(host(weights), [share, 1 - share], rtol=0, atol=1e-12)


def test_a_tiny_weight_on_a_long_row_counts(backend):
    rows = np.array([[1.0, 0.0], [-1e9, 1e9]])
    weights = host(mk.min_norm_weights(gram_of(rows), backend=backend).weights)
    assert value_of(rows, weights) == pytest.approx(0.5, rel=1e-8)


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [-1.0, 0.0]],
        [[1.0, 0.0], [-1e3, 0.0]],
        [[0.0, 1.0], [1e9, 0.0], [-1e9, 0.0]],
        [[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]],
        [[1.0, 2.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[2.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [-5.0, 0.0]],
    ],
    ids=["opposite", "opposite_unequal", "long_opposite", "triangle", "zero_row", "all_zero", "line"],
)
def test_zero_in_the_hull_gives_zero(backend, rows):
    rows = np.array(rows)
    weights = mk.min_norm_weights(gram_of(rows), backend=backend).weights
    assert weights.min() >= 0 and abs(weights.sum() - 1) <= 2 * EPSILON
    assert np.linalg.norm(rows.T @ host(weights)) <= 4 * EPSILON * unit_of(rows, host(weights))


def test_a_single_task_and_equal_tasks(backend):
    weights, gap, iterations = mk.min_norm_weights(torch.tensor([[3.0]]), backend=backend)
    assert (weights.tolist(), gap.item(), iterations.item()) == ([1.0], 0.0, 0)
    weights, gap, _ = mk.min_norm_weights(torch.full((5, 5), 2.0), backend=backend)
    assert weights.sum() == 1 and gap == 0


def test_batched_is_one_problem_at_a_time(backend):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram = rows @ rows.mT
    for solver in ("exact", "frank_wolfe"):
        batched = mk.min_norm_weights(gram, solver=solver, backend=backend)
        assert [x.shape for x in batched] == [(3, 4, 6), (3, 4), (3, 4)]
        for i in range(3):
            for j in range(4):
                alone = mk.min_norm_weights(gram[i, j], solver=solver, backend=backend)
                torch.testing.assert_close(batched.weights[i, j], alone.weights)
                assert batched.iterations[i, j] == alone.iterations


@given(row_matrices(min_tasks=2), backends, st.integers(0, 2**16 - 1))
def test_inactive_tasks_take_no_part(rows, backend, bits):
    active = np.array([bits >> k & 1 for k in range(len(rows))], dtype=bool)
    assume(active.any())
    gram = gram_of(rows)
    gram[torch.as_tensor(~active), :] = torch.nan
    weights, gap, _ = mk.min_norm_weights(gram, active=torch.as_tensor(active), backend=backend)
    assert not weights[torch.as_tensor(~active)].any()
    assert gap.isfinite()
    check(rows[active], host(weights)[active])


def test_no_active_task(backend):
    active = torch.tensor([[False, False], [True, False]])
    for solver in ("exact", "frank_wolfe"):
        weights, gap, iterations = mk.min_norm_weights(
            torch.eye(2).expand(2, 2, 2), solver=solver, active=active, backend=backend
        )
        assert weights.tolist() == [[0, 0], [1, 0]]
        assert gap.tolist() == [0, 0] and iterations.tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
def test_a_matrix_that_is_not_finite_gives_uniform_weights(backend, value, solver):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    active = torch.tensor([True, True, True, False])
    weights, gap, iterations = mk.min_norm_weights(gram, solver=solver, active=active, backend=backend)
    assert weights[0].tolist() == [1 / 3, 1 / 3, 1 / 3, 0]
    assert gap[0].isnan() and iterations[0] == 0
    torch.testing.assert_close(weights[1], weights[0])
    assert gap[1] <= 2 * EPSILON


def test_a_gram_matrix_with_rounding_of_float32(backend):
    """Rank 1 rows, a Gram matrix indefinite by its own rounding: no hang, on the simplex, small gap."""
    generator = np.random.default_rng(0)
    rows = torch.as_tensor(generator.standard_normal((12, 1)) @ generator.standard_normal((1, 50))).float()
    gram = (rows @ rows.T).to(torch.float64)
    weights, gap, _ = mk.min_norm_weights((gram + gram.T) / 2, backend=backend)
    assert weights.min() >= 0 and abs(weights.sum() - 1) <= 4 * EPSILON
    assert gap <= 1e-5 * gram.diagonal().max()


@given(row_matrices(min_tasks=2, kinds=("plain", "low_rank", "duplicate", "zero_rows", "conflicting")), backends)
def test_frank_wolfe_comes_within_twice_its_gap(rows, backend):
    gram = gram_of(rows)
    largest = gram.diagonal().max()
    solution = mk.min_norm_weights(gram, solver="frank_wolfe", max_iters=200, tol=1e-3, backend=backend)
    weights = host(solution.weights)
    assert weights.min() >= 0 and abs(weights.sum() - 1) <= 4 * EPSILON
    assert solution.iterations == 200 or solution.gap <= 1.000001e-3 * largest
    optimum = value_of(rows, host(mk.min_norm_weights(gram, backend=backend).weights))
    assert value_of(rows, weights) - optimum <= 2 * solution.gap + 1e-13 * largest


def test_frank_wolfe_follows_the_published_steps(backend):
    rows = np.random.default_rng(1).standard_normal((5, 8))
    gram = rows @ rows.T
    weights = np.full(5, 1 / 5)
    for steps in range(1, 12):
        vertex = np.eye(5)[(gram @ weights).argmin()]
        to = vertex - weights
        weights = weights + np.clip(-(weights @ gram @ to) / (to @ gram @ to), 0, 1) * to
        found = mk.min_norm_weights(
            torch.as_tensor(gram), solver="frank_wolfe", max_iters=steps, tol=0, backend=backend
        )
        np.testing.assert_allclose(host(found.weights), weights, rtol=0, atol=1e-12)
        assert found.iterations == steps


def test_frank_wolfe_on_orthonormal_rows_is_uniform_at_once(backend):
    weights, gap, iterations = mk.min_norm_weights(torch.eye(4), solver="frank_wolfe", backend=backend)
    assert weights.tolist() == [0.25] * 4 and gap == 0 and iterations == 0


def test_more_iterations_never_raise_the_value(backend):
    rows = np.random.default_rng(2).standard_normal((10, 12))
    gram = gram_of(rows)
    for solver in ("exact", "frank_wolfe"):
        values = [
            value_of(rows, host(mk.min_norm_weights(gram, solver=solver, max_iters=n, backend=backend).weights))
            for n in range(1, 25)
        ]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))


def test_tol_stops_the_exact_solver_early(backend):
    rows = np.random.default_rng(3).standard_normal((30, 60))
    gram = gram_of(rows)
    full = mk.min_norm_weights(gram, backend=backend)
    early = mk.min_norm_weights(gram, tol=0.2, backend=backend)
    assert early.iterations < full.iterations
    assert early.gap <= 0.2 * gram.diagonal().max()


@pytest.mark.parametrize("num_tasks", [2, 5, 40, 128])
def test_backends_agree(backend, num_tasks):
    rows = torch.randn(2, num_tasks, num_tasks + 3, dtype=torch.float64)
    gram = rows @ rows.mT
    for solver in ("exact", "frank_wolfe"):
        expected = mk.reference.min_norm_weights(gram, solver=solver, max_iters=None if solver == "exact" else 30)
        found = mk.min_norm_weights(gram, solver=solver, max_iters=None if solver == "exact" else 30, backend=backend)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, '"exact" or "frank_wolfe"'),
        ({"max_iters": 0}, "positive integer"),
        ({"max_iters": 2.5}, "positive integer"),
        ({"max_iters": True}, "positive integer"),
        ({"tol": -1e-3}, ">= 0"),
        ({"tol": float("nan")}, ">= 0"),
        ({"tol": "small"}, ">= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mk.min_norm_weights(torch.eye(2, dtype=torch.float64), **arguments)


@pytest.mark.parametrize("left", [1e-3, 3e-7, 1e-8])
@pytest.mark.parametrize("num_columns", [20, 1000])
def test_rows_that_nearly_cancel(implementation, left, num_columns):
    """Eight pairs of unit rows, each of which leaves next to nothing: as near to the optimum as G tells."""
    if implementation == "triton":
        pytest.skip("its kernel takes plain sums")
    generator = np.random.default_rng(0)
    for _ in range(4):
        half = generator.standard_normal((8, num_columns))
        other = -half + left * generator.standard_normal(half.shape)
        rows = np.concatenate([half, other])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        solution = mk.min_norm_weights(gram_of(rows), backend=implementation)
        products = gram_of(rows).numpy().astype(np.longdouble) @ host(solution.weights)
        gap = products @ host(solution.weights) - products.min()
        assert gap <= (1e-15 if implementation != "reference" else 1e-9) * len(rows)
        assert abs(solution.gap.item() - gap) <= 1e-15
