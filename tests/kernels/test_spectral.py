"""AlignedMTL, ConFIG and IMTL-G against singular value decompositions of the rows, and by what they promise."""

import functools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host

import mtl_kernels as mk
from benchmarks.oracles import spectral as oracle
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps
MODES = ["min", "median", "rmse"]
LENGTHS = ["projection", "min", "max", "harmonic", "arithmetic", "geometric"]
SOLVERS: dict[str, Callable[..., mk.Solution]] = {
    "aligned": mk.aligned_mtl_weights,
    "aligned median": functools.partial(mk.aligned_mtl_weights, scale_mode="median"),
    "aligned rmse": functools.partial(mk.aligned_mtl_weights, scale_mode="rmse"),
    "config": mk.config_weights,
    "config geometric": functools.partial(mk.config_weights, length="geometric"),
    "imtl_g": mk.imtl_g_weights,
}
EACH = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
any_solver = st.sampled_from(list(SOLVERS))


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return oracle.exact_gram(rows).to(torch.empty(0).device)


def on_device(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values)


def rounding(num_tasks: int) -> float:
    """In units of the sensitivity to the rounding of G. LAPACK needs as much, Jacobi's method a tenth."""
    return 10 * EPSILON * max(num_tasks, 4)


def preference(num_tasks: int) -> np.ndarray:
    return np.random.default_rng(num_tasks).uniform(0.1, 3, num_tasks)


