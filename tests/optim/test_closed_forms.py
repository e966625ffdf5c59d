"""The methods in closed form, each against its definition on the vectors themselves, in numpy."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import (
    CRMOGM,
    MGDA,
    Constant,
    GradNormBalance,
    Krum,
    Mean,
    MultiTaskOptimizer,
    Normalized,
    PCGrad,
    RandomWeights,
    Sum,
    methods,
)
from optim.recording import record

DISTRIBUTIONS = ["normal", "uniform", "dirichlet", "bernoulli"]
BUILD: dict[str, Callable[[], methods.Method]] = {
    **{name: lambda name=name: RandomWeights(name, seed=3) for name in DISTRIBUTIONS},
    "balance": GradNormBalance,
    "krum": lambda: Krum(1),
    "multi-krum": lambda: Krum(1, n_selected=3),
    "normalized mgda": lambda: Normalized(MGDA()),
    "normalized pcgrad": lambda: Normalized(PCGrad(seed=5)),
    "crmogm mgda": lambda: CRMOGM(MGDA()),
    "crmogm pcgrad": lambda: CRMOGM(PCGrad(seed=5), alpha=0.5),
    "crmogm normalized mean": lambda: CRMOGM(Normalized(Mean()), alpha=0.2),
    "normalized crmogm random": lambda: Normalized(CRMOGM(RandomWeights())),
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
DIVIDE_BY_NORMS = {"balance", *(name for name in BUILD if "normalized" in name)}
MATRIX = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@st.composite
def matrices(draw: st.DrawFn, least: int = 1, most: int = 8) -> np.ndarray:
    """Rows of every rank, scale and degree of conflict, with zero and equal ones among them."""
    num_tasks, width = draw(st.integers(least, most)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, max(num_tasks, width)))
    matrix = generator.standard_normal((num_tasks, rank)) @ generator.standard_normal((rank, width))
    matrix *= 10.0 ** draw(st.integers(-12, 12))
    if draw(st.booleans()):
        matrix *= 10.0 ** generator.uniform(-4, 4, (num_tasks, 1))
    for k in draw(st.sets(st.integers(0, num_tasks - 1), max_size=2)):
        matrix[k] = draw(st.sampled_from([0.0, 1.0, -1.0])) * matrix[0]
    return matrix


def gram_of(matrix: np.ndarray) -> Tensor:
    return mk.gram(torch.from_numpy(matrix))


def unit_rows(matrix: np.ndarray) -> np.ndarray:
    return np.array([row / np.linalg.norm(row) if row.any() else row for row in matrix])


@given(matrices())
def test_balance_adds_up_unit_rows(matrix: np.ndarray) -> None:
    found = GradNormBalance()(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, unit_rows(matrix).sum(0), rtol=0, atol=1e-14 * len(matrix))
    weights = GradNormBalance().weights(gram_of(matrix)).numpy()
    assert (weights[~matrix.any(1)] == 0).all() and (weights[matrix.any(1)] > 0).all()


def krum_scores(matrix: np.ndarray, n_byzantine: int) -> list[float]:
    """The score of every row, on the vectors themselves."""
    scores = []
    for i, row in enumerate(matrix):
        distances = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(matrix) if j != i)
        scores.append(sum(distances[: len(matrix) - n_byzantine - 2]))
    return scores


@given(matrices(3, 9), st.data())
def test_krum_selects_the_lowest_scores(matrix: np.ndarray, data: st.DataObject) -> None:
    n_byzantine = data.draw(st.integers(0, len(matrix) - 3))
    n_selected = data.draw(st.integers(1, len(matrix)))
    weights = Krum(n_byzantine, n_selected).weights(gram_of(matrix)).numpy()
    chosen = np.flatnonzero(weights)
    assert len(chosen) == n_selected and (weights[chosen] == 1 / n_selected).all()
    scores = np.array(krum_scores(matrix, n_byzantine))
    # Near ties may go either way: distances from a Gram matrix carry the rounding of the squares.
    rounding = 1e-13 * (matrix**2).sum()
    assert scores[chosen].max() <= np.sort(scores)[n_selected - 1] + rounding


@settings(max_examples=200)
@given(st.data())
def test_krum_of_integers_is_exact_and_takes_the_lower_index(data: st.DataObject) -> None:
    num_tasks, width = data.draw(st.integers(3, 8)), data.draw(st.integers(1, 3))
    matrix = np.random.default_rng(data.draw(st.integers(0, 2**31))).integers(-2, 3, (num_tasks, width)).astype(float)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=num_tasks, max_size=num_tasks)))
    n_byzantine = data.draw(st.integers(0, num_tasks - 3))
    n_selected = data.draw(st.integers(1, num_tasks))
    method, active = Krum(n_byzantine, n_selected), torch.from_numpy(mask)
    for scale in (1.0, 2.0**-400, 2.0**400):
        found = method.weights(gram_of(matrix * scale), active=active).numpy()
        expected, tasks = np.zeros(num_tasks), np.flatnonzero(mask)
        if len(tasks):
            fewer = min(n_byzantine, max(len(tasks) - 3, -1))  # the nearest other one counts, as long as there is one
            scores = krum_scores(matrix[tasks], fewer)
            chosen = sorted(range(len(tasks)), key=lambda i: (scores[i], i))[:n_selected]
            expected[tasks[chosen]] = 1 / len(chosen)
        assert found.tolist() == expected.tolist()


def test_krum_drops_what_is_far_away() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.1, 0.0], [1.0, 0.2], [-50.0, 9.0], [0.9, 0.1]])
    assert Krum(1, n_selected=4).weights(mk.gram(rows)).tolist() == [0.25, 0.25, 0.25, 0, 0.25]
    assert Krum(0).weights(torch.zeros(128, 128)).tolist() == [1.0] + [0.0] * 127
    huge = torch.diag(torch.tensor([1e308, 1e308, 1.5e308, 1e308], dtype=torch.float64))
    assert Krum(1, 3).weights(huge).tolist() == Krum(1, 3).weights(huge * 1e-300).tolist() == [1 / 3, 1 / 3, 0, 1 / 3]


@given(matrices())
def test_normalized_is_the_method_on_unit_rows(matrix: np.ndarray) -> None:
    unit, rows = unit_rows(matrix), torch.from_numpy(matrix)
    close = {"rtol": 0, "atol": 1e-12 * len(matrix)}
    np.testing.assert_allclose(Normalized(Sum())(rows), unit.sum(0), **close)
    np.testing.assert_allclose(Normalized(Mean())(rows), unit.mean(0), **close)
    nearest = Normalized(MGDA())(rows).numpy()
    # Of the minimum-norm point d of the unit rows u_k: u_k . d >= d . d, and d lies in their hull.
    assert (unit @ nearest - nearest @ nearest >= -1e-7).all()
    weights = Normalized(MGDA()).weights(gram_of(matrix)).numpy() * np.linalg.norm(matrix, axis=1)
    assert (weights >= 0).all() and (weights.sum() <= 1 + 1e-12)
    assert (~matrix.any(1)).any() or abs(weights.sum() - 1) <= 1e-12
    surgery = np.zeros(matrix.shape[1])
    for i in range(len(unit)):
        projected = unit[i].copy()
        for j in range(len(unit)):
            product = projected @ unit[j]
            if j != i and product < 0:
                projected -= product / (unit[j] @ unit[j]) * unit[j]
        surgery += projected
    np.testing.assert_allclose(Normalized(PCGrad(order="fixed"))(rows), surgery, rtol=0, atol=1e-6)


def test_normalized_mgda_is_that_of_mgda() -> None:
    gram = mk.gram(MATRIX)
    found, expected = Normalized(MGDA()).solve(gram), MGDA(normalize="l2").solve(gram)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=0)
    assert found.gap is not None and found.iterations is not None and 0 <= found.gap < 1e-12


@pytest.mark.parametrize("alpha", [0, 0.3, 0.9, 1])
@pytest.mark.parametrize("start", ["first", "uniform"])
def test_crmogm_is_the_average_over_steps(alpha: float, start: str) -> None:
    method, expected = CRMOGM(PCGrad(order="fixed"), alpha, start), np.full(4, 0.25)
    for seed in range(6):
        rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 5)))
        fresh = PCGrad(order="fixed").weights(mk.gram(rows)).numpy()
        expected = fresh if seed == 0 and start == "first" else alpha * expected + (1 - alpha) * fresh
        np.testing.assert_allclose(method.weights(mk.gram(rows)), expected, rtol=1e-14)
        np.testing.assert_allclose(method.state["weights"], expected, rtol=1e-14)
    method.reset()
    assert method.state_dict() == {}


def test_crmogm_keeps_the_average_of_a_task_that_is_away() -> None:
    eye, first = torch.eye(3), torch.tensor([True, True, False])
    method = CRMOGM(Sum(), alpha=0.5, start="uniform")
    assert method.weights(eye, active=first).tolist() == [0.75, 0.75, 0]
    assert method.state["weights"].isnan().tolist() == [False, False, True]
    assert method.weights(eye, active=~first).tolist() == [0, 0, 1]
    assert method.weights(eye).tolist() == [0.875, 0.875, 1]
    method = CRMOGM(Mean(), alpha=0.5)
    assert method.weights(eye, active=first).tolist() == [0.5, 0.5, 0]
    torch.testing.assert_close(method.weights(eye).tolist(), [5 / 12, 5 / 12, 1 / 3])


def test_crmogm_of_other_tasks_is_refused() -> None:
    method = CRMOGM(MGDA())
    method.weights(mk.gram(MATRIX))
    with pytest.raises(ValueError, match="keeps the state of 5 tasks and was given 4; name all"):
        method.weights(mk.gram(MATRIX[:4]))
    method.reset()
    assert method.weights(mk.gram(MATRIX[:4])).shape == (4,)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_random_weights_have_the_moments_of_their_distribution(distribution: str, num_tasks: int) -> None:
    drawn = RandomWeights(distribution, seed=11).weights(torch.eye(num_tasks).expand(20000, -1, -1)).numpy()
    rng = np.random.default_rng(0)
    if distribution == "normal":
        share = np.exp(rng.standard_normal((200000, num_tasks)))
    elif distribution == "uniform":
        share = rng.random((200000, num_tasks))
    elif distribution == "dirichlet":
        share = rng.dirichlet(np.ones(num_tasks), 200000)
    else:
        share = rng.integers(0, 2, (200000, num_tasks)).astype(float)
        share[~share.any(1)] = 1
    share /= share.sum(1, keepdims=True)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(drawn.mean(0), 1 / num_tasks, atol=5 * share.std() / math.sqrt(len(drawn)) + 1e-12)
    for power in (2, 3, 4):
        values = share[:, 0] ** power
        np.testing.assert_allclose(
            (drawn**power).mean(0), values.mean(), atol=6 * values.std() / math.sqrt(len(drawn)) + 1e-12
        )
    if num_tasks == 5:
        # Of five weights with sum 1, alike in law: correlation -1/4 with each other, none from draw to draw.
        correlation = np.corrcoef(drawn.T)
        np.testing.assert_allclose(correlation[~np.eye(5, dtype=bool)], -0.25, atol=0.05)
        np.testing.assert_allclose(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1], 0, atol=0.05)


def test_softmax_of_random_weights_is_of_normal_numbers() -> None:
    """Differences of the logarithms are those of independent normal numbers: variance 2, kurtosis 3."""
    method = RandomWeights(seed=2)
    logs = torch.stack([method.weights(torch.eye(8)) for _ in range(1500)]).log().numpy()
    assert method.state["rng"].tolist() == [2, 1500]
    differences = (logs[:, 0::2] - logs[:, 1::2]).ravel()
    assert abs(differences.mean()) < 0.1 and abs(differences.var() - 2) < 0.2
    assert abs(((differences - differences.mean()) ** 4).mean() / differences.var() ** 2 - 3) < 0.3
    assert abs(np.corrcoef(logs[1:, 0] - logs[1:, 1], logs[:-1, 0] - logs[:-1, 1])[0, 1]) < 0.1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_weights_of_absent_tasks_leave_the_draws_of_the_others(distribution: str) -> None:
    active = torch.tensor([True, False, True, True, False])
    full, some = (
        RandomWeights(distribution, seed=8).weights(torch.eye(5).expand(50, -1, -1), active=mask)
        for mask in (None, active)
    )
    assert (some[:, ~active] == 0).all()
    kept = full[:, active] / full[:, active].sum(-1, keepdim=True)
    drawn = ~kept.isnan().any(-1)
    torch.testing.assert_close(some[:, active][drawn], kept[drawn], rtol=1e-12, atol=0)
    assert (some[:, active][~drawn] == 1 / 3).all()
    assert RandomWeights(distribution).weights(torch.eye(2), active=torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]


@EACH
def test_batch_and_active_tasks(build: Callable[[], methods.Method]) -> None:
    """Masked tasks take no part, whatever they hold: the others' weights are those of the problem without them."""
    draws = any(word in repr(build()) for word in ("RandomWeights", "PCGrad"))
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    active = torch.ones(3, 6, dtype=torch.bool)
    active[1, [0, 4]], active[2, 2] = False, False
    rows[1, 0] = torch.inf
    grams = torch.stack([mk.gram(row) for row in rows])
    found = build().weights(grams, active=active)
    assert found.shape == (3, 6) and found.dtype == torch.float64 and (found[~active] == 0).all()
    assert found.isfinite().all()
    for problem in (0,) if draws else range(3):
        tasks = active[problem]
        alone = build().weights(grams[problem][tasks][:, tasks])
        torch.testing.assert_close(found[problem][tasks], alone, rtol=1e-9, atol=1e-300)
    same = build().weights(grams[:1], active=active[0])
    torch.testing.assert_close(same[0], found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [-12, -5, 3, 12])
