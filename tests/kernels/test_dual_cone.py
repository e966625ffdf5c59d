"""UPGrad, DualProj and PCD: solvers on Gram matrices against least squares and enumeration on rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host

import mtl_kernels as mk
from benchmarks.oracles import cones
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps
PROJECTIONS = {
    "upgrad": (mk.upgrad_weights, cones.upgrad),
    "dualproj": (mk.dualproj_weights, cones.onto_dual_cone),
}
BOTH = pytest.mark.parametrize("name", PROJECTIONS)
names = st.sampled_from(sorted(PROJECTIONS))
regs = st.sampled_from([1e-4, 1e-2, 1.0])


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(rows @ rows.T)


def norms_of(rows: np.ndarray, reg: float) -> np.ndarray:
    """Of the rows of G + reg trace(G) I."""
    return np.sqrt((rows**2).sum(1) + reg * (rows**2).sum())


@st.composite
def preferences(draw: st.DrawFn, num_tasks: int) -> np.ndarray | None:
    if draw(st.booleans()):
        return None
    pref = np.array(draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0]), min_size=num_tasks, max_size=num_tasks)))
    return pref if pref.any() else pref + 1


def check(name: str, rows: np.ndarray, pref: np.ndarray | None, reg: float, weights: np.ndarray) -> None:
    """Weights as far from those of non-negative least squares as its own error explains.

    The rows of G + reg trace(G) I have a condition below sqrt(K / reg), and least squares go with its square.
    """
    given_pref = np.full(len(rows), 1 / len(rows)) if pref is None else pref
    expected = PROJECTIONS[name][1](rows, given_pref, reg)
    norm = norms_of(rows, reg)
    slack = 100 * EPSILON * len(rows) / reg * float(given_pref @ norm)
    assert (weights >= given_pref).all()
    assert np.abs((weights - expected) * norm).max() <= min(slack, 1e-10 * float(given_pref @ norm))


@given(row_matrices(), names, regs, backends, st.data())
def test_as_non_negative_least_squares_on_rows(rows, name, reg, backend, data):
    pref = data.draw(preferences(len(rows)))
    tensor = None if pref is None else torch.as_tensor(pref)
    solution = PROJECTIONS[name][0](gram_of(rows), pref=tensor, reg=reg, backend=backend)
    check(name, rows, pref, reg, host(solution.weights))
    assert 0 <= solution.gap <= 1e-13


@given(row_matrices(min_tasks=9, max_tasks=24, max_columns=30), names, backends)
def test_with_many_tasks(rows, name, backend):
    solution = PROJECTIONS[name][0](gram_of(rows), backend=backend)
    check(name, rows, None, 1e-4, host(solution.weights))
    assert solution.gap <= 1e-13


@given(row_matrices(max_tasks=12), names, st.sampled_from([0.0, 1e-4]), backends)
def test_no_conflict_beyond_the_regularisation(rows, name, reg, backend):
    weights = host(PROJECTIONS[name][0](gram_of(rows), reg=reg, backend=backend).weights)
    norm = norms_of(rows, reg)
    allowed = reg * (rows**2).sum() * weights + 1e-12 * norm * (weights @ norm)
    assert (rows @ (rows.T @ weights) >= -allowed).all()


@given(row_matrices(max_tasks=10), backends, st.data())
def test_unregularised_is_the_nearest_point_of_the_cone(rows, backend, data):
    """Any rank; weights are then not unique, but ||J'w|| is, up to what the rounding of G hides."""
    pref = data.draw(preferences(len(rows)))
    given_pref = np.full(len(rows), 1 / len(rows)) if pref is None else pref
    tensor = None if pref is None else torch.as_tensor(pref)
    weights, gap, _ = mk.dualproj_weights(gram_of(rows), pref=tensor, reg=0, backend=backend)
    try:
        expected = cones.onto_dual_cone(rows, given_pref, 0.0)
    except RuntimeError:
        assume(False)
    found, norm = host(weights), np.linalg.norm(rows, axis=1)
    unit = max(found @ norm, expected @ norm)
    square, least = (float(np.square(rows.T @ w).sum()) for w in (found, expected))
    assert (found >= given_pref).all()
    assert square <= least + 100 * EPSILON * len(rows) * unit**2
    assert gap <= 1e-12


