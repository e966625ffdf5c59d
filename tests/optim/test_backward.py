"""backward(): what lands in .grad, against rows by autograd.grad and methods on whole vectors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import MGDA, Mean, MultiTaskOptimizer, PCGrad, Sum
from optim.oracle import TwoHeads, flatten, min_norm_pair, pcgrad_fixed, rows_of, uncombined

FIXED = PCGrad(order="fixed")
pytestmark = pytest.mark.usefixtures("each_capture")


def wrap(model: nn.Module, method=FIXED, **options) -> MultiTaskOptimizer:  # type: ignore[no-untyped-def]
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def trunk_matrix(model: TwoHeads, losses: list[Tensor]) -> Tensor:
    params = list(model.trunk.parameters())
    return torch.stack([flatten(row, params) for row in rows_of(losses, params)])


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-9 * expected.norm() + 1e-15)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_pcgrad_on_the_trunk_and_plain_heads(tasks: int) -> None:
    model = TwoHeads(tasks)
    expected = pcgrad_fixed(trunk_matrix(model, model.losses()))
    heads = [
        torch.autograd.grad(loss, list(h.parameters())) for h, loss in zip(model.heads, model.losses(), strict=True)
    ]
    opt = wrap(model)
    opt.backward(model.losses())
    assert close(flatten(grads(model.trunk), list(model.trunk.parameters())), expected)
    for head, row in zip(model.heads, heads, strict=True):
        assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), row, strict=True))
    assert float(opt.report.conflict_fraction) > 0


def test_mgda_of_two() -> None:
    model = TwoHeads()
    expected = min_norm_pair(trunk_matrix(model, model.losses()))
    opt = wrap(model, MGDA())
    opt.backward(tuple(model.losses()))
    assert close(flatten(grads(model.trunk), list(model.trunk.parameters())), expected)
    assert opt.report.gap is not None and opt.report.iterations is not None


@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([FIXED, MGDA(), Mean(), Sum()]))
@settings(max_examples=25)
def test_any_mask(seed: int, tasks: int, method) -> None:  # type: ignore[no-untyped-def]
    """Random subsets of parameters per task: shared, single-task and untouched ones in one model."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in (3, 1, 4, 2, 5)]
    mask = torch.rand(tasks, len(params), generator=generator) < 0.5
    mask[:, 0] |= ~mask.any(1)
    coefficients = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in mask]
    losses = [
        sum((c * p).sum() for c, p, m in zip(row, params, reach, strict=True) if m)
        for row, reach in zip(coefficients, mask, strict=True)
    ]
    count = mask.sum(0)
    shared = [p for p in range(len(params)) if count[p] > 1]
    opt = MultiTaskOptimizer(torch.optim.SGD(params, lr=1.0), method)
    opt.backward(losses)
    rows = [
        [c if m else torch.zeros_like(c) for c, m in zip(r, mk_, strict=True)]
        for r, mk_ in zip(coefficients, mask, strict=True)
    ]
    if shared:
        matrix = torch.stack([torch.cat([row[p] for p in shared]) for row in rows])
        active = torch.tensor([bool(mask[k, shared].any()) for k in range(tasks)])
        expected = iter(
            (matrix.T @ method.weights(matrix @ matrix.T, active=active)).split([len(params[p]) for p in shared])
        )
    for p, param in enumerate(params):
        if count[p] == 0:
            assert param.grad is None
        elif count[p] == 1:
            assert torch.equal(param.grad, rows[int(mask[:, p].int().argmax())][p])
        else:
            assert torch.allclose(param.grad, next(expected), atol=1e-9)


def test_dict_tuple_and_list_agree() -> None:
    results = []
    for form in (list, tuple, lambda losses: dict(zip("ab", losses, strict=True))):
        model = TwoHeads()
        opt = wrap(model)
        opt.backward(form(model.losses()))
        results.append(grads(model))
        assert opt.tasks == (("a", "b") if len(results) == 3 else ("0", "1"))
    assert all(torch.equal(g, h) for other in results[1:] for g, h in zip(results[0], other, strict=True))


