"""with opt.task(name): separate batches, accumulation, and what must not be done in or around a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtl_optim import MGDA, Mean, MultiTaskOptimizer, PCGrad
from optim.oracle import TwoHeads, uncombined

pytestmark = pytest.mark.usefixtures("each_capture")


def pair(method=None, **options):  # type: ignore[no-untyped-def]
    model = TwoHeads()
    method = PCGrad(order="fixed") if method is None else method
    return model, MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


def grads(model: nn.Module) -> list:  # type: ignore[type-arg]
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a: list, b: list) -> bool:  # type: ignore[type-arg]
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_blocks_equal_one_backward() -> None:
    model, opt = pair()
    opt.backward({"a": model.losses(1)[0], "b": model.losses(2)[1]})
    expected = grads(model)
    opt.zero_grad()
    for k, name in enumerate("ab"):
        with opt.task(name):
            model.losses(k + 1)[k].backward()
        assert uncombined(model.parameters()) == [None] * 8
    opt.combine()
    assert same(grads(model), expected)
    opt.step()


def test_step_combines() -> None:
    (model, opt), (other, twin) = pair(), pair()
    opt.backward({"a": model.losses(1)[0], "b": model.losses(2)[1]})
    opt.step()
    for k, name in enumerate("ab"):
        with twin.task(name):
            other.losses(k + 1)[k].backward()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="no task captured"):
        twin.step()


def test_accumulate_adds_in_place() -> None:
    model, opt = pair()
    total = [sum(model.losses(seed)[k] for seed in (1, 2, 3)) for k in range(2)]
    opt.backward(total)
    expected = grads(model)
    opt.zero_grad()
    for seed in (1, 2, 3):
        for k in range(2):
            with opt.task(str(k), accumulate=True):
                model.losses(seed)[k].backward()
            if seed == 1 and k == 0:
                first = [g.data_ptr() for g in opt._training.pending.rows["0"] if g is not None]
    assert [g.data_ptr() for g in opt._training.pending.rows["0"] if g is not None] == first
    opt.combine()
    assert all(torch.allclose(g, h) for g, h in zip(grads(model), expected, strict=True))


def test_several_backwards_in_a_block() -> None:
    model, opt = pair(Mean())
    with opt.task("a"):
        model.losses(1)[0].backward()
        model.losses(2)[0].backward()
    with opt.task("b"):
        model.losses(3)[1].backward()
    opt.combine()
    found = grads(model)
    opt.zero_grad()
    opt.backward([model.losses(1)[0] + model.losses(2)[0], model.losses(3)[1]])
    assert all(torch.allclose(g, h) for g, h in zip(grads(model), found, strict=True))


def test_backward_between_blocks_is_a_regulariser() -> None:
    model, opt = pair()
    for k in range(2):
        with opt.task(str(k)):
            model.losses()[k].backward()
        sum(p.sum() for p in model.trunk.parameters()).backward()
    opt.combine()
    found = grads(model.trunk)
    opt.zero_grad()
    opt.backward(model.losses())
    assert same(found, [g + 2 for g in grads(model.trunk)])


def test_losses_of_methods_that_need_them() -> None:
    method = MGDA(normalize="loss")
    model, opt = pair(method)
    opt.backward([model.losses(1)[0] + model.losses(2)[0], model.losses(1)[1] + model.losses(2)[1]])
    expected = grads(model)
    opt.zero_grad()
    for seed in (1, 2):
        for k in range(2):
            with opt.task(str(k), accumulate=True) as task:
                task.loss = model.losses(seed)[k]
                task.loss.backward()
    opt.combine()
    assert all(torch.allclose(g, h) for g, h in zip(grads(model), expected, strict=True))
    before = grads(model)
    with (
        pytest.raises(ValueError, match=r"needs the value of the loss of task '0'.*task\.loss"),
        opt.task("0"),
    ):
        model.losses()[0].backward()
    for wrong, error in ((3.0, TypeError), (torch.ones(3), ValueError)):
        with pytest.raises(error, match="expected a scalar"), opt.task("0") as task:
            model.losses()[0].backward()
            task.loss = wrong  # type: ignore[assignment]
    assert same(grads(model), before) and not opt._training.pending.rows


def test_exception_restores() -> None:
    model, opt = pair()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with opt.task("a"):
        model.losses()[0].backward()
    before, row = uncombined(model.parameters()), opt._training.pending.rows["a"]
    kept = [None if g is None else g.clone() for g in row]
    with pytest.raises(KeyError), opt.task("b"):
        model.losses()[1].backward()
        raise KeyError("mine")
    assert same(uncombined(model.parameters()), before)
    assert opt._training.pending.rows == {"a": row} and same(kept, row)
    assert opt.tasks == ("a",)
    with opt.task("b"):
        model.losses()[1].backward()
    opt.combine()


def test_interrupted_accumulation_drops_the_rows() -> None:
    model, opt = pair()
    with opt.task("a"):
        model.losses()[0].backward()
    with pytest.raises(KeyError), opt.task("a", accumulate=True):
        raise KeyError("before anything was added")
    assert list(opt._training.pending.rows) == ["a"]
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(KeyError), opt.task("a", accumulate=True):
        model.losses()[0].backward()
        raise KeyError("half way")
    assert not opt._training.pending.rows and grads(model) == [None] * 8


def test_misuse() -> None:
    model, opt = pair(tasks=["a", "b"])
    with pytest.raises(ValueError, match=r"unknown task 'c'.*\['a', 'b'\]"):
        opt.task("c")
    with pytest.raises(TypeError, match="task name"):
        opt.task(3)  # type: ignore[arg-type]
    block = opt.task("a")
    with block:
        for nested in (lambda: opt.task("b").__enter__(), block.__enter__):
            with pytest.raises(RuntimeError, match=r"inside the block of opt\.task\('a'\)"):
                nested()
        for name in ("step", "combine", "zero_grad"):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) inside the block"):
                getattr(opt, name)()
        with pytest.raises(RuntimeError, match=r"backward\(\) inside the block"):
            opt.backward(model.losses())
        model.losses()[0].backward()
    with pytest.raises(RuntimeError, match=r"'a' was already captured.*accumulate=True"), block:
        pass
    with pytest.raises(RuntimeError, match="'a' was already captured"):
        opt.backward({"a": model.losses()[0]})
    with pytest.raises(ValueError, match=r"loss 'b' reaches none.*was backward\(\) called"), opt.task("b"):
        pass
    assert list(opt._training.pending.rows) == ["a"]
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="nothing to combine"):
        opt.combine()


def test_graph_freed_between_blocks() -> None:
    model, opt = pair()
    first, second = model.losses()
    with opt.task("a"):
        first.backward()
    with (
        pytest.raises(RuntimeError, match=r"task 'b': .*already freed.*retain_graph=True") as caught,
        opt.task("b"),
    ):
        second.backward()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert list(opt._training.pending.rows) == ["a"] and uncombined(model.parameters()) == [None] * 8


def test_parameters_that_change_between_blocks() -> None:
    model, opt = pair()
    with opt.task("a"):
        model.losses()[0].backward()
    with pytest.raises(RuntimeError, match=r"combine\(\) first"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    model.heads[1].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="changed since tasks were captured"):
        opt.step()
    model.heads[1].weight.requires_grad_(True)
    opt.step()