@pytest.mark.parametrize("name", BUILD)
def test_weights_are_free_of_scale(name: str, exponent: int) -> None:
    first, scaled, scale = BUILD[name](), BUILD[name](), 10.0**exponent
    assert first.scales_with_gradient is (name not in DIVIDE_BY_NORMS)
    for step in range(3):
        rows = MATRIX.roll(step, 1) + step
        expected, found = first.weights(mk.gram(rows)), scaled.weights(mk.gram(rows * scale))
        torch.testing.assert_close(found * (scale if name in DIVIDE_BY_NORMS else 1), expected, rtol=1e-8, atol=0)


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_is_the_mean_and_leaves_the_averages(build: Callable[[], methods.Method], bad: float) -> None:
    method, rows = build(), MATRIX.clone()
    rows[1, 0] = bad
    active = torch.tensor([True, True, False, False, True])
    for _ in range(2):  # before the first finite step, and after it
        before = method.state_dict()
        assert method.weights(mk.gram(rows)).tolist() == [0.2] * 5
        assert method.weights(mk.gram(rows), active=active).tolist() == [1 / 3, 1 / 3, 0, 0, 1 / 3]
        assert not method(rows).isfinite().all()
        for key, value in method.state_dict().items():
            if key.endswith("weights"):
                unknown = torch.full_like(value, torch.nan)
                assert torch.equal(value.view(torch.int64), before.get(key, unknown).view(torch.int64))
        assert method.weights(mk.gram(MATRIX)).isfinite().all()


