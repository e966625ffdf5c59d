import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host

import mtl_kernels as mk
from benchmarks.oracles.supports import cagrad, told
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps
reaches = st.sampled_from([0.01, 0.1, 0.4, 0.7, 0.95, 1.5, 4.0])  # not 1, where the zero of d may have any weights


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(rows @ rows.T)


def weigh(rows: np.ndarray, c: float, backend: str, **options: str) -> np.ndarray:
    return host(mk.cagrad_weights(gram_of(rows), c=c, backend=backend, **options).weights)


def mean_and_reach(rows: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """g0 and c |g0|, of a g0 that is more than rounding."""
    mean = rows.mean(axis=0)
    assume(np.linalg.norm(mean) > 1e-7 * np.linalg.norm(rows, axis=1).mean())
    return mean, c * float(np.linalg.norm(mean))


def check(rows: np.ndarray, weights: np.ndarray, c: float) -> None:
    """Feasible, and as good as the best of all supports: min_i g_i'd is no less than the least of the dual problem."""
    mean, reach = mean_and_reach(rows, c)
    length = np.linalg.norm(rows, axis=1)
    least, w_in = cagrad(rows, c)
    if not weights.any():
        assert least >= -1e-12 * reach * length.max()
        assert least <= 0 or least <= np.sqrt(16 * len(rows) * EPSILON) * reach * (w_in @ length)
        return
    assert weights.min() >= 1 / len(rows) - EPSILON
    d = rows.T @ weights
    slack = 1e-12 / told(rows, weights)
    assert abs(np.linalg.norm(d - mean) - reach) <= slack * reach
    assert (rows @ d).min() >= least - slack * reach * length.max()


@given(row_matrices(max_tasks=4), reaches, backends)
def test_no_support_is_better(rows, c, backend):
    check(rows, weigh(rows, c, backend), c)


@given(row_matrices(min_tasks=2, max_tasks=30, max_columns=40), reaches, backends)
def test_the_gap_certifies_many_tasks(rows, c, backend):
    mean_and_reach(rows, c)
    weights, gap, iterations = mk.cagrad_weights(gram_of(rows), c=c, backend=backend)
    weights, scale = host(weights), np.square(rows).sum(axis=1).max()
    assert 0 <= gap and iterations <= 6 * len(rows) + 10
    if not weights.any():
        assert gap <= 1e-10 * scale
        return
    d, v = rows.T @ weights, np.clip(weights - 1 / len(rows), 0, None)
    left = np.linalg.norm(rows.T @ v) / (v @ np.linalg.norm(rows, axis=1))
    slack = 1e-13 * len(rows) * (1 + c) / left
    assert gap <= slack * scale
    worth = (rows @ d @ v) / v.sum() - (rows @ d).min()  # F(w_in) = sum_k w_k g_k'd, of d before rounding
    assert abs(worth - gap.item()) <= (slack + 1e-14 * len(rows) / left**2) * scale


@given(st.floats(0.01, 3), st.floats(-2, 2), st.floats(-0.999, 0.999), backends)
def test_two_tasks_against_bisection(c, exponent, cosine, backend):
    """The least of a convex function of one variable, where its derivative changes sign."""
    ratio = 10.0**exponent
    rows = np.array([[1.0, 0.0], [ratio * cosine, ratio * np.sqrt(1 - cosine**2)]])
    mean, reach = rows.mean(axis=0), c * np.linalg.norm(rows.mean(axis=0))
    along = rows[1] - rows[0]

    def slope(x: float) -> float:
        point = rows[0] + x * along
        return along @ mean + reach * (along @ point) / np.linalg.norm(point)

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    x = 0.0 if slope(0.0) >= 0 else 1.0 if slope(1.0) <= 0 else middle
    point = rows[0] + x * along
    expected = mean + reach * point / np.linalg.norm(point)
    np.testing.assert_allclose(rows.T @ weigh(rows, c, backend), expected, atol=1e-9 * (1 + ratio) * (1 + c), rtol=0)


@given(row_matrices(min_tasks=2), reaches, backends, st.randoms(use_true_random=False))
def test_permuting_the_tasks_permutes_the_problem(rows, c, backend, random):
    mean_and_reach(rows, c)
    order = list(range(len(rows)))
    random.shuffle(order)
    plain, permuted = weigh(rows, c, backend), weigh(rows[order], c, backend)
    assert plain.any() == permuted.any()
    if plain.any():
        difference = rows.T @ plain - rows[order].T @ permuted
        slack = 1e-12 / told(rows, plain)
        assert np.linalg.norm(difference) <= slack * (1 + c) * np.linalg.norm(rows, axis=1).max()


@given(row_matrices(max_exponent=10), reaches, backends, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(rows, c, backend, exponent):
    plain = mk.cagrad_weights(gram_of(rows), c=c, backend=backend)
    scaled = mk.cagrad_weights(gram_of(rows) * 4.0**exponent, c=c, backend=backend)
    assert torch.equal(plain.weights, scaled.weights)
    assert torch.equal(plain.gap * 4.0**exponent, scaled.gap)


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_any_scale_gives_the_same_weights(backend, scale):
    rows = np.random.default_rng(0).standard_normal((6, 20))
    np.testing.assert_allclose(weigh(rows * scale, 0.4, backend), weigh(rows, 0.4, backend), rtol=1e-12)


@pytest.mark.parametrize("c", [0.4, 0.9])
def test_rows_of_any_length(backend, c):
    """Norms that differ by 1e16, near-parallel and dependent rows among them."""
    generator = np.random.default_rng(3)
    for _ in range(20):
        rows = generator.standard_normal((8, 5)) + 1
        rows[1] = rows[0] + 1e-6 * rows[1]
        rows[3] = rows[2]
        rows *= 10.0 ** generator.uniform(-8, 8, (8, 1))
        solution = mk.cagrad_weights(gram_of(rows), c=c, backend=backend)
        weights, d = host(solution.weights), rows.T @ host(solution.weights)
        assert solution.gap <= 1e-13 * gram_of(rows).max()
        np.testing.assert_allclose(np.linalg.norm(d - rows.mean(0)), c * np.linalg.norm(rows.mean(0)), rtol=1e-10)
        # On the rows that hold the weight g_i'd is the same, and no row has less: to the rounding of each.
        level, holding = rows @ d, weights > 1 / 8 * (1 + 1e-9)
        rounding = 1e-12 * np.linalg.norm(rows, axis=1) * np.linalg.norm(d)
        assert (
            level[holding].max() - level <= rounding + rounding[holding].max()
        ).all() or level.min() >= -rounding.max()


@pytest.mark.parametrize("c", [0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("rescale", ["none", "paper", "max"])
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_one_task_and_equal_tasks(backend, c, rescale, scale):
    divisor = {"none": 1.0, "paper": 1 + c**2, "max": 1 + c}[rescale]
    one = mk.cagrad_weights(torch.tensor([[3.0]]), c=c, rescale=rescale, scale=scale, backend=backend)
    torch.testing.assert_close(one.weights, torch.tensor([(1 + c) / divisor], dtype=torch.float64))
    equal = mk.cagrad_weights(torch.full((5, 5), 2.0), c=c, rescale=rescale, scale=scale, backend=backend)
    total = (1 + c) / divisor * (5 if scale == "sum" else 1)
    torch.testing.assert_close(equal.weights.sum(), torch.tensor(total, dtype=torch.float64))


@given(row_matrices(max_tasks=5), backends)
def test_c_of_zero_is_the_mean(rows, backend):
    for scale, expected in (("mean", 1 / len(rows)), ("sum", 1.0)):
        weights, gap, _ = mk.cagrad_weights(gram_of(rows), c=0, scale=scale, backend=backend)
        assert torch.equal(weights, torch.full_like(weights, expected)) and gap == 0


@given(row_matrices(max_tasks=6, kinds=("plain", "low_rank", "conflicting")), st.floats(1.05, 5), backends)
def test_from_one_on_every_loss_descends_or_none(rows, c, backend):
    mean_and_reach(rows, c)
    weights = weigh(rows, c, backend)
    d = rows.T @ weights
    if weights.any():
        assert (rows @ d).min() >= -1e-12 * np.linalg.norm(rows, axis=1).max() * np.linalg.norm(d)
    else:
        shortest = host(mk.min_norm_weights(gram_of(rows)).weights)
        assert np.linalg.norm(rows.T @ shortest) <= 1e-6 * (shortest @ np.linalg.norm(rows, axis=1))


@pytest.mark.parametrize(
    ("rows", "c"),
    [
        ([[1.0, 0.0], [-2.0, 0.0], [0.0, 50.0]], 0.4),
        ([[1.0, 2.0], [0.0, 0.0]], 0.4),
        ([[0.0, 0.0], [0.0, 0.0]], 0.4),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.4),
        ([[1.0, 0.0], [-3.0, 0.0]], 2.0),
        ([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]], 0.4),
        ([[1.0, 0.0], [-0.5, 1.0], [-0.4, -1.0]], 3.0),
    ],
    ids=["opposite_aside", "zero_row", "all_zero", "opposite", "line", "mean_of_zero", "triangle"],
)
def test_weights_of_zero(backend, rows, c):
    gram = gram_of(np.array(rows))
    solution = mk.cagrad_weights(gram, c=c, backend=backend)
    assert not solution.weights.any() and solution.gap <= 1e-13


def test_a_stationary_point_that_the_mean_leaves(backend):
    """d is as near to 0 as c lets it, and has the better of the two gradients the wrong way."""
    rows = np.array([[1.0, 0.0], [-3.0, 0.0]])
    np.testing.assert_allclose(rows.T @ weigh(rows, 0.4, backend), [-1 + 0.4, 0], rtol=1e-14)
    # A zero row does not stop it either: the mean would have to turn by more than c.
    rows = np.array([[1.0, 0.0], [-3.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(rows.T @ weigh(rows, 0.4, backend), [(-1 + 0.4) * 2 / 3, 0], rtol=1e-14)


def test_batched_is_one_problem_at_a_time(backend):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram = rows @ rows.mT
    batched = mk.cagrad_weights(gram, backend=backend)
    assert [x.shape for x in batched] == [(3, 4, 6), (3, 4), (3, 4)]
    for i in range(3):
        for j in range(4):
            alone = mk.cagrad_weights(gram[i, j], backend=backend)
            torch.testing.assert_close(batched.weights[i, j], alone.weights)
            assert batched.iterations[i, j] == alone.iterations


@given(row_matrices(min_tasks=2, max_tasks=6), reaches, backends, st.integers(0, 2**16 - 1))
def test_inactive_tasks_take_no_part(rows, c, backend, bits):
    active = np.array([bits >> k & 1 for k in range(len(rows))], dtype=bool)
    assume(active.any())
    gram = gram_of(rows)
    alone = mk.cagrad_weights(gram_of(rows[active]), c=c, scale="sum", backend=backend)
    gram[torch.as_tensor(~active), :] = torch.nan
    masked = mk.cagrad_weights(gram, c=c, scale="sum", active=torch.as_tensor(active), backend=backend)
    assert not masked.weights[torch.as_tensor(~active)].any()
    # The reference sums over all tasks, zeros included, in an order that torch chooses by their number.
    rounding = 8 * np.finfo(float).eps if backend == "reference" else 0.0
    np.testing.assert_allclose(host(masked.weights)[active], host(alone.weights), rtol=rounding)
    assert abs(masked.gap - alone.gap) <= rounding * float(gram_of(rows).abs().max())


def test_no_active_task(backend):
    active = torch.tensor([[False, False], [True, False]])
    weights, gap, iterations = mk.cagrad_weights(torch.eye(2).expand(2, 2, 2), active=active, backend=backend)
    assert weights[0].tolist() == [0, 0] and gap[0] == 0 and iterations[0] == 0
    torch.testing.assert_close(weights[1], torch.tensor([1.4, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_gives_uniform_weights(backend, value):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    active = torch.tensor([True, True, True, False])
    weights, gap, iterations = mk.cagrad_weights(gram, active=active, backend=backend)
    assert weights[0].tolist() == [1 / 3, 1 / 3, 1 / 3, 0]
    assert gap[0].isnan() and iterations[0] == 0
    torch.testing.assert_close(weights[1], torch.tensor([1, 1, 1, 0]).double() * 1.4 / 3)


def test_a_gram_matrix_with_rounding_of_float32(backend):
    """Rank 2 rows, a Gram matrix indefinite by its own rounding: no hang, finite, and near the best."""
    generator = np.random.default_rng(0)
    for shift in (0, 1):
        rows = torch.as_tensor(generator.standard_normal((12, 2)) @ generator.standard_normal((2, 50)) + shift).float()
        gram = (rows @ rows.T).to(torch.float64)
        weights, gap, iterations = mk.cagrad_weights((gram + gram.T) / 2, backend=backend)
        assert weights.isfinite().all() and weights.min() >= 0 and iterations <= 160
        assert gap <= 1e-3 * gram.diagonal().max()


@pytest.mark.parametrize(
    "gram",
    [
        [[1e300, 0.0], [0.0, 1e-300]],
        [[1e308, -1e308], [-1e308, 1e308]],
        [[5e-324, 0.0], [0.0, 5e-324]],
        [[1.0, 2.0], [2.0, 1.0]],
        [[1.0, -2.0], [-2.0, 1.0]],
        [[-1.0, 0.0], [0.0, 1.0]],
    ],
)
@pytest.mark.parametrize("c", [1e-300, 1e-3, 0.4, 1e3])
def test_what_no_rows_have(backend, gram, c):
    weights, gap, _ = mk.cagrad_weights(torch.tensor(gram, dtype=torch.float64), c=c, backend=backend)
    assert weights.isfinite().all() and weights.min() >= 0 and gap.isfinite()


@pytest.mark.parametrize("num_tasks", [2, 5, 40, 128])
def test_backends_agree(backend, num_tasks):
    rows = torch.randn(2, num_tasks, num_tasks + 3, dtype=torch.float64) + 0.2
    gram = rows @ rows.mT
    expected = mk.reference.cagrad_weights(gram, rescale="paper", scale="sum")
    found = mk.cagrad_weights(gram, rescale="paper", scale="sum", backend=backend)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": -0.1}, "finite number >= 0, found -0.1"),
        ({"c": float("nan")}, "finite number >= 0"),
        ({"c": float("inf")}, "finite number >= 0"),
        ({"c": "0.4"}, "finite number >= 0"),
        ({"c": True}, "finite number >= 0"),
        ({"rescale": "half"}, '"none", "paper" or "max", found \'half\''),
        ({"scale": "total"}, '"mean" or "sum", found \'total\''),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mk.cagrad_weights(torch.eye(2, dtype=torch.float64), **arguments)