def independent(seed: int, num_tasks: int = 5) -> np.ndarray:
    """Rows of many lengths whose cosines have a condition below 1e3."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((num_tasks, 3 * num_tasks)) - 0.5
    return rows * 10.0 ** generator.uniform(-3, 3, (num_tasks, 1))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(row_matrices(), backends, st.sampled_from(MODES), st.booleans())
def test_aligned_mtl_combines_the_nearest_aligned_rows(rows, backend, mode, preferring):
    pref = preference(len(rows)) if preferring else np.full(len(rows), 1 / len(rows))
    expected = oracle.aligned_mtl(rows, pref, mode)
    assume(expected is not None)
    given_pref = on_device(pref) if preferring else None
    weights = host(mk.aligned_mtl_weights(gram_of(rows), pref=given_pref, scale_mode=mode, backend=backend).weights)
    off = np.linalg.norm(rows.T @ weights - expected.value)
    assert off <= rounding(len(rows)) * expected.sensitivity


@given(row_matrices(), backends, st.sampled_from(LENGTHS), st.booleans())
def test_config_is_its_definition_on_vectors(rows, backend, length, preferring):
    pref = preference(len(rows)) if preferring else np.ones(len(rows))
    expected = oracle.config(rows, pref, length)
    assume(expected is not None)
    given_pref = on_device(pref) if preferring else None
    weights = host(mk.config_weights(gram_of(rows), pref=given_pref, length=length, backend=backend).weights)
    assert not weights[~rows.any(axis=1)].any()
    off = np.linalg.norm(rows.T @ weights - expected.value)
    assert off <= rounding(len(rows)) * expected.sensitivity


@given(row_matrices(), backends)
def test_imtl_g_is_its_definition_on_vectors(rows, backend):
    expected = oracle.imtl_g(rows)
    assume(expected is not None)
    weights = host(mk.imtl_g_weights(gram_of(rows), backend=backend).weights)
    assert not weights[~rows.any(axis=1)].any()
    assert (np.abs(weights - expected.value) <= rounding(len(rows)) * expected.sensitivity).all()


@pytest.mark.parametrize("num_tasks", [9, 31, 64, 128])
def test_many_tasks(backend, num_tasks):
    if num_tasks > 31 and backend not in ("cpu", "cuda"):
        pytest.skip("slow there, and nothing new")
    generator = np.random.default_rng(num_tasks)
    for rank in (num_tasks // 3, 2 * num_tasks):
        rows = generator.standard_normal((num_tasks, rank)) @ generator.standard_normal((rank, 2 * num_tasks))
        gram, pref = gram_of(rows), np.full(num_tasks, 1 / num_tasks)
        cases = [
            (mk.aligned_mtl_weights, oracle.aligned_mtl(rows, pref, "min"), rows.T),
            (mk.config_weights, oracle.config(rows, pref, "projection"), rows.T),
            (mk.imtl_g_weights, oracle.imtl_g(rows), np.eye(num_tasks)),
        ]
        for solve, expected, to_value in cases:
            if expected is None:
                continue
            solution = solve(gram, backend=backend)
            off = np.abs(to_value @ host(solution.weights) - expected.value)
            assert (off <= 4 * EPSILON * num_tasks * expected.sensitivity).all()
            assert solution.gap <= 1e-14 and solution.iterations <= 20


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("mode", MODES)
def test_aligned_rows_have_condition_one(backend, num_tasks, mode):
    """B, column by column from unit preferences: all singular values of BJ are equal, and B is symmetric."""
    rows = independent(num_tasks, num_tasks)
    gram = gram_of(rows).expand(num_tasks, -1, -1)
    eye = torch.eye(num_tasks, dtype=torch.float64)
    balance = host(mk.aligned_mtl_weights(gram, pref=eye, scale_mode=mode, backend=backend).weights)
    values = np.linalg.svd(balance @ rows, compute_uv=False)
    scale = np.sqrt(oracle.SCALES[mode](np.linalg.svd(rows, compute_uv=False) ** 2))
    squares = np.linalg.eigvalsh(host(gram[0]))
    np.testing.assert_allclose(values, scale, rtol=rounding(num_tasks) * squares[-1] / squares[0])
    np.testing.assert_allclose(balance, balance.T, atol=rounding(num_tasks) * np.abs(balance).max())


@pytest.mark.parametrize("seed", range(5))
def test_config_makes_equal_angles(backend, seed):
    rows = independent(seed)
    weights = host(mk.config_weights(gram_of(rows), backend=backend).weights)
    direction = rows.T @ weights
    cosines = unit(rows) @ direction / np.linalg.norm(direction)
    assert cosines.min() > 0
    np.testing.assert_allclose(cosines, cosines.mean(), rtol=1e-11)
    pref = preference(len(rows))
    weights = host(mk.config_weights(gram_of(rows), pref=on_device(pref), backend=backend).weights)
    products = unit(rows) @ (rows.T @ weights) / pref
    np.testing.assert_allclose(products, products.mean(), rtol=1e-11)


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_config_with_the_length_of_a_mean(backend, length):
    rows = independent(3)
    n = np.linalg.norm(rows, axis=1)
    direction = rows.T @ host(mk.config_weights(gram_of(rows), length=length, backend=backend).weights)
    cosines = unit(rows) @ direction / np.linalg.norm(direction)
    assert np.linalg.norm(direction) == pytest.approx(oracle.MEANS[length](n) * cosines.sum(), rel=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_imtl_g_has_equal_projections(backend, seed):
    rows = independent(seed)
    weights = host(mk.imtl_g_weights(gram_of(rows), backend=backend).weights)
    projections = unit(rows) @ (rows.T @ weights)
    assert weights.sum() == pytest.approx(1, abs=1e-14 * np.abs(weights).sum())
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_imtl_g_of_independent_rows_is_a_solve_with_the_gram_matrix(backend, seed):
    """a = G^-1 n; in rational numbers, because rows of such lengths ask too much of a pseudo-inverse."""
    rows = independent(seed, 4)
    gram = host(gram_of(rows))
    a = solve_exactly(gram, np.sqrt(np.diag(gram)))
    expected = np.array([float(x / sum(a)) for x in a])
    np.testing.assert_allclose(host(mk.imtl_g_weights(on_device(gram), backend=backend).weights), expected, rtol=1e-9)


def solve_exactly(matrix: np.ndarray, b: np.ndarray) -> list[Fraction]:
    """Gauss elimination on rational numbers."""
    table = [[*map(Fraction, row), Fraction(x)] for row, x in zip(matrix.tolist(), b.tolist(), strict=True)]
    for i, pivot in enumerate(table):
        pivot[:] = [x / pivot[i] for x in pivot]
        for row in table:
            if row is not pivot:
                row[:] = [x - row[i] * y for x, y in zip(row, pivot, strict=True)]
    return [row[-1] for row in table]


def test_imtl_g_of_parallel_rows_is_where_independent_rows_lead(backend):
    parallel = np.array([[1.0, 0.0], [2.0, 0.0]])
    np.testing.assert_allclose(
        host(mk.imtl_g_weights(gram_of(parallel), backend=backend).weights), [2 / 3, 1 / 3], rtol=1e-14
    )
    for angle in (1e-2, 1e-4, 1e-6):
        nearly = parallel + np.array([[0.0, angle], [0.0, 0.0]])
        found = host(mk.imtl_g_weights(gram_of(nearly), backend=backend).weights)
        np.testing.assert_allclose(found, [2 / 3, 1 / 3], atol=angle)


def test_imtl_g_shares_what_no_direction_makes_equal(backend):
    """Three rows in a plane, one of them long: what is left of equal projections is orthogonal to all unit rows."""
    rows = np.array([[1.0, 0.0], [0.3, 1.0], [400.0, 700.0]])
    weights = host(mk.imtl_g_weights(gram_of(rows), backend=backend).weights)
    direction = rows.T @ weights
    least_squares = np.linalg.lstsq(unit(rows), np.ones(3), rcond=None)[0]
    np.testing.assert_allclose(direction / np.linalg.norm(direction), least_squares / np.linalg.norm(least_squares))
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, -3, 4], [3, 6, 2], [2, 1, 2]],
        [[2, -4, -4], [2, -4, 4], [2, -2, -1]],
        [[0, 0, 6], [-3, 0, 0], [-6, 2, -3]],
        [[-1, 2, -2], [0, 1, 0], [3, 4, 0]],
    ],
)
def test_imtl_g_is_zero_where_sum_a_is(backend, rows):
    """Independent rows of whole lengths: a = G^-1 n is rational, and its sum exactly zero."""
    matrix = np.array(rows, dtype=float)
    assert sum(solve_exactly(matrix @ matrix.T, np.rint(np.linalg.norm(matrix, axis=1)))) == 0
    assert not host(mk.imtl_g_weights(gram_of(matrix), backend=backend).weights).any()
    nudged = matrix * [[1.0], [1.0], [1 + 1e-9]]
    assert np.abs(host(mk.imtl_g_weights(gram_of(nudged), backend=backend).weights)).max() > 1e6


@given(row_matrices(max_tasks=4, kinds=("plain", "near_parallel", "spread"), max_exponent=4), backends)
def test_opposite_rows_leave_nothing_to_agree_on(rows, backend):
    lengths = np.random.default_rng(0).uniform(0.1, 10, (len(rows), 1))
    both = gram_of(np.concatenate([rows, -lengths * rows]))
    for solve in (mk.imtl_g_weights, mk.config_weights):
        assert not host(solve(both, backend=backend).weights).any()


@EACH
def test_zero_rows(backend, solve):
    zero = solve(torch.zeros(3, 3), backend=backend)
    aligned = solve in [SOLVERS[name] for name in SOLVERS if "aligned" in name]
    assert zero.weights.tolist() == ([1 / 3] * 3 if aligned else [0, 0, 0])
    assert zero.gap == 0 and zero.iterations == 0
    rows = independent(0, 4)
    rows[2] = 0
    weights = host(solve(gram_of(rows), backend=backend).weights)
    others = [0, 1, 3]
    pref = {"pref": torch.full((3,), 0.25, dtype=torch.float64)} if aligned else {}
    alone = host(solve(gram_of(rows[others]), backend=backend, **pref).weights)
    assert weights[2] == 0
    np.testing.assert_allclose(weights[others], alone, rtol=1e-9)


@EACH
def test_a_single_task_and_equal_tasks(backend, solve):
    assert solve(torch.tensor([[3.0]]), backend=backend).weights.item() == pytest.approx(1, rel=4 * EPSILON)
    weights = solve(torch.full((5, 5), 2.0), backend=backend).weights
    torch.testing.assert_close(weights, weights.mean().expand(5), rtol=1e-13, atol=0)


@given(row_matrices(min_tasks=2, max_exponent=10), backends, any_solver, st.randoms(use_true_random=False))
def test_permuting_the_tasks_permutes_the_weights(rows, backend, name, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    expected = {
        "aligned": lambda: oracle.aligned_mtl(rows, np.full(len(rows), 1 / len(rows)), "rmse"),
        "config": lambda: oracle.config(rows, np.ones(len(rows)), "max"),
        "imtl_g": lambda: oracle.imtl_g(rows),
    }[name.split()[0]]()
    assume(expected is not None)
    gram = gram_of(rows)
    weights = host(SOLVERS[name](gram, backend=backend).weights)[order]
    permuted = host(SOLVERS[name](gram[order][:, order].contiguous(), backend=backend).weights)
    slack = 2 * rounding(len(rows)) * expected.sensitivity
    if name == "imtl_g":
        assert (np.abs(permuted - weights) <= slack[order]).all()
    else:
        assert np.linalg.norm(rows[order].T @ (permuted - weights)) <= slack


@given(row_matrices(max_exponent=10), backends, any_solver, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(rows, backend, name, exponent):
    assume(backend != "reference")  # LAPACK scales by what is no power of two
    gram = gram_of(rows)
    plain, scaled = (SOLVERS[name](matrix, backend=backend) for matrix in (gram, gram * 4.0**exponent))
    if name == "config geometric":  # by way of logarithms
        torch.testing.assert_close(plain.weights, scaled.weights, rtol=1e-13, atol=0)
    else:
        assert torch.equal(plain.weights, scaled.weights)
    assert torch.equal(plain.gap, scaled.gap) and torch.equal(plain.iterations, scaled.iterations)


@EACH
@pytest.mark.parametrize("scale", [1e-150, 1e-24, 1e24, 1e150])
def test_any_scale_gives_the_same_weights(backend, solve, scale):
    rows = unit(independent(1, 6))
    plain = solve(gram_of(rows), backend=backend).weights
    scaled = solve(gram_of(rows * scale), backend=backend).weights
    torch.testing.assert_close(plain, scaled, rtol=1e-11, atol=0)


@given(row_matrices(min_tasks=2, kinds=("plain", "low_rank", "duplicate", "conflicting"), max_exponent=0), backends)
def test_directions_of_impartial_methods_do_not_depend_on_the_lengths(rows, backend):
    """IMTL-G and ConFIG look at unit rows: rows of lengths from 1e-8 to 1e8 have the direction of those."""
    lengths = 10.0 ** np.random.default_rng(len(rows)).uniform(-8, 8, len(rows))
    assume(rows.any(axis=1).all())
    found = oracle.nearest(unit(rows), np.ones(len(rows)))
    assume(found is not None and found.direction.any())
    size = np.linalg.norm(found.direction)
    slack = 2 * rounding(len(rows)) * len(rows) * found.sensitivity / size
    assume(slack < 0.1)
    gram = gram_of(unit(rows) * lengths[:, None])
    for solve in (mk.imtl_g_weights, mk.config_weights):
        shares = host(solve(gram, backend=backend).weights) * lengths
        if not shares.any():
            assert solve is mk.imtl_g_weights and oracle.imtl_g(unit(rows) * lengths[:, None]) is None
            continue
        shares /= np.linalg.norm(unit(rows).T @ shares)
        expected = found.direction / size
        off = unit(rows).T @ shares
        assert min(np.linalg.norm(off - expected), np.linalg.norm(off + expected)) <= slack


def test_a_sum_of_float32_rows_becomes_the_scale_unless_rtol_is_larger(backend):
    """The rounding of the rows is no rounding of G: which eigenvalues are meant to be zero only the caller knows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 100, generator=generator, device="cpu").to(torch.empty(0).device)
    rows = torch.cat([rows, rows.sum(0, keepdim=True)]).double()
    rows[2] = rows[:2].float().sum(0).double()
    rows[0, :] += 1e-7 * rows[0].roll(1)
    gram = rows @ rows.T
    plain, cut = (mk.aligned_mtl_weights(gram, rtol=rtol, backend=backend).weights for rtol in (None, 3e-7))
    lengths = [float((rows.T @ weights).norm()) for weights in (plain, cut)]
    assert lengths[0] < 1e-5 < 1 < lengths[1]


