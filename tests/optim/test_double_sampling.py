"""SDMGrad and MoDo on matrices: their published steps on the gradients themselves, and their state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import mtl_kernels as mk
from benchmarks.oracles.stochastic import project
from mtl_optim import CRMOGM, MGDA, MoDo, MultiTaskOptimizer, Normalized, SDMGrad, Sum, methods
from optim.recording import record

BUILD: dict[str, Callable[[], methods.Method]] = {
    "sdmgrad": lambda: SDMGrad(lr=0.1),
    "sdmgrad, preferring": lambda: SDMGrad(lam=0.7, lr=0.1, momentum=0.3, n_iter=7, pref=[1, 2, 3, 4]),
    "modo": MoDo,
    "modo of two": lambda: MoDo(gamma=0.02, rho=0.5, num_batches=2),
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def batches(step: int, count: int = 3, num_tasks: int = 4) -> list[Tensor]:
    """The rows of one step: the same gradients with noise of their own."""
    generator = torch.Generator().manual_seed(step)
    mean = torch.randn(num_tasks, 6, generator=generator, dtype=torch.float64)
    return [mean + 0.5 * torch.randn(mean.shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def products(step: int) -> Tensor:
    first, second, _ = batches(step)
    return mk.cross_gram(first, second)


def test_sdmgrad_is_its_published_steps() -> None:
    """Algorithm 1 on vectors, with the scale of the published code; the weights go from step to step."""
    method, w, pref = SDMGrad(lam=0.4, lr=0.1, pref=[3, 1, 0, 4]), np.full(4, 0.25), np.array([3, 1, 0, 4]) / 8
    for step in range(4):
        j1, j2, j3 = (rows.numpy() for rows in batches(step))
        own = [max(g1 @ g2, 0.0) for g1, g2 in zip(j1, j2, strict=True)]
        scale = np.mean(np.sqrt(own)) ** 2 + 1e-8 * np.abs(j1 @ j2.T).max()
        buffer = np.zeros(4)
        for _ in range(20):
            direction = sum((w[k] + 0.4 * pref[k]) * j2[k] for k in range(4))
            buffer = 0.5 * buffer + np.array([g1 @ direction for g1 in j1]) / scale
            w = project(w - 0.1 * buffer)
        found = method(*batches(step))
        np.testing.assert_allclose(found, (j3.T @ w + 0.4 * (j3.T @ pref)) / 1.4, rtol=0, atol=1e-13)
        np.testing.assert_allclose(method.state["weights"], w, rtol=0, atol=1e-14)
    assert w.min() >= 0 and np.ptp(w) > 0.1


@pytest.mark.parametrize("count", [2, 3])
def test_modo_is_its_published_step(count: int) -> None:
    method, w = MoDo(gamma=0.05, rho=0.2, num_batches=count), np.full(4, 0.25)
    for step in range(5):
        rows = [one.numpy() for one in batches(step, count)]
        towards = rows[1].T @ w
        w = project(w - 0.05 * (np.array([g @ towards for g in rows[0]]) + 0.2 * w))
        np.testing.assert_allclose(method(*batches(step, count)), rows[-1].T @ w, rtol=0, atol=1e-13)
    assert w.min() >= 0 and np.ptp(w) > 0.1


def test_the_defaults_are_those_of_the_definition() -> None:
    assert SDMGrad().config() == {
        "pref": None, "lam": 0.3, "lr": 10.0, "momentum": 0.5, "n_iter": 20, "normalize": True,
    }  # fmt: skip
    assert MoDo().config() == {"gamma": 0.1, "rho": 0.1, "num_batches": 3}
    state = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(SDMGrad().weights(products(0)), mk.sdmgrad_weights(products(0), state=state))
    state.fill_(0.25)
    assert torch.equal(MoDo().weights(products(0)), mk.modo_weights(products(0), state=state))


def test_the_weights_approach_those_of_mgda_on_average() -> None:
    """Noise of a tenth of the gradients' length: nothing a single batch would tell apart from the full gradients."""
    mean = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = MGDA().weights(mk.gram(mean))
    sdmgrad, modo, total = SDMGrad(lam=0.0, lr=0.01), MoDo(gamma=0.002, rho=0.0), torch.zeros(2, 3).double()
    for step in range(600):
        first, second, third = (mean + 0.3 * torch.randn(3, 20, dtype=torch.float64) for _ in range(3))
        sdmgrad(first, second, third)
        modo(first, second, third)
        if step >= 200:
            total += torch.stack([sdmgrad.state["weights"], modo.state["weights"]]) / 400
    torch.testing.assert_close(total, expected.expand(2, 3), rtol=0, atol=0.03)


