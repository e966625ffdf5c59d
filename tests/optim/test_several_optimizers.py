"""Several inner optimizers under one wrapper, and two wrappers over one graph."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MGDA, Mean, MultiTaskOptimizer, PCGrad, Sum
from optim.oracle import TwoHeads

pytestmark = pytest.mark.usefixtures("each_capture")


def split(model: TwoHeads) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices and the rest, as Muon and AdamW share a model."""
    params = list(model.parameters())
    return [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]


def inner(model: TwoHeads) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]


def train(model: TwoHeads, opt: MultiTaskOptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        opt.backward(model.losses(step))
        opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("method", [PCGrad(), MGDA()], ids=repr)
def test_one_combination_steps_all(method) -> None:  # type: ignore[no-untyped-def]
    """As one optimizer that treats its param groups so, on the same combined gradient."""
    model, twin = TwoHeads(), TwoHeads()
    opt = MultiTaskOptimizer(inner(model), copy.deepcopy(method))
    plain = MultiTaskOptimizer(torch.optim.SGD(twin.parameters(), lr=0.0), copy.deepcopy(method))
    steppers = inner(twin)
    for step in range(4):
        opt.zero_grad()
        opt.backward(model.losses(step))
        opt.step()
        plain.zero_grad()
        plain.backward(twin.losses(step))
        for stepper in steppers:
            stepper.step()
        assert torch.equal(opt.report.gram.diagonal().sort().values, opt.report.gram.diagonal().sort().values)
        assert same(model, twin) or all(
            torch.allclose(p, q, rtol=1e-12) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
    assert len(opt.param_groups) == 2 and len(opt.state) == 8
    assert opt.param_groups[1] is opt.optimizers[1].param_groups[0]


def test_what_an_optimizer_shows() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(inner(model), Mean())
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    order: list[str] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: order.append("pre") if o is opt else None)
    opt.register_step_post_hook(lambda o, args, kwargs: order.append("post") if o is opt else None)
    train(model, opt, range(1))
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.005]
    assert [one.param_groups[0]["lr"] for one in opt.optimizers] == [0.05, 0.005] and order == ["pre", "post"]
    weight, bias = model.trunk[0].weight, model.trunk[0].bias
    assert opt.state[bias] is opt.optimizers[1].state[bias] and set(opt.state[weight]) == {"momentum_buffer"}
    opt.state[bias] = {"step": 3}
    assert opt.optimizers[1].state[bias] == {"step": 3} and set(opt.state) == set(model.parameters())
    del opt.state[bias]
    assert bias not in opt.state and "lr" in opt.defaults and "betas" not in opt.defaults
    with pytest.raises(AttributeError, match="2 optimizers are wrapped"):
        _ = opt.optimizer
    with pytest.raises(ValueError, match=r"add it to one of opt\.optimizers"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    opt.optimizers[1].add_param_group({"params": [extra := nn.Parameter(torch.ones((), dtype=torch.float64))]})
    opt.zero_grad()
    opt.backward([loss * extra for loss in model.losses()])
    opt.step()
    assert extra.item() != 1 and "SGD" in repr(opt) and "AdamW" in repr(opt)


def test_resuming_is_bit_for_bit() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(inner(model), PCGrad(seed=3))
    train(model, opt, range(3))
    saved, start = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
    assert saved.keys() == {"state", "param_groups", "mtl"} and sorted(saved["state"]) == list(range(8))
    train(model, opt, range(3, 6))
    resumed = MultiTaskOptimizer(inner(start), PCGrad(seed=3))
    resumed.load_state_dict(saved)
    train(start, resumed, range(3, 6))
    assert same(model, start)
    # The same as that of one optimizer over all of these groups.
    one = torch.optim.SGD([{"params": group["params"]} for group in opt.param_groups], lr=0.1)
    assert [group["params"] for group in one.state_dict()["param_groups"]] == [
        group["params"] for group in saved["param_groups"]
    ]
    broken = copy.deepcopy(saved)
    broken["param_groups"][1]["params"] = broken["param_groups"][1]["params"][:-1]
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError):
        resumed.load_state_dict(broken)
    with pytest.raises(ValueError, match=r"has 1 param groups, the optimizers have \[1, 1\]"):
        resumed.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})
    assert str(resumed.state_dict()) == str(before)


