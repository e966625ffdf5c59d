"""`joint_loss` against `MultiTaskOptimizer.backward`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MultiTaskOptimizer, PCGrad, Sum
from mtl_optim.trainers import joint_loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 7, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(7, 1, dtype=torch.float64) for _ in range(3))

    def losses(self, step: int) -> dict[str, Tensor]:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        z = self.trunk(x).tanh()
        return {f"task{k}": (head(z) - 3 + 2 * k).square().mean() for k, head in enumerate(self.heads)}


def make(**options: Any) -> tuple[Net, MultiTaskOptimizer]:
    net = Net()
    return net, MultiTaskOptimizer(torch.optim.AdamW(net.parameters(), lr=0.1), PCGrad(), **options)


def same(net: Net, other: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_gradient_scaler_and_clipping(kind: type, accumulate: bool) -> None:
    """Scales that are powers of two change nothing, to the bit."""
    (net, opt), (expected, plain) = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        losses = net.losses(step)
        loss = joint_loss(opt, losses if kind is dict else list(losses.values()), accumulate=accumulate)
        assert loss.item() == pytest.approx(sum(loss.item() for loss in losses.values()))
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        plain.backward(expected.losses(step))
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
    assert same(net, expected)


def test_micro_batches_are_added_up_before_they_are_combined() -> None:
    (net, opt), (expected, plain) = make(), make()
    for step in range(3):
        for micro in (0, 1):
            (joint_loss(opt, net.losses(2 * step + micro)) / 2).backward()
        opt.step()
        opt.zero_grad()
        halves = expected.losses(2 * step), expected.losses(2 * step + 1)
        plain.backward({name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]})
        plain.step()
        plain.zero_grad()
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_options_are_those_of_backward() -> None:
    (net, opt), (expected, plain) = make(refresh_every=2), make(refresh_every=2)
    for step in range(3):
        opt.zero_grad()
        joint_loss(opt, net.losses(step), accumulate=False).backward()
        opt.step()
        plain.zero_grad()
        plain.backward(expected.losses(step))
        plain.step()
    assert same(net, expected)
    with pytest.raises(TypeError, match="unknown"):
        joint_loss(opt, net.losses(0), unknown=True).backward()


def test_evaluation_needs_no_optimizer() -> None:
    net = Net()
    with torch.no_grad():
        loss = joint_loss(None, net.losses(0))  # type: ignore[arg-type]
    assert not loss.requires_grad and loss.item() == pytest.approx(sum(one.item() for one in net.losses(0).values()))


def test_wrong_arguments() -> None:
    net, opt = make()
    losses = net.losses(0)
    with pytest.raises(TypeError, match=r"expected a MultiTaskOptimizer.*found AdamW; wrap the optimizer"):
        joint_loss(opt.optimizer, losses)
    for wrong in ({}, torch.ones(3), sum(losses.values())):
        with pytest.raises(TypeError, match="expected a list, tuple or dict of scalar losses"):
            joint_loss(opt, wrong)
    with pytest.raises(ValueError, match="expected a scalar"):
        joint_loss(opt, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match=r"requires? grad"):
        joint_loss(opt, {"a": torch.ones(())})


def test_an_error_of_backward_leaves_everything_as_it_was() -> None:
    net = Net()
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Sum(), tasks=["task0", "task1"])
    with pytest.raises(ValueError, match="task2"):
        joint_loss(opt, net.losses(0)).backward()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="no task captured"):
        opt.step()
