"""UPGrad, DualProj, PCD and DCGD as methods, and preference vectors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mtl_kernels as mk
from benchmarks.oracles import cones
from mtl_optim import DCGD, PCD, DualProj, MultiTaskOptimizer, UPGrad, get_method, methods
from optim.recording import record
from strategies import row_matrices

BUILD: dict[str, Callable[[], methods.Method]] = {
    "upgrad": UPGrad,
    "upgrad preferring": lambda: UPGrad([1, 2, 0, 4, 5], reg=0.01),
    "dualproj": DualProj,
    "dualproj preferring": lambda: DualProj([1, 2, 0, 4, 5]),
    "pcd": lambda: PCD(tau=0.2, beta=0.5),
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
MATRIX = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VARIANTS = ["center", "average", "projection"]


def gram_of(matrix: np.ndarray) -> Tensor:
    return mk.gram(torch.from_numpy(matrix))


def test_the_options_reach_the_solvers() -> None:
    gram, pref = mk.gram(MATRIX), [1.0, 2.0, 0.0, 4.0, 5.0]
    tensor = torch.tensor(pref, dtype=torch.float64)
    for cls, function in ((UPGrad, mk.upgrad_weights), (DualProj, mk.dualproj_weights)):
        assert torch.equal(cls().weights(gram), function(gram).weights)
        for reg in (0.0, 0.3):
            expected = function(gram, pref=tensor, reg=reg)
            found = cls(pref, reg).solve(gram)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    state = torch.zeros(10, dtype=torch.float64)
    method = PCD(tau=0.3, beta=0.25, eps=0.5)
    for step in range(3):
        gram = mk.gram(MATRIX.roll(step, 1))
        expected = mk.pcd_weights(gram, state=state, tau=0.3, beta=0.25, eps=0.5)
        assert torch.equal(method.weights(gram), expected.weights)
        assert torch.equal(method.state["averages"], state)


def test_d_is_in_conflict_with_no_gradient() -> None:
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows -= 1.3 * rows.mean(0)
    assert (rows @ rows.sum(0)).min() < -1
    for method in (UPGrad(reg=0), DualProj(reg=0), PCD(tau=0)):
        products = rows @ method(rows)
        assert (products[1:] >= -1e-10).all() and (products[0] >= -1e-10 or isinstance(method, PCD))
    assert (rows @ UPGrad()(rows)).min() >= -1e-4 * rows.square().sum() * UPGrad().weights(mk.gram(rows)).max()


@given(row_matrices(min_tasks=2, max_tasks=2), st.sampled_from(VARIANTS))
def test_dcgd_on_the_vectors(rows: np.ndarray, variant: Any) -> None:
    found = DCGD(variant)(torch.from_numpy(rows)).numpy()
    norm, weights = np.linalg.norm(rows, axis=1), DCGD(variant).weights(gram_of(rows)).numpy()
    least = (rows @ rows.sum(0)).min()
    edge = 1e-14 * norm.sum() ** 2  # where rounding may take the sum for in the cone or out of it
    sides = [side for side in (True, False) if (least >= -edge if side else least < edge)]
    off = min(float(np.linalg.norm(found - cones.dcgd(rows, variant, side))) for side in sides)
    assert off <= 1e-12 * (weights @ norm)
    assert (rows @ found >= -1e-12 * norm * (weights @ norm)).all()


def test_dcgd_known_answers() -> None:
    def weights(gram: list[list[float]], variant: Any, **options: Any) -> list[float]:
        return DCGD(variant).weights(torch.tensor(gram, dtype=torch.float64), **options).tolist()  # type: ignore[no-any-return]

    assert weights([[1, 0], [0, 9]], "center") == [2, pytest.approx(2 / 3)]
    assert weights([[1, 0], [0, 9]], "average") == weights([[1, 0], [0, 9]], "projection") == [1, 1]
    assert weights([[1, -1], [-1, 2]], "projection") == [1, 1]  # on the edge
    assert weights([[1, -2], [-2, 9]], "projection") == [2, 1]
    assert weights([[1, -2], [-2, 9]], "average") == [1.5, pytest.approx(11 / 18)]
    for variant in VARIANTS:
        assert weights([[0, 0], [0, 4]], variant) == weights([[0, 0], [0, 0]], variant) == [1, 1]
        first, second = weights([[1, -2], [-2, 4]], variant)
        assert first == pytest.approx(2 * second)  # opposite: d = 0
        active = torch.tensor([[False, True], [True, True], [False, False]])
        found = DCGD(variant).weights(torch.tensor([[1.0, -2], [-2, 9]]).expand(3, 2, 2), active=active)
        assert found[0].tolist() == [0, 1] and found[2].tolist() == [0, 0] and found[1].all()
        bad = torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])
        assert DCGD(variant).weights(bad).tolist() == [0.5, 0.5]
        scaled = DCGD(variant).weights(torch.tensor([[1.0, -2], [-2, 9]]) * 2.0**80)
        torch.testing.assert_close(scaled, found[1], rtol=1e-14, atol=0)


def test_dcgd_is_for_two_tasks() -> None:
    with pytest.raises(ValueError, match=r"two tasks, found K = 5; add up losses .* UPGrad or DualProj"):
        DCGD()(MATRIX)
    with pytest.raises(ValueError, match="found K = 1"):
        DCGD().weights(torch.eye(1))
    with pytest.raises(ValueError, match="'center', 'average', 'projection'"):
        DCGD("middle")  # type: ignore[arg-type]


@EACH
def test_inactive_tasks_take_no_part(build: Callable[[], methods.Method]) -> None:
    active, rows = torch.tensor([True, True, False, False, True]), MATRIX.clone()
    rows[2] = torch.nan
    weights = build().weights(mk.gram(rows), active=active)
    assert weights[2:4].tolist() == [0, 0] and weights.isfinite().all() and weights[[0, 1, 4]].any()


@EACH
def test_what_scales_with_the_gradients(build: Callable[[], methods.Method]) -> None:
    method = build()
    assert method.scales_with_gradient is not isinstance(method, PCD)
    if method.scales_with_gradient:
        torch.testing.assert_close(method(MATRIX * 65536), 65536 * build()(MATRIX), rtol=1e-11, atol=0)


@EACH
def test_state_continues_to_the_bit(build: Callable[[], methods.Method]) -> None:
    grams = [mk.gram(torch.randn(5, 7, generator=torch.Generator().manual_seed(k))) for k in range(8)]
    method = build()
    for gram in grams[:4]:
        method.weights(gram)
    fresh, file = build(), io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for twin in (fresh, copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        again = copy.deepcopy(method)
        assert twin.config() == method.config()
        assert all(torch.equal(twin.weights(gram), again.weights(gram)) for gram in grams[4:])
    assert method.state_dict().keys() == ({"averages"} if isinstance(method, PCD) else set())
    method.reset()
    assert method.state_dict() == {} and torch.equal(method.weights(grams[0]), build().weights(grams[0]))


@EACH
def test_a_recorded_step_goes_on(build: Callable[[], methods.Method]) -> None:
    """What a CUDA graph needs: nothing reads a value on the host, and the state advances in place."""
    method, eager, gram = build(), build(), mk.gram(MATRIX)
    found = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        method.weights(gram)
        eager.weights(gram)
    replay = record("cpu", lambda: found.copy_(method.weights(gram)))
    assert torch.equal(found, eager.weights(gram))
    for _ in range(2):
        replay()
        assert torch.equal(found, eager.weights(gram))


@pytest.mark.gpu
@EACH
def test_on_a_gpu(build: Callable[[], methods.Method]) -> None:
    """The weights of a CPU, without a wait once preferences and state are there."""
    method, there = build(), build()
    grams = [mk.gram(MATRIX.roll(k, 1) + k) for k in range(4)]
    on_gpu = [gram.cuda() for gram in grams]
    found = [there.weights(on_gpu[0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [there.weights(gram) for gram in on_gpu[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gram, weights in zip(grams, found, strict=True):
        torch.testing.assert_close(weights.cpu(), method.weights(gram), rtol=1e-9, atol=1e-12)


def test_pcd_keeps_its_averages_where_a_step_says_nothing() -> None:
    method, gram = PCD(), mk.gram(MATRIX)
    bad = gram.clone()
    bad[1, 2] = bad[2, 1] = torch.inf
    assert method.weights(bad).tolist() == [0.2] * 5 and not method.state["averages"].any()
    method.weights(gram)
    before = method.state_dict()["averages"]
    method.weights(bad)
    method.weights(gram, active=torch.zeros(5, dtype=torch.bool))
    assert torch.equal(method.state["averages"], before)
    method.weights(gram, active=torch.tensor([True, False, True, True, True]))
    after = method.state["averages"]
    assert after[[1, 6]].equal(before[[1, 6]]) and (after != before).sum() == 8
    with pytest.raises(ValueError, match="keeps the state of 5 tasks and was given 3; name all"):
        method.weights(gram[:3, :3])
    assert torch.equal(method.state["averages"], after)


class Net(nn.Module):
    """A trunk that some tasks share."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Parameter(torch.randn(6, 8, generator=generator) * 0.3)
        self.heads = torch.randn(8, num_tasks, generator=generator) * 0.3

    def losses(self, seed: int) -> dict[str, Tensor]:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        outputs = torch.tanh(x @ self.trunk) @ self.heads
        return {str(k): (outputs[:, k] - (-1) ** k).square().mean() for k in range(self.heads.shape[1])}


