"""NashMTL and FairGrad: the step, the last weights, and how often weights are computed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mtl_kernels as mk
from mtl_optim import CRMOGM, MGDA, FairGrad, Mean, MultiTaskOptimizer, NashMTL, Normalized, get_method, methods
from optim.oracle import TwoHeads, rows_of
from optim.recording import record

MATRIX = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STATIONARY = torch.cat((MATRIX[:4], -0.5 * MATRIX[:1]))
BUILD: dict[str, Callable[[], methods.Method]] = {
    "nash": NashMTL,
    "nash without clip": lambda: NashMTL(max_norm=0),
    "nash skip": lambda: NashMTL(zero_rows="skip"),
    "fair 1": FairGrad,
    "fair 2": lambda: FairGrad(2),
    "fair half": lambda: FairGrad(alpha=0.5),
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def step(gram: Tensor, weights: Tensor) -> Tensor:
    """||J^T w||."""
    return (weights @ gram @ weights).sqrt()


def test_nash_gives_every_task_the_same_share() -> None:
    d = NashMTL(max_norm=0)(MATRIX)
    weights = NashMTL(max_norm=0).weights(mk.gram(MATRIX))
    torch.testing.assert_close(weights * (MATRIX @ d), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    unit = NashMTL()(MATRIX)
    torch.testing.assert_close(unit, d / d.norm(), rtol=1e-12, atol=0)
    factor = torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.3], dtype=torch.float64)
    torch.testing.assert_close(NashMTL()(MATRIX * factor.unsqueeze(1)), unit, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1, 3.0])
def test_fairgrad_weighs_by_a_power_of_the_progress(alpha: float) -> None:
    d = FairGrad(alpha)(MATRIX)
    weights = FairGrad(alpha).weights(mk.gram(MATRIX))
    torch.testing.assert_close(weights, (MATRIX @ d) ** -alpha, rtol=1e-11, atol=0)
    longer = FairGrad(alpha)(MATRIX * 100)
    torch.testing.assert_close(longer, d * 100 ** ((1 - alpha) / (1 + alpha)), rtol=1e-9, atol=1e-300)


def test_fairgrad_0_is_the_mean() -> None:
    method = FairGrad(0)
    assert torch.equal(method(MATRIX), Mean()(MATRIX))
    assert method.scales_with_gradient and not method.weighs_alone
    for other in (FairGrad(), FairGrad(0.1), NashMTL(), NashMTL(max_norm=0)):
        assert not other.scales_with_gradient and other.weighs_alone


@EACH
def test_batch_and_active_tasks(build: Callable[[], methods.Method]) -> None:
    rows = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    active = torch.ones(3, 6, dtype=torch.bool)
    active[1, [0, 4]], active[2, 2] = False, False
    rows[1, 0] = torch.inf
    grams = torch.stack([mk.gram(row) for row in rows])
    found = build().weights(grams, active=active)
    assert found.shape == (3, 6) and (found[~active] == 0).all() and (found[active] > 0).all()
    for problem in range(3):
        tasks = active[problem]
        alone = build().weights(grams[problem][tasks][:, tasks])
        torch.testing.assert_close(found[problem][tasks], alone, rtol=1e-11, atol=0)


def test_the_last_weights_stand_in_where_there_are_none() -> None:
    method, stuck, gram = NashMTL(max_norm=0), mk.gram(STATIONARY), mk.gram(MATRIX)
    assert method.weights(stuck).tolist() == [1] * 5 and method.solve(stuck).gap == 1
    expected = method.weights(gram)
    assert torch.equal(method.weights(stuck), expected) and torch.equal(method.state["weights"], expected)
    mask = torch.tensor([True, False, True, True, True])
    assert torch.equal(method.weights(stuck, active=mask), torch.where(mask, expected, 0.0))
    clipped = NashMTL(max_norm=0.5)
    clipped.weights(gram)
    assert torch.equal(clipped.state["weights"], expected)
    torch.testing.assert_close(step(stuck, clipped.weights(stuck)).item(), 0.5, rtol=1e-12, atol=0)
    assert FairGrad().weights(stuck).tolist() == [0] * 5 and FairGrad().solve(stuck).gap == 1


def test_zero_rows() -> None:
    rows = MATRIX.clone()
    rows[2] = 0
    gram, there = mk.gram(rows), [0, 1, 3, 4]
    last, skip = NashMTL(), NashMTL(zero_rows="skip")
    assert last.solve(gram).gap == 1
    found = skip.weights(gram)
    torch.testing.assert_close(found[there], NashMTL().weights(mk.gram(rows[there])), rtol=1e-12, atol=0)
    assert found[2] == 0 and skip.state["weights"][2] == 1
    fair = FairGrad(2).weights(gram)
    torch.testing.assert_close(fair[there], FairGrad(2).weights(mk.gram(rows[there])), rtol=1e-12, atol=0)
    assert fair[2] == 0


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_is_the_mean_and_leaves_the_last_weights(build: Callable[[], methods.Method], bad: float) -> None:
    method, rows = build(), MATRIX.clone()
    rows[1, 0] = bad
    method.weights(mk.gram(MATRIX))
    before = method.state_dict()
    assert method.weights(mk.gram(rows)).tolist() == [0.2] * 5
    assert not method(rows).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@EACH
def test_state_continues_to_the_bit(build: Callable[[], methods.Method]) -> None:
    grams = [mk.gram(torch.randn(5, 7, generator=torch.Generator().manual_seed(k))) for k in range(6)]
    grams[1] = grams[4] = mk.gram(STATIONARY)
    method = build()
    for gram in grams[:3]:
        method.weights(gram)
    fresh, file = build(), io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twins = [fresh, copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    for gram in (grams[4], *grams[3:]):
        expected = method.weights(gram)
        assert all(torch.equal(twin.weights(gram), expected) for twin in twins)
    # Where there is a solution, it does not depend on what went before.
    assert torch.equal(method.weights(grams[3]), build().weights(grams[3]))
    method.reset()
    assert method.state_dict() == {}


@EACH
def test_a_recorded_step_goes_on(build: Callable[[], methods.Method]) -> None:
    method, eager = build(), build()
    gram, other = mk.gram(MATRIX), mk.gram(STATIONARY)
    found = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        method.weights(gram)
        eager.weights(gram)
    given = gram.clone()
    replay = record("cpu", lambda: found.copy_(method.weights(given)))
    for values in (gram, other, gram * 2):
        given.copy_(values)
        replay()
        assert torch.equal(found, eager.weights(values))


def test_other_tasks_are_refused() -> None:
    method = NashMTL()
    method.weights(mk.gram(MATRIX))
    with pytest.raises(ValueError, match="NashMTL keeps the state of 5 tasks and was given 4; name"):
        method.weights(mk.gram(MATRIX[:4]))
    assert method.state["weights"].shape == (5,)
    method.reset()
    assert method.weights(mk.gram(MATRIX[:4])).shape == (4,)


@pytest.mark.parametrize("given", [None, 1, 2])
def test_how_often_weights_are_computed(given: int | None) -> None:
    """By the method where the optimizer is not told; in between a single weighted backward pass."""
    model = TwoHeads(3)
    options = {} if given is None else {"refresh_every": given}
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), NashMTL(refresh_every=3), **options)
    passes, every = [0], given or 3
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: passes.__setitem__(0, passes[0] + 1))
    params, weights = list(model.parameters()), None
    for n in range(7):
        opt.zero_grad()
        rows, before = rows_of(model.losses(n), params), passes[0]
        opt.backward(model.losses(n))
        assert passes[0] - before == (3 if n % every == 0 else 1) and opt.report.age == n % every
        if n % every == 0:
            weights = opt.report.weights
        for param, column in zip(params, zip(*rows, strict=True), strict=True):
            there = [k for k in range(3) if column[k] is not None]
            expected = sum((weights[k] if len(there) > 1 else 1) * column[k] for k in there)
            assert torch.allclose(param.grad, expected)
        opt.step()


def test_wrappers_hand_on_how_often() -> None:
    assert CRMOGM(NashMTL(refresh_every=4)).refresh_every == Normalized(NashMTL(refresh_every=4)).refresh_every == 4
    assert MGDA().refresh_every == FairGrad().refresh_every == NashMTL().refresh_every == 1
    model = TwoHeads(2)
    with pytest.raises(ValueError, match="refresh_every=4 reuses one weight per loss"):
        MultiTaskOptimizer(torch.optim.SGD(model.parameters()), CRMOGM(NashMTL(refresh_every=4)), granularity="group")
    MultiTaskOptimizer(
        torch.optim.SGD(model.parameters()), NashMTL(refresh_every=4), granularity="parameter", refresh_every=1
    )


def test_training_resumes_to_the_bit() -> None:
    def build() -> tuple[TwoHeads, MultiTaskOptimizer]:
        torch.manual_seed(0)
        model = TwoHeads(3)
        return model, MultiTaskOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), NashMTL(refresh_every=2))

    def train(model: TwoHeads, opt: MultiTaskOptimizer, steps: range) -> None:
        for n in steps:
            opt.zero_grad()
            opt.backward(model.losses(n))
            opt.step()

    model, opt = build()
    train(model, opt, range(8))
    first, saved = build()
    train(first, saved, range(3))
    again, resumed = build()
    again.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved.state_dict())
    train(again, resumed, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", [NashMTL(), FairGrad(2)], ids=repr)
def test_no_gradient_scaler(method: methods.Method) -> None:
    model = TwoHeads(2)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.backward([scaler.scale(loss) for loss in model.losses()])
    with pytest.raises((RuntimeError, ValueError), match=type(method).__name__):
        scaler.step(opt)


def test_a_task_that_comes_alone_is_weighted_too() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), NashMTL())
    opt.backward([(w**2).sum()])
    torch.testing.assert_close(w.grad, torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_by_the_names_of_other_libraries() -> None:
    assert isinstance(get_method("Nash_MTL", max_norm=2.0), NashMTL) and isinstance(get_method("FairGrad"), FairGrad)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: NashMTL(max_norm=-1), ValueError, "max_norm >= 0, found -1"),
        (lambda: NashMTL(max_norm=float("inf")), ValueError, "finite max_norm"),
        (lambda: NashMTL(max_norm="1"), TypeError, "max_norm as a number"),
        (lambda: NashMTL(refresh_every=0), ValueError, "refresh_every >= 1, found 0"),
        (lambda: NashMTL(refresh_every=1.5), TypeError, "refresh_every as an integer"),
        (lambda: NashMTL(zero_rows="stop"), ValueError, "'last', 'skip'"),
        (lambda: FairGrad(alpha=-1), ValueError, "FairGrad: expected alpha as 0 or a number in"),
        (lambda: FairGrad(alpha=1e-3), ValueError, "found 0.001"),
        (lambda: FairGrad(alpha=True), TypeError, "alpha as a number"),
        (lambda: NashMTL().weights(MATRIX.long()), ValueError, "Gram matrix of shape"),
        (lambda: FairGrad().weights(MATRIX[:5, :5].long()), TypeError, "int64"),
    ],
)
def test_bad_input(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()