@EACH
def test_a_larger_rtol_leaves_directions_out(backend, solve):
    """Two nearly parallel rows are one direction where rtol says so, and then weigh alike."""
    rows = np.array([[1.0, 1e-4, 0.0], [1.0, -1e-4, 1e-6], [0.0, 0.3, 1.0]])
    kept, dropped = (host(solve(gram_of(rows), rtol=rtol, backend=backend).weights) for rtol in (None, 1e-6))
    assert dropped[0] == pytest.approx(dropped[1], rel=1e-3)
    assert np.abs(kept - dropped).max() > 1e-3


@EACH
def test_batched_is_one_problem_at_a_time(backend, solve):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram = rows @ rows.mT
    batched = solve(gram, backend=backend)
    assert [x.shape for x in batched] == [(3, 4, 6), (3, 4), (3, 4)]
    for i in range(3):
        for j in range(4):
            alone = solve(gram[i, j], backend=backend)
            torch.testing.assert_close(batched.weights[i, j], alone.weights, rtol=1e-13, atol=1e-15)
            assert batched.iterations[i, j] == alone.iterations


@EACH
def test_inactive_tasks_take_no_part(backend, solve):
    rows = independent(2, 6)
    for bits in (1, 6, 21, 43, 63):
        active = np.array([bits >> k & 1 for k in range(6)], dtype=bool)
        gram = gram_of(rows)
        gram[on_device(~active), :] = torch.nan
        weights, gap, _ = solve(gram, active=on_device(active), backend=backend)
        assert not weights[on_device(~active)].any() and gap <= 1e-14
        alone = host(solve(gram_of(rows[active]), backend=backend).weights)
        np.testing.assert_allclose(host(weights)[active], alone, rtol=1e-8)


