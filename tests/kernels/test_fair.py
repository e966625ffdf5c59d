"""Nash-MTL and FairGrad weights: closed forms, the equation itself in exact arithmetic, what has no solution."""

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from placement import backends, host
from torch import Tensor

import mtl_kernels as mk
from strategies import row_matrices

EPSILON = np.finfo(np.float64).eps
ALPHAS = [0.1, 0.5, 1.0, 2.0, 10.0, 100.0, 1000.0]


def gram_of(rows: np.ndarray) -> Tensor:
    return torch.as_tensor(rows @ rows.T)


def exact_products(gram: Tensor, weights: np.ndarray) -> tuple[list[Fraction], list[Fraction]]:
    """G w and |G| w of the numbers as they are, without rounding."""
    matrix, w = [[Fraction(x) for x in row] for row in gram.tolist()], [Fraction(x) for x in weights.tolist()]
    signed = [sum((g * x for g, x in zip(row, w, strict=True)), Fraction()) for row in matrix]
    terms = [sum((abs(g) * x for g, x in zip(row, w, strict=True)), Fraction()) for row in matrix]
    return signed, terms


def certificate(gram: Tensor, weights: np.ndarray, alpha: float) -> float:
    signed, terms = exact_products(gram, weights)
    expected = [Fraction(w ** (-1 / alpha)) for w in weights.tolist()]
    return max(float(abs(z - s) / (s + t)) for z, s, t in zip(signed, expected, terms, strict=True))


@given(row_matrices(max_exponent=8), backends, st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0]))
def test_the_equation_holds_where_there_is_a_solution(rows, backend, alpha):
    gram = gram_of(rows)
    weights, gap, iterations = mk.fairgrad_weights(gram, alpha=alpha, backend=backend)
    found = host(weights)
    if gap == 1:
        assert not found.any()
        # A convex combination of the rows that are not zero is next to nothing.
        unit = np.array([row / np.linalg.norm(row) for row in rows if row.any()])
        share = host(mk.min_norm_weights(gram_of(unit)).weights)
        assert np.linalg.norm(unit.T @ share) <= 1e-5
        return
    there = rows.any(1)
    assert (found[there] > 0).all() and not found[~there].any()
    assume(there.any())
    # Weights are rounded once more than what the certificate is of.
    assert certificate(gram[there][:, there], found[there], alpha) <= gap + 8 * EPSILON * (1 + 1 / alpha)
    assert gap <= 2e-14 * max(1, alpha) and iterations <= 100


