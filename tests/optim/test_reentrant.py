"""Reentrant checkpointing, whose parameters the graph of the losses does not show, where gradients outside are kept."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_optim import MGDA, MoDo, MultiTaskOptimizer, PCGrad, SDMGrad
from mtl_optim.step.surroundings import HIDDEN

pytestmark = pytest.mark.usefixtures("each_capture")


class Judged(nn.Module):
    """A trunk that is checkpointed in whole or in part, two heads, and a judge of one of them outside the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b, self.judge = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(1, 1)

    def losses(self, x: Tensor, reentrant: bool, whole: bool) -> dict[str, Tensor]:
        if whole:
            z = checkpoint(nn.Sequential(self.first, self.second), x, use_reentrant=reentrant)
        else:
            z = self.second(checkpoint(self.first, x, use_reentrant=reentrant))
        return {"a": self.judge(self.a(z)).square().mean(), "b": (self.b(z) - 1).square().mean()}


def step(reentrant: bool, whole: bool, method: Any, **options: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """One step: the gradients inside, those outside beyond what was there, and warnings."""
    model = Judged()
    inside = [p for name, p in model.named_parameters() if not name.startswith("judge")]
    opt = MultiTaskOptimizer(torch.optim.SGD(inside, lr=0.0), method, **options)
    inputs = [torch.randn(8, 4, requires_grad=True) for _ in range(method.num_batches)]
    outside = [*inputs, *model.judge.parameters()]
    for leaf in outside:
        leaf.grad = torch.full_like(leaf, 2.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch, x in enumerate(inputs):
            opt.backward(model.losses(x, reentrant, whole), batch=batch)
        opt.combine() if method.num_batches > 1 else None
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in inside]
    assert all(bool(grad.any()) for grad in grads)
    return grads, [leaf.grad - 2.0 for leaf in outside], [str(one.message) for one in said]  # type: ignore[operator]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("method", [PCGrad(order="fixed"), MGDA()], ids=repr)
def test_the_trunk_trains_and_the_judge_is_left_alone(method: Any, whole: bool) -> None:
    torch.manual_seed(1)
    plain, none, said = step(False, whole, method, outside="keep")
    torch.manual_seed(1)
    hidden, kept, warned = step(True, whole, method, outside="keep")
    assert all(map(torch.equal, hidden, plain))
    assert not any(bool(grad.any()) for grad in (*none, *kept))
    assert said.count(HIDDEN) == 0 and warned.count(HIDDEN) == 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("method", [MoDo, SDMGrad])
def test_methods_of_several_batches(method: Any, whole: bool) -> None:
    """Only the last batch adds to what is outside: the others are there for the weights."""
    torch.manual_seed(1)
    plain, added, _ = step(False, whole, method())
    torch.manual_seed(1)
    hidden, also_added, _ = step(True, whole, method())
    assert all(map(torch.equal, hidden, plain)) and all(map(torch.equal, added, also_added))
    assert bool(added[-1].any()) and not bool(added[0].any())


def test_a_step_that_fails_leaves_the_judge_alone() -> None:
    model = Judged()
    inside = [p for name, p in model.named_parameters() if not name.startswith("judge")]
    opt = MultiTaskOptimizer(torch.optim.SGD(inside, lr=0.0), PCGrad(), outside="keep")
    losses = model.losses(torch.randn(8, 4, requires_grad=True), True, True)
    losses["b"].register_hook(lambda grad: 1 / 0)
    with pytest.warns(UserWarning, match="may hide parameters"), pytest.raises(ZeroDivisionError):
        opt.backward(losses)
    assert all(p.grad is None for p in model.parameters())