def test_tensor_of_losses() -> None:
    """One output layer for all tasks: its losses come as a vector."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = list(layer.parameters())

    def losses() -> Tensor:
        return (layer(x) - torch.tensor([1.0, -1.0, 2.0])).square().mean(0)

    matrix = torch.stack([flatten(row, params) for row in rows_of(losses().unbind(), params)])
    opt = wrap(layer)
    with pytest.warns(
        UserWarning, match=r"parts of parameter 0 \(shape \[3, 4\]\), 1 \(shape \[3\]\): .*one layer for all"
    ):
        opt.backward(losses())
    assert close(flatten(grads(layer), params), pcgrad_fixed(matrix))
    with pytest.warns(UserWarning, match="as a list"):
        opt.backward(torch.stack(list(losses())))


def test_adds_to_gradients_that_are_there() -> None:
    model = TwoHeads()
    reference = copy.deepcopy(model)
    wrap(reference).backward(reference.losses())
    opt = wrap(model)
    sum(p.square().sum() for p in model.trunk.parameters()).backward()
    before = grads(model.trunk)
    copies = [g.clone() for g in before]
    opt.backward(model.losses())
    for p, q, old, kept in zip(model.trunk.parameters(), reference.trunk.parameters(), copies, before, strict=True):
        assert p.grad is kept
        assert torch.equal(p.grad, old + q.grad)
    opt.zero_grad(set_to_none=False)
    assert all((g == 0).all() for g in grads(model))
    opt.backward(model.losses())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_mtl_false_groups_get_the_plain_sum() -> None:
    model = TwoHeads()
    first = model.trunk[0]
    rest = [p for p in model.parameters() if p is not first.weight and p is not first.bias]
    groups = [{"params": list(first.parameters()), "mtl": False}, {"params": rest}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), FIXED)
    plain = torch.autograd.grad(sum(model.losses()), list(first.parameters()))
    opt.backward(model.losses())
    assert all(torch.allclose(p.grad, g) for p, g in zip(first.parameters(), plain, strict=True))
    opt.backward(model.losses())
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(first.parameters(), plain, strict=True))
    with pytest.raises(TypeError, match="mtl='no'"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "mtl": "no"})
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
def test_head_scaling_and_granularity(granularity: str) -> None:
    model = TwoHeads(2)
    # Group 1 holds the second trunk layer and head 0, group 2 only head 1.
    groups = [
        {"params": list(model.trunk[0].parameters())},
        {"params": [*model.trunk[2].parameters(), *model.heads[0].parameters()]},
        {"params": list(model.heads[1].parameters())},
    ]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), MGDA(), granularity=granularity, head_scaling="weights")
    plain = [
        torch.autograd.grad(loss, list(h.parameters())) for h, loss in zip(model.heads, model.losses(), strict=True)
    ]
    layers = {
        "model": [[0, 1, 2, 3]],
        "group": [[0, 1], [2, 3]],
        "parameter": [[0], [1], [2], [3]],
    }[granularity]
    params = list(model.trunk.parameters())
    rows = rows_of(model.losses(), params)
    opt.backward(model.losses())
    report, weights = opt.report, []
    assert report.gram.shape == ((2, 2) if granularity == "model" else (len(layers), 2, 2))
    assert report.problems == {"model": (), "group": (0, 1), "parameter": (0, 1, 2, 3)}[granularity]
    for layer in layers:
        matrix = torch.stack([torch.cat([row[p].reshape(-1) for p in layer]) for row in rows])
        weights.append(MGDA().weights(mk.gram(matrix)))
        found = torch.cat([params[p].grad.reshape(-1) for p in layer])
        assert close(found, min_norm_pair(matrix))
    mean = torch.stack(weights).mean(0)
    factors = [weights[1][0] if granularity == "group" else mean[0], mean[1]]
    for head, row, factor in zip(model.heads, plain, factors, strict=True):
        assert all(torch.allclose(p.grad, factor * g) for p, g in zip(head.parameters(), row, strict=True))
    assert torch.allclose(report.weights.reshape(-1, 2), torch.stack(weights))


def test_task_inactive_in_a_group() -> None:
    """A task that reaches nothing shared of a group takes no part there: Mean divides by those that do."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    opt = MultiTaskOptimizer(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), Mean(), granularity="group")
    opt.backward([a.sum(), 3 * a.sum() + b.sum(), 5 * b.sum()])
    assert a.grad.tolist() == [2, 2] and b.grad.tolist() == [3, 3, 3]
    assert opt.report.active.tolist() == [[True, True, False], [False, True, True]]
    assert opt.report.weights.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert "2 problems" in opt.report.summary()