def test_preferences_of_inactive_tasks_do_not_count(backend):
    active, pref = torch.tensor([True, False, True]), torch.tensor([2.0, torch.nan, 1.0])
    gram = gram_of(independent(0, 3))
    among = gram[[0, 2]][:, [0, 2]]
    for solve in (mk.aligned_mtl_weights, mk.config_weights):
        weights = solve(gram, pref=pref, active=active, backend=backend).weights
        alone = solve(among, pref=pref[[0, 2]], backend=backend).weights
        torch.testing.assert_close(weights[[0, 2]], alone, rtol=1e-10, atol=0)
        assert weights[1] == 0


def test_the_size_of_preferences(backend):
    gram, pref = gram_of(independent(0, 3)), torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    aligned, config = mk.aligned_mtl_weights, mk.config_weights
    once, twice = (aligned(gram, pref=x * pref, backend=backend).weights for x in (1, 2))
    torch.testing.assert_close(twice, 2 * once)
    once, twice = (config(gram, pref=x * pref, backend=backend).weights for x in (1, 2))
    torch.testing.assert_close(twice, once)
    zero = torch.zeros(3, dtype=torch.float64)
    for solve in (aligned, config):
        assert not solve(gram, pref=zero, backend=backend).weights.any()


@EACH
def test_no_active_task(backend, solve):
    active = torch.tensor([[False, False], [True, False]])
    weights, gap, iterations = solve(torch.eye(2).expand(2, 2, 2), active=active, backend=backend)
    assert weights.tolist() == [[0, 0], [1, 0]]
    assert gap.tolist() == [0, 0] and iterations.tolist() == [0, 0]


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_gives_uniform_weights(backend, solve, value):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    active = torch.tensor([True, True, True, False])
    weights, gap, iterations = solve(gram, active=active, backend=backend)
    assert weights[0].tolist() == [1 / 3, 1 / 3, 1 / 3, 0]
    assert gap[0].isnan() and iterations[0] == 0
    assert weights[1].isfinite().all() and gap[1] == 0


