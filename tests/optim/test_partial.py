"""A Gram matrix over the last layers: its weights, and the exact weighted sum of all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_optim import (
    MGDA,
    CAGrad,
    GradDrop,
    GradVac,
    MoCo,
    MoDo,
    MultiTaskOptimizer,
    NashMTL,
    Normalized,
    PCGrad,
    ReNorm,
    Sum,
    UPGrad,
    gram_groups,
)

TASKS = 4
METHODS: dict[str, Callable[[], Any]] = {
    "sum": Sum,
    "pcgrad": lambda: PCGrad(seed=3),
    "gradvac": lambda: GradVac(seed=3),
    "mgda": MGDA,
    "cagrad": CAGrad,
    "nash": NashMTL,
    "upgrad": UPGrad,
    "renorm": ReNorm,
    "normalized": lambda: Normalized(MGDA()),
}


class Model(nn.Module):
    """Three shared layers and a head a task; `count` counts the backward passes through the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS))
        self.count = 0
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        h = self.first(x)
        if h.requires_grad:
            h.register_hook(self._tick)
        h = self.third(self.second(h.tanh()).tanh()).tanh()
        return [(head(h).squeeze(-1) - t).square().mean() for head, t in zip(self.heads, y, strict=True)]

    def _tick(self, grad: Tensor) -> None:
        self.count += 1


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(9, 6, dtype=torch.float64), torch.randn(TASKS, 9, dtype=torch.float64)


def optimizer(model: Model, method: Any, **options: Any) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(torch.optim.SGD(gram_groups(model, model.third), lr=0.1), method, **options)


