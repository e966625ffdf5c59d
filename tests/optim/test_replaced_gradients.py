"""Gradients that somebody replaces, adds to or looks at while captured rows wait, and other surprises of loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import Constant, MultiTaskOptimizer, Sum


@pytest.fixture(params=["harvest", "arena"])
def capture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def two_rows(capture: str) -> tuple[Tensor, Tensor, MultiTaskOptimizer]:
    """Two parameters that both tasks reach, captured in two blocks; their summed gradients are 3 and 5 everywhere."""
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    opt = MultiTaskOptimizer(torch.optim.SGD([p, q], lr=1.0), Sum(), capture=capture)
    for name, scale in (("a", (1.0, 2.0)), ("b", (2.0, 3.0))):
        with opt.task(name):
            (scale[0] * p.sum() + scale[1] * q.sum()).backward()
    return p, q, opt


def test_one_gradient_is_replaced(capture: str) -> None:
    p, _, opt = two_rows(capture)
    p.grad = torch.zeros(2)
    with pytest.raises(RuntimeError, match="1 of 2 parameters were cleared or replaced"):
        opt.step()
    assert not p.detach().any()


def test_one_gradient_is_replaced_after_the_combination(capture: str) -> None:
    p, q, opt = two_rows(capture)
    opt.combine()
    p.grad = torch.zeros(2)
    opt.step()
    assert p.tolist() == [0, 0] and q.tolist() == [-5, -5]


def test_all_gradients_are_replaced(capture: str) -> None:
    p, q, opt = two_rows(capture)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    with (
        pytest.warns(UserWarning, match="its rows were dropped"),
        pytest.raises(RuntimeError, match="no task captured"),
    ):
        opt.step()
    assert p.grad.tolist() == [1, 1] and not p.detach().any()


def test_a_plain_pass_after_an_abandoned_step(capture: str) -> None:
    p, q, opt = two_rows(capture)
    p.grad = q.grad = None
    (10 * p.sum() + 10 * q.sum()).backward()
    with pytest.warns(UserWarning, match="'a', 'b' had been captured: the step counts as abandoned"), opt.task("b"):
        (2 * p.sum() + 3 * q.sum()).backward()
    opt.combine()
    assert p.grad is not None and p.grad.tolist() == [12, 12] and q.grad is not None and q.grad.tolist() == [13, 13]


def test_a_look_before_combine(capture: str) -> None:
    p, _, opt = two_rows(capture)
    assert p.grad is not None and float(p.grad.norm()) == pytest.approx(3 * 2**0.5)
    opt.combine()
    assert p.grad.tolist() == [3, 3]
    opt.step()
    assert p.tolist() == [-3, -3]
    with pytest.raises(RuntimeError, match="nothing to combine"):
        opt.combine()


def test_a_hook_that_adds_a_part(capture: str) -> None:
    p, _, opt = two_rows(capture)

    def hook(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.add_(torch.ones(2), alpha=0.5)

    p.register_post_accumulate_grad_hook(hook)
    p.sum().backward()
    opt.combine()
    assert p.grad is not None and p.grad.tolist() == [4.5, 4.5]


def test_memory_of_a_gradient_that_waits(capture: str) -> None:
    p, _, _ = two_rows(capture)
    assert p.grad is not None and torch.from_dlpack(p.grad).tolist() == [3, 3]
    q = two_rows(capture)[1]
    assert q.grad is not None and q.grad.data_ptr() != 0


def test_a_weight_listed_twice(capture: str) -> None:
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        inner = torch.optim.SGD([p, q, p], lr=0.0)
    opt = MultiTaskOptimizer(inner, Sum(), capture=capture)
    opt.backward([(p * q).sum(), 2 * p.sum()])
    assert p.grad is not None and p.grad.tolist() == [3]


@pytest.mark.parametrize("several", [False, True])
def test_a_plain_state_dict_leaves_groups_out_of_the_combination(several: bool) -> None:
    trunk, head = nn.Linear(2, 2), nn.Linear(2, 1)
    plain = torch.optim.SGD([{"params": list(trunk.parameters())}, {"params": list(head.parameters())}], lr=0.1)
    groups = [{"params": list(trunk.parameters()), "mtl": False}, {"params": list(head.parameters())}]
    inner = [torch.optim.SGD([group], lr=0.2) for group in groups] if several else torch.optim.SGD(groups, lr=0.2)
    opt = MultiTaskOptimizer(inner, Sum())
    with pytest.warns(UserWarning):
        opt.load_state_dict(plain.state_dict())
    assert [group.get("mtl") for group in opt.param_groups] == [False, None]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.1]


def test_defaults_of_several_optimizers_are_what_they_share() -> None:
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    opt = MultiTaskOptimizer([torch.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.AdamW([q], lr=0.2)], Sum())
    assert opt.defaults["lr"] == 0.1 and not {"momentum", "betas"} & set(opt.defaults)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=10, cycle_momentum=False)


def test_a_head_belongs_to_its_task() -> None:
    """What task a alone has reached is no head of task b: b is weighed there."""
    trunk, head = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    opt = MultiTaskOptimizer(torch.optim.SGD([trunk, head], lr=1.0), Constant({"a": 1.0, "b": 0.25}))
    opt.backward({"a": trunk.sum(), "b": (trunk.detach() + head).sum()})
    opt.zero_grad()
    opt.backward({"b": trunk.sum() + head.sum()})
    assert trunk.grad is not None and trunk.grad.tolist() == [0.25, 0.25]
    assert head.grad is not None and head.grad.tolist() == [1, 1]