@given(row_matrices(max_tasks=6), st.sampled_from([0.0, 1e-4]), backends)
def test_upgrad_adds_up_projections_of_single_rows(rows, reg, backend):
    gram, total = gram_of(rows), np.zeros(len(rows))
    for part in np.eye(len(rows)) / len(rows):
        total += host(mk.dualproj_weights(gram, pref=torch.as_tensor(part), reg=reg, backend=backend).weights)
    found = host(mk.upgrad_weights(gram, reg=reg, backend=backend).weights)
    np.testing.assert_allclose(found, total, rtol=1e-9 if reg else 1e-5)


@given(row_matrices(), names, backends)
def test_the_certificate_is_its_definition(rows, name, backend):
    """On DualProj, which has all that UPGrad's K problems have."""
    solution = mk.dualproj_weights(gram_of(rows), backend=backend)
    weights, norm = host(solution.weights), norms_of(rows, 1e-4)
    there, pref = np.linalg.norm(rows, axis=1) > 0, 1 / len(rows)
    if not there.any():
        assert solution.gap == 0
        return
    unit = weights @ np.where(there, norm, 0.0)
    products = (rows @ (rows.T @ weights) + 1e-4 * (rows**2).sum() * weights)[there] / norm[there] / unit
    violation = np.where(weights[there] > pref * (1 + 4 * EPSILON), np.abs(products), -products).max()
    assert abs(solution.gap - max(violation, 0)) <= 20 * EPSILON * len(rows)


def test_known_answers(backend):
    opposite = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    weights = mk.dualproj_weights(opposite, reg=0, backend=backend).weights
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5], dtype=torch.float64))  # d = 0
    right_angle = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)  # (1, 0) and (-1, 1)
    weights = mk.upgrad_weights(right_angle, reg=0, backend=backend).weights
    # Onto the plane of the other: (1, 0) to (1/2, 1/2), (-1, 1) to (0, 1).
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.75], dtype=torch.float64))
    for function, _ in PROJECTIONS.values():
        assert function(torch.eye(3), backend=backend).weights.tolist() == [1 / 3] * 3
        assert function(torch.tensor([[3.0]]), backend=backend).weights.tolist() == [1]
        assert function(torch.zeros(2, 2), backend=backend).weights.tolist() == [0.5, 0.5]
        weights, gap, _ = function(torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]]), backend=backend)
        assert weights[1] == 1 / 3 and weights[0] == weights[2] and gap <= 1e-15


@BOTH
@given(rows=row_matrices(max_exponent=10), backend=backends, exponent=st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit(name, rows, backend, exponent):
    plain = PROJECTIONS[name][0](gram_of(rows), backend=backend)
    scaled = PROJECTIONS[name][0](gram_of(rows) * 4.0**exponent, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True))


@BOTH
@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_any_scale_gives_the_same_weights(backend, name, scale):
    rows = np.random.default_rng(0).standard_normal((6, 20))
    rows -= 1.3 * rows.mean(0)
    plain = PROJECTIONS[name][0](gram_of(rows), backend=backend).weights
    scaled = PROJECTIONS[name][0](gram_of(rows * scale), backend=backend).weights
    torch.testing.assert_close(plain, scaled, rtol=1e-11, atol=0)