def test_pickling_and_copying() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(inner(model), PCGrad(seed=3))
    train(model, opt, range(2))
    twin, copied = copy.deepcopy((model, opt))
    train(model, opt, range(2, 4))
    train(twin, copied, range(2, 4))
    assert same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    model, twin = TwoHeads(dtype=torch.float32), TwoHeads(dtype=torch.float32)

    def build(model: TwoHeads) -> MultiTaskOptimizer:
        options = {"fused": True} if fused else {}
        pair = [torch.optim.AdamW(params, lr=0.01, **options) for params in split(model)]
        return MultiTaskOptimizer(pair, PCGrad(order="fixed"))

    opt, plain = build(model), build(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        bad = torch.inf if step == 2 else 1.0
        opt.zero_grad()
        opt.backward([scaler.scale(loss * bad) for loss in model.losses(step)])
        scaler.step(opt)
        scaler.update()
        if step != 2:
            train(twin, plain, range(step, step + 1))
        assert same(model, twin)
    assert not any(hasattr(one, "found_inf") for one in opt.optimizers)


def test_a_closure_runs_once_for_all() -> None:
    model, twin = TwoHeads(), TwoHeads()
    opt, plain = MultiTaskOptimizer(inner(model), PCGrad()), MultiTaskOptimizer(inner(twin), PCGrad())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        opt.zero_grad()
        opt.backward(model.losses())
        return torch.tensor(7.0)

    assert opt.step(closure).item() == 7 and len(calls) == 1
    train(twin, plain, range(1))
    assert same(model, twin)


class ScheduleFree(torch.optim.SGD):
    mode = "none"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_train_and_eval_reach_the_optimizers_that_have_them() -> None:
    first, second = split(TwoHeads())
    opt = MultiTaskOptimizer([ScheduleFree(first, lr=0.1), torch.optim.SGD(second, lr=0.1)], Sum())
    opt.eval()
    assert opt.optimizers[0].mode == "eval"
    opt.train()
    assert opt.optimizers[0].mode == "train"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ([], ValueError, "at least one optimizer"),
        ([torch.optim.SGD], TypeError, "or a list of them"),
        ("sgd", TypeError, "expected a torch.optim.Optimizer"),
    ],
)
def test_bad_lists(wrong, error: type[Exception], text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        MultiTaskOptimizer(wrong, Sum())


def test_a_parameter_belongs_to_one_optimizer() -> None:
    model = TwoHeads()
    with pytest.raises(ValueError, match=r"optimizers 0 and 1 share a parameter of shape \[6, 4\]"):
        MultiTaskOptimizer([torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)], Sum())


def test_two_wrappers_over_one_graph_are_told() -> None:
    """Each adds plain sums to the other's parameters: every gradient would count twice."""
    model = TwoHeads()
    first, second = (MultiTaskOptimizer(one, Sum()) for one in inner(model))
    with pytest.warns(UserWarning, match=r"reach parameters of another MultiTaskOptimizer.*\[first, second\]"):
        first.backward(model.losses())
    with pytest.warns(UserWarning, match="counts twice"), second.task("0"):
        model.losses()[0].backward()


@pytest.mark.parametrize("way", ["backward", "blocks", "nested", "nested keep", "refresh"])
def test_outside_keep_leaves_others_alone(way: str) -> None:
    model, twin = TwoHeads(), TwoHeads()
    options = {"outside": "keep", "refresh_every": 3 if way == "refresh" else 1}
    if way == "nested":
        options["outside"] = "sum"  # two open blocks know of each other
    first, second = (MultiTaskOptimizer(one, Sum(), **options) for one in inner(model))
    plain = MultiTaskOptimizer(inner(twin), Sum())
    probe = nn.Parameter(torch.ones((), dtype=torch.float64))
    probe.grad = torch.full((), 5.0, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            for opt in (first, second):
                opt.zero_grad()
            if way in ("backward", "refresh"):
                first.backward([loss * probe for loss in model.losses(step)])
                second.backward([loss * probe for loss in model.losses(step)])
            for k in range(2) if way in ("blocks", "nested", "nested keep") else ():
                if "nested" in way:
                    with first.task(str(k)), second.task(str(k)):
                        model.losses(step)[k].backward()
                    continue
                for opt in (first, second):
                    with opt.task(str(k)):
                        model.losses(step)[k].backward()
            for opt in (first, second):
                opt.step()
            train(twin, plain, range(step, step + 1))
            assert all(torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert probe.grad.item() == 5
    if way == "refresh":
        assert first.report.age == 2


def test_outside_is_checked() -> None:
    with pytest.raises(ValueError, match="outside='drop' is unknown; choose one of 'sum', 'keep'"):
        MultiTaskOptimizer(inner(TwoHeads())[0], Sum(), outside="drop")