@EACH
def test_matrices_that_no_rows_have(backend, solve):
    """Indefinite by the rounding of float32, or outright: as LAPACK's eigenvalues have it, negative ones dropped."""
    rows = np.random.default_rng(0).standard_normal((12, 2)) @ np.random.default_rng(1).standard_normal((2, 50))
    single = (rows.astype(np.float32) @ rows.astype(np.float32).T).astype(np.float64)
    found = solve(on_device((single + single.T) / 2), rtol=1e-5, backend=backend).weights
    expected = solve(on_device((single + single.T) / 2), rtol=1e-5, backend="reference").weights
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for matrix in ([[1.0, 2.0], [2.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]], [[2.0, -3.0], [-3.0, 1.0]]):
        gram = torch.tensor(matrix, dtype=torch.float64)
        expected = solve(gram, backend="reference").weights
        torch.testing.assert_close(solve(gram, backend=backend).weights, expected, rtol=1e-12, atol=1e-15)


@EACH
@pytest.mark.parametrize("num_tasks", [2, 5, 40])
def test_backends_agree(backend, solve, num_tasks):
    rows = torch.randn(2, num_tasks, 3 * num_tasks, dtype=torch.float64)
    gram = rows @ rows.mT
    expected = solve(gram, backend="reference").weights
    torch.testing.assert_close(solve(gram, backend=backend).weights, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("solve", "arguments", "message"),
    [
        (mk.aligned_mtl_weights, {"scale_mode": "max"}, "min, median, rmse"),
        (mk.config_weights, {"length": "mean"}, "projection, min"),
        (mk.aligned_mtl_weights, {"rtol": 0}, r"rtol as a number in \(0, 1\)"),
        (mk.aligned_mtl_weights, {"rtol": 1.0}, r"rtol as a number in \(0, 1\)"),
        (mk.config_weights, {"rtol": float("nan")}, r"rtol as a number in \(0, 1\)"),
        (mk.imtl_g_weights, {"rtol": "small"}, r"rtol as a number in \(0, 1\)"),
        (mk.imtl_g_weights, {"rtol": True}, r"rtol as a number in \(0, 1\)"),
    ],
)
def test_bad_arguments(solve, arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(torch.eye(2, dtype=torch.float64), **arguments)


@pytest.mark.parametrize("solve", [mk.aligned_mtl_weights, mk.config_weights])
def test_bad_preferences(solve):
    for shape in [(3,), (2, 2)]:
        with pytest.raises(ValueError, match=r"pref of shape \[2\]"):
            solve(torch.eye(2), pref=torch.ones(shape))
    with pytest.raises(TypeError, match="expected pref as a tensor"):
        solve(torch.eye(2), pref=[1.0, 2.0])