@pytest.mark.parametrize("missing", [1.0, 1e-3, 1e-6, 1e-9, 1e-12, 1.5])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (3.0, 1e-5), (2.0**-300, 2.0**300)])
def test_two_tasks_in_closed_form(implementation, missing, lengths):
    """w_i = 1 / (n_i sqrt(1 + cos)), as near to opposite rows as can be told."""
    first, second = lengths
    dot = (missing - 1) * first * second
    gram = torch.tensor([[first**2, dot], [dot, second**2]], dtype=torch.float64)
    found, gap, _ = mk.nash_mtl_weights(gram, max_norm=0.0, backend=implementation)
    with localcontext() as context:
        context.prec = 60
        square, other = (Decimal(gram[k, k].item()).sqrt() for k in range(2))
        left = (1 + Decimal(gram[0, 1].item()) / (square * other)).sqrt()
        expected = [float(1 / (length * left)) for length in (square, other)]
    np.testing.assert_allclose(host(found), expected, rtol=8 * EPSILON)
    assert gap <= 4 * EPSILON


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cosine", [-1 + 1e-6, -0.9, 0.0, 0.5, 1.0])
def test_rows_alike_in_closed_form(backend, alpha, cosine):
    """Of K rows of length n, each pair at the same angle: w = (n^2 (1 + (K - 1) cos))^(-alpha / (1 + alpha))."""
    rtol = 1e-14 + EPSILON * alpha  # by how much rounding sets rows apart that are the same
    for num_tasks in (2, 5) if cosine >= 0 else (2,):
        for length in (1.0, 1e-4, 1e5):
            gram = torch.full((num_tasks, num_tasks), cosine * length**2, dtype=torch.float64)
            gram.fill_diagonal_(length**2)
            found = mk.fairgrad_weights(gram, alpha=alpha, backend=backend)
            total = Fraction(gram[0, 0].item()) + (num_tasks - 1) * Fraction(gram[0, 1].item())
            np.testing.assert_allclose(host(found.weights), float(total) ** (-alpha / (1 + alpha)), rtol=rtol)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_rows_in_closed_form(backend, alpha):
    """w_i = n_i^(-2 alpha / (1 + alpha))."""
    squares = torch.tensor([1.0, 1e-6, 1e8, 7.0], dtype=torch.float64)
    found, gap, iterations = mk.fairgrad_weights(torch.diag(squares), alpha=alpha, backend=backend)
    np.testing.assert_allclose(host(found), host(squares) ** (-alpha / (1 + alpha)), rtol=1e-14)
    assert gap <= 1e-14 and iterations <= 2


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["cone", "near", "spread", "duplicate", "parallel"])
def test_every_alpha_converges(kind, alpha):
    """Within few iterations, and a small residual, whatever the lengths and however near to a stationary point."""
    generator = np.random.default_rng(0)
    for num_tasks in (2, 5, 12, 23):
        rows = generator.standard_normal((num_tasks, 3 * num_tasks))
        if kind == "cone":  # many tasks on one side: most weights fall by orders of magnitude for a large alpha
            rows[:, 0] += 3
        elif kind == "near":
            rows[-1] = 1e-5 * rows[-1] - generator.random(num_tasks - 1) @ rows[:-1]
        elif kind == "spread":
            rows *= 10.0 ** generator.uniform(-6, 6, (num_tasks, 1))
        elif kind == "duplicate":
            rows[-1] = 3 * rows[0]
        else:
            rows = rows[:1] + 1e-6 * rows
        weights, gap, iterations = mk.fairgrad_weights(gram_of(rows), alpha=alpha)
        assert gap <= 1e-13 * max(1, alpha) and iterations <= 80
        assert (weights > 0).all() or alpha >= 100  # the power may be less than float64 holds


def test_a_large_alpha_is_max_min_fair():
    """The least progress relative to |d| is the largest there is: that of the point of least norm in the hull."""
    rows = np.random.default_rng(2).standard_normal((6, 9))
    gram = gram_of(rows)
    nearest = rows.T @ host(mk.min_norm_weights(gram).weights)
    shares = []
    for alpha in (1, 10, 100, 1000):
        d = rows.T @ host(mk.fairgrad_weights(gram, alpha=alpha).weights)
        shares.append((rows @ d).min() / np.linalg.norm(d) / np.linalg.norm(nearest))
    assert shares == sorted(shares) and 0.99 < shares[-1] <= 1 + 1e-12 and shares[0] < 0.9


def test_alpha_0_is_the_mean_and_1_is_nash(backend):
    gram = gram_of(np.random.default_rng(3).standard_normal((5, 8)))
    weights, gap, iterations = mk.fairgrad_weights(gram, alpha=0, backend=backend)
    assert weights.tolist() == [0.2] * 5 and gap == 0 and iterations == 0
    nash, fair = mk.nash_mtl_weights(gram, max_norm=0, backend=backend), mk.fairgrad_weights(gram, backend=backend)
    assert torch.equal(nash.weights, fair.weights) and torch.equal(nash.gap, fair.gap)


@given(row_matrices(min_tasks=2, kinds=("plain", "duplicate", "near_parallel", "spread")), backends, st.data())
def test_the_length_of_a_row_is_undone(rows, backend, data):
    """Nash: w_i n_i does not change, to the bit for powers of two."""
    scale = np.array(data.draw(st.lists(st.integers(-30, 30), min_size=len(rows), max_size=len(rows))))
    plain = mk.nash_mtl_weights(gram_of(rows), max_norm=0, backend=backend)
    powers = torch.as_tensor(2.0**scale, dtype=torch.float64)
    gram = gram_of(rows) * powers.to(plain.weights) * powers.to(plain.weights).unsqueeze(1)
    scaled = mk.nash_mtl_weights(gram, max_norm=0, backend=backend)
    assert torch.equal(scaled.gap == 1, plain.gap == 1)
    assume(plain.gap != 1)
    np.testing.assert_allclose(host(scaled.weights) * 2.0**scale, host(plain.weights), rtol=1e-9)
    if backend != "reference":
        assert (host(scaled.weights) * 2.0**scale == host(plain.weights)).all()


