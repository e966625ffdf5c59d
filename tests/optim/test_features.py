"""Gradients at the features between a shared trunk and the heads, against the same by hand on detached features."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_optim import (
    CRMOGM,
    DBMTL,
    MGDA,
    CAGrad,
    ConFIG,
    ExcessMTL,
    GradDrop,
    Krum,
    Mean,
    MoCo,
    MoDo,
    MultiTaskOptimizer,
    NashMTL,
    Normalized,
    PCGrad,
    ReNorm,
    SDMGrad,
    Sum,
    TrimmedMean,
    UPGrad,
)

TASKS = 5
METHODS: dict[str, Callable[[], Any]] = {
    "sum": Sum,
    "mean": Mean,
    "pcgrad": lambda: PCGrad(seed=3),
    "mgda": MGDA,
    "cagrad": CAGrad,
    "config": ConFIG,
    "nash": NashMTL,
    "upgrad": UPGrad,
    "krum": lambda: Krum(n_byzantine=1),
    "graddrop": lambda: GradDrop(seed=3),
    "trimmed mean": lambda: TrimmedMean(trim=1),
    "normalized": lambda: Normalized(MGDA()),
    "crmogm": lambda: CRMOGM(MGDA()),
}


class Model(nn.Module):
    """A trunk and a head a task; `passes` counts backward passes through the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS))
        self.passes = 0
        self.double()

    def features(self, x: Tensor) -> Tensor:
        hidden = self.trunk[0](x).tanh()
        hidden.register_hook(self._count)
        z: Tensor = self.trunk[2](hidden)
        return z

    def _count(self, grad: Tensor) -> None:
        self.passes += 1

    def losses(self, z: Tensor, y: Tensor) -> list[Tensor]:
        return [
            (head(z.relu()).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)
        ]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(9, 6, dtype=torch.float64), torch.randn(TASKS, 9, dtype=torch.float64)


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def by_hand(model: Model, method: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The definition: gradients at a detached copy, combined, and one pass through the trunk."""
    x, y = batch
    model.zero_grad()
    z = model.features(x)
    cut = z.detach().requires_grad_()
    losses = model.losses(cut, y)
    rows = torch.stack([torch.autograd.grad(loss, cut, retain_graph=True)[0] for loss in losses])
    combined = method(rows.flatten(1)).view_as(z)
    sum(losses).backward()  # type: ignore[union-attr]
    z.backward(combined)
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_definition(name: str, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    expected = by_hand(model, METHODS[name](), batch)
    model.zero_grad()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), METHODS[name]())
    z = model.features(batch[0])
    model.passes = 0
    opt.backward(model.losses(z, batch[1]), features=z)
    assert model.passes == 1, "backward passes through the trunk"
    found = grads_of(model)
    assert len(found) == len(expected) and not z.retains_grad
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    opt.step()


def test_features_are_freed_after_the_step(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), PCGrad())
    z = model.features(batch[0])
    alive = weakref.ref(z)
    opt.backward(model.losses(z, batch[1]), features=z)
    opt.step()
    del z
    gc.collect()
    assert alive() is None


def test_the_report_is_of_the_features(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    z = model.features(batch[0])
    losses = model.losses(z, batch[1])
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses])
    opt.backward(losses, features=z)
    assert opt.report is not None
    torch.testing.assert_close(opt.report.gram, rows @ rows.T)


def test_heads_are_scaled_with_the_weights(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), head_scaling="weights")
    z = model.features(batch[0])
    losses = model.losses(z, batch[1])
    plain = [
        torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        for loss, head in zip(losses, model.heads, strict=True)
    ]
    opt.backward(losses, features=z)
    assert opt.report is not None and opt.report.weights is not None
    for head, grad, weight in zip(model.heads, plain, opt.report.weights, strict=True):
        torch.testing.assert_close(head.weight.grad, grad * weight)


def test_renorm_goes_by_the_heads(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ReNorm())
    z = model.features(batch[0])
    opt.backward(model.losses(z, batch[1]), features=z)
    assert opt.report is not None and opt.report.weights is not None and opt.report.weights.isfinite().all()


class TwoScales(nn.Module):
    """Features of two layers, a decoder that all tasks share behind them, and what is outside the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Linear(6, 4), nn.Linear(6, 3)
        self.decoder = nn.Linear(7, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.frozen_rate = nn.Parameter(torch.ones(6))
        self.double()

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = x * self.frozen_rate
        z = [self.stem(x).tanh(), self.deep(x)]
        h = self.decoder(torch.cat(z, 1)).tanh()
        return z, [head(h).square().mean() * (k + 1) for k, head in enumerate(self.heads)]


@pytest.mark.parametrize("outside", ["sum", "keep"])
@pytest.mark.parametrize("plain", ["stem", "decoder"])
def test_every_kind_of_parameter(plain: str, outside: str) -> None:
    model = TwoScales()
    x = torch.randn(8, 6, dtype=torch.float64)
    groups = [
        {"params": [p for name, p in model.named_parameters() if not name.startswith((plain, "frozen"))]},
        {"params": list(getattr(model, plain).parameters()), "mtl": False},
    ]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), UPGrad(), outside=outside)
    z, losses = model(x)
    beside = [*z, *([] if plain == "decoder" else model.decoder.parameters())]
    rows = [torch.autograd.grad(loss, beside, retain_graph=True) for loss in losses]
    total = torch.autograd.grad(
        sum(losses), [*getattr(model, plain).parameters(), model.frozen_rate], retain_graph=True
    )
    d = UPGrad()([list(row) for row in rows])
    behind = [p for name in ("stem", "deep") if name != plain for p in getattr(model, name).parameters()]
    expected = torch.autograd.grad(z, behind, d[:2], retain_graph=True)
    opt.backward(losses, features=z)
    for param, grad in zip(behind, expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
    if plain != "decoder":
        for param, grad in zip(model.decoder.parameters(), d[2:], strict=True):
            torch.testing.assert_close(param.grad, grad)
    for param, grad in zip(getattr(model, plain).parameters(), total, strict=False):
        torch.testing.assert_close(param.grad, grad)
    if outside == "sum":
        torch.testing.assert_close(model.frozen_rate.grad, total[-1])
    else:
        assert model.frozen_rate.grad is None
    assert not any(one.retains_grad for one in z)


def test_gradients_add_up_and_graphs_are_kept(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    z = model.features(batch[0])
    losses = model.losses(z, batch[1])
    opt.backward(losses, features=z, retain_graph=True)
    once = grads_of(model)
    opt.backward(losses, features=z)
    for a, b in zip(once, grads_of(model), strict=True):
        assert a is not None
        torch.testing.assert_close(b, 2 * a)
    with pytest.raises(RuntimeError, match="already freed"):
        opt.backward(losses, features=z)


def test_a_task_that_is_absent_and_one_that_goes_past(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), tasks=[*"abcde"])
    z = model.features(batch[0])
    losses = dict(zip("abcde", model.losses(z, batch[1]), strict=True))
    del losses["c"]
    losses["e"] = model.heads[4].weight.square().sum()
    opt.backward(losses, features=[z])
    assert opt.report is not None and opt.report.active.tolist() == [True, True, False, True, False]
    assert model.heads[2].weight.grad is None
    torch.testing.assert_close(model.heads[4].weight.grad, 2 * model.heads[4].weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trunk_under_checkpointing(reentrant: bool, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    expected = by_hand(model, MGDA(), batch)
    model.zero_grad()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    z = checkpoint(model.trunk[1:], model.trunk[0](batch[0]), use_reentrant=reentrant)
    opt.backward(model.losses(z, batch[1]), features=z)
    for a, b in zip(grads_of(model), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_plain_sum_in_a_trunk_that_hides_parameters(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    z = checkpoint(model.trunk, batch[0].clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="hides parameters"):
        opt.backward(model.losses(z, batch[1]), features=z)


def broken(model: Model, z: Tensor, losses: Sequence[Tensor]) -> dict[str, tuple[dict[str, Any], str]]:
    tied = (z * model.trunk[2].bias).sum()
    return {
        "no tensor": ({"features": "z"}, "expected features as a tensor or a list of tensors, found str"),
        "none": ({"features": []}, "at least one tensor"),
        "leaf": ({"features": model.trunk[0].weight}, r"features\[0\] of shape \[7, 6\] is a leaf"),
        "detached": ({"features": [z.detach()]}, "does not require grad"),
        "twice": ({"features": [z, z]}, r"features\[1\] is there twice"),
        "another": ({"features": [z, z * 2]}, r"features\[1\] is in the graph of none of the losses"),
        "both": ({"losses": [*losses, tied]}, r"parameters of shapes \[4\] both through the features and beside"),
        "accumulate": ({"accumulate": True}, "features= combines the losses of one call"),
    }


@pytest.mark.parametrize("case", ["no tensor", "none", "leaf", "detached", "twice", "another", "both", "accumulate"])
def test_what_features_cannot_be(case: str, model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    z = model.features(batch[0])
    losses = model.losses(z, batch[1])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    options, text = broken(model, z, losses)[case]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text):
        opt.backward(**{"losses": losses, "features": z, **options})
    assert all(grad is not None and (grad == 1).all() for grad in grads_of(model)) and opt.tasks == ()
    opt.backward(losses, features=z)


def test_features_computed_from_one_another() -> None:
    trunk, head = nn.Linear(3, 3), nn.Linear(3, 1)
    opt = MultiTaskOptimizer(torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1), MGDA())
    first = trunk(torch.randn(4, 3))
    second = first.tanh()
    losses = [head(second).sum() + first.sum(), second.sum()]
    with pytest.raises(ValueError, match=re.escape("features[1] is computed from features[0]")):
        opt.backward(losses, features=[first, second])
    opt.backward(losses, features=first)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": MoCo()}, "keeps numbers for every element"),
        ({"method": DBMTL()}, "keeps numbers for every element"),
        ({"method": ExcessMTL()}, "keeps numbers for every element"),
        ({"method": SDMGrad()}, "products of the gradients of two batches"),
        ({"method": MoDo()}, "products of the gradients of two batches"),
        ({"granularity": "group"}, "granularity='group'"),
        ({"capture": "arena"}, "capture='arena'"),
        ({"refresh_every": 2}, "refresh_every=2"),
    ],
)
def test_what_does_not_go_with_features(
    options: dict[str, Any], text: str, model: Model, batch: tuple[Tensor, Tensor]
) -> None:
    made = {"method": MGDA(), **options}
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **made)
    z = model.features(batch[0])
    with pytest.raises(ValueError, match=text):
        opt.backward(model.losses(z, batch[1]), features=z)


def test_rows_that_wait_are_combined_first(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    with opt.task("0"):
        model.losses(model.features(batch[0]), batch[1])[0].backward()
    z = model.features(batch[0])
    losses = dict(zip("bcdef", model.losses(z, batch[1]), strict=True))
    with pytest.raises(RuntimeError, match="after combine"):
        opt.backward(losses, features=z)
    opt.combine()
    opt.backward(losses, features=z)


def test_an_error_behind_the_features_leaves_gradients_alone(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    hidden = model.trunk[0](batch[0])
    hidden.register_hook(lambda grad: (_ for _ in ()).throw(ArithmeticError("in the trunk")))
    z = model.trunk[2](hidden.tanh())
    with pytest.raises(ArithmeticError, match="in the trunk"):
        opt.backward(model.losses(z, batch[1]), features=z)
    assert all(grad is None for grad in grads_of(model))


def test_retained_features_have_what_went_through_them(model: Model, batch: tuple[Tensor, Tensor]) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Mean())
    z = model.features(batch[0])
    losses = model.losses(z, batch[1])
    expected = torch.autograd.grad(sum(losses) / TASKS, z, retain_graph=True)[0]  # type: ignore[operator]
    z.retain_grad()
    opt.backward(losses, features=z)
    torch.testing.assert_close(z.grad, expected)