def test_absent_tasks() -> None:
    model = TwoHeads(3)
    opt = wrap(model, Mean(), tasks=("a", "b", "c"))
    a, _, c = model.losses()
    expected = trunk_matrix(model, [a, c]).mean(0)
    opt.backward({"c": c, "a": a})
    assert close(flatten(grads(model.trunk), list(model.trunk.parameters())), expected)
    assert opt.report.tasks == ("a", "b", "c") and opt.report.gram.shape == (3, 3)
    assert opt.report.weights.tolist() == [0.5, 0, 0.5] and opt.report.active.tolist() == [True, False, True]
    assert (opt.report.gram[1] == 0).all() and model.heads[1].weight.grad is None
    with pytest.raises(ValueError, match=r"unknown task 'd'.*\['a', 'b', 'c'\]"):
        opt.backward({"d": model.losses()[0]})


def test_tasks_keep_the_order_of_first_sight() -> None:
    model = TwoHeads(3)
    opt = wrap(model)
    a, b, c = model.losses()
    opt.backward({"b": b, "c": c})
    a, b, c = model.losses()
    opt.backward({"a": a, "b": b})
    assert opt.tasks == ("b", "c", "a") and opt.report.active.tolist() == [True, False, True]


def test_one_loss_is_plain_and_warns_once() -> None:
    model = TwoHeads()
    opt = wrap(model)
    expected = torch.autograd.grad(sum(model.losses()), list(model.parameters()))
    with pytest.warns(UserWarning, match="nothing to combine"):
        opt.backward([sum(model.losses())])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.zero_grad()
        opt.backward(sum(model.losses()))
    assert opt.report.weights.tolist() == [1] and "100%" not in opt.report.summary()


def test_nothing_shared() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = MultiTaskOptimizer(torch.optim.SGD([a, b], lr=0.1), MGDA(), head_scaling="weights")
    opt.backward([a.sum(), 2 * b.sum()])
    assert a.grad.tolist() == [1, 1] and b.grad.tolist() == [2, 2]
    assert opt.report.gram.tolist() == [[0, 0], [0, 0]] and float(opt.report.conflict_fraction) == 0


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_loss_normalisation_gets_the_losses(normalize: str) -> None:
    model = TwoHeads(3)
    method = MGDA(normalize=normalize)
    matrix, losses = trunk_matrix(model, model.losses()), torch.stack(model.losses()).detach()
    opt = wrap(model, method, tasks=["x", "0", "1", "2"])
    opt.backward(model.losses())
    expected = matrix.T @ method.weights(mk.gram(matrix), losses=losses)
    assert close(flatten(grads(model.trunk), list(model.trunk.parameters())), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [FIXED, PCGrad(), MGDA(), MGDA(normalize="loss+"), Mean()], ids=repr)
def test_non_finite_loss_reaches_grad(value: float, method) -> None:  # type: ignore[no-untyped-def]
    model = TwoHeads()
    opt = wrap(model, copy.deepcopy(method))
    first, second = model.losses()
    opt.backward([first * value, second])
    assert not all(torch.isfinite(g).all() for g in grads(model.trunk))
    str(opt.report)


def test_accumulation_over_micro_batches() -> None:
    whole, parts = TwoHeads(), TwoHeads()

    def total() -> list[Tensor]:
        return [sum(micro) for micro in zip(*map(whole.losses, (1, 2, 3)), strict=True)]

    wrap(whole).backward(total())
    opt = wrap(parts)
    for micro in (1, 2):
        opt.backward(parts.losses(micro), accumulate=True)
        assert uncombined(parts.parameters()) == [None] * 8
    opt.backward(parts.losses(3))
    assert all(torch.allclose(g, h) for g, h in zip(grads(whole), grads(parts), strict=True))
    opt.zero_grad()
    for micro in (1, 2, 3):
        opt.backward(parts.losses(micro), accumulate=True)
    opt.step()
    wrap_whole = wrap(whole)
    wrap_whole.zero_grad()
    wrap_whole.backward(total())
    wrap_whole.step()
    assert all(torch.allclose(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_sparse_gradients_stay_sparse_in_plain_groups() -> None:
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)
    groups = [{"params": embedding.parameters(), "mtl": False}, {"params": linear.parameters()}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), FIXED)
    for _ in range(2):
        out = linear(embedding(torch.tensor([1, 3])))
        opt.backward([out.square().sum(), (out - 1).square().sum()])
    assert embedding.weight.grad.is_sparse
    opt.step()


def test_retain_graph() -> None:
    model = TwoHeads()
    losses = model.losses()
    opt = wrap(model)
    opt.backward(losses, retain_graph=True)
    before = [g.clone() for g in grads(model)]
    opt.backward(losses)
    assert all(torch.allclose(g, 2 * h) for g, h in zip(grads(model), before, strict=True))
