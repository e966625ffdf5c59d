"""Gradients between capture and combination: whoever looks gets the combination, whoever clears them drops the rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import Mean, MultiTaskOptimizer, PCGrad, Sum
from mtl_optim.step.lazy import LazyGrad
from optim.oracle import TwoHeads, uncombined

pytestmark = pytest.mark.usefixtures("each_capture")


def pair(method=None, model: nn.Module | None = None, **options):  # type: ignore[no-untyped-def]
    model = TwoHeads() if model is None else model
    method = PCGrad(order="fixed") if method is None else method
    return model, MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


def capture(model: TwoHeads, opt: MultiTaskOptimizer, way: str, seed: int = 0) -> None:
    if way == "accumulate":
        opt.backward(model.losses(seed), accumulate=True)
        return
    for k, loss in enumerate(model.losses(seed)):
        with opt.task(str(k)):
            loss.backward(retain_graph=k == 0)


def combined(seed: int = 0) -> list[Tensor]:
    """The gradient that a step of losses has, every parameter's."""
    model, opt = pair()
    opt.backward(model.losses(seed))
    return [p.grad for p in model.parameters()]


def same(model: nn.Module, expected: list[Tensor]) -> bool:
    return all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("way", ["blocks", "accumulate"])
def test_clipping_by_norm(way: str) -> None:
    model, opt = pair()
    before = [p.detach().clone() for p in model.parameters()]
    expected = combined()
    norm = torch.cat([g.flatten() for g in expected]).norm()
    for _ in range(2):  # the second time with gradients that are there and zero
        capture(model, opt, way)
        assert torch.allclose(nn.utils.clip_grad_norm_(model.parameters(), 0.5), norm)
        opt.step()
        for p, start, g in zip(model.parameters(), before, expected, strict=True):
            assert torch.allclose(p, start - 0.1 * g * 0.5 / (norm + 1e-6))
            p.data.copy_(start)
        opt.zero_grad(set_to_none=False)


def look(grads: list[Tensor]) -> dict[str, Callable[[], Any]]:
    return {
        "norm": lambda: grads[0].norm(),
        "foreach": lambda: torch._foreach_norm(grads),
        "max": lambda: torch.stack([g.abs().max() for g in grads]),
        "item": lambda: grads[0].sum().item(),
        "tolist": lambda: grads[0].tolist(),
        "numpy": lambda: grads[0].numpy(),
        "repr": lambda: repr(grads[0]),
        "detach": lambda: grads[0].detach(),
        "data": lambda: grads[0].data,
        "copy": lambda: copy.deepcopy(grads[0]),
        "cat": lambda: torch.cat([g.flatten() for g in grads]),
        "isfinite": lambda: all(g.isfinite().all() for g in grads),
    }


@pytest.mark.parametrize("how", look([]))
def test_every_way_to_look(how: str) -> None:
    expected = combined()
    model, opt = pair()
    capture(model, opt, "blocks")
    grads = [p.grad for p in model.parameters()]
    assert all(type(g) is LazyGrad for g in grads) and opt.report is None
    shapes = [(g.shape, g.dtype, g.device, g.stride(), g.requires_grad, g.is_sparse) for g in grads]
    assert shapes == [(g.shape, g.dtype, g.device, g.stride(), False, False) for g in expected] and opt.report is None
    found, wanted = look(grads)[how](), look(expected)[how]()
    if isinstance(wanted, Tensor):
        assert type(found) is Tensor and torch.equal(found, wanted)
    elif isinstance(wanted, (list, tuple)) and isinstance(wanted[0], Tensor):
        assert all(map(torch.equal, found, wanted))
    else:
        assert str(found) == str(wanted)
    assert same(model, expected) and all(type(p.grad) is Tensor for p in model.parameters())
    # Who has kept the lazy ones goes on working on the real ones.
    torch._foreach_mul_(grads, 2.0)
    assert same(model, [2 * g for g in expected])
    opt.step()