@given(row_matrices(min_tasks=2, kinds=("plain", "conflicting", "near_parallel")), backends, st.randoms())
def test_permuting_the_tasks_permutes_the_weights(rows, backend, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    plain = mk.nash_mtl_weights(gram_of(rows), max_norm=0, backend=backend)
    moved = mk.nash_mtl_weights(gram_of(rows)[order][:, order], max_norm=0, backend=backend)
    assume(plain.gap != 1 and moved.gap != 1)
    d, other = rows.T @ host(plain.weights), rows[order].T @ host(moved.weights)
    cancelling = np.linalg.norm(rows, axis=1) @ host(plain.weights)
    np.testing.assert_allclose(other, d, rtol=0, atol=100 * EPSILON * cancelling**2)


def test_the_step_is_as_long_as_the_square_root_of_k_or_as_it_may_be(backend):
    rows = np.random.default_rng(4).standard_normal((3, 6, 9))
    gram = torch.as_tensor(rows @ rows.transpose(0, 2, 1))
    for most, expected in ((0.0, 6**0.5), (1.0, 1.0), (0.01, 0.01), (6**0.5 + 1e-9, 6**0.5), (100, 6**0.5)):
        weights = host(mk.nash_mtl_weights(gram, max_norm=most, backend=backend).weights)
        np.testing.assert_allclose(np.linalg.norm(np.einsum("bkn,bk->bn", rows, weights), axis=1), expected, rtol=1e-14)
    assert np.linalg.norm(rows[0].T @ host(mk.nash_mtl_weights(gram[0], backend=backend).weights)) == pytest.approx(1)


NO_SOLUTION = {
    "zero_row": [[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]],
    "opposite": [[1.0, 2.0], [-0.3, -0.6], [2.0, 1.0]],
    "far_apart": [[1.0, 2.0], [-1e9, -2e9], [1e-9, 0.0]],
    "triangle": [[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]],
    "scalars": [[0.1], [3.0], [-0.7]],
    "all_zero": [[0.0], [0.0], [0.0]],
}


@pytest.mark.parametrize("name", NO_SOLUTION)
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_where_there_is_no_solution_nash_takes_the_last_weights(implementation, name, scale):
    gram = gram_of(np.array(NO_SOLUTION[name]) * scale)
    last = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    weights, gap, _ = mk.nash_mtl_weights(gram, max_norm=0, last=last, backend=implementation)
    assert weights.tolist() == last.tolist() == [0.5, 0.25, 2.0] and gap == 1
    assert mk.nash_mtl_weights(gram, max_norm=0, backend=implementation).weights.tolist() == [1, 1, 1]
    clipped, _, _ = mk.nash_mtl_weights(gram, last=last, backend=implementation)
    norm = (last @ gram @ last).clamp(min=0).sqrt()
    torch.testing.assert_close(clipped, last if norm <= 1 else last / norm, rtol=1e-14, atol=0)
    assert last.tolist() == [0.5, 0.25, 2.0]


@pytest.mark.parametrize("name", [name for name in NO_SOLUTION if "zero" not in name])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_where_there_is_no_solution_fairgrad_stays(implementation, name, alpha):
    if implementation == "reference" and not 0.5 <= alpha <= 10:
        pytest.skip("slow")
    for scale in (1e-8, 1.0, 1e5):
        gram = gram_of(np.array(NO_SOLUTION[name]) * scale)
        weights, gap, iterations = mk.fairgrad_weights(gram, alpha=alpha, backend=implementation)
        assert weights.tolist() == [0, 0, 0] and gap == 1 and iterations <= 1000


def test_zero_rows_can_be_left_out(implementation):
    rows = np.random.default_rng(5).standard_normal((5, 7))
    rows[[0, 3]] = 0
    there = np.array([1, 2, 4])
    last = torch.full((5,), 7.0, dtype=torch.float64)
    nash = mk.nash_mtl_weights(gram_of(rows), zero_rows="skip", last=last, backend=implementation)
    alone = mk.nash_mtl_weights(gram_of(rows[there]), backend=implementation)
    assert host(nash.weights)[[0, 3]].tolist() == [0, 0] and host(last)[[0, 3]].tolist() == [7, 7]
    torch.testing.assert_close(nash.weights[there], alone.weights, rtol=1e-14, atol=0)
    fair = mk.fairgrad_weights(gram_of(rows), alpha=2, backend=implementation)
    alone = mk.fairgrad_weights(gram_of(rows[there]), alpha=2, backend=implementation)
    assert host(fair.weights)[[0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(fair.weights[there], alone.weights, rtol=1e-14, atol=0)
    for zeros in (mk.fairgrad_weights(torch.zeros(2, 2)), mk.nash_mtl_weights(torch.zeros(2, 2), zero_rows="skip")):
        assert zeros.weights.tolist() == [0, 0] and zeros.gap == 0


def test_the_last_weights_are_those_of_each_task_and_before_the_clip(implementation):
    rows = np.random.default_rng(6).standard_normal((2, 4, 6))
    gram = torch.as_tensor(rows @ rows.transpose(0, 2, 1))
    last = torch.full((2, 4), 9.0, dtype=torch.float64)
    active = torch.tensor([[True, True, False, True], [True, True, True, True]])
    unclipped = mk.nash_mtl_weights(gram, active=active, max_norm=0, backend=implementation).weights
    mk.nash_mtl_weights(gram, active=active, last=last, max_norm=0.01, backend=implementation)
    assert torch.equal(last, torch.where(active, unclipped, 9.0))
    kept = last.clone()
    gram[0, 0] = gram[0, :, 0] = 0
    weights, gap, _ = mk.nash_mtl_weights(gram, active=active, last=last, max_norm=0, backend=implementation)
    assert torch.equal(weights, torch.where(active, kept, 0.0)) and gap.tolist()[0] == 1 and gap[1] < 1e-14
    assert torch.equal(last, kept)


@pytest.mark.parametrize("num_tasks", [40, 128])
def test_many_tasks(implementation, num_tasks):
    if implementation not in ("cpu", "cuda"):
        pytest.skip("slow")
    rows = np.random.default_rng(7).standard_normal((num_tasks, 2 * num_tasks))
    for alpha in ALPHAS:
        weights, gap, iterations = mk.fairgrad_weights(gram_of(rows), alpha=alpha, backend=implementation)
        assert gap <= 1e-13 and iterations <= 30
        assert num_tasks > 40 or alpha > 10 or certificate(gram_of(rows), host(weights), alpha) <= 1e-13


def test_a_gram_matrix_with_rounding_of_float32(backend):
    """Near-parallel rows, a Gram matrix indefinite by its own rounding."""
    generator = np.random.default_rng(0)
    rows = torch.as_tensor(1 + 1e-5 * generator.standard_normal((12, 50))).float()
    gram = (rows @ rows.T).to(torch.float64)
    for alpha in (0.5, 1.0, 10.0):
        weights, gap, _ = mk.fairgrad_weights((gram + gram.T) / 2, alpha=alpha, backend=backend)
        assert gap <= 1e-12 and (weights > 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda gram: mk.nash_mtl_weights(gram, max_norm=-1), ValueError, "max_norm as a number >= 0, found -1"),
        (lambda gram: mk.nash_mtl_weights(gram, max_norm=float("nan")), ValueError, "max_norm"),
        (lambda gram: mk.nash_mtl_weights(gram, max_norm=True), ValueError, "max_norm"),
        (lambda gram: mk.nash_mtl_weights(gram, zero_rows="stop"), ValueError, '"last" or "skip"'),
        (lambda gram: mk.nash_mtl_weights(gram, last=torch.ones(3).double()), ValueError, "state of 2 numbers"),
        (lambda gram: mk.nash_mtl_weights(gram, last=torch.ones(2)), TypeError, "float64"),
        (lambda gram: mk.fairgrad_weights(gram, alpha=-1), ValueError, r"alpha as 0 or a number in \[0.1, 1000\]"),
        (lambda gram: mk.fairgrad_weights(gram, alpha=0.01), ValueError, "found 0.01"),
        (lambda gram: mk.fairgrad_weights(gram, alpha=float("inf")), ValueError, "found inf"),
        (lambda gram: mk.fairgrad_weights(gram, alpha="1"), ValueError, "found '1'"),
        (lambda gram: mk.fairgrad_weights(gram.long()), TypeError, "int64"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.eye(2, dtype=torch.float64))