def test_of_two_batches_the_gram_matrix_is_not_biased() -> None:
    """What double sampling is for: the noise of a task adds its variance to G_ii, and nothing to A_ii."""
    noise = torch.randn(2, 2000, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = [(torch.ones(1, 50) + one).unbind(0) for one in noise]
    cross = torch.stack([mk.cross_gram(a, b) for a, b in zip(*both, strict=True)]).mean()
    gram = torch.stack([mk.gram(a) for a in both[0]]).mean()
    assert abs(cross - 50) < 2 and abs(gram - 100) < 2


@EACH
def test_matrices_and_lists_of_any_dtype(build: Callable[[], methods.Method]) -> None:
    count = build().num_batches
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        rows = [one.to(dtype) for one in batches(0, count)]
        weights = build().weights(mk.cross_gram(*rows[:2]))
        found = build()(*rows)
        assert found.dtype == dtype and torch.equal(found, mk.combine(rows[-1], weights))
        first, rest, nothing = build()(*([[row[:1], row[1:], None] for row in one] for one in rows))
        assert nothing is None
        torch.testing.assert_close(torch.cat([first, rest]), found)


@EACH
def test_active_tasks_and_batches_of_problems(build: Callable[[], methods.Method]) -> None:
    a = torch.stack([products(step) for step in range(3)])
    active = torch.tensor([[True] * 4, [True, False, True, True], [True, True, True, True]])
    method = build()
    found = method.weights(a, active=active)
    assert found.shape == (3, 4) == method.state["weights"].shape and found[1, 1] == 0
    for problem in (0, 2):
        torch.testing.assert_close(build().weights(a[problem]), found[problem], rtol=0, atol=1e-15)
    torch.testing.assert_close(found.sum(-1), torch.ones(3).double())
    if "preferring" not in repr(build) and isinstance(method, MoDo):
        alone = build().weights(a[1][active[1]][:, active[1]])
        torch.testing.assert_close(found[1][active[1]], alone, rtol=0, atol=1e-14)


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_is_the_mean_and_leaves_the_state(build: Callable[[], methods.Method], bad: float) -> None:
    method, rows = build(), batches(0, build().num_batches)
    method(*rows)
    before = method.state["weights"].clone()
    rows[1][2, 0] = bad
    if method.num_batches == 3:
        torch.testing.assert_close(method(*rows), rows[2].mean(0))
    else:
        assert not method(*rows).isfinite().all()
    assert torch.equal(method.state["weights"], before)


@EACH
def test_state_continues_to_the_bit(build: Callable[[], methods.Method]) -> None:
    method = build()
    for step in range(3):
        method.weights(products(step))
    fresh, file = build(), io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twins = [fresh, copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    for step in range(3, 6):
        expected = method.weights(products(step))
        assert all(torch.equal(twin.weights(products(step)), expected) for twin in twins)
        assert len({twin.state["weights"].data_ptr() for twin in (method, *twins)}) == 4
    method.reset()
    assert method.state_dict() == {}
    assert torch.equal(method.weights(products(0)), build().weights(products(0)))


@EACH
def test_a_recorded_step_goes_on(build: Callable[[], methods.Method]) -> None:
    """What a CUDA graph needs: nothing reads a value on the host, and the weights move in place."""
    method, eager = build(), build()
    rows, found = [one.float() for one in batches(0, method.num_batches)], torch.zeros(6)
    for _ in range(2):
        method(*rows)
        eager(*rows)
    kept = method.state["weights"]
    replay = record("cpu", lambda: found.copy_(method(*rows)))
    assert torch.equal(found, eager(*rows))
    for _ in range(3):
        replay()
        assert torch.equal(found, eager(*rows)) and method.state["weights"] is kept


@pytest.mark.gpu
@EACH
def test_on_a_gpu(build: Callable[[], methods.Method]) -> None:
    """The weights of a CPU, without a wait once the state is there."""
    method, there = build(), build()
    rows = [batches(step, method.num_batches) for step in range(3)]
    on_gpu = [[one.cuda() for one in step] for step in rows]
    found = [there(*on_gpu[0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [there(*step) for step in on_gpu[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, direction in zip(rows, found, strict=True):
        torch.testing.assert_close(direction.cpu(), method(*step), rtol=1e-9, atol=1e-12)


@EACH
def test_state_made_in_inference_mode(build: Callable[[], methods.Method]) -> None:
    method, plain = build(), build()
    with torch.inference_mode():
        method.weights(products(0))
    plain.weights(products(0))
    assert torch.equal(method.weights(products(1)), plain.weights(products(1)))


def test_scale() -> None:
    """SDMGrad's weights do not depend on it, MoDo's do: what GradScaler needs to know."""
    for step in range(2):
        rows = batches(step)
        torch.testing.assert_close(SDMGrad(lr=0.1)(*(1e6 * one for one in rows)) / 1e6, SDMGrad(lr=0.1)(*rows))
    assert SDMGrad().scales_with_gradient
    assert not SDMGrad(normalize=False).scales_with_gradient and not MoDo().scales_with_gradient
    short = MoDo(gamma=1e-3).weights(products(0)) - 0.25
    assert short.abs().max() < 0.1 * (MoDo(gamma=1e-3).weights(1e4 * products(0)) - 0.25).abs().max()


@pytest.mark.parametrize("num_tasks", [1, 2, 64, 128])
@pytest.mark.parametrize("method", [SDMGrad, MoDo])
def test_up_to_128_tasks(method: Callable[[], methods.Method], num_tasks: int) -> None:
    rows = batches(0, num_tasks=num_tasks)
    found = method()
    assert found(*rows).isfinite().all()
    torch.testing.assert_close(found.state["weights"].sum().item(), 1.0)
    if num_tasks == 1:
        assert torch.equal(found(*rows), rows[2][0])


def test_names_of_preferences() -> None:
    method = SDMGrad(lr=0.1, pref={"b": 3.0, "a": 1.0})
    bound, plain = method.bound_to(("a", "b")), SDMGrad(lr=0.1, pref=[1, 3])
    rows = batches(0, num_tasks=2)
    assert torch.equal(bound(*rows), plain(*rows)) and torch.equal(method.state["weights"], plain.state["weights"])
    with pytest.raises(ValueError, match="bound_to"):
        method(*rows)
    with pytest.raises(ValueError, match="2 preferences for 4 tasks"):
        plain.weights(products(0))


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: SDMGrad(lam=-1), ValueError, "SDMGrad: expected lam as a finite number >= 0, found -1"),
        (lambda: SDMGrad(lr=0.0), ValueError, "SDMGrad: expected lr > 0"),
        (lambda: SDMGrad(momentum=1.0), ValueError, r"momentum in \[0, 1\)"),
        (lambda: SDMGrad(n_iter=1.5), TypeError, "n_iter as an integer"),
        (lambda: SDMGrad(normalize=None), TypeError, "normalize as True or False"),
        (lambda: SDMGrad(pref=[1, -1]), ValueError, "pref"),
        (lambda: MoDo(gamma=0), ValueError, "MoDo: expected gamma > 0"),
        (lambda: MoDo(rho="0.1"), TypeError, "MoDo: expected rho as a number"),
        (lambda: MoDo(num_batches=1), ValueError, "num_batches 2 or 3, found 1"),
        (lambda: MoDo(num_batches=True), ValueError, "num_batches 2 or 3"),
        (lambda: SDMGrad()(*batches(0, 2)), TypeError, r"SDMGrad takes the rows of 3 independent batch\(es\), found 2"),
        (lambda: MoDo(num_batches=2)(*batches(0, 3)), TypeError, "of 2 independent"),
        (lambda: Sum()(*batches(0, 2)), TypeError, r"Sum takes the rows of 1 independent batch\(es\), found 2"),
        (lambda: MoDo()(*batches(0, 2), batches(0)[0][:3]), ValueError, "weights of shape"),
        (lambda: MoDo().weights(batches(0)[0]), ValueError, "MoDo: expected a Gram matrix of shape"),
        (lambda: SDMGrad().weights(products(0), active=torch.ones(4)), TypeError, "bool"),
        (lambda: CRMOGM(SDMGrad()), ValueError, "CRMOGM: SDMGrad goes by the products of two batches"),
        (lambda: Normalized(MoDo(num_batches=2)), ValueError, "use it without a wrapper"),
    ],
)
def test_what_is_refused(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


@EACH
def test_other_tasks_are_refused(build: Callable[[], methods.Method]) -> None:
    method = build()
    method.weights(products(0))
    with pytest.raises(ValueError, match=r"weights of shape \[4\] .* problem of \[2, 4\]; with one problem per"):
        method.weights(products(0).expand(2, 4, 4))
    if getattr(method, "pref", None) is None:  # which are for four tasks
        with pytest.raises(ValueError, match="keeps the state of 4 tasks and was given 3; name all tasks beforehand"):
            method.weights(products(0)[:3, :3])
    assert method.weights(products(0)).shape == (4,)


def test_a_method_of_several_batches_says_how_it_weighs_them() -> None:
    class Unfinished(Sum):
        num_batches = 2

    with pytest.raises(NotImplementedError, match=r"no weigh_batches\(\)"):
        Unfinished()(*batches(0, 2))


def test_refresh_is_refused() -> None:
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"refresh_every=2 is for steps of one batch.* MoDo takes 3 in every step"):
        MultiTaskOptimizer(adam, MoDo(), refresh_every=2)
