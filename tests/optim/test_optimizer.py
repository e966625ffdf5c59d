"""MultiTaskOptimizer as an optimizer: what schedulers, scalers, checkpoints and copies expect of it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mtl_optim import MGDA, Constant, Mean, MultiTaskOptimizer, PCGrad, Sum
from optim.oracle import TwoHeads


def adam(model: nn.Module, **options) -> torch.optim.Optimizer:  # type: ignore[no-untyped-def]
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def train(model: TwoHeads, opt: MultiTaskOptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        opt.backward(model.losses(step))
        opt.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_is_an_optimizer_that_shares_everything() -> None:
    model = TwoHeads()
    inner = adam(model)
    opt = MultiTaskOptimizer(inner, PCGrad())
    assert isinstance(opt, torch.optim.Optimizer) and opt.optimizer is inner
    assert opt.param_groups is inner.param_groups and opt.state is inner.state and opt.defaults is inner.defaults
    train(model, opt, range(2))
    assert len(inner.state) == 8
    extra = nn.Parameter(torch.zeros((), dtype=torch.float64))
    opt.add_param_group({"params": (p for p in [extra]), "lr": 0.5})
    assert inner.param_groups[1]["params"] == [extra] and inner.param_groups[1]["lr"] == 0.5
    opt.backward([loss + extra for loss in model.losses()])
    assert float(extra.grad) > 0
    text = repr(opt)
    assert "PCGrad(order='random'" in text and "AdamW" in text and "granularity='model'" in text


def test_sum_steps_like_the_wrapped_optimizer() -> None:
    ours, plain = TwoHeads(), TwoHeads()
    train(ours, MultiTaskOptimizer(adam(ours), Sum()), range(5))
    inner = adam(plain)
    for step in range(5):
        inner.zero_grad()
        sum(plain.losses(step)).backward()
        inner.step()
    assert all(torch.allclose(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("attach", ["wrapper", "wrapped"])
def test_schedulers(attach: str) -> None:
    model = TwoHeads()
    inner = adam(model)
    opt = MultiTaskOptimizer(inner, PCGrad())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt if attach == "wrapper" else inner, max_lr=0.1, total_steps=10)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            train(model, opt, range(step, step + 1))
            scheduler.step()
            rates.append(opt.param_groups[0]["lr"])
    assert inner.param_groups[0]["lr"] == rates[-1] and max(rates) > 0.09
    opt2 = MultiTaskOptimizer(adam(TwoHeads()), Sum())
    scheduler = torch.optim.lr_scheduler.StepLR(opt2, 1)
    with pytest.warns(UserWarning, match="before `optimizer"):
        scheduler.step()


def test_hooks_see_the_combined_gradient_and_the_wrapper() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    calls: list[tuple[str, bool]] = []
    opt.register_step_pre_hook(
        lambda o, a, k: calls.append(("pre", o is opt and model.trunk[0].weight.grad is not None))
    )
    handle = opt.register_step_post_hook(lambda o, a, k: calls.append(("post", o is opt)))
    seen: list[type] = []
    everywhere = register_optimizer_step_post_hook(lambda o, a, k: seen.append(type(o)))
    try:
        for k in range(2):
            with opt.task(str(k)):
                model.losses()[k].backward()
        opt.step()
    finally:
        everywhere.remove()
    assert calls == [("pre", True), ("post", True)] and seen == [torch.optim.AdamW]
    handle.remove()
    train(model, opt, range(1))
    assert [name for name, _ in calls] == ["pre", "post", "pre"]


def test_clipping() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), PCGrad())
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward(model.losses())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    moved = sum((p.detach() - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt()
    assert abs(float(moved) - 1e-3) < 1e-6


def test_a_closure_adds_to_the_micro_batches_before_it() -> None:
    """One combination of their sum, not a sum of combinations."""
    grads = []
    for with_closure in (False, True):
        model = TwoHeads()
        opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
        opt.backward(model.losses(), accumulate=True)
        last = functools.partial(opt.backward, [10 * loss.square() for loss in model.losses()], accumulate=True)
        if with_closure:
            opt.step(last)
        else:
            last()
            opt.step()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [False, True])
def test_closure_with_lbfgs(blocks: bool) -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5), Mean())

    def closure() -> torch.Tensor:
        opt.zero_grad()
        losses = model.losses()
        if blocks:
            for k, loss in enumerate(losses):
                with opt.task(str(k)):
                    loss.backward(retain_graph=k == 0)
        else:
            opt.backward(losses)
        return sum(losses)  # type: ignore[return-value]

    first = opt.step(closure)
    for _ in range(5):
        last = opt.step(closure)
    assert last.item() < 0.5 * first.item()


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    model = TwoHeads(dtype=torch.float32)
    plain = copy.deepcopy(model)
    options = {"fused": True} if fused else {}
    opt, inner = MultiTaskOptimizer(adam(model, **options), PCGrad(order="fixed")), adam(plain, **options)
    reference = MultiTaskOptimizer(inner, PCGrad(order="fixed"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        opt.zero_grad()
        losses = model.losses(step)
        if step == 2:
            losses[0] = losses[0] * torch.inf
        if step == 1:
            for k, loss in enumerate(losses):
                with opt.task(str(k)):
                    scaler.scale(loss).backward(retain_graph=k == 0)
        else:
            opt.backward([scaler.scale(loss) for loss in losses])
        if step == 3:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert not hasattr(opt.optimizer, "grad_scale") and not hasattr(opt, "found_inf")
        if step != 2:
            reference.zero_grad()
            reference.backward(plain.losses(step))
            reference.step()
    assert scaler.get_scale() == 512.0
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("clear", ["wrapper", "wrapped", "model", "by hand"])
def test_a_skipped_step_whose_gradients_were_cleared(clear: str) -> None:
    """GradScaler does not call step() then, so nothing says that the gradients were dealt with until they are gone."""
    model = TwoHeads(dtype=torch.float32)
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    scaler = torch.amp.GradScaler("cpu")
    opt.backward([scaler.scale(loss * torch.inf) for loss in model.losses()])
    scaler.step(opt)
    scaler.update()
    if clear == "by hand":
        for p in model.parameters():
            p.grad = None
    else:
        {"wrapper": opt, "wrapped": opt.optimizer, "model": model}[clear].zero_grad()
    with pytest.raises(RuntimeError, match="no task captured"):
        opt.step()


def test_grad_scaler_refuses_methods_without_scale() -> None:
    model = TwoHeads(dtype=torch.float32)
    opt = MultiTaskOptimizer(adam(model), MGDA(normalize="l2"))
    scaler = torch.amp.GradScaler("cpu")
    opt.backward([scaler.scale(loss) for loss in model.losses()])
    with pytest.raises(RuntimeError, match="does not scale with the gradients"):
        scaler.step(opt)


@pytest.mark.parametrize("method", [PCGrad(seed=3), MGDA(), Constant([1, 2]), Mean()], ids=repr)
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_resume_is_bit_for_bit(method, refresh_every: int) -> None:  # type: ignore[no-untyped-def]
    tasks = 3 if isinstance(method, PCGrad) else 2

    def build() -> tuple[TwoHeads, MultiTaskOptimizer]:
        model = TwoHeads(tasks)
        return model, MultiTaskOptimizer(adam(model), copy.deepcopy(method), refresh_every=refresh_every)

    model, opt = build()
    train(model, opt, range(7))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, opt, range(7, 15))
    resumed, other = build()
    train(resumed, other, range(20, 22))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert other.tasks == opt.tasks
    train(resumed, other, range(7, 15))
    assert equal(model, resumed)
    assert saved["opt"]["mtl"]["state"].keys() == ({"rng"} if isinstance(method, PCGrad) else set())


def test_state_dict_is_a_snapshot() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    train(model, opt, range(2))
    saved = opt.state_dict()
    train(model, opt, range(2))
    assert saved["mtl"]["state"]["rng"].tolist() == [0, 2] and opt.method.state["rng"].tolist() == [0, 4]


def test_state_dict_of_a_plain_optimizer() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    train(model, opt, range(2))
    saved = opt.optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    with pytest.warns(UserWarning, match="plain optimizer"):
        opt.load_state_dict(saved)
    assert opt.tasks == ("0", "1")
    adam(model).load_state_dict({k: v for k, v in opt.state_dict().items() if k != "mtl"})


def test_state_dict_that_does_not_fit() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad(seed=1), tasks=["0", "1"])
    train(model, opt, range(2))
    other = MultiTaskOptimizer(adam(model), MGDA())
    train(model, other, range(1))
    named = MultiTaskOptimizer(adam(model), PCGrad(seed=2), tasks=["1", "0"])
    train(model, named, range(1))
    groups = MultiTaskOptimizer(adam(model.trunk), PCGrad(seed=1), tasks=["0", "1"])
    before = copy.deepcopy(opt.state_dict())
    newer = copy.deepcopy(before)
    newer["mtl"]["version"] = 99
    broken = copy.deepcopy(named.state_dict())
    broken["mtl"]["tasks"] = 3
    free = MultiTaskOptimizer(adam(model), PCGrad(seed=2))
    with pytest.raises(TypeError):
        free.load_state_dict(broken)
    assert free.method.state == {} and free.tasks == () and not free.state
    for saved, text in [
        (other.state_dict(), "saved with MGDA, this optimizer uses PCGrad"),
        (named.state_dict(), r"tasks \['1', '0'\]"),
        (groups.state_dict(), "size of optimizer's group"),
        (newer, "unknown version"),
    ]:
        with pytest.raises(ValueError, match=text):
            opt.load_state_dict(saved)
        after = opt.state_dict()
        assert torch.equal(after["mtl"].pop("state")["rng"], before["mtl"]["state"]["rng"])
        assert after["mtl"] == {k: v for k, v in before["mtl"].items() if k != "state"}
        assert all(torch.equal(after["state"][p]["exp_avg"], v["exp_avg"]) for p, v in before["state"].items())
    seeded = MultiTaskOptimizer(adam(model), PCGrad(seed=5))
    with pytest.warns(UserWarning, match="'seed': 1"):
        seeded.load_state_dict(before)
    assert seeded.method.state["rng"].tolist() == [1, 2]


def test_state_dict_hooks() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(o is opt))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "mine": list(d)})
    opt.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "mine"})
    opt.register_load_state_dict_post_hook(lambda o: calls.append(o is opt))
    saved = opt.state_dict()
    assert saved["mine"] == ["state", "param_groups", "mtl"]
    opt.load_state_dict(saved)
    assert calls == [True, True] and "mine" in saved


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent_twins(duplicate) -> None:  # type: ignore[no-untyped-def]
    model = TwoHeads(3)
    opt = MultiTaskOptimizer(adam(model), PCGrad(), refresh_every=2)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    train(model, opt, range(3))
    twin, other = duplicate((model, opt))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, opt, range(3, 8))
    train(twin, other, range(3, 8))
    assert equal(model, twin) and str(opt.report) == str(other.report)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_stand_in_that_runs_the_methods_on_itself(blocks: bool) -> None:
    """As Lightning's does: a subclass made on the spot, which finds the attributes but sets them on itself."""

    class StandIn:
        def __init__(self, optimizer: MultiTaskOptimizer) -> None:
            self.inner = optimizer
            self.__class__ = type("StandIn", (StandIn, MultiTaskOptimizer), {})

        optimizer = property(lambda self: self.inner)

        def step(self) -> None:
            self.inner.step()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    ours, plain = TwoHeads(), TwoHeads()
    opt = MultiTaskOptimizer(adam(ours), PCGrad(), refresh_every=2)
    stand_in = StandIn(opt)
    train(plain, MultiTaskOptimizer(adam(plain), PCGrad(), refresh_every=1 if blocks else 2), range(4))
    for step in range(4):
        stand_in.zero_grad()
        if blocks:
            for k in range(2):
                with stand_in.task(str(k)):
                    ours.losses(step)[k].backward()
        else:
            stand_in.backward(ours.losses(step))
        stand_in.step()
    assert equal(ours, plain) and opt.tasks == ("0", "1") and opt.report is stand_in.report


def test_zero_grad() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(adam(model), PCGrad())
    opt.backward(model.losses(), accumulate=True)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no task captured"):
        opt.step()
    opt.backward(model.losses())
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_import_needs_no_extras() -> None:
    extras = ("rich", "matplotlib", "sklearn", "scipy")
    code = f"import sys, mtl_optim; print([m for m in {extras} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_stands_in_for_an_optimizer_is_not_wrapped() -> None:
    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    with pytest.raises(TypeError, match="found Prepared, which stands in for one; wrap the optimizer itself"):
        MultiTaskOptimizer(Prepared(torch.optim.SGD([nn.Parameter(torch.ones(2))])), PCGrad())