TRAINED: dict[str, Callable[[], methods.Method]] = {
    "upgrad": lambda: UPGrad({"0": 1, "1": 2, "2": 0.5, "3": 1}),
    "dualproj": lambda: DualProj([1, 2, 3, 4]),
    "pcd": PCD,
    **{variant: lambda variant=variant: DCGD(variant) for variant in VARIANTS},
}


@pytest.mark.parametrize("build", TRAINED.values(), ids=TRAINED)
def test_training_and_resuming(build: Callable[[], methods.Method], recwarn: pytest.WarningsRecorder) -> None:
    def trainer() -> tuple[Net, MultiTaskOptimizer]:
        net = Net(2 if isinstance(build(), DCGD) else 4)
        return net, MultiTaskOptimizer(torch.optim.SGD([net.trunk], lr=0.05, momentum=0.5), build())

    def train(net: Net, opt: MultiTaskOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.backward(net.losses(step))
            opt.step()

    net, opt = trainer()
    before = sum(float(loss.detach()) for loss in net.losses(100).values())
    train(net, opt, range(20))
    assert sum(float(loss.detach()) for loss in net.losses(100).values()) < before
    again, resumed = trainer()
    train(again, resumed, range(10))
    third, last = trainer()
    third.load_state_dict(again.state_dict())
    last.load_state_dict(pickle.loads(pickle.dumps(resumed.state_dict())))
    train(third, last, range(10, 20))
    assert torch.equal(third.trunk, net.trunk)
    assert not recwarn.list


def test_pcd_refuses_a_grad_scaler() -> None:
    net = Net(3)
    opt = MultiTaskOptimizer(torch.optim.SGD([net.trunk], lr=0.01), PCD())
    scaler = torch.amp.GradScaler("cpu")
    opt.backward({name: scaler.scale(loss) for name, loss in net.losses(0).items()})
    with pytest.raises(RuntimeError, match="does not scale with the gradients"):
        scaler.step(opt)


def test_preferences_by_name() -> None:
    gram = mk.gram(MATRIX[:2])
    method = UPGrad({"a": 1.0, "b": 3.0, "c": 0.0})
    for tasks, pref in ((("a", "b"), [1, 3]), (("b", "a"), [3, 1])):
        assert torch.equal(method.bound_to(tasks).weights(gram), UPGrad(pref).weights(gram))
        assert method.bound_to(tasks) is method.bound_to(tasks)
    assert method.bound_to(("c",)).weights(torch.eye(1)).tolist() == [0]
    assert UPGrad().bound_to(("a",)).pref is None and DualProj([1]).bound_to(("a",)).pref == (1.0,)
    assert pickle.loads(pickle.dumps(method)).config() == {"pref": {"a": 1.0, "b": 3.0, "c": 0.0}, "reg": 1e-4}
    with pytest.raises(ValueError, match=r"UPGrad has preferences for \['a', 'b', 'c'\] and none for task 'd'"):
        method.bound_to(("a", "d"))
    with pytest.raises(ValueError, match="a Gram matrix does not tell"):
        method.weights(gram)
    with pytest.raises(ValueError, match="2 preferences for 5 tasks"):
        DualProj([1, 2])(MATRIX)
    assert not UPGrad().weighs_alone and UPGrad([2.0]).weighs_alone
    assert UPGrad([2.0]).weights(torch.eye(1)).tolist() == [2]


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: UPGrad("12"), TypeError, "UPGrad: expected pref as a sequence"),
        (lambda: UPGrad(3), TypeError, "expected pref as a sequence"),
        (lambda: UPGrad([]), ValueError, "a number > 0"),
        (lambda: UPGrad([0, 0]), ValueError, "a number > 0"),
        (lambda: DualProj([1, -1]), ValueError, "DualProj: .* >= 0 in pref, found -1"),
        (lambda: DualProj([1, float("nan")]), ValueError, "nan"),
        (lambda: DualProj([True]), TypeError, "found True"),
        (lambda: DualProj({1: 1.0}), TypeError, "names of tasks in pref"),
        (lambda: UPGrad(reg=-1), ValueError, "UPGrad: expected reg >= 0, found -1"),
        (lambda: DualProj(reg="small"), TypeError, "reg as a number"),
        (lambda: PCD(tau=-0.1), ValueError, "PCD: expected tau >= 0"),
        (lambda: PCD(beta=1.0), ValueError, r"beta in \[0, 1\)"),
        (lambda: PCD(eps=float("inf")), ValueError, "eps >= 0"),
        (lambda: PCD(eps=None), TypeError, "eps as a number"),
    ],
)
def test_bad_options(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


@EACH
def test_bad_gram(build: Callable[[], methods.Method]) -> None:
    with pytest.raises(ValueError, match="method itself"):
        build().weights(MATRIX)
    with pytest.raises(TypeError, match="int64"):
        build().weights(MATRIX[:, :5].long())
    with pytest.raises((TypeError, ValueError), match=r"\[5\]|\[2\]"):
        build().weights(mk.gram(MATRIX), active=torch.ones(2, dtype=torch.bool))


def test_by_name() -> None:
    for cls in (UPGrad, DualProj, PCD, DCGD):
        assert type(get_method(cls.__name__)) is cls and cls.__name__ in methods.__all__
    assert get_method("upgrad", reg=0.5).config() == {"pref": None, "reg": 0.5}
    assert not {"Preferring", "_Projecting"} & set(methods.__all__)