@given(row_matrices(min_tasks=2), names, backends, st.randoms(use_true_random=False))
def test_permuting_the_tasks_permutes_the_weights(rows, name, backend, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    back = np.empty(len(rows))
    back[order] = host(PROJECTIONS[name][0](gram_of(rows[order]), backend=backend).weights)
    check(name, rows, None, 1e-4, back)


@given(row_matrices(min_tasks=2), names, backends, st.integers(0, 2**16 - 1), st.data())
def test_inactive_tasks_take_no_part(rows, name, backend, bits, data):
    active = np.array([bits >> k & 1 for k in range(len(rows))], dtype=bool)
    assume(active.any())
    pref = data.draw(preferences(len(rows)))
    assume(pref is None or pref[active].any())
    gram = gram_of(rows)
    gram[torch.as_tensor(~active), :] = torch.nan
    tensor = None if pref is None else torch.as_tensor(pref)
    weights, gap, _ = PROJECTIONS[name][0](gram, pref=tensor, active=torch.as_tensor(active), backend=backend)
    assert not weights[torch.as_tensor(~active)].any() and gap.isfinite()
    check(name, rows[active], None if pref is None else pref[active], 1e-4, host(weights)[active])


@BOTH
def test_batched_is_one_problem_at_a_time(backend, name):
    rows = torch.randn(3, 4, 6, 9, dtype=torch.float64)
    gram, pref = rows @ rows.mT, torch.rand(3, 4, 6, dtype=torch.float64)
    batched = PROJECTIONS[name][0](gram, pref=pref, backend=backend)
    assert [x.shape for x in batched] == [(3, 4, 6), (3, 4), (3, 4)]
    for i in range(3):
        for j in range(4):
            alone = PROJECTIONS[name][0](gram[i, j], pref=pref[i, j], backend=backend)
            torch.testing.assert_close(batched.weights[i, j], alone.weights)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "pcd"])
def test_a_matrix_that_is_not_finite_gives_uniform_weights(backend, name, value):
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 2] = gram[0, 2, 1] = value
    active = torch.tensor([[True, True, True, False], [False] * 4])
    weights, gap, iterations = getattr(mk, f"{name}_weights")(gram, active=active, backend=backend)
    assert weights.tolist() == [[1 / 3, 1 / 3, 1 / 3, 0], [0] * 4]
    assert gap[0].isnan() and gap[1] == 0 and iterations.tolist() == [0, 0]


@pytest.mark.parametrize("num_tasks", [2, 5, 24, 128])
@pytest.mark.parametrize("reg", [0.0, 1e-4])
@BOTH
def test_backends_agree(implementation, name, num_tasks, reg):
    if name == "upgrad" and num_tasks == 128 and implementation in ("reference", "emulated"):
        pytest.skip("128 problems take it ten seconds")
    generator = np.random.default_rng(num_tasks)
    for share in (0.0, 1.5):
        rows = generator.standard_normal((num_tasks, num_tasks + 3))
        gram = gram_of(rows - share * rows.mean(0))
        expected = PROJECTIONS[name][0](gram, reg=reg, backend="cpu" if num_tasks == 128 else "reference")
        found = PROJECTIONS[name][0](gram, reg=reg, backend=implementation)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-8, atol=0)


