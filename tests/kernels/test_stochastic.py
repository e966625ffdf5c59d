"""SDMGrad's and MoDo's steps on the weights, one by one, and what becomes of their state."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host
from torch import Tensor

import mtl_kernels as mk
from benchmarks.oracles.stochastic import normalised, project
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps
SOLVERS = {"sdmgrad": mk.sdmgrad_weights, "modo": mk.modo_weights}
EACH = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


@st.composite
def products(draw: st.DrawFn, **limits: int) -> np.ndarray:
    """A = J1 J2' of rows that agree but for noise, or not at all."""
    rows = draw(row_matrices(**limits))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    noise = 10.0 ** draw(st.integers(-3, 1)) * np.linalg.norm(rows, axis=1, keepdims=True) / rows.shape[1] ** 0.5
    first, second = (rows + noise * generator.standard_normal(rows.shape) for _ in range(2))
    return first @ second.T


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def plain(num_tasks: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    """Products that are neither symmetric nor positive."""
    rows = np.random.default_rng(seed).standard_normal((2, *batch, num_tasks, num_tasks + 2))
    return torch.as_tensor((rows[0] + rows[1]) @ (rows[0] - 0.5 * rows[1]).swapaxes(-1, -2))


def on_simplex(weights: np.ndarray) -> bool:
    return bool((weights >= 0).all()) and abs(weights.sum() - 1) <= 4 * EPSILON * len(weights)


@given(products(), backends, st.floats(0, 2), st.sampled_from([0.01, 1, 10]), st.sampled_from([0, 0.5, 0.9]))
def test_sdmgrad_takes_projected_steps_with_momentum(a, backend, lam, lr, momentum):
    """Each from where the one before has ended: with long steps, whole runs multiply the rounding of the first."""
    num_tasks = len(a)
    start = np.random.default_rng(num_tasks).dirichlet(np.ones(num_tasks))
    pref = np.arange(1.0, num_tasks + 1)
    pref /= pref.sum()
    w, velocity = start, np.zeros(num_tasks)
    for n in (1, 2, 3, 4):
        velocity = momentum * velocity + normalised(a) @ (w + lam * pref)
        expected, state = project(w - lr * velocity), torch.as_tensor(start.copy())
        found = mk.sdmgrad_weights(
            torch.as_tensor(a), state=state, lam=lam, lr=lr, momentum=momentum, n_iter=n,
            pref=torch.as_tensor(7 * pref), backend=backend,
        )  # fmt: skip
        w = host(state)
        assert on_simplex(w)
        assert np.abs(w - expected).max() <= 50 * EPSILON * num_tasks * (1 + lr * np.abs(velocity).max())
        np.testing.assert_allclose(host(found), (w + lam * pref) / (1 + lam), rtol=0, atol=4 * EPSILON)


@given(products(max_exponent=6), backends, st.sampled_from([1e-3, 0.1, 3]), st.floats(0, 1))
def test_modo_takes_one_projected_step(a, backend, gamma, rho):
    state = zeros(len(a))
    w = np.full(len(a), 1 / len(a))
    for _ in range(3):
        change = gamma * (a @ w + rho * w)
        expected = project(w - change)
        found = mk.modo_weights(torch.as_tensor(a), state=state, gamma=gamma, rho=rho, backend=backend)
        w = host(state).copy()
        assert torch.equal(found, state) and on_simplex(w)
        assert np.abs(w - expected).max() <= 50 * EPSILON * len(a) * (1 + np.abs(change).max())


@given(st.lists(st.floats(-5, 5) | st.sampled_from([0, 1, -1, 1e6, -1e6]), min_size=1, max_size=20), backends)
def test_the_projection_is_the_nearest_point(x, backend):
    """What MoDo projects is w - gamma A w; A = (w - x) 1' makes that x."""
    x = np.array(x)
    w = np.full(len(x), 1 / len(x))
    a = torch.as_tensor(np.outer(w - x, np.ones(len(x))))
    found = host(mk.modo_weights(a, state=zeros(len(x)), gamma=1.0, rho=0.0, backend=backend))
    rounding = 20 * EPSILON * len(x) * (1 + np.abs(x).max())
    assert on_simplex(found)
    np.testing.assert_allclose(found, project(x), rtol=0, atol=rounding)
    # Nearest: x - w has one and the same value on the support, and no more elsewhere.
    above = x - found
    assert np.ptp(above[found > 0]) <= rounding and above.max() <= above[found > 0].max() + rounding


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 33, 40, 128])
def test_backends_agree(backend, num_tasks):
    if backend == "reference":
        pytest.skip("it is what the others are held against")
    a = plain(num_tasks, batch=(3,))
    states = {name: zeros(3, num_tasks) for name in ("expected", "found")}
    for _ in range(3):
        for solve, options in ((mk.sdmgrad_weights, {"lr": 0.5 / num_tasks}), (mk.modo_weights, {"gamma": 1e-3})):
            expected = solve(a, state=states["expected"], backend="reference", **options)
            found = solve(a, state=states["found"], backend=backend, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(states["found"], states["expected"], rtol=0, atol=1e-12)


def test_products_need_not_be_symmetric(backend):
    a = torch.tensor([[1.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    weights = mk.modo_weights(a, state=zeros(2), gamma=0.1, rho=0.0, backend=backend)
    torch.testing.assert_close(weights.tolist(), [0.6, 0.4])  # A w = (0.5, 2.5)
    weights = mk.modo_weights(a.T, state=zeros(2), gamma=0.1, rho=0.0, backend=backend)
    torch.testing.assert_close(weights.tolist(), [0.4, 0.6])


@given(products(max_exponent=8), backends, st.sampled_from([-40, -7, 1, 40]))
def test_scaling_by_a_power_of_two_changes_no_bit_of_sdmgrad(a, backend, exponent):
    assume(not a.any() or np.abs(a[a != 0]).min() > 1e-200)
    plain, scaled = zeros(len(a)), zeros(len(a))
    for _ in range(2):
        first = mk.sdmgrad_weights(torch.as_tensor(a), state=plain, backend=backend)
        second = mk.sdmgrad_weights(torch.as_tensor(a * 2.0**exponent), state=scaled, backend=backend)
        assert torch.equal(first, second) or backend == "reference"  # which divides by the largest entry
    assert torch.equal(plain, scaled) or backend == "reference"


@pytest.mark.parametrize("scale", [1e-280, 1e-24, 1e24, 1e280])
def test_sdmgrad_is_free_of_scale(backend, scale):
    a = plain(6)
    for solve in (lambda a: mk.sdmgrad_weights(a, state=zeros(6), lr=0.2, backend=backend),):
        torch.testing.assert_close(solve(a * scale), solve(a), rtol=0, atol=1e-13)


def test_what_normalisation_divides_by(backend):
    a = torch.tensor([[4.0, 1.0], [-3.0, -1.0]], dtype=torch.float64)
    divisor = 1.0**2 + 1e-8 * 4  # (sqrt(4) + 0) / 2
    expected = mk.sdmgrad_weights(a / divisor, state=zeros(2), lr=0.1, n_iter=3, normalize=False, backend=backend)
    found = mk.sdmgrad_weights(a, state=zeros(2), lr=0.1, n_iter=3, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_products_that_all_disagree_still_lead_somewhere(backend):
    """No positive A_ii to tell the scale by: the steps are as long as the 1e-8 allows."""
    a = torch.tensor([[-1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    state = zeros(2)
    weights = mk.sdmgrad_weights(a, state=state, n_iter=1, lam=0.0, backend=backend)
    assert weights.tolist() == [1, 0] == state.tolist()  # A w = (0.5, 1)


@EACH
def test_no_products_leave_the_weights(backend, solve):
    state = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    solve(zeros(3, 3), state=state, backend=backend)
    if solve is mk.sdmgrad_weights:
        assert state.tolist() == [0.5, 0.25, 0.25]
    else:  # the regularisation alone
        torch.testing.assert_close(state.tolist(), [0.5 * 0.99 + 0.01 / 3, *[0.25 * 0.99 + 0.01 / 3] * 2])


@EACH
def test_one_task(backend, solve):
    state = zeros(1)
    assert solve(torch.tensor([[-3.0]]), state=state, backend=backend).tolist() == [1.0] == state.tolist()


@pytest.mark.parametrize("fresh", [0.0, -1.0, float("nan"), float("inf")])
@EACH
def test_a_state_that_is_none_is_uniform(backend, solve, fresh):
    a = plain(4)
    state, uniform = torch.full((4,), fresh, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    found = solve(a, state=state, backend=backend)
    torch.testing.assert_close(found, solve(a, state=uniform, backend=backend), rtol=0, atol=1e-15)
    torch.testing.assert_close(state, uniform, rtol=0, atol=1e-15)


@EACH
def test_tasks_that_take_no_part_keep_their_share(backend, solve):
    options = {"lr": 0.1} if solve is mk.sdmgrad_weights else {}
    a, active = plain(4), torch.tensor([True, False, True, True])
    state = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    a[1], a[:, 1] = torch.nan, torch.inf
    among = state[active] / 0.8
    expected = solve(a[active][:, active], state=among, backend=backend, **options)
    found = solve(a, state=state, active=active, backend=backend, **options)
    torch.testing.assert_close(found[active], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(state[active], 0.8 * among, rtol=0, atol=1e-14)
    assert found[1] == 0 and state[1] == 0.2

    state = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # nothing to share: uniform, with 3 / 4 in all
    found = solve(a, state=state, active=active, backend=backend, **options)
    again = zeros(4)
    assert torch.equal(found, solve(a, state=again, active=active, backend=backend, **options))
    assert state[1] == 1 and again[1] == 0.25 and torch.equal(state[active], again[active])
    torch.testing.assert_close(again.sum().item(), 1.0)


def test_preferences_are_shared_among_the_active(backend):
    a, pref = plain(3), torch.tensor([1.0, 100.0, 3.0])
    active = torch.tensor([True, False, True])
    found = mk.sdmgrad_weights(a, state=zeros(3), lam=2.0, lr=0.1, pref=pref, active=active, backend=backend)
    small = mk.sdmgrad_weights(
        a[active][:, active], state=zeros(2), lam=2.0, lr=0.1, pref=torch.tensor([0.25, 0.75]), backend=backend
    )
    torch.testing.assert_close(found[active], small, rtol=0, atol=1e-14)
    assert found[1] == 0 and found[2] >= 0.5
    alike = mk.sdmgrad_weights(a, state=zeros(3), lr=0.1, active=active, backend=backend)
    none = mk.sdmgrad_weights(a, state=zeros(3), lr=0.1, pref=1.0 * ~active, active=active, backend=backend)
    assert torch.equal(alike, none)


@EACH
def test_batched_is_one_problem_at_a_time(backend, solve):
    a = plain(5, batch=(2, 3))
    state = torch.as_tensor(np.random.default_rng(1).dirichlet(np.ones(5), (2, 3)))
    active = torch.rand(2, 3, 5) > 0.3
    active[..., 0] = True
    before = state.clone()
    found = solve(a, state=state, active=active, backend=backend)
    for i in range(2):
        for j in range(3):
            alone = before[i, j].clone()
            assert torch.equal(solve(a[i, j], state=alone, active=active[i, j], backend=backend), found[i, j])
            assert torch.equal(alone, state[i, j])


@EACH
def test_problems_that_are_settled_leave_their_state(backend, solve):
    a = plain(3, batch=(3,))
    a[0, 2, 0] = torch.nan
    active = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    for start in (zeros(3, 3), torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64)):
        state = start.clone()
        found = solve(a, state=state, active=active, backend=backend)
        assert found[:2].tolist() == [[1 / 3] * 3, [0.0] * 3]
        assert torch.equal(state[:2], start[:2]) and not torch.equal(state[2], start[2])


def test_sdmgrad_with_short_steps_finds_the_least_norm(backend):
    """With one and the same batch, many steps and no preference it is MGDA."""
    rows = torch.as_tensor(np.random.default_rng(5).standard_normal((5, 8)))
    gram = mk.gram(rows)
    found = mk.sdmgrad_weights(
        gram, state=zeros(5), lam=0.0, lr=0.1, n_iter=300 if backend == "triton" else 3000, backend=backend
    )
    expected = mk.min_norm_weights(gram).weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": -0.1}, ValueError, "lam as a finite number >= 0"),
        ({"lam": True}, TypeError, "lam as a number"),
        ({"lr": 0}, ValueError, "lr > 0"),
        ({"lr": float("inf")}, ValueError, "lr as a finite"),
        ({"momentum": 1}, ValueError, r"momentum in \[0, 1\)"),
        ({"momentum": "0.5"}, TypeError, "momentum as a number"),
        ({"n_iter": 0}, ValueError, "n_iter >= 1"),
        ({"n_iter": 2.0}, TypeError, "n_iter as an integer"),
        ({"normalize": 1}, TypeError, "True or False"),
        ({"pref": torch.ones(3)}, ValueError, r"inputs of shape \[2\]"),
        ({"state": torch.zeros(2)}, TypeError, "float64"),
        ({"state": torch.zeros(1, 2, dtype=torch.float64)}, ValueError, "state of shape"),
        ({"state": torch.zeros(3, dtype=torch.float64)}, ValueError, "state of 2 numbers"),
    ],
)
def test_bad_arguments(options, error, message):
    arguments = {"state": zeros(2), **options}
    if not isinstance(options.get("state"), Tensor):
        arguments["state"] = zeros(2)
    with pytest.raises(error, match=message):
        mk.sdmgrad_weights(torch.eye(2, dtype=torch.float64), **arguments)
    assert not arguments["state"].any()


@pytest.mark.parametrize(
    ("options", "message"), [({"gamma": 0.0}, "gamma > 0"), ({"rho": -1.0}, "rho as a finite number >= 0")]
)
def test_bad_arguments_of_modo(options, message):
    with pytest.raises(ValueError, match=message):
        mk.modo_weights(torch.eye(2, dtype=torch.float64), state=zeros(2), **options)
