"""What an optimizer has seen of heads goes along: a task that comes alone is weighted alike after a checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mtl_optim import (
    MGDA,
    CAGrad,
    Constant,
    FairGrad,
    GradNormBalance,
    Method,
    MultiTaskOptimizer,
    NashMTL,
    Normalized,
    ReNorm,
)

METHODS: dict[str, Callable[[], Method]] = {
    "constant": lambda: Constant({"a": 0.01, "b": 1.0}),
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "gradnormbalance": GradNormBalance,
    "cagrad": lambda: CAGrad(c=0.5),
    "renorm": ReNorm,
    "normalized": lambda: Normalized(MGDA()),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def step(self, opt: MultiTaskOptimizer, names: str) -> list[torch.Tensor]:
        z = self.trunk(torch.linspace(-1, 1, 32).reshape(8, 4))
        losses = {"a": self.a(z).square().mean(), "b": (self.b(z) - 1).square().mean()}
        opt.zero_grad()
        opt.backward({name: losses[name] for name in names})
        opt.step()
        return [p.grad.clone() for p in self.parameters() if p.grad is not None]


def optimizer(net: Net, method: Method, several: bool) -> MultiTaskOptimizer:
    parts = [[net.trunk, net.b], [net.a]] if several else [[net.trunk, net.a, net.b]]
    return MultiTaskOptimizer(
        [torch.optim.SGD([p for module in part for p in module.parameters()], lr=0.0) for part in parts], method
    )


@pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "two optimizers"])
@pytest.mark.parametrize("name", METHODS)
def test_a_lone_task_is_weighted_alike_after_a_checkpoint(name: str, several: bool) -> None:
    net = Net()
    opt = optimizer(net, METHODS[name](), several)
    net.step(opt, "ab")
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = optimizer(net, METHODS[name](), several)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    their_net, theirs = copy.deepcopy((net, opt))
    file = io.BytesIO()
    torch.save((net, opt), file)
    file.seek(0)
    loaded_net, loaded = torch.load(file, weights_only=False)
    never = optimizer(net, METHODS[name](), several)
    wrong = net.step(never, "a")
    expected = net.step(opt, "a")
    assert any(not torch.equal(a, b) for a, b in zip(wrong, expected, strict=True))  # so that the test can fail
    for one_net, one in ((net, resumed), (their_net, theirs), (loaded_net, loaded)):
        assert all(torch.equal(a, b) for a, b in zip(one_net.step(one, "a"), expected, strict=True))


def test_a_state_dict_replaces_what_was_seen_and_an_older_one_does_not_tell() -> None:
    net = Net()
    fresh, seen = (optimizer(net, Constant({"a": 0.01, "b": 1.0}), False) for _ in range(2))
    plain = net.step(fresh, "a")
    net.step(seen, "ab")
    known = net.step(seen, "a")
    state: dict[str, Any] = fresh.state_dict()
    assert (
        state["mtl"]["heads"] == [None] * 6 and seen.state_dict()["mtl"]["heads"] == [None] * 2 + ["a"] * 2 + ["b"] * 2
    )
    older = copy.deepcopy(state)
    del older["mtl"]["heads"]
    seen.load_state_dict(older)
    assert all(map(torch.equal, net.step(seen, "a"), known))
    seen.load_state_dict(state)
    assert all(map(torch.equal, net.step(seen, "a"), plain))
