"""Combinations of losses, against their formulas executed literally in numpy."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_optim import losses as L

K = 3
LAM = [0.2, 0.5, 0.3]
Z = [0.01, -0.2, 0.05]
MAKE: dict[str, Callable[[], L.LossCombination]] = {
    "uncertainty": lambda: L.UncertaintyWeighting(K),
    "imtl-l": lambda: L.IMTLL(K),
    "dwa": lambda: L.DynamicWeightAverage(K),
    "gradnorm": lambda: L.GradNorm(K),
    "dtp": lambda: L.DynamicTaskPriority(K, gamma=2.0),
    "lbtw": lambda: L.LossBalancedTaskWeighting(K),
    "initial": lambda: L.InverseInitialLoss(K),
    "prior": lambda: L.InversePriorLoss([0.5, 2.0, 3.0]),
    "current": lambda: L.InverseCurrentLoss(K),
    "geometric": lambda: L.GeometricMean(),
    "logsum": lambda: L.LogSum(K),
    "famo": lambda: L.FAMO(K),
    "stch": lambda: L.STCH(K, mu=0.5, preference=LAM, reference=Z),
    "stch-warm": lambda: L.STCH(K, warmup=2),
    "cosmos": lambda: L.COSMOS(LAM, mu=0.7),
    "pbi": lambda: L.PBI(LAM, theta=5.0, reference=Z),
    "fixed": lambda: L.FixedWeights([1.0, -2.0, 0.0]),
}
STEPS = 7
EPOCH = 2


def drawn(seed: int, count: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.7, (count, K))


def float32(values: list[float]) -> np.ndarray:
    """Given vectors are kept as float32; the formulas start from the same numbers."""
    return np.array(values, dtype=np.float32).astype(np.float64)


def advance(module: L.LossCombination, step: int, now: np.ndarray, after: np.ndarray) -> None:
    """What a training loop calls after a step besides the module itself."""
    if isinstance(module, L.FAMO):
        module.update(torch.tensor(after))
    elif isinstance(module, L.GradNorm):
        module.update(torch.tensor(after))
    elif isinstance(module, L.DynamicTaskPriority):
        module.update([float(x) for x in 1 / (1 + now)])
    if step % EPOCH == EPOCH - 1:
        if isinstance(module, L.DynamicWeightAverage):
            module.step()
        elif isinstance(module, L.LossBalancedTaskWeighting):
            module.new_epoch()


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def weights_by_definition(name: str, rows: np.ndarray, after: np.ndarray) -> list[np.ndarray]:
    """The weights of every step; ``after`` is what `advance` was given."""
    found: list[np.ndarray] = []
    w, kbar, m, v = np.ones(K), None, np.zeros(K), np.zeros(K)
    logits = np.zeros(K)
    for t, x in enumerate(rows):
        epoch = t // EPOCH
        if name == "dwa":
            means = [rows[e * EPOCH : (e + 1) * EPOCH].mean(0) for e in range(epoch)]
            found.append(K * softmax(means[-1] / means[-2] / 2) if epoch >= 2 else np.ones(K))
        elif name == "gradnorm":
            found.append(w.copy())
            n, ratio = after[t], x / rows[0]
            target = np.mean(w * n) * (ratio / ratio.mean()) ** 1.5
            w = np.maximum(w - 0.025 * np.sign(w * n - target) * n, 1e-3)
            w = K * w / w.sum()
        elif name == "dtp":
            found.append(np.ones(K) if kbar is None else -((1 - kbar) ** 2.0) * np.log(kbar))
            kappa = 1 / (1 + x)
            kbar = kappa if kbar is None else 0.9 * kappa + (1 - 0.9) * kbar
        elif name == "lbtw":
            found.append((x / rows[epoch * EPOCH]) ** 0.5)
        elif name == "initial":
            found.append(1 / rows[0])
        elif name == "prior":
            found.append(1 / np.array([0.5, 2.0, 3.0]))
        elif name == "current":
            found.append(1 / x)
        elif name == "fixed":
            found.append(np.array([1.0, -2.0, 0.0]))
        elif name == "famo":
            z = softmax(logits)
            found.append(z / (x + 1e-8) / (z / (x + 1e-8)).sum())
            delta = np.log(x + 1e-8) - np.log(after[t] + 1e-8)
            grad = (np.diag(z) - np.outer(z, z)) @ delta + 1e-3 * logits
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            logits = logits - 0.025 * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    return found


WEIGHTED = ["dwa", "gradnorm", "dtp", "lbtw", "initial", "prior", "current", "fixed", "famo"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_follow_the_definition_and_take_no_gradient(name: str, seed: int) -> None:
    rows, after = drawn(seed), drawn(seed + 100)
    module = MAKE[name]().double()
    expected = weights_by_definition(name, rows, after)
    for step, row in enumerate(rows):
        x = torch.tensor(row, requires_grad=True)
        value = module(x)
        assert torch.equal(module.weights(x), module.weights())
        torch.testing.assert_close(module.weights(x), torch.tensor(expected[step]), rtol=1e-9, atol=1e-12)
        assert not module.weights(x).requires_grad
        value.backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.tensor(expected[step]), rtol=1e-9, atol=1e-12)
        if name != "famo":
            assert value.item() == pytest.approx((expected[step] * row).sum(), rel=1e-9)
        advance(module, step, row, after[step])


def test_the_value_of_famo_is_the_definition() -> None:
    row = drawn(3, 1)[0]
    z = np.full(K, 1 / K)
    expected = (z * np.log(row + 1e-8)).sum() / (z / (row + 1e-8)).sum()
    assert L.FAMO(K).double()(torch.tensor(row)).item() == pytest.approx(expected, rel=1e-12)


def formula(name: str, x: Tensor, s: Tensor) -> Tensor:
    """The combinations that are no weighted sum, written out with scalars."""
    lam, z = [float(v) for v in float32(LAM)], [float(v) for v in float32(Z)]
    xs = list(x)
    if name == "uncertainty":
        return torch.stack([torch.exp(-s[k]) * xs[k] / 2 + s[k] / 2 for k in range(K)]).sum()
    if name == "imtl-l":
        return torch.stack([torch.exp(s[k]) * xs[k] - s[k] for k in range(K)]).sum()
    if name == "geometric":
        return (xs[0] * xs[1] * xs[2]) ** (1 / 3)
    if name == "logsum":
        return torch.log(xs[0] * xs[1] * xs[2])
    if name == "stch":
        return 0.5 * torch.log(torch.stack([torch.exp(lam[k] * (xs[k] - z[k]) / 0.5) for k in range(K)]).sum())
    dot = torch.stack([lam[k] * xs[k] for k in range(K)]).sum()
    size = math.sqrt(sum(v * v for v in lam))
    if name == "cosmos":
        return dot - 0.7 * dot / (size * (x * x).sum().sqrt())
    assert name == "pbi"
    along = torch.stack([lam[k] * (xs[k] - z[k]) for k in range(K)]).sum() / size
    rest = torch.stack([xs[k] - z[k] - along * lam[k] / size for k in range(K)])
    return along + 5.0 * (rest * rest).sum().sqrt()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["uncertainty", "imtl-l", "geometric", "logsum", "stch", "cosmos", "pbi"])
def test_values_and_gradients_follow_the_formula(name: str, seed: int) -> None:
    module = MAKE[name]().double()
    s = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    if name in ("uncertainty", "imtl-l"):
        module.load_state_dict({f"s.{k}": s[k].detach() for k in range(K)})
    row = drawn(seed, 1)[0]
    x, y = (torch.tensor(row, requires_grad=True) for _ in range(2))
    value, expected = module(x), formula(name, y, s)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(module.weights(), x.grad, rtol=1e-9, atol=1e-12)
    if learned := [parameter.grad for parameter in module.parameters()]:
        torch.testing.assert_close(torch.stack(learned), s.grad, rtol=1e-9, atol=1e-12)


def test_stch_averages_the_nadir_first() -> None:
    rows = drawn(5, 4)
    module = L.STCH(K, warmup=2).double()
    values = [module(torch.tensor(row)).item() for row in rows]
    nadir = rows[:2].mean(0)
    expected = [np.log(row).sum() for row in rows[:2]]
    expected += [np.log(np.exp(np.log(row / nadir) * float32([1 / 3])[0]).sum()) for row in rows[2:]]
    assert values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", MAKE)
def test_a_restored_module_goes_on_to_the_bit(name: str) -> None:
    rows, after = drawn(1, 12).astype(np.float32), drawn(2, 12).astype(np.float32)
    first = MAKE[name]()
    for step in range(5):
        first(torch.tensor(rows[step]))
        advance(first, step, rows[step], after[step])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MAKE[name]()
    second.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for step in range(5, 12):
        x = torch.tensor(rows[step])
        assert torch.equal(first(x), second(x))
        advance(first, step, rows[step], after[step])
        advance(second, step, rows[step], after[step])
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    rows, after = drawn(1, 5).astype(np.float32), drawn(2, 5).astype(np.float32)
    eager = MAKE[name]()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if name in ("famo", "dwa") else "eager")
    for step, row in enumerate(rows):
        x, y = (torch.tensor(row, requires_grad=True) for _ in range(2))
        value, expected = compiled(x), eager(y)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        torch.testing.assert_close(x.grad, y.grad)
        advance(module, step, row, after[step])
        advance(eager, step, row, after[step])


@pytest.mark.parametrize("name", MAKE)
def test_a_short_training_stays_finite(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, requires_grad=True)
    centers = torch.randn(K, 4)
    module = MAKE[name]()
    optimizer = torch.optim.SGD([x, *module.parameters()], lr=0.01)
    for step in range(20):
        losses = [((x - center) ** 2).sum() + 0.1 for center in centers]
        optimizer.zero_grad()
        module(losses).backward()
        optimizer.step()
        now = np.array([loss.item() for loss in losses])
        advance(module, step, now, np.array([((x - center) ** 2).sum().item() + 0.1 for center in centers]))
    assert x.isfinite().all()
    unknown = ("initial", "current")  # nan until there is one
    assert all(value.isfinite().all() for key, value in module.state_dict().items() if key not in unknown)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    ("losses", "error"),
    [
        (torch.ones(2, 2), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.ones(K, dtype=torch.int64), TypeError),
        ([1.0, 2.0, 3.0], TypeError),
        ([torch.ones(1)] * K, ValueError),
        ([], ValueError),
        (torch.ones(0), ValueError),
        (None, TypeError),
    ],
)
def test_losses_of_another_kind_are_refused(name: str, losses: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        MAKE[name]()(losses)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "geometric"])
def test_another_number_of_losses_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected 3 losses, found 2"):
        MAKE[name]()(torch.ones(2))


@pytest.mark.parametrize("name", MAKE)
def test_sixteen_bit_losses_are_combined_in_float32(name: str) -> None:
    assert MAKE[name]()(torch.ones(K, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", ["current", "geometric", "logsum", "famo", "stch-warm"])
def test_losses_that_are_not_positive_are_refused_where_logs_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected losses > 0"):
        MAKE[name]()(torch.tensor([1.0, -1.0, 2.0]))


BAD: list[tuple[Callable[[], object], type[Exception]]] = [
    (lambda: L.UncertaintyWeighting(0), ValueError),
    (lambda: L.IMTLL(2.0), TypeError),  # type: ignore[arg-type]
    (lambda: L.FAMO(True), TypeError),
    (lambda: L.DynamicWeightAverage(2, temperature=0.0), ValueError),
    (lambda: L.DynamicWeightAverage(2, warn_after=0), ValueError),
    (lambda: L.GradNorm(2, lr=math.nan), ValueError),
    (lambda: L.GradNorm(2, alpha=-1.0), ValueError),
    (lambda: L.GradNorm(2, torch.ones(2)), TypeError),
    (lambda: L.GradNorm(2, [torch.ones(2)]), TypeError),
    (lambda: L.GradNorm(2).update(), TypeError),
    (lambda: L.GradNorm(2).update(torch.ones(3)), ValueError),
    (lambda: L.GradNorm(2).update(losses=torch.ones(2)), TypeError),
    (lambda: L.DynamicTaskPriority(2, alpha=0.0), ValueError),
    (lambda: L.DynamicTaskPriority(2, gamma=math.inf), ValueError),
    (lambda: L.DynamicTaskPriority(2).update([0.0, 0.5]), ValueError),
    (lambda: L.DynamicTaskPriority(2).update(torch.tensor([0.5, 1.5])), ValueError),
    (lambda: L.DynamicTaskPriority(2).update([0.5]), ValueError),
    (lambda: L.DynamicTaskPriority(2).update(["a", 0.5]), TypeError),  # type: ignore[list-item]
    (lambda: L.LossBalancedTaskWeighting(2, alpha=-0.5), ValueError),
    (lambda: L.InversePriorLoss([1.0, 0.0]), ValueError),
    (lambda: L.FAMO(2, lr=0.0), ValueError),
    (lambda: L.FAMO(2, weight_decay=-1.0), ValueError),
    (lambda: L.FAMO(2, min_losses=[0.0]), ValueError),
    (lambda: L.FAMO(2).update(torch.ones(2)), RuntimeError),
    (lambda: L.STCH(2, mu=0.0), ValueError),
    (lambda: L.STCH(2, mu="1"), TypeError),  # type: ignore[arg-type]
    (lambda: L.STCH(2, preference=[1.0, -1.0]), ValueError),
    (lambda: L.STCH(2, preference=[0.0, 0.0]), ValueError),
    (lambda: L.STCH(2, preference=[1.0]), ValueError),
    (lambda: L.STCH(2, reference=[1.0]), ValueError),
    (lambda: L.STCH(2, warmup=-1), ValueError),
    (lambda: L.STCH(2, warmup=1.5), TypeError),  # type: ignore[arg-type]
    (lambda: L.COSMOS([1.0, -1.0], 1.0), ValueError),
    (lambda: L.COSMOS([1.0, 1.0], -1.0), ValueError),
    (lambda: L.PBI([0.0, 0.0], 1.0), ValueError),
    (lambda: L.PBI([1.0, 1.0], math.nan), ValueError),
    (lambda: L.FixedWeights([1.0, math.inf]), ValueError),
    (lambda: L.FixedWeights([]), ValueError),
    (lambda: L.FixedWeights(3), TypeError),  # type: ignore[arg-type]
    (lambda: L.FixedWeights({"a": 1.0, "b": "x"}), TypeError),  # type: ignore[dict-item]
    (lambda: L.UncertaintyWeighting(None), TypeError),  # type: ignore[arg-type]
    (lambda: L.UncertaintyWeighting([]), ValueError),
    (lambda: L.UncertaintyWeighting(["a", "a"]), ValueError),
    (lambda: L.UncertaintyWeighting(["a", 1]), TypeError),  # type: ignore[list-item]
    (lambda: L.UncertaintyWeighting("ab"), TypeError),
    (lambda: L.STCH(2, preference={"a": 1.0, "b": 2.0}), ValueError),
    (lambda: L.STCH(["a", "b"], preference={"a": 1.0, "c": 2.0}), ValueError),
    (lambda: L.FAMO(["a", "b"], min_losses={"a": 1.0}), ValueError),
    (lambda: L.GradNorm(2, iter([])), ValueError),
    (lambda: L.GeometricMean().terms(torch.ones(2)), TypeError),
    (lambda: L.entropy_prior([5.0, 0.0]), ValueError),
    (lambda: L.entropy_prior([5.0, -1.0]), ValueError),
    (lambda: L.variance_prior(torch.ones(3)), ValueError),
    (lambda: L.variance_prior([1.0, 2.0]), TypeError),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_refused(case: int) -> None:
    build, error = BAD[case]
    with pytest.raises(error):
        build()


def test_priors_are_the_losses_of_constant_predictors() -> None:
    p = np.array([1, 2, 5]) / 8
    assert L.entropy_prior([1, 2, 5]) == pytest.approx(-(p * np.log(p)).sum())
    targets = np.random.default_rng(0).normal(size=(20, 3))
    assert L.variance_prior(torch.tensor(targets)) == pytest.approx(((targets - targets.mean(0)) ** 2).mean())


def test_gradnorm_measures_norms_on_the_parameters_it_was_given() -> None:
    shared = torch.tensor([1.0, 2.0], requires_grad=True)
    head = torch.tensor(3.0, requires_grad=True)
    losses = [(shared**2).sum(), (head * shared).sum(), head**2]
    measured, told = L.GradNorm(K, [shared]), L.GradNorm(K)
    assert torch.equal(measured(losses), told(losses))
    told.update(torch.tensor([math.sqrt(20), math.sqrt(18), 0.0]))
    torch.testing.assert_close(measured.w, told.w)
    assert measured.w.sum().item() == pytest.approx(K) and not torch.equal(measured.w, torch.ones(K))
    assert not list(measured.parameters())


def test_kpis_may_be_tensors() -> None:
    first, second, third = (L.DynamicTaskPriority(2) for _ in range(3))
    first.update([0.5, 0.25])
    second.update(torch.tensor([0.5, 0.25]))
    third.update([torch.tensor(0.5), 0.25])
    assert torch.equal(first.average, second.average) and torch.equal(first.average, third.average)
    assert first.weights(torch.ones(2)).tolist() == pytest.approx([-0.5 * math.log(0.5), -0.75 * math.log(0.25)])


def test_two_calls_before_one_backward_pass() -> None:
    for name, make in MAKE.items():
        module, x = make(), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        (module(x) + module(2 * x)).backward()
        assert x.grad is not None and bool(x.grad.isfinite().all()), name


@pytest.mark.parametrize("name", MAKE)
def test_no_value_is_read_off_another_device(name: str) -> None:
    """Tensors on "meta" have no values, so that whatever waits for one raises."""
    module = MAKE[name]().to("meta")
    x = torch.ones(K, device="meta", requires_grad=True)
    for _ in range(2):
        assert module(x).shape == ()
        if isinstance(module, (L.FAMO, L.GradNorm, L.DynamicTaskPriority)):
            module.update(torch.ones(K, device="meta"))
        if isinstance(module, L.DynamicWeightAverage):
            module.step()
        if isinstance(module, L.LossBalancedTaskWeighting):
            module.new_epoch()


def test_a_forgotten_step_is_told_once() -> None:
    module = L.DynamicWeightAverage(2, warn_after=3)
    with pytest.warns(RuntimeWarning, match="without step") as told:
        for _ in range(5):
            module(torch.ones(2))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.step()
        module(torch.ones(2))


def test_a_step_without_losses_changes_nothing() -> None:
    module = L.DynamicWeightAverage(2)
    module(torch.tensor([1.0, 2.0]))
    module.step()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.step()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_evaluation_changes_no_state(name: str) -> None:
    module = MAKE[name]().eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module(torch.tensor([1.0, 2.0, 3.0]))
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


def test_the_first_positive_finite_loss_is_the_initial_one() -> None:
    module = L.InverseInitialLoss(2)
    module(torch.tensor([math.nan, 0.0]))
    module(torch.tensor([4.0, 2.0]))
    module(torch.tensor([1.0, 1.0]))
    assert module.weights(torch.ones(2)).tolist() == [0.25, 0.5]


NAMED: dict[str, Callable[[], L.LossCombination]] = {
    "uncertainty": lambda: L.UncertaintyWeighting(["a", "b", "c"]),
    "imtl-l": lambda: L.IMTLL(["a", "b", "c"]),
    "dwa": lambda: L.DynamicWeightAverage(["a", "b", "c"]),
    "gradnorm": lambda: L.GradNorm(["a", "b", "c"]),
    "dtp": lambda: L.DynamicTaskPriority(["a", "b", "c"], gamma=2.0),
    "lbtw": lambda: L.LossBalancedTaskWeighting(["a", "b", "c"]),
    "initial": lambda: L.InverseInitialLoss(["a", "b", "c"]),
    "prior": lambda: L.InversePriorLoss({"a": 0.5, "b": 2.0, "c": 3.0}),
    "current": lambda: L.InverseCurrentLoss(["a", "b", "c"]),
    "geometric": lambda: L.GeometricMean(["a", "b", "c"]),
    "logsum": lambda: L.LogSum(["a", "b", "c"]),
    "famo": lambda: L.FAMO(["a", "b", "c"]),
    "stch": lambda: L.STCH(["a", "b", "c"], mu=0.5, preference=LAM, reference={"c": Z[2], "a": Z[0], "b": Z[1]}),
    "stch-warm": lambda: L.STCH(["a", "b", "c"], warmup=2),
    "cosmos": lambda: L.COSMOS(dict(zip("abc", LAM, strict=True)), mu=0.7),
    "pbi": lambda: L.PBI(dict(zip("abc", LAM, strict=True)), theta=5.0, reference=dict(zip("abc", Z, strict=True))),
    "fixed": lambda: L.FixedWeights({"a": 1.0, "b": -2.0, "c": 0.0}),
}


@pytest.mark.parametrize("name", MAKE)
def test_losses_by_name_in_any_order(name: str) -> None:
    listed, named = MAKE[name](), NAMED[name]()
    assert named.tasks == ("a", "b", "c") and named.num_tasks == 3
    rows, after = drawn(1).astype(np.float32), drawn(2).astype(np.float32)
    for step, row in enumerate(rows):
        by_name = {"c": torch.tensor(row[2]), "a": torch.tensor(row[0]), "b": torch.tensor(row[1])}
        assert torch.equal(named(by_name), listed(torch.tensor(row)))
        assert torch.equal(named.weights(by_name), listed.weights())
        advance(listed, step, row, after[step])
        advance(named, step, row, after[step])
    with pytest.raises(ValueError, match=r"found losses of task 'd'; expected those of \['a', 'b', 'c'\]"):
        named({**by_name, "d": torch.tensor(1.0)})
    if listed.num_tasks is None:
        assert torch.isfinite(listed(by_name))
    else:
        with pytest.raises(ValueError, match=r"built without the names .* \['c', 'a', 'b'\] in place of 3"):
            listed(by_name)
    del by_name["b"]
    if isinstance(named, L.SumOfTerms) and name != "famo":
        assert torch.isfinite(named(by_name))
    else:
        with pytest.raises(ValueError, match="found no losses of task 'b'"):
            named(by_name)


@pytest.mark.parametrize("name", MAKE)
def test_weights_are_the_derivatives_and_change_nothing(name: str) -> None:
    module = MAKE[name]()
    with pytest.raises(RuntimeError, match="before the first call"):
        module.weights()
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    module(x).backward()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.inference_mode():
        found = module.weights()
    torch.testing.assert_close(found, x.grad)
    assert module.training and not found.requires_grad and torch.equal(module.weights(x), found)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MAKE if issubclass(type(MAKE[name]()), L.SumOfTerms)])
def test_terms_compile_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    module = MAKE[name]()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module.terms, fullgraph=True, backend="eager")
    for row in drawn(1, 3).astype(np.float32):
        losses = [torch.tensor(value, requires_grad=True) for value in row]
        for found, expected in zip(compiled(losses), eager.terms(losses), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in MAKE if issubclass(type(MAKE[name]()), L.SumOfTerms)])
def test_no_value_of_a_term_is_read_off_another_device(name: str) -> None:
    losses = [torch.ones((), device="meta", requires_grad=True) for _ in range(K)]
    module = NAMED[name]().to("meta")
    assert len(module.terms(losses)) == K
    if module.takes_some:
        assert len(module.terms({"b": losses[0]})) == 1


@pytest.mark.parametrize("module", [L.FAMO(2), L.GradNorm(2)])
def test_a_forgotten_update_is_told_once(module: L.SumOfTerms) -> None:
    with pytest.warns(RuntimeWarning, match="1000 calls without update") as told:
        for _ in range(1100):
            module(torch.ones(2))
    assert len(told) == 1


def test_an_update_goes_with_a_call() -> None:
    module = L.GradNorm(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="none in training mode since the last update"):
            module.update(torch.ones(2))
        module(torch.tensor([1.0, 2.0]))
        restored = L.GradNorm(2)
        restored.load_state_dict(module.state_dict())
        module.update(torch.tensor([1.0, 3.0]))
        restored.update(torch.tensor([1.0, 3.0]))
        assert torch.equal(module.w, restored.w)


def test_gradnorm_measures_in_training_alone() -> None:
    shared = torch.tensor([1.0, 2.0], requires_grad=True)
    module = L.GradNorm(["a", "b", "c"], [shared])
    losses = {"a": (shared**2).sum(), "c": 3 * shared.sum()}
    module.eval()(losses)
    with torch.no_grad():
        module.train()(losses)
    assert torch.equal(module.w, torch.ones(3))
    with pytest.raises(TypeError, match="no graph to take the norm"):
        module({name: loss.detach() for name, loss in losses.items()})
    module(losses)
    assert module.w[1] == 1 and module.w[0] != 1 and module.w.sum().item() == pytest.approx(3)
    module(torch.stack([losses["a"], losses["a"] * 0, losses["c"]])).backward()


def test_a_weight_of_gradnorm_comes_back_from_the_bottom() -> None:
    module = L.GradNorm(2)
    module(torch.ones(2))
    module.update(torch.tensor([1e4, 1.0]))
    assert 0 < module.w[0] < 2e-3
    lowest = module.w[0].clone()
    for _ in range(3):
        module(torch.ones(2))
        module.update(torch.tensor([1.0, 1.0]) * module.w, weighted=True)
    assert module.w[0] > 10 * lowest


def test_indicators_by_name() -> None:
    module = L.DynamicTaskPriority(["a", "b"])
    module.update({"b": 0.25, "a": torch.tensor(0.5)})
    assert module.average.tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="found no KPIs of task 'b'"):
        module.update({"a": 0.5})
    with pytest.raises(TypeError, match="expected KPIs as a sequence or dict, found float"):
        module.update(0.5)  # type: ignore[arg-type]


def test_shown_with_its_tasks() -> None:
    assert repr(L.UncertaintyWeighting(["a", "b"])) == "UncertaintyWeighting(['a', 'b'])"
    assert (repr(L.FAMO(3)), repr(L.LogSum())) == ("FAMO(3)", "LogSum()")


def test_losses_that_are_not_finite_leave_what_is_kept_alone() -> None:
    stch = L.STCH(2, mu=0.1, warmup=2)
    for losses in ([1.0, 10.0], [math.inf, 10.0], [1.0, math.nan], [3.0, 30.0]):
        stch(torch.tensor(losses))
    assert stch.nadir.tolist() == [2.0, 20.0] and int(stch.seen) == 2
    for bad in (math.inf, -0.5):
        gradnorm = L.GradNorm(3)
        gradnorm(torch.ones(3))
        gradnorm.update(torch.tensor([1.0, 5.0, 2.0]))
        before = gradnorm.w.clone()
        gradnorm(torch.tensor([bad, 1.0, 1.0]))
        gradnorm.update(torch.tensor([1.0, 5.0, 2.0]))
        assert torch.equal(gradnorm.w, before)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e200])
def test_the_cosine_of_cosmos_does_not_depend_on_lengths(scale: float) -> None:
    lam, values = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.7, 2.0, 3.5], dtype=torch.float64)
    cosine = (lam @ values / lam.norm() / values.norm()).item()
    module = L.COSMOS(lam, 3.0).double()
    losses = (scale * values).requires_grad_()
    found = module(losses)
    assert float(found) == pytest.approx(scale * float(lam @ values) - 3.0 * cosine, rel=1e-12)
    (grad,) = torch.autograd.grad(found, losses)
    unit = values / values.norm()
    expected = lam - 3.0 * (lam / lam.norm() - cosine * unit) / (scale * values.norm())
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=0.0)
    small = L.COSMOS((1e-9 * lam).tolist(), 1.0).double()
    assert float(small(values)) == pytest.approx(-cosine, rel=1e-6)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(module(zero), zero)[0].tolist() == lam.tolist()


def test_what_is_refused_is_not_recorded() -> None:
    balanced = L.LossBalancedTaskWeighting(2)
    with pytest.raises(ValueError, match="expected losses >= 0"):
        balanced(torch.tensor([2.0, -1.0]))
    assert bool(balanced.initial.isnan().all())
    gradnorm = L.GradNorm(2, parameters=[torch.ones(2, requires_grad=True)])
    for call in (gradnorm, gradnorm.terms):
        with pytest.raises(TypeError, match="no graph"):
            call(torch.tensor([2.0, 1.0]))
    assert bool(gradnorm.initial.isnan().all()) and not gradnorm.wants_norms


def test_weights_of_some_tasks() -> None:
    module = L.LogSum(["a", "b"])
    module({"b": torch.tensor(2.0)})
    for found in (module.weights(), module.weights({"b": torch.tensor(2.0)})):
        assert math.isnan(found[0]) and found[1] == 0.5
    with pytest.raises(ValueError, match="found no losses of task 'a'"):
        L.STCH(["a", "b"]).weights({"b": torch.tensor(2.0)})


def test_initial_losses_count_as_they_are_kept() -> None:
    half = L.InverseInitialLoss(2).half()
    assert half.weights(torch.tensor([7e4, 2.0])).tolist() == [1.0, 0.5]
    half(torch.tensor([7e4, 2.0]))
    assert math.isnan(half.initial[0]) and half.initial[1] == 2.0  # float16 ends at 65504
