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


def test_sparse_gradients_are_dense_in_every_step() -> None:
    """Adam refuses sparse ones."""
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = MultiTaskOptimizer(torch.optim.Adam(embedding.parameters(), lr=0.1), MGDA(), refresh_every=2)
    for step in range(3):
        out = embedding(torch.tensor([1, 3]))
        opt.zero_grad()
        with pytest.warns(UserWarning, match="made dense") if step == 0 else contextlib.nullcontext():
            opt.backward([out.sum(), out.square().sum()])
        assert opt.report.age == step % 2 and not embedding.weight.grad.is_sparse
        opt.step()


@pytest.mark.usefixtures("each_capture")
def test_gradients_that_share_memory_are_taken_apart_in_every_step() -> None:
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    opt = MultiTaskOptimizer(torch.optim.SGD([a, b], lr=0.1), Constant([1, 3]), refresh_every=9)
    for step in range(3):
        if step < 2:
            opt.zero_grad()
        total = a.view(-1) + b.view(-1)
        opt.backward([(total * torch.arange(6.0)).sum(), (total * 10).sum()])
    assert opt.report.age == 2
    assert all(p.grad.flatten().tolist() == [60, 62, 64, 66, 68, 70] for p in (a, b))


class Net(nn.Module):
    """Two trunks and a head; which trunk is frozen decides which task reaches the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.second = (nn.Parameter(torch.tensor(v)) for v in ([1.0, 2.0], [3.0], [1.0, 1.0]))

    def losses(self) -> dict[str, Tensor]:
        product = self.first * self.second
        return {"a": product[0] * self.head.sum(), "b": product.sum()}


def test_other_parameters_of_the_same_number_force_new_weights() -> None:
    found = []
    for refresh_every in (1, 4):
        net = Net()
        opt = MultiTaskOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.0), Constant([2, 5]), refresh_every=refresh_every
        )
        for frozen, thawed in ((net.second, net.first), (net.first, net.second)):
            frozen.requires_grad_(False)
            thawed.requires_grad_(True)
            opt.zero_grad()
            opt.backward(net.losses())
        assert opt.report.age == 0
        found.append((net.head.grad.tolist(), net.second.grad.tolist()))
        for age in (1, 2):
            opt.zero_grad()
            opt.backward(net.losses())
            assert opt.report.age == (age if refresh_every > 1 else 0)
    assert found[0] == found[1] == ([1], [11, 10])


def test_weights_that_were_saved_are_for_the_parameters_of_the_next_step() -> None:
    net, other = Net(), Net()
    options = {"method": Constant([2, 5]), "refresh_every": 4}
    opt = MultiTaskOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), **options)
    resumed = MultiTaskOptimizer(torch.optim.SGD(other.parameters(), lr=0.0), **options)
    net.second.requires_grad_(False)
    opt.backward(net.losses())
    resumed.load_state_dict(opt.state_dict())
    other.second.requires_grad_(False)  # frozen after loading
    for number in (1, 2):
        resumed.backward(other.losses())
        assert resumed._training.progress.reusable.age == number
    other.first.requires_grad_(False)
    other.second.requires_grad_(True)
    resumed.backward(other.losses())
    assert resumed.report.age == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_too_coarse_for_the_weights(dtype: torch.dtype) -> None:
    """Autograd hands a loss its gradient in the dtype of the loss."""

    def run(method: Constant, refresh_every: int) -> tuple[list[float], int]:
        w = nn.Parameter(torch.ones(3))
        opt = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), method, refresh_every=refresh_every)
        for _ in range(3):
            opt.zero_grad()
            opt.backward([w.to(dtype).sum(), (w.to(dtype) * 2).sum()])
        return w.grad.tolist(), opt.report.age

    for weights in ([1.001, 3.003], [1e-8, 1]):
        expected, _ = run(Constant(weights), 1)
        with pytest.warns(UserWarning, match=f"{str(dtype).removeprefix('torch.')}.*compute them in float32"):
            assert run(Constant(weights), 4) == (expected, 0)
    assert run(Constant([0.5, 2]), 4) == ([4.5] * 3, 2)