def scale_of(rows: np.ndarray, before: np.ndarray, beta: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """PCD's s, and the state after the step."""
    v, t = before.reshape(2, -1)
    v, t = beta * v + (1 - beta) * (rows**2).sum(1), t + 1
    return 1 / np.sqrt(v / (1 - beta**t) + eps), np.concatenate([v, t])


@given(
    row_matrices(max_tasks=6, kinds=cones.WELL_POSED), backends, st.sampled_from([0.0, 0.02, 1.0]), st.integers(0, 99)
)
def test_pcd_as_every_set_of_equalities_on_rows(rows, backend, tau, seed):
    """Where the conditions can be met, the direction; else g_1."""
    generator = np.random.default_rng(seed)
    square = (rows**2).sum(1)
    before = np.concatenate([square * 10.0 ** generator.uniform(-1, 1, len(rows)), np.arange(len(rows)) % 3])
    before[: len(rows)] *= before[len(rows) :] > 0
    scale, after = scale_of(rows, before, 0.9, 1e-8)
    state = torch.as_tensor(before)
    weights, gap, _ = mk.pcd_weights(gram_of(rows), state=state, tau=tau, beta=0.9, eps=1e-8, backend=backend)
    np.testing.assert_allclose(host(state), after, rtol=1e-13)
    expected = cones.pcd(rows, scale, tau)
    expected = rows[0] if expected is None else expected
    found, norm = host(weights), np.sqrt(square)
    assert (found >= 0).all() and 0 <= gap <= 1e-13
    # The rounding of G turns d by EPSILON (sum w n)^2 / ||d||, and the oracle goes with 1e-11 for rounding.
    unit = max(found @ norm, norm[0])
    assert np.linalg.norm(rows.T @ found - expected) * norm[0] <= 1e-10 * unit**2


def test_pcd_known_answers(backend):
    def weights(gram: list[list[float]], **options: float) -> list[float]:
        found = mk.pcd_weights(torch.tensor(gram, dtype=torch.float64), backend=backend, **options).weights
        return [float(weight) for weight in found]

    assert weights([[4.0]]) == [1]
    assert weights([[4.0, 1.0], [1.0, 1.0]], eps=0.0) == [1, 0]  # progress enough
    # In the first step a_k are unit rows: (1, 0) and (0, 1), so that d = (1, tau) / |(1, tau)|, times 2.
    np.testing.assert_allclose(weights([[4.0, 0], [0, 9]], tau=0.75, eps=0.0), [0.8, 1.2 / 3], rtol=1e-14)
    assert weights([[1.0, -1], [-1, 1]], tau=0.0) == [0, 0]
    np.testing.assert_allclose(weights([[1.0, -1], [-1, 1]], eps=0.0), [50.0 - 0.0, 51.0], rtol=1e-12)
    assert weights([[1.0, 0, 0], [0, 1, -1], [0, -1, 1]]) == [1, 0, 0]  # no d meets both of the others
    assert weights([[1.0, 0, 0], [0, 1, -1], [0, -1, 1]], tau=0.0) == [1, 0, 0]
    assert weights([[0.0, 0], [0, 1]]) == [0, 0]
    assert weights([[1.0, 0, -1], [0, 0, 0], [-1, 0, 2]], tau=0.0)[1] == 0
    assert weights([[0.0, 0], [0, 0]]) == [0, 0]


@pytest.mark.parametrize("num_tasks", [6, 40, 128])
def test_pcd_tells_what_cannot_be_met(implementation, num_tasks):
    """Zero in the hull of the others, in fewer dimensions than tasks: a combination of them proves it."""
    generator = np.random.default_rng(num_tasks)
    rows = generator.standard_normal((num_tasks, num_tasks // 3))
    weights, gap, _ = mk.pcd_weights(gram_of(rows), backend=implementation)
    assert weights.tolist() == [1] + [0] * (num_tasks - 1)
    assert gap <= 10 * EPSILON * num_tasks
    rows[1:] += 2 * rows[1] / np.linalg.norm(rows[1]) * np.linalg.norm(rows[1:], axis=1, keepdims=True)
    weights, gap, _ = mk.pcd_weights(gram_of(rows), backend=implementation)
    d = rows.T @ host(weights)
    assert gap <= 1e-12 and abs(np.linalg.norm(d) / np.linalg.norm(rows[0]) - 1) <= 1e-12
    assert (rows[1:] @ d >= -1e-12 * np.linalg.norm(rows[1:], axis=1)).all()


def test_pcd_leaves_the_averages_of_others_alone(backend):
    gram = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    gram[1, 0, 0] = torch.nan
    active = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    state = torch.arange(18.0, dtype=torch.float64).view(3, 6)
    before = state.clone()
    weights = mk.pcd_weights(gram * 2, state=state, active=active, beta=0.5, backend=backend).weights
    assert torch.equal(state[1:], before[1:])
    assert state[0].tolist() == [0, 1.5, 2, 3, 5, 6]
    assert weights[0, 0] == 0 and weights[0, 1] > 0  # the first of those that are there comes first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gram: mk.upgrad_weights(gram, reg=-1e-4), "reg as a finite number >= 0"),
        (lambda gram: mk.dualproj_weights(gram, reg=float("nan")), "reg as a finite number >= 0"),
        (lambda gram: mk.upgrad_weights(gram, reg=True), "reg as a finite number >= 0"),
        (lambda gram: mk.upgrad_weights(gram, pref=torch.ones(3)), r"pref of shape \[2\]"),
        (lambda gram: mk.pcd_weights(gram, tau="much"), "tau as a finite number >= 0"),
        (lambda gram: mk.pcd_weights(gram, beta=1.0), "beta < 1"),
        (lambda gram: mk.pcd_weights(gram, eps=-1.0), "eps as a finite number >= 0"),
        (lambda gram: mk.pcd_weights(gram, state=torch.zeros(3, dtype=torch.float64)), "state of 4 numbers"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(2, dtype=torch.float64))
