"""refresh_every: one weighted backward pass between the steps that compute the weights."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_optim import MGDA, Constant, MultiTaskOptimizer, PCGrad
from optim.oracle import TwoHeads, rows_of


def passes(model: TwoHeads) -> list[int]:
    count = [0]
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize("head_scaling", ["none", "weights"])
@pytest.mark.parametrize("plain_group", [False, True])
def test_reused_weights(head_scaling: str, plain_group: bool) -> None:
    model = TwoHeads(3)
    plain = list(model.trunk[0].parameters()) if plain_group else []
    managed = [p for p in model.parameters() if all(p is not q for q in plain)]
    groups = [{"params": managed}, {"params": plain, "mtl": False}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), PCGrad(), refresh_every=3, head_scaling=head_scaling)
    count, weights = passes(model), None
    for step in range(7):
        opt.zero_grad()
        params = list(model.parameters())
        rows = rows_of(model.losses(step), params)
        before = count[0]
        opt.backward(model.losses(step))
        fresh = step % 3 == 0
        assert count[0] - before == (3 if fresh else 1)
        assert opt.report.age == step % 3
        if fresh:
            weights = opt.report.weights
            assert ("old" in str(opt.report)) is False
        for p, param in enumerate(params):
            column = [row[p] for row in rows]
            reached = [k for k in range(3) if column[k] is not None]
            if any(param is q for q in plain) or (len(reached) == 1 and head_scaling == "none"):
                expected = sum(column[k] for k in reached)
            else:
                expected = sum(weights[k] * column[k] for k in reached)
            assert torch.allclose(param.grad, expected)
        opt.step()
    assert opt.method.state["rng"].tolist() == [0, 3]


def test_outside_tensors_get_their_sum_once() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), refresh_every=2)
    extra = nn.Parameter(torch.ones((), dtype=torch.float64))
    for step in range(2):
        extra.grad = None
        with pytest.warns(UserWarning, match="not in the optimizer") if step == 0 else contextlib.nullcontext():
            opt.backward([loss * extra for loss in model.losses()])
        assert torch.allclose(extra.grad, sum(model.losses()))


def test_what_forces_new_weights() -> None:
    model = TwoHeads(3)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), refresh_every=100)

    def age(losses: list[Tensor] | dict[str, Tensor], **options: bool) -> int:
        opt.zero_grad()
        opt.backward(losses, **options)
        if options:
            opt.combine()
        return opt.report.age

    assert [age(model.losses()) for _ in range(3)] == [0, 1, 2]
    assert age(model.losses()[:2]) == 0 and age(model.losses()[:2]) == 1
    assert age(dict(zip("102", (model.losses()[k] for k in (1, 0, 2)), strict=True))) == 0
    assert age(model.losses()) == 1
    assert age(model.losses(), accumulate=True) == 0
    assert age(model.losses()) == 1
    model.heads[0].bias.requires_grad_(False)
    assert age(model.losses()) == 0
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert age(model.losses()) == 0


def test_weights_of_a_non_finite_step_are_not_reused() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Constant([1.0, 2.0]), refresh_every=4)
    ages = []
    for factor in (float("inf"), float("nan"), 1.0, float("nan"), 1.0):
        opt.zero_grad()
        opt.backward([loss * factor for loss in model.losses()])
        ages.append(opt.report.age)
    assert ages == [0, 0, 0, 1, 2]


def test_failure_restores() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), refresh_every=4)
    opt.backward(model.losses())
    before = [p.grad.clone() for p in model.parameters()]
    losses = model.losses()
    losses[1].backward(inputs=[model.trunk[0].weight])
    model.trunk[0].weight.grad.copy_(before[0])
    with pytest.raises(RuntimeError, match="already freed"):
        opt.backward(losses)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert opt.report.age == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(TwoHeads):
        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = checkpoint(self.trunk, x.requires_grad_(), use_reentrant=reentrant)
            return [head(hidden) for head in self.heads]

    model = Checkpointed()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), refresh_every=2)
    with pytest.warns(UserWarning, match="not in the optimizer"):
        opt.backward(model.losses())
    before = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    if reentrant:
        with pytest.warns(UserWarning, match="use_reentrant=False"):
            opt.backward(model.losses())
    else:
        opt.backward(model.losses())
    assert opt.report.age == (0 if reentrant else 1)
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