def by_hand(model: Model, method: Any, batch: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The gradients by the definition, and the weights."""
    losses = model(*batch)
    shared = [p for layer in (model.first, model.second, model.third) for p in layer.parameters()]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    heads = [
        torch.autograd.grad(loss, list(h.parameters()), retain_graph=True)
        for loss, h in zip(losses, model.heads, strict=True)
    ]
    last = torch.stack([torch.cat([g.flatten() for g in row[4:]]) for row in rows])
    gram = last @ last.T
    if isinstance(method, ReNorm):
        norms = torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in heads])
        method = method.with_heads(norms)
    weights = method.weights(gram)
    grads = [sum(w * row[p] for w, row in zip(weights, rows, strict=True)) for p in range(len(shared))]
    return [*grads, *(g for one in heads for g in one)], weights  # type: ignore[list-item]


def compare(model: Model, expected: list[Tensor]) -> None:
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_definition_with_one_pass_through_the_first_layers(
    name: str, model: Model, batch: tuple[Tensor, Tensor]
) -> None:
    expected, weights = by_hand(model, METHODS[name](), batch)
    opt = optimizer(model, METHODS[name]())
    losses = model(*batch)
    model.count = 0
    opt.backward(losses)
    assert model.count == 1
    compare(model, expected)
    assert opt.report is not None and opt.report.weights is not None
    torch.testing.assert_close(opt.report.weights, weights, rtol=1e-9, atol=1e-12)
    opt.step()


@pytest.mark.parametrize("route", ["blocks", "accumulate", "arena"])
def test_whole_rows_give_the_same(route: str, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    expected, _ = by_hand(model, MGDA(), batch)
    opt = optimizer(model, MGDA(), capture="arena" if route == "arena" else "harvest")
    losses = model(*batch)
    if route == "blocks":
        for k, loss in enumerate(losses):
            with opt.task(str(k)):
                loss.backward(retain_graph=True)
        opt.combine()
    elif route == "accumulate":
        opt.backward([loss / 2 for loss in losses], accumulate=True, retain_graph=True)
        opt.backward([loss / 2 for loss in losses])
    else:
        opt.backward(losses)
    compare(model, expected)


def test_a_float16_loss_and_a_graph_that_hides_parameters(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    expected, _ = by_hand(model, MGDA(), batch)
    opt = optimizer(model, MGDA())
    h = checkpoint(
        lambda h: model.third(model.second(h.tanh()).tanh()).tanh(), model.first(batch[0]), use_reentrant=True
    )
    losses = [(head(h).squeeze(-1) - t).square().mean() for head, t in zip(model.heads, batch[1], strict=True)]
    with pytest.warns(UserWarning, match="hides parameters"):
        opt.backward(losses)
    compare(model, expected)
    model.zero_grad()
    opt = optimizer(model, MGDA())
    with pytest.warns(UserWarning, match="16 bits would round"):
        opt.backward([loss.half() for loss in model(*batch)])
    assert model.first.weight.grad is not None


@pytest.mark.parametrize("outside", ["sum", "keep"])
def test_plain_sums(outside: str, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    rate = nn.Parameter(torch.ones(6, dtype=torch.float64))
    groups = [
        {"params": model.first.weight, "mtl": False},
        {"params": [model.first.bias, *model.second.parameters()], "gram": False},
        {"params": [*model.third.parameters(), *model.heads.parameters()]},
    ]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), MGDA(), outside=outside)
    losses = model(batch[0] * rate, batch[1])
    plain = torch.autograd.grad(sum(losses), [model.first.weight, rate], retain_graph=True)
    expected, _ = by_hand(model, MGDA(), batch)
    opt.backward(losses)
    compare(model, [plain[0], *expected[1:]])
    if outside == "sum":
        torch.testing.assert_close(rate.grad, plain[1])
    else:
        assert rate.grad is None


def test_weights_are_used_again(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = optimizer(model, MGDA(), refresh_every=3)
    expected, _ = by_hand(model, MGDA(), batch)
    for age in (0, 1, 2, 0):
        model.zero_grad()
        opt.backward(model(*batch))
        assert opt.report is not None and opt.report.age == age
        compare(model, expected)


@pytest.mark.parametrize("granularity", ["group", "parameter"])
def test_several_problems_give_the_mean_of_their_weights(
    granularity: str, model: Model, batch: tuple[Tensor, Tensor]
) -> None:
    losses = model(*batch)
    rows = torch.stack([torch.autograd.grad(loss, model.first.weight, retain_graph=True)[0] for loss in losses])
    opt = optimizer(model, MGDA(), granularity=granularity)
    opt.backward(losses)
    assert opt.report is not None and opt.report.weights is not None
    weights = opt.report.weights.mean(0)
    torch.testing.assert_close(model.first.weight.grad, torch.einsum("k,kij->ij", weights, rows))


def test_absent_tasks_and_tasks_that_reach_the_first_layers_alone(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = optimizer(model, MGDA(), tasks=[*"abcd"])
    losses = dict(zip("abc", model(*batch), strict=False))
    losses["c"] = model.first.weight.square().sum()
    opt.backward(losses)
    assert opt.report is not None and opt.report.active.tolist() == [True, True, False, False]
    rows = [
        torch.autograd.grad(loss, model.first.weight, retain_graph=True)[0]
        for loss in (*model(*batch)[:2], model.first.weight.square().sum())
    ]
    assert opt.report.weights is not None
    expected = opt.report.weights[0] * rows[0] + opt.report.weights[1] * rows[1] + rows[2]
    torch.testing.assert_close(model.first.weight.grad, expected)


@pytest.mark.parametrize("granularity", ["model", "group"])
def test_the_share_of_the_gram_matrix(granularity: str, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    layers = (model.first, model.second, model.third)
    rows = [
        torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)])
                for loss in model(*batch)
            ]
        )
        for layer in layers
    ]
    part, whole = rows[2] @ rows[2].T, sum(r @ r.T for r in rows)
    assert isinstance(whole, Tensor)

    def cosines(gram: Tensor) -> Tensor:
        return gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())

    expected, _ = by_hand(model, MGDA(), batch)
    opt = optimizer(model, MGDA(), share_every=3, granularity=granularity)
    passes = []
    for step in range(7):
        model.zero_grad()
        losses = model(*batch)
        model.count = 0
        opt.backward(losses)
        passes.append(model.count)
        compare(model, expected)
        share = None if opt.report is None else opt.report.gram_share
        assert opt.report is not None and share is not None and share.age == step % 3
        torch.testing.assert_close(share.trace, part.trace() / whole.trace())
        torch.testing.assert_close(share.cosine_error, (cosines(part) - cosines(whole)).abs().max())
        assert int(share.flips) == int(((part < 0) != (whole < 0)).sum()) // 2
        assert f"{int(share.flips)} pair(s) of another sign, {step % 3} step(s) ago" in opt.report.summary()
    assert passes == [TASKS, 1, 1, TASKS, 1, 1, TASKS]


def test_share_every_is_checked(model: Model) -> None:
    for value, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="expected share_every"):
            optimizer(model, MGDA(), share_every=value)
    with pytest.raises(ValueError, match=r"share_every=2 compares .* there are none"):
        MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), share_every=2)


def test_resuming_and_adding_up(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = optimizer(model, PCGrad(seed=1))
    opt.backward(model(*batch), retain_graph=True)
    opt.step()
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    opt.zero_grad()
    opt.backward(model(*batch))
    found = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    other = Model()
    other.load_state_dict(weights)
    resumed = optimizer(other, PCGrad(seed=1))
    resumed.load_state_dict(saved)
    resumed.backward(other(*batch))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(other.parameters(), found, strict=True))
    resumed.method.state["rng"].copy_(saved["mtl"]["state"]["rng"])
    resumed.backward(other(*batch))
    compare(other, [2 * grad for grad in found])


def test_an_error_leaves_everything_as_it_was(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = optimizer(model, MGDA())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    losses = model(*batch)
    losses[0].grad_fn.register_prehook(lambda grads: None)  # type: ignore[union-attr]
    handle = model.first.weight.register_hook(lambda grad: (_ for _ in ()).throw(ArithmeticError("in the first layer")))
    with pytest.raises(ArithmeticError, match="in the first layer"):
        opt.backward(losses, retain_graph=True)
    assert all((p.grad == 1).all() for p in model.parameters()) and opt.report is None
    handle.remove()
    opt.backward(losses)


def test_what_gram_false_cannot_be(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    params, rest = list(model.first.parameters()), [*model.second.parameters(), *model.third.parameters()]

    def made(method: Any, **keys: Any) -> MultiTaskOptimizer:
        return MultiTaskOptimizer(torch.optim.SGD([{"params": params, **keys}, {"params": rest}], lr=0.1), method)

    with pytest.raises(TypeError, match=r"param group 0 has gram=1; expected True .* or False"):
        made(MGDA(), gram=1)
    with pytest.raises(ValueError, match="gram=False and mtl=False"):
        made(MGDA(), gram=False, mtl=False)
    for method in (GradDrop(), MoCo()):
        with pytest.raises(ValueError, match="is no weighted sum"):
            made(method, gram=False)
    with pytest.raises(ValueError, match="MoDo takes 3"):
        made(MoDo(), gram=False)
    opt = MultiTaskOptimizer(torch.optim.SGD(rest, lr=0.1), GradDrop())
    with pytest.raises(ValueError, match="is no weighted sum"):
        opt.add_param_group({"params": params, "gram": False})
    assert len(opt.param_groups) == 1
    heads = list(model.heads.parameters())
    opt = MultiTaskOptimizer(
        torch.optim.SGD([{"params": [*params, *rest], "gram": False}, {"params": heads}], lr=0.1), MGDA()
    )
    with pytest.raises(ValueError, match="no parameter that several tasks reach is in the Gram matrix"):
        opt.backward(model(*batch))
    assert all(p.grad is None for p in model.parameters())
    z = model.first(batch[0])
    opt = optimizer(model, MGDA())
    with pytest.raises(ValueError, match="features= with a param group of gram=False"):
        opt.backward([z.sum(), z.square().sum()], features=z)


def test_gram_groups(model: Model) -> None:
    early, late = gram_groups(model, model.second, weight_decay=0.1)
    assert early["gram"] is False and early["weight_decay"] == late["weight_decay"] == 0.1 and "gram" not in late
    assert [p.shape for p in early["params"]] == [(7, 6), (7,)] and len(late["params"]) == 4 + 2 * TASKS
    with pytest.raises(ValueError, match="no parameter comes before"):
        gram_groups(model, model.first)
    with pytest.raises(ValueError, match="a module of the model that has parameters"):
        gram_groups(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a module of the model that has parameters"):
        gram_groups(model, nn.Tanh())
