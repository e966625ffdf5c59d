"""Steps of several independent batches: which row is of which, what is combined, and what is missing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import MGDA, MoDo, MultiTaskOptimizer, PCGrad, SDMGrad, methods
from mtl_optim.step.lazy import LazyGrad
from optim.oracle import TwoHeads, flatten, rows_of, uncombined
from optim.recording import record, warm_up

pytestmark = pytest.mark.usefixtures("each_capture")

BUILD: dict[str, Callable[[], methods.Method]] = {
    "sdmgrad": lambda: SDMGrad(lr=0.1),
    "modo": lambda: MoDo(gamma=0.02),
    "modo of two": lambda: MoDo(gamma=0.02, num_batches=2),
}
EACH = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def pair(method: methods.Method | None = None, tasks: int = 2, **options):  # type: ignore[no-untyped-def]
    model = TwoHeads(tasks)
    return model, MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method or SDMGrad(lr=0.1), **options)


def losses(model: TwoHeads, step: int, batch: int) -> list[Tensor]:
    return model.losses(10 * step + batch)


def capture(model: TwoHeads, opt: MultiTaskOptimizer, step: int = 0, way: str = "backward") -> None:
    for b in range(opt.method.num_batches):
        if way == "backward":
            opt.backward(losses(model, step, b), batch=b)
            continue
        for k, loss in enumerate(losses(model, step, b)):
            with opt.task(str(k), batch=b):
                loss.backward(retain_graph=k == 0)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def expected(method: methods.Method, model: TwoHeads, step: int) -> tuple[Tensor, Tensor]:
    """d on the trunk, and the Gram matrix of the last batch."""
    params = list(model.trunk.parameters())
    rows = [
        torch.stack([flatten(row, params) for row in rows_of(losses(model, step, b), params)])
        for b in range(method.num_batches)
    ]
    return method(*rows), rows[-1] @ rows[-1].T


@EACH
@pytest.mark.parametrize("way", ["backward", "blocks"])
def test_a_step_combines_the_last_batch_with_weights_from_the_first_two(build, way: str) -> None:  # type: ignore[no-untyped-def]
    (model, opt), method = pair(build()), build()
    for step in range(4):
        d, gram = expected(method, model, step)
        last = losses(model, step, method.num_batches - 1)
        heads = [torch.autograd.grad(one, list(h.parameters())) for h, one in zip(model.heads, last, strict=True)]
        opt.zero_grad()
        capture(model, opt, step, way)
        assert uncombined(model.parameters()) == [None] * 8
        opt.combine()
        found = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
        torch.testing.assert_close(found, d, rtol=0, atol=1e-12 * float(gram.diagonal().max().sqrt()))
        for head, row in zip(model.heads, heads, strict=True):
            assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), row, strict=True))
        torch.testing.assert_close(opt.report.gram, gram)
        assert opt.report.weights.shape == (2,) and opt.report.gap is None and "2 tasks" in str(opt.report)
        opt.step()
    assert (opt.method.state["weights"] - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(opt.method.state["weights"], method.state["weights"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_batches_come_in_any_order(order: tuple[int, ...]) -> None:
    (model, opt), (other, twin) = pair(), pair()
    capture(model, opt)
    opt.combine()
    for b in order:
        twin.backward(losses(other, 0, b), batch=b)
    twin.combine()
    assert same(grads(model), grads(other))


def test_tasks_come_one_by_one_and_with_batches_of_their_own() -> None:
    (model, opt), (other, twin) = pair(), pair()
    for name in "ba":
        for b in (1, 0, 2):
            with opt.task(name, batch=b):
                losses(model, 0, b)["ab".index(name)].backward()
    opt.step()
    for b in range(3):
        both = losses(other, 0, b)
        twin.backward({"b": both[1], "a": both[0]}, batch=b)
    twin.step()
    assert opt.tasks == ("b", "a") and same(list(model.parameters()), list(other.parameters()))


def test_micro_batches_add_up_within_their_batch() -> None:
    (model, opt), (other, twin) = pair(), pair()
    for b in range(3):
        total = [sum(parts) for parts in zip(*(losses(model, step, b) for step in range(3)), strict=True)]
        opt.backward(total, batch=b)
        for step in (0, 1):
            twin.backward(losses(other, step, b), batch=b, accumulate=True)
        for k, loss in enumerate(losses(other, 2, b)):
            with twin.task(str(k), batch=b, accumulate=True):
                loss.backward(retain_graph=k == 0)
    opt.combine()
    twin.combine()
    assert all(torch.allclose(g, h, rtol=0, atol=1e-12) for g, h in zip(grads(model), grads(other), strict=True))


def test_a_gradient_that_is_read_is_the_combination() -> None:
    (model, opt), (other, twin) = pair(), pair()
    capture(model, opt)
    capture(other, twin)
    twin.combine()
    assert all(isinstance(p.grad, LazyGrad) for p in model.parameters())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(other.parameters(), 1e-3))
    assert same(grads(model), grads(other))
    opt.step()


def test_what_is_missing_is_named_and_can_be_added() -> None:
    model, opt = pair()
    opt.backward({"a": losses(model, 0, 0)[0], "b": losses(model, 0, 0)[1]}, batch=0)
    with opt.task("a", batch=2):
        losses(model, 0, 2)[0].backward()
    before = [p.detach().clone() for p in model.parameters()]
    text = r"SDMGrad takes 3 independent batches .*missing: 'a' \(batch 1\), 'b' \(batch 1\), 'b' \(batch 2\)\."
    for act in (opt.step, opt.combine, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
        with pytest.raises(RuntimeError, match=text + r".*opt.task\('a', batch=1\)"):
            act()
    assert all(map(torch.equal, before, model.parameters())) and "weights" not in opt.method.state
    assert len(opt._training.pending.rows) == 3 and opt.report is None
    with opt.task("b", batch=2):
        losses(model, 0, 2)[1].backward()
    opt.backward({"a": losses(model, 0, 1)[0], "b": losses(model, 0, 1)[1]}, batch=1)
    opt.step()
    other, twin = pair()
    for b in range(3):
        twin.backward(dict(zip("ab", losses(other, 0, b), strict=True)), batch=b)
    twin.step()
    assert same(list(model.parameters()), list(other.parameters()))


def test_a_task_of_one_batch_alone_is_an_error() -> None:
    model, opt = pair(tasks=3)
    for b in range(3):
        names = "abc" if b == 1 else "ab"
        opt.backward(dict(zip(names, losses(model, 0, b), strict=False)), batch=b)
    with pytest.raises(RuntimeError, match=r"missing: 'c' \(batch 0\), 'c' \(batch 2\)"):
        opt.step()
    opt.zero_grad()
    for b in range(3):
        opt.backward(dict(zip("ab", losses(model, 0, b), strict=False)), batch=b)
    opt.step()


def test_absent_tasks_keep_their_share() -> None:
    model, opt = pair(MoDo(gamma=0.02), tasks=3)
    capture(model, opt)
    opt.step()
    third = opt.method.state["weights"][2].clone()
    opt.zero_grad()
    for b in range(3):
        opt.backward(losses(model, 1, b)[:2], batch=b)
    opt.step()
    assert opt.report.weights[2] == 0 and opt.report.active.tolist() == [True, True, False]
    assert opt.method.state["weights"][2] == third
    torch.testing.assert_close(opt.report.weights[:2], opt.method.state["weights"][:2] / (1 - third))


@pytest.mark.parametrize(
    ("method", "batch", "error", "text"),
    [
        (PCGrad(), 1, ValueError, r"batch=1: PCGrad takes one batch a step; .*accumulate=True"),
        (MGDA(), -1, ValueError, "MGDA takes one batch"),
        (SDMGrad(), 3, ValueError, "batch=3: SDMGrad takes 3 independent batches a step, 0 to 2"),
        (MoDo(num_batches=2), 2, ValueError, "MoDo takes 2 independent batches a step, 0 to 1"),
        (SDMGrad(), -1, ValueError, "batch=-1"),
        (SDMGrad(), True, TypeError, "batch as an integer, found True"),
        (SDMGrad(), 1.0, TypeError, "batch as an integer, found 1.0"),
        (SDMGrad(), None, TypeError, "found None"),
    ],
    ids=str,
)
def test_batches_that_there_are_not(method, batch, error, text) -> None:  # type: ignore[no-untyped-def]
    model, opt = pair(copy.deepcopy(method))
    for act in (lambda: opt.backward(model.losses(), batch=batch), lambda: opt.task("a", batch=batch)):
        with pytest.raises(error, match=text):
            act()
    assert opt.tasks == () and grads(model) == [None] * 8


def test_a_batch_twice_is_refused() -> None:
    model, opt = pair()
    opt.backward(losses(model, 0, 0))
    text = r"task '0' \(batch 0\) was already captured in this step; .*accumulate=True.* batch= of another one"
    with pytest.raises(RuntimeError, match=text):
        opt.backward(losses(model, 0, 1))
    with pytest.raises(RuntimeError, match=text), opt.task("0"):
        pass
    opt.backward(losses(model, 0, 0), accumulate=True)
    with pytest.raises(RuntimeError, match="already captured"):
        opt.backward(losses(model, 0, 1))
    assert len(opt._training.pending.rows) == 2
    opt.zero_grad()
    capture(model, opt)
    opt.step()


def test_a_failing_pass_leaves_the_other_batches() -> None:
    model, opt = pair()
    opt.backward(losses(model, 0, 0), batch=0)
    kept = {key: [None if g is None else g.clone() for g in row] for key, row in opt._training.pending.rows.items()}
    with pytest.raises(ValueError, match=r"loss '0' \(batch 1\) reaches none"), opt.task("0", batch=1):
        pass
    freed = losses(model, 0, 1)
    freed[1].backward(inputs=[model.heads[1].weight])
    with pytest.raises(RuntimeError, match="already freed"):
        opt.backward(freed, batch=1)
    rows = opt._training.pending.rows
    assert rows.keys() == kept.keys() and all(same(rows[key], kept[key]) for key in kept)
    opt.backward(losses(model, 0, 1), batch=1)
    opt.backward(losses(model, 0, 2), batch=2)
    opt.step()


@pytest.mark.filterwarnings("ignore:the losses reach 1 parameter")
def test_what_is_not_combined_is_of_the_last_batch() -> None:
    """Groups with mtl=False and tensors outside the optimizer, whatever comes when, on top of what is there."""
    model = TwoHeads()
    first, extra = model.trunk[0], nn.Parameter(torch.ones((), dtype=torch.float64))
    rest = [p for p in model.parameters() if p is not first.weight and p is not first.bias]
    groups = [{"params": list(first.parameters()), "mtl": False}, {"params": rest}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), SDMGrad())

    def scaled(b: int) -> list[Tensor]:
        return [loss * extra for loss in losses(model, 0, b)]

    plain = torch.autograd.grad(sum(scaled(2)), [first.weight, first.bias, extra])
    for way, order in (("backward", (0, 1, 2)), ("blocks", (0, 1, 2)), ("backward", (2, 0, 1)), ("blocks", (1, 2, 0))):
        opt.zero_grad()
        extra.grad, first.bias.grad = None, torch.ones_like(first.bias)
        for b in order:
            if way == "backward":
                opt.backward(scaled(b), batch=b)
                continue
            for k, loss in enumerate(scaled(b)):
                with opt.task(str(k), batch=b):
                    loss.backward(retain_graph=k == 0)
        opt.combine()
        found = (first.weight.grad, first.bias.grad - 1, extra.grad)
        assert all(torch.allclose(g, h, rtol=1e-12) for g, h in zip(found, plain, strict=True)), (way, order)


@pytest.mark.parametrize("granularity", ["group", "parameter"])
@EACH
def test_granularity_and_head_scaling(build, granularity: str) -> None:  # type: ignore[no-untyped-def]
    model = TwoHeads()
    groups = [
        {"params": [*model.trunk[0].parameters(), *model.heads[0].parameters()]},
        {"params": [*model.trunk[2].parameters(), *model.heads[1].parameters()]},
    ]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), build(), granularity=granularity, head_scaling="weights")
    layers = [[0, 1], [2, 3]] if granularity == "group" else [[0], [1], [2], [3]]
    params, apart = list(model.trunk.parameters()), [build() for _ in layers]
    for step in range(2):
        rows = [rows_of(losses(model, step, b), params) for b in range(opt.method.num_batches)]
        last = losses(model, step, opt.method.num_batches - 1)
        head = torch.autograd.grad(last[0], [model.heads[0].weight])[0]
        opt.zero_grad()
        capture(model, opt, step)
        opt.combine()
        for layer, method in zip(layers, apart, strict=True):
            matrices = [torch.stack([torch.cat([r[p].flatten() for p in layer]) for r in batch]) for batch in rows]
            found = torch.cat([params[p].grad.flatten() for p in layer])
            torch.testing.assert_close(found, method(*matrices), rtol=1e-9, atol=1e-12)
        kept = torch.stack([method.state["weights"] for method in apart])
        torch.testing.assert_close(opt.method.state["weights"], kept, rtol=0, atol=1e-12)
        weights = opt.report.weights
        factor = weights[0, 0] if granularity == "group" else weights[:, 0].mean()
        torch.testing.assert_close(model.heads[0].weight.grad, factor * head)
        opt.step()


def test_a_parameter_that_some_batches_do_not_reach_counts_as_zero_there() -> None:
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    opt = MultiTaskOptimizer(torch.optim.SGD([a, b], lr=0.1), MoDo(gamma=0.05, rho=0.0))
    opt.backward([a.sum(), (2 * a).sum()], batch=0)
    opt.backward([a.sum() + b.sum(), a.prod()], batch=1)
    opt.backward([a.sum() + b.sum(), (3 * a).sum() - b.sum()], batch=2)
    opt.combine()
    cross = np.array([[1, 1, 0], [2, 2, 0]]) @ np.array([[1, 1, 1], [2, 1, 0]]).T
    step = 0.5 - 0.05 * cross @ [0.5, 0.5]
    weights = step + (1 - step.sum()) / 2
    assert (weights > 0).all()
    np.testing.assert_allclose(opt.report.weights, weights, rtol=1e-12)
    np.testing.assert_allclose(a.grad, [weights @ [1, 3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(b.grad, [weights @ [1, -1]], rtol=1e-6)


def test_one_task_and_nothing_shared() -> None:
    model, opt = pair()
    for b in range(3):
        opt.backward({"a": losses(model, 0, b)[0]}, batch=b)
    opt.combine()
    alone = torch.autograd.grad(losses(model, 0, 2)[0], list(model.trunk.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.trunk.parameters(), alone, strict=True))
    assert opt.method.state == {}


@EACH
def test_training_and_resuming_to_the_bit(build) -> None:  # type: ignore[no-untyped-def]
    def train(model: TwoHeads, opt: MultiTaskOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            capture(model, opt, step)
            opt.step()

    model, opt = pair(build())
    train(model, opt, range(6))
    again, half = pair(build())
    train(again, half, range(3))
    file = io.BytesIO()
    torch.save((again.state_dict(), half.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, last = pair(build())
    resumed.load_state_dict(weights)
    last.load_state_dict(state)
    train(resumed, last, range(3, 6))
    assert same(list(model.parameters()), list(resumed.parameters()))
    twin_model, twin = copy.deepcopy((again, half))
    train(twin_model, twin, range(3, 6))
    assert same(list(model.parameters()), list(twin_model.parameters()))


def test_grad_scaler() -> None:
    model, plain = (TwoHeads(dtype=torch.float32) for _ in range(2))
    opt, twin = (MultiTaskOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), SDMGrad(lr=0.1)) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        opt.zero_grad()
        for b in range(3):
            bad = torch.inf if (step, b) == (1, 2) else 1.0
            opt.backward([scaler.scale(loss * bad) for loss in losses(model, step, b)], batch=b)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step != 1:
            twin.zero_grad()
            capture(plain, twin, step)
            twin.step()
        else:  # the skipped step has moved the weights
            plain_state = opt.method.state_dict()
            twin.method.load_state_dict(plain_state)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    refused = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MoDo())
    capture(model, refused)
    with pytest.raises(RuntimeError, match=r"MoDo.*does not scale with the gradients"):
        scaler.step(refused)


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    model, opt = pair()
    opt.backward(losses(model, 5, 0), batch=0)
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"after '0' \(batch 0\), '1' \(batch 0\) had been captured"):
        opt.backward(losses(model, 0, 0), batch=0)
    for b in (1, 2):
        opt.backward(losses(model, 0, b), batch=b)
    opt.combine()
    other, twin = pair()
    capture(other, twin)
    twin.combine()
    assert same(grads(model), grads(other))


def test_closures() -> None:
    model, opt = pair()

    def closure() -> Tensor:
        opt.zero_grad()
        capture(model, opt)
        return sum(losses(model, 0, 2))  # type: ignore[return-value]

    first = opt.step(closure)
    for _ in range(10):
        last = opt.step(closure)
    assert last.item() < first.item()


def test_a_recorded_step_goes_on(each_capture: str) -> None:
    if each_capture == "harvest":
        pytest.skip("addresses that stay the same are what arena is for")
    (model, opt), (other, twin) = (pair(MoDo(gamma=0.02)) for _ in range(2))

    def run(model: TwoHeads, opt: MultiTaskOptimizer) -> None:
        opt.zero_grad(set_to_none=False)
        for b in range(3):
            outputs = model(inputs[b])
            opt.backward([(out - (-1) ** k).square().mean() for k, out in enumerate(outputs)], batch=b)
        opt.step()

    inputs = [torch.randn(8, 4) for _ in range(3)]
    model.float()
    other.float()
    warm_up("cpu", lambda: run(model, opt))
    for _ in range(3):
        run(other, twin)
    replay = record("cpu", lambda: run(model, opt))
    run(other, twin)
    for _ in range(3):
        replay()
        run(other, twin)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_plain_methods_are_as_they_were() -> None:
    """The rows of a method with one batch go by the names of their tasks alone."""
    model, opt = pair(PCGrad())
    opt.backward(model.losses(), accumulate=True, batch=0)
    assert list(opt._training.pending.rows) == ["0", "1"]
    with opt.task("0", accumulate=True, batch=0):
        model.losses()[0].backward()
    opt.step()
    assert torch.equal(mk.norms(opt.report.gram), opt.report.norms)