@EACH
def test_state_continues_to_the_bit(build: Callable[[], methods.Method]) -> None:
    grams = [mk.gram(torch.randn(5, 7, generator=torch.Generator().manual_seed(k))) for k in range(8)]
    method = build()
    for gram in grams[:4]:
        method.weights(gram)
    fresh, file = build(), io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    twins = [fresh, copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    for gram in grams[4:]:
        expected = method.weights(gram)
        assert all(torch.equal(twin.weights(gram), expected) for twin in twins)
    method.reset()
    start = build()
    assert method.state_dict() == {}
    assert all(torch.equal(method.weights(gram), start.weights(gram)) for gram in grams)
    assert twins[1].config() == build().config() == pickle.loads(pickle.dumps(build().config()))
    with pytest.raises(TypeError, match="dict of tensors"):
        method.load_state_dict({"rng": 3, "method.rng": torch.zeros(2)})  # type: ignore[dict-item]
    assert method.state_dict().keys() == start.state_dict().keys()


@EACH
def test_a_recorded_step_goes_on(build: Callable[[], methods.Method]) -> None:
    """What a CUDA graph needs: nothing reads a value on the host, and the state advances in place."""
    method, eager = build(), build()
    gram = mk.gram(MATRIX)
    found = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        method.weights(gram)
        eager.weights(gram)
    replay = record("cpu", lambda: found.copy_(method.weights(gram)))
    assert torch.equal(found, eager.weights(gram))
    for _ in range(3):
        replay()
        assert torch.equal(found, eager.weights(gram))


@pytest.mark.gpu
@EACH
def test_on_a_gpu(build: Callable[[], methods.Method]) -> None:
    """The weights of a CPU, without a wait once the state is there."""
    method, there = build(), build()
    grams = [mk.gram(MATRIX.roll(k, 1) + k) for k in range(4)]
    on_gpu = [gram.cuda() for gram in grams]
    active = torch.tensor([True, True, False, True, True])
    masks = [None, None, active, active]
    on_gpu_masks = [None if mask is None else mask.cuda() for mask in masks]
    found = [there.weights(on_gpu[0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [there.weights(gram, active=mask) for gram, mask in zip(on_gpu[1:], on_gpu_masks[1:], strict=True)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gram, mask, weights in zip(grams, masks, found, strict=True):
        torch.testing.assert_close(weights.cpu(), method.weights(gram, active=mask), rtol=1e-9, atol=1e-15)


@EACH
def test_state_made_in_inference_mode(build: Callable[[], methods.Method]) -> None:
    method, plain = build(), build()
    with torch.inference_mode():
        method(MATRIX)
    plain(MATRIX)
    assert torch.equal(method(MATRIX), plain(MATRIX))


@pytest.mark.parametrize("num_tasks", [3, 64, 128])
@EACH
def test_up_to_128_tasks(build: Callable[[], methods.Method], num_tasks: int) -> None:
    rows = torch.randn(num_tasks, 40, generator=torch.Generator().manual_seed(0))
    method = Krum(0) if num_tasks == 3 and isinstance(build(), Krum) else build()
    assert method(rows).isfinite().all() and method.weights(mk.gram(rows)).shape == (num_tasks,)


def test_one_task() -> None:
    one = torch.tensor([[4.0]])
    for name in DISTRIBUTIONS:
        assert RandomWeights(name).weights(one).tolist() == [1]
    assert GradNormBalance().weights(one).tolist() == Normalized(MGDA()).weights(one).tolist() == [0.5]
    assert CRMOGM(MGDA()).weights(one).tolist() == [1]


def test_wrappers_forward_what_the_optimizer_asks() -> None:
    for cls in (Normalized, CRMOGM):
        assert cls(MGDA(normalize="loss")).needs_losses and not cls(MGDA()).needs_losses
        assert cls(MGDA()).stops_at_zero_rows and not cls(MGDA(zero_rows="skip")).stops_at_zero_rows
    assert Normalized(Sum()).needs_gram and Normalized(Sum()).weighs_alone and not CRMOGM(Sum()).weighs_alone
    assert (
        CRMOGM(Constant([1])).weighs_alone and not CRMOGM(RandomWeights()).needs_gram and not RandomWeights().needs_gram
    )
    assert not CRMOGM(GradNormBalance()).scales_with_gradient and CRMOGM(MGDA()).scales_with_gradient
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    scaled = CRMOGM(MGDA(normalize="loss"), alpha=0).weights(mk.gram(MATRIX), losses=losses)
    assert torch.equal(scaled, MGDA(normalize="loss").weights(mk.gram(MATRIX), losses=losses))
    assert CRMOGM(PCGrad(seed=2)).config() == {
        "method": {"PCGrad": {"order": "random", "reduction": "sum", "seed": 2}},
        "alpha": 0.9,
        "start": "first",
    }


def test_wrappers_bind_names_and_keep_their_state() -> None:
    method = CRMOGM(Normalized(Constant({"a": 1.0, "b": 3.0})), alpha=0.5)
    bound = method.bound_to(("b", "a"))
    assert bound.weights(torch.eye(2)).tolist() == [3, 1]
    assert method.state["weights"].tolist() == [3, 1]
    assert method.bound_to(("b", "a")).weights(4 * torch.eye(2)).tolist() == [2.25, 0.75]
    assert CRMOGM(MGDA()).bound_to(("a",)).state == {}
    with pytest.raises(ValueError, match="none for task 'c'"):
        method.bound_to(("a", "c"))


class Net(nn.Module):
    """A trunk that four tasks share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Parameter(torch.randn(6, 8, generator=generator) * 0.3)
        self.heads = nn.Parameter(torch.randn(8, 4, generator=generator) * 0.3, requires_grad=False)

    def losses(self, seed: int) -> dict[str, Tensor]:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        outputs = torch.tanh(x @ self.trunk) @ self.heads
        return {str(k): (outputs[:, k] - (-1) ** k).square().mean() for k in range(4)}


@EACH
def test_training_and_resuming(build: Callable[[], methods.Method], recwarn: pytest.WarningsRecorder) -> None:
    def trainer() -> tuple[Net, MultiTaskOptimizer]:
        net = Net()
        return net, MultiTaskOptimizer(torch.optim.SGD([net.trunk], lr=0.02, momentum=0.5), build())

    def train(net: Net, opt: MultiTaskOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.backward(net.losses(step))
            opt.step()

    net, opt = trainer()
    start = net.trunk.detach().clone()
    train(net, opt, range(10))
    assert net.trunk.isfinite().all() and not torch.equal(net.trunk, start)
    assert opt.report is not None and opt.report.weights.shape == (4,)
    again, resumed = trainer()
    train(again, resumed, range(5))
    third, last = trainer()
    third.load_state_dict(again.state_dict())
    last.load_state_dict(pickle.loads(pickle.dumps(resumed.state_dict())))
    train(third, last, range(5, 10))
    assert torch.equal(third.trunk, net.trunk)
    assert not recwarn.list


def test_by_name() -> None:
    for cls in (RandomWeights, GradNormBalance, Krum, Normalized, CRMOGM):
        assert methods.get(cls.__name__) is cls and cls.__name__ in methods.__all__
    assert "Wrapper" not in methods.__all__


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: RandomWeights("gaussian"), ValueError, "'normal', 'uniform', 'dirichlet', 'bernoulli'"),
        (lambda: RandomWeights(seed=1.5), TypeError, "integer seed"),
        (lambda: RandomWeights(seed=True), TypeError, "integer seed"),
        (lambda: RandomWeights(seed=-1), ValueError, "-1"),
        (lambda: RandomWeights(seed=2**63), ValueError, str(2**63)),
        (lambda: Krum(), TypeError, "n_byzantine"),
        (lambda: Krum(-1), ValueError, "n_byzantine >= 0"),
        (lambda: Krum(1.0), TypeError, "n_byzantine as an integer"),
        (lambda: Krum(True), TypeError, "n_byzantine as an integer"),
        (lambda: Krum(0, 0), ValueError, "n_selected >= 1"),
        (lambda: Krum(0, None), TypeError, "n_selected as an integer"),
        (lambda: Krum(3)(MATRIX), ValueError, r"n_byzantine=3.* 6 tasks, found K = 5; lower n_byzantine to at most 2"),
        (lambda: Krum(0)(MATRIX[:2]), ValueError, r"3 tasks, found K = 2; use another"),
        (lambda: Krum(0, 6)(MATRIX), ValueError, r"n_selected=6.*K = 5; lower n_selected to at most 5"),
        (lambda: Normalized("mgda"), TypeError, r"such as MGDA\(\), found 'mgda'"),
        (lambda: Normalized(MGDA), TypeError, "expected a method"),
        (lambda: CRMOGM(None), TypeError, "CRMOGM: expected a method"),
        (lambda: CRMOGM(MGDA(), "0.9"), TypeError, "alpha as a number"),
        (lambda: CRMOGM(MGDA(), True), TypeError, "alpha as a number"),
        (lambda: CRMOGM(MGDA(), 1.1), ValueError, r"alpha in \[0, 1\], found 1.1"),
        (lambda: CRMOGM(MGDA(), float("nan")), ValueError, "nan"),
        (lambda: CRMOGM(MGDA(), start="mean"), ValueError, "'first', 'uniform'"),
        (lambda: Normalized(MGDA(normalize="loss"))(MATRIX), ValueError, "losses="),
    ],
)
def test_bad_options(build, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        build()


@EACH
def test_bad_gram(build: Callable[[], methods.Method]) -> None:
    with pytest.raises(ValueError, match="method itself"):
        build().weights(MATRIX)
    with pytest.raises(TypeError, match="int64"):
        build().weights(MATRIX[:, :5].long())
    with pytest.raises(TypeError, match="bool"):
        build().weights(mk.gram(MATRIX), active=torch.ones(5))
    with pytest.raises(ValueError, match=r"\[5\]"):
        build().weights(mk.gram(MATRIX), active=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="on meta"):
        build().weights(mk.gram(MATRIX), active=torch.ones(5, dtype=torch.bool, device="meta"))