def test_assigning_to_data_replaces_the_combination() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    for param in model.parameters():
        param.grad.data = torch.full_like(param, 3.0)
    assert opt.report is not None and same(model, [torch.full_like(p, 3.0) for p in model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_what_no_task_reaches_stays_none() -> None:
    model, opt = pair(model=TwoHeads(3))
    with opt.task("0"):
        model.losses()[0].backward()
    assert [p.grad is None for p in model.heads[1].parameters()] == [True, True]
    with opt.task("1"):
        model.losses()[1].backward()
    assert [p.grad is None for p in model.heads[1].parameters()] == [False, False]
    opt.step()
    assert [p.grad is None for p in model.heads[2].parameters()] == [True, True]


def test_looking_before_all_is_captured_ends_the_step() -> None:
    model, opt = pair()
    with opt.task("0"):
        model.losses()[0].backward()
    alone = model.trunk[0].weight.grad.clone()
    first = TwoHeads()
    first.losses()[0].backward()
    assert torch.equal(alone, first.trunk[0].weight.grad)
    for again in (lambda: opt.task("1").__enter__(), lambda: opt.backward({"1": model.losses()[1]})):
        with pytest.raises(RuntimeError, match=r"a gradient was read .* before all tasks were captured"):
            again()
    assert torch.equal(model.trunk[0].weight.grad, alone)
    opt.step()
    capture(model, opt, "blocks", 1)  # the next step is a new one
    assert model.trunk[0].weight.grad.norm() > 0
    model.zero_grad()  # abandoned
    capture(model, opt, "blocks", 1)
    opt.step()


def test_an_early_combination_that_was_asked_for_can_be_added_to() -> None:
    model, opt = pair(Mean())
    for seed in (0, 1):
        capture(model, opt, "blocks", seed)
        opt.combine()
    found = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    opt.backward(model.losses(0))
    opt.backward(model.losses(1))
    assert same(model, found)


def test_what_was_there_is_added_to() -> None:
    model, opt = pair()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    capture(model, opt, "blocks")
    sum(p.sum() for p in model.parameters()).backward()
    total = model.trunk[0].weight.grad.sum()
    expected = [g + 2 for g in combined()]
    assert torch.allclose(total, expected[0].sum()) and same(model, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unscales_the_combination(fused: bool, unscale: bool) -> None:
    model, plain = TwoHeads(dtype=torch.float32), TwoHeads(dtype=torch.float32)
    options = {"fused": True} if fused else {}
    opt = MultiTaskOptimizer(torch.optim.Adam(model.parameters(), **options), PCGrad(order="fixed"))
    twin = MultiTaskOptimizer(torch.optim.Adam(plain.parameters(), **options), PCGrad(order="fixed"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        opt.zero_grad()
        bad = torch.inf if step == 1 else 1.0
        for k, loss in enumerate(model.losses(step)):
            with opt.task(str(k)):
                scaler.scale(loss * bad).backward(retain_graph=k == 0)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step != 1:
            twin.zero_grad()
            twin.backward(plain.losses(step))
            twin.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**9


CLEARED = {
    "model": lambda model, opt: model.zero_grad(),
    "inner": lambda model, opt: opt.optimizer.zero_grad(),
    "none": lambda model, opt: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("how", CLEARED)
@pytest.mark.parametrize("then", ["blocks", "micro-batches", "backward", "accumulate"])
def test_an_abandoned_step_leaves_nothing_behind(how: str, then: str) -> None:
    model, opt = pair()
    with opt.task("0"):
        model.losses(5)[0].backward()
    with pytest.raises(KeyError), opt.task("1"):
        raise KeyError("out of memory")
    CLEARED[how](model, opt)
    with pytest.warns(UserWarning, match="after '0' had been captured: the step counts as abandoned") as caught:
        if then == "micro-batches":
            for k, loss in enumerate(model.losses()):
                with opt.task(str(k), accumulate=True):
                    loss.backward(retain_graph=k == 0)
        elif then == "backward":
            opt.backward(model.losses())
        else:
            capture(model, opt, then)
    assert [w.filename for w in caught] == [__file__]
    opt.combine() if then != "backward" else None
    assert same(model, combined())


def test_an_abandoned_step_is_not_stepped_with() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    model.zero_grad()
    with pytest.warns(UserWarning, match="abandoned"), pytest.raises(RuntimeError, match="no task captured"):
        opt.step()
    capture(model, opt, "blocks")
    model.zero_grad()
    with pytest.warns(UserWarning, match="abandoned"), pytest.raises(RuntimeError, match="nothing to combine"):
        opt.combine()


def test_zeros_abandon_a_step_as_well() -> None:
    model, opt = pair()
    capture(model, opt, "blocks", 5)
    model.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters()) and not opt._training.pending.rows
    opt.zero_grad()
    capture(model, opt, "blocks")
    opt.combine()
    assert same(model, combined())


def test_single_gradients_that_are_cleared_too_early_are_refused() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    model.heads[1].weight.grad = None
    with pytest.raises(RuntimeError, match=r"the gradients of 1 of 8 parameters were cleared"):
        opt.step()
    opt.zero_grad()
    capture(model, opt, "blocks")
    opt.combine()
    model.heads[1].weight.grad = None
    opt.step()


def test_a_lazy_gradient_whose_rows_were_dropped_says_so() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    kept = model.trunk[0].weight.grad
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="were dropped"):
        kept.norm()


def test_the_inner_optimizer_steps_with_the_combination() -> None:
    model, opt = pair()
    twin, plain = pair()
    capture(model, opt, "blocks")
    opt.optimizer.step()
    plain.backward(twin.losses())
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


class Perturbed(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021): it reads the gradient before it calls the closure."""

    def __init__(self, params, lr: float, rho: float) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):  # type: ignore[no-untyped-def,override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moves = [p.grad * (self.defaults["rho"] / norm) for p in params]
        for p, move in zip(params, moves, strict=True):
            p.add_(move)
        loss = closure()
        for p, move in zip(params, moves, strict=True):
            p.sub_(move).sub_(self.defaults["lr"] * p.grad)
        return loss


@pytest.mark.parametrize("way", ["blocks", "accumulate", "backward"])
def test_a_closure_finds_the_rows_from_before_it_combined(way: str) -> None:
    results = []
    for chosen in (way, "backward"):
        model = TwoHeads()
        opt = MultiTaskOptimizer(Perturbed(model.parameters(), 0.1, 0.05), PCGrad(order="fixed"))

        def closure(opt=opt, model=model, chosen=chosen) -> Tensor:  # type: ignore[no-untyped-def]
            opt.zero_grad()
            if chosen == "backward":
                opt.backward(model.losses())
            else:
                capture(model, opt, chosen)
            return model.losses()[0].detach()

        for _ in range(2):
            closure()
            opt.step(closure)
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_model_can_be_compiled_between_blocks() -> None:
    torch._dynamo.reset()
    model, opt = pair(Sum())
    with opt.task("0"):
        model.losses()[0].backward()
    compiled = torch.compile(model.trunk, backend="aot_eager")
    hidden = compiled(torch.ones(3, 4, dtype=torch.float64))
    with opt.task("1"):
        model.heads[1](hidden).sum().backward()
    assert opt.report is None
    opt.step()
    assert opt.report.active.tolist() == [True, True]


def test_looking_in_inference_mode() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    with torch.inference_mode():
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert torch.allclose(norm, torch.cat([g.flatten() for g in combined()]).norm())
    opt.step()
    opt.zero_grad()
    capture(model, opt, "blocks")
    opt.step()


def test_a_failed_combination_can_be_tried_again() -> None:
    class Once(Mean):  # type: ignore[misc]
        failed = False

        def solve(self, gram, **options):  # type: ignore[no-untyped-def]
            if not Once.failed:
                Once.failed = True
                raise KeyError("once")
            return super().solve(gram, **options)

    model, opt = pair(Once())
    capture(model, opt, "blocks")
    with pytest.raises(KeyError):
        model.trunk[0].weight.grad.norm()
    assert list(opt._training.pending.rows) == ["0", "1"] and uncombined(model.parameters()) == [None] * 8
    assert model.trunk[0].weight.grad.norm() > 0
    opt.step()


def test_copies_know_nothing_of_captured_rows() -> None:
    model, opt = pair()
    capture(model, opt, "blocks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin, copied = copy.deepcopy((model, opt))
    assert all(p.grad is None for p in twin.parameters()) and not copied._training.pending.rows
    capture(twin, copied, "blocks")
    copied.step()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
