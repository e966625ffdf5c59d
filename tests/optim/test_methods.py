"""The methods on matrices and Gram matrices, against definitions on whole vectors."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mtl_kernels as mk
from mtl_optim import MGDA, Constant, Mean, PCGrad, Sum, get_method, list_methods, methods
from optim.oracle import min_norm_pair, pcgrad_fixed, pcgrad_orders

ALL = [Sum(), Mean(), Constant([0.5, 2.0, 1.0]), PCGrad(), PCGrad(order="fixed", reduction="mean"), MGDA()]
META = torch.ones(3, dtype=torch.bool, device="meta")
MATRIX = torch.tensor([[1.0, 0.0, 2.0], [-2.0, 1.0, 0.0], [0.5, -3.0, 0.1]], dtype=torch.float64)


@st.composite
def matrices(draw: st.DrawFn, tasks: st.SearchStrategy[int]) -> torch.Tensor:
    """Rows of every rank, scale and degree of conflict."""
    num_tasks, width = draw(tasks), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, max(num_tasks, width)))
    left = torch.randn(num_tasks, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    matrix = left @ right * 10.0 ** draw(st.integers(-12, 12))
    for k in draw(st.sets(st.integers(0, num_tasks - 1), max_size=1)):
        matrix[k] = draw(st.sampled_from([0.0, 1.0, -1.0])) * matrix[0]
    return matrix


def close(found: torch.Tensor, expected: torch.Tensor, matrix: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return bool((found - expected).norm() <= tolerance * matrix.norm())


@given(matrices(st.integers(1, 6)))
def test_pcgrad_fixed_is_algorithm_1(matrix: torch.Tensor) -> None:
    # A product that is zero but for rounding may count as conflict or not: its effect is that small too.
    assert close(PCGrad(order="fixed")(matrix), pcgrad_fixed(matrix), matrix, 1e-6)
    assert close(PCGrad(order="fixed", reduction="mean")(matrix), pcgrad_fixed(matrix) / len(matrix), matrix, 1e-6)


@given(matrices(st.just(3)), st.integers(0, 100))
def test_pcgrad_random_is_algorithm_1_in_some_order(matrix: torch.Tensor, seed: int) -> None:
    found = PCGrad(seed=seed)(matrix)
    assert any(close(found, expected, matrix, 1e-6) for expected in pcgrad_orders(matrix))


@given(matrices(st.just(2)))
def test_mgda_of_two_is_the_nearest_point(matrix: torch.Tensor) -> None:
    found = MGDA()(matrix)
    if (matrix[1] - matrix[0]).norm() > 1e-6 * matrix.norm():
        assert close(found, min_norm_pair(matrix), matrix, 1e-7)


@given(matrices(st.integers(2, 6)), st.sampled_from(["none", "l2", "loss", "loss+"]))
def test_mgda_descends_every_loss(matrix: torch.Tensor, normalize: str) -> None:
    losses = torch.linspace(0.5, 3.0, len(matrix), dtype=torch.float64)
    norms = matrix.norm(dim=1).where(matrix.norm(dim=1) > 0, 1.0)
    scale = {"none": 1.0, "l2": norms, "loss": losses, "loss+": losses * norms}[normalize]
    rows = matrix / torch.as_tensor(scale).expand(len(matrix)).unsqueeze(1)
    found = MGDA(normalize=normalize)(matrix, losses=losses)
    # Of the minimum-norm point d of the rows r_k: r_k . d >= d . d.
    assert (rows @ found - found @ found >= -1e-7 * rows.norm() ** 2).all()
    published = MGDA(normalize=normalize, weights_for="normalized")
    weights = published.weights(mk.gram(matrix), losses=losses)
    assert torch.allclose(weights.sum(), torch.ones((), dtype=torch.float64)) and (weights >= 0).all()
    assert close(rows.T @ weights, found, rows, 1e-7)


def test_weights_of_constants() -> None:
    gram = mk.gram(MATRIX)
    active = torch.tensor([True, False, True])
    assert Sum().weights(gram).tolist() == [1, 1, 1]
    assert Sum().weights(gram, active=active).tolist() == [1, 0, 1]
    assert Mean().weights(gram).tolist() == [1 / 3] * 3
    assert Mean().weights(gram, active=active).tolist() == [0.5, 0, 0.5]
    constant = Constant((0.5, 2, 1.0))
    assert constant.weights(gram, active=active).tolist() == [0.5, 0, 1]
    constant.weights(gram).zero_()
    assert constant.weights(gram).tolist() == [0.5, 2, 1]
    assert torch.equal(Constant(torch.tensor([0.5, 2, 1]))(MATRIX), 0.5 * MATRIX[0] + 2 * MATRIX[1] + MATRIX[2])


@pytest.mark.parametrize("method", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_callable_on_matrix_and_lists(method: methods.Method, dtype: torch.dtype) -> None:
    method = copy.deepcopy(method)
    matrix = MATRIX.to(dtype)
    weights = copy.deepcopy(method).weights(mk.gram(matrix))
    found = copy.deepcopy(method)(matrix)
    assert found.dtype == dtype and found.shape == (3,) and weights.dtype == torch.float64
    assert torch.equal(found, mk.combine(matrix, weights))
    first, rest = copy.deepcopy(method)([[row[:1], row[1:], None] for row in matrix])[:2]
    assert torch.equal(torch.cat([first, rest]), found)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_batch_is_one_problem_after_another(method: methods.Method) -> None:
    grams = torch.stack([mk.gram(MATRIX), mk.gram(MATRIX.flip(0))])
    method = PCGrad(order="fixed") if isinstance(method, PCGrad) else method
    solution = method.solve(grams)
    assert solution.weights.shape == (2, 3)
    for gram, weights in zip(grams, solution.weights, strict=True):
        assert torch.equal(method.weights(gram), weights)
    assert solution.gap is None or solution.gap.shape == (2,)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_non_finite_reaches_the_result(method: methods.Method) -> None:
    matrix = MATRIX.clone()
    matrix[1, 0] = torch.nan
    assert copy.deepcopy(method)(matrix).isnan().any()


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
def test_normalized_mgda_of_non_finite_rows_is_the_mean(normalize: str) -> None:
    matrix = MATRIX.clone()
    matrix[1, 0] = torch.inf
    weights = MGDA(normalize=normalize).weights(mk.gram(matrix), losses=torch.tensor([1.0, 2.0, torch.nan]))
    assert weights.tolist() == [1 / 3] * 3


def test_factors_that_are_not_positive_count_as_one() -> None:
    gram = mk.gram(torch.eye(3, dtype=torch.float64))
    losses = torch.tensor([-1.0, 0.0, torch.nan])
    plain = MGDA().weights(gram)
    assert torch.equal(MGDA(normalize="loss").weights(gram, losses=losses), plain)
    with_zero_row = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert MGDA(normalize="l2")(with_zero_row).tolist() == [0, 0]


def test_pcgrad_state_advances_and_resumes() -> None:
    method = PCGrad(seed=7)
    assert method.state == {}
    first, second = method(MATRIX), method(MATRIX * 2)
    assert method.state["rng"].tolist() == [7, 2]
    other = PCGrad()
    other.load_state_dict(method.state_dict())
    results = [(method(MATRIX), other(MATRIX)) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in results)
    again = PCGrad(seed=7)
    assert torch.equal(again(MATRIX), first) and torch.equal(again(MATRIX * 2), second)
    with pytest.raises(TypeError, match="dict of tensors"):
        method.load_state_dict({"rng": 3})  # type: ignore[dict-item]
    assert method.state["rng"].tolist() == [7, 7]


def test_pcgrad_state_made_in_inference_mode() -> None:
    method, plain = PCGrad(), PCGrad()
    with torch.inference_mode():
        first = method(MATRIX)
    assert torch.equal(plain(MATRIX), first) and torch.equal(plain(MATRIX), method(MATRIX))


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_rows_whose_squares_leave_float64(scale: float) -> None:
    rows = torch.randn(3, 8, dtype=torch.float64)
    for method in (PCGrad(order="fixed"), MGDA(), MGDA(solver="frank_wolfe"), Sum(), Mean(), Constant([1.0, 2.0, 3.0])):
        torch.testing.assert_close(method(rows * scale) / scale, method(rows), rtol=1e-12, atol=1e-15)
    for method in (MGDA(normalize="l2"), MGDA(zero_rows="skip")):
        if scale > 1:
            with pytest.raises(ValueError, match="squares of float64 gradients overflow"):
                method(rows * scale)
            bad = rows * scale
            bad[0, 0] = torch.inf
            assert not method(bad).isfinite().all()


def test_frozen_but_not_shared() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PCGrad().seed = 1  # type: ignore[misc]
    assert PCGrad() != PCGrad()
    method = PCGrad()
    method(MATRIX)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin.state["rng"] is not method.state["rng"]
        assert torch.equal(twin.state["rng"], method.state["rng"])
    assert pickle.loads(pickle.dumps(Constant([1, 2]))).config() == {"weights_per_task": (1.0, 2.0)}


def test_constant_loaded_for_another_device() -> None:
    """What it keeps on a device is not saved: it would be mapped elsewhere behind its back."""
    constant = Constant([1, 2])
    constant.weights(torch.eye(2))
    file = io.BytesIO()
    torch.save(constant, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert loaded.weights(torch.eye(2)).tolist() == [1, 2] and loaded.config() == constant.config()


def test_get() -> None:
    assert methods.get("pcgrad") is PCGrad and methods.get("MGDA") is MGDA
    names = methods.available()
    assert names == sorted(names) and {"constant", "mean", "mgda", "pcgrad", "sum"} <= set(names)
    with pytest.raises(ValueError, match=f"unknown method 'pcgard'; choose one of {', '.join(names)}"):
        methods.get("pcgard")


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: PCGrad(order="ascending"), ValueError, "'random', 'fixed'"),
        (lambda: PCGrad(reduction="max"), ValueError, "'sum', 'mean'"),
        (lambda: PCGrad(seed=-1), ValueError, "-1"),
        (lambda: PCGrad(seed=True), TypeError, "integer seed"),
        (lambda: PCGrad(seed=1.5), TypeError, "1.5"),
        (lambda: MGDA(normalize="l1"), ValueError, "'l2'"),
        (lambda: MGDA(solver="qp"), ValueError, "'frank_wolfe'"),
        (lambda: MGDA(weights_for="raw"), ValueError, "'original'"),
        (lambda: MGDA(max_iters=0), ValueError, "max_iters >= 1"),
        (lambda: MGDA(max_iters=True), TypeError, "max_iters"),
        (lambda: MGDA(tol=float("nan")), ValueError, "tol"),
        (lambda: MGDA(tol=-1e-3), ValueError, "tol"),
        (lambda: MGDA(tol=False), TypeError, "tol"),
        (lambda: Constant([]), ValueError, "found none"),
        (lambda: Constant([1, float("nan")]), ValueError, "nan"),
        (lambda: Constant([1, -1]), ValueError, "negate the loss"),
        (lambda: Constant([1, True]), TypeError, "True"),
        (lambda: Constant("12"), TypeError, "sequence"),
        (lambda: Constant(3), TypeError, "sequence"),
        (lambda: Constant([1, 2])(MATRIX), ValueError, "2 weights for 3 tasks"),
        (lambda: MGDA(normalize="loss")(MATRIX), ValueError, "losses="),
        (lambda: MGDA(normalize="loss")(MATRIX, losses=torch.ones(2)), ValueError, r"\[3\]"),
        (lambda: MGDA(normalize="loss")(MATRIX, losses=[1, 2, 3]), TypeError, "tensor"),
        (lambda: Sum().weights(MATRIX[:2]), ValueError, "method itself"),
        (lambda: Mean().weights([[1.0]]), TypeError, "Gram matrix"),
        (lambda: PCGrad().weights(MATRIX.long()), TypeError, "int64"),
        (lambda: Mean().weights(MATRIX, active=torch.ones(3)), TypeError, "bool"),
        (lambda: Sum().weights(MATRIX, active=torch.ones(2, dtype=torch.bool)), ValueError, r"\[3\]"),
        (lambda: Sum().weights(MATRIX, active=META), ValueError, "Sum: expected active on cpu, .*found it on meta"),
        (lambda: Mean().weights(MATRIX, active=META), ValueError, "on cpu, .*found it on meta"),
        (lambda: Constant([1, 2, 3]).weights(MATRIX, active=META), ValueError, "on cpu, .*found it on meta"),
        (lambda: PCGrad()(MATRIX.long()), TypeError, "int64"),
        (lambda: MGDA()(torch.ones(129, 2)), ValueError, "128"),
        (lambda: MGDA()([[torch.ones(2)], [torch.ones(3)]]), ValueError, "shape"),
    ],
)
def test_bad_input(build, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize("name", [info.name for info in list_methods()])
@pytest.mark.parametrize("listed", [False, True])
def test_rows_of_tasks_that_are_not_active_are_not_looked_at(name: str, listed: bool) -> None:
    rows = torch.tensor([[1.0, 0.25], [math.inf, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    active = torch.tensor([True, False, True])
    others = {"constant": {"weights": [1.0, 1.0, 1.0]}, "krum": {"n_byzantine": 0}, "trimmedmean": {"trim": 0}}
    wrappers = {"normalized", "crmogm"}
    options = {"method": MGDA()} if name in wrappers else others.get(name, {})
    if name in ("dcgd", "renorm"):
        pytest.skip("of two tasks alone, or of heads")
    results = []
    for broken in (rows, torch.where(active.unsqueeze(1), rows, 7.0)):
        method = get_method(name, **options)
        given = [[row] for row in broken] if listed else broken
        losses = {"losses": torch.ones(3, dtype=torch.float64)} if method.needs_losses else {}
        found = method(*[given] * method.num_batches, active=active, **losses)
        results.append(found[0] if listed else found)
    assert bool(results[0].isfinite().all()) and torch.equal(*results)
