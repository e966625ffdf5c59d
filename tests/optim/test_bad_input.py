"""Every mistake raises, says what to do, and leaves gradients, tasks and rows as they were."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mtl_optim import MGDA, MultiTaskOptimizer, PCGrad, Sum, get_method
from optim.oracle import TwoHeads


def sgd(*params: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(params or [nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.fixture
def model() -> TwoHeads:
    return TwoHeads()


@pytest.fixture
def opt(model: TwoHeads) -> MultiTaskOptimizer:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    opt.backward(dict(zip("ab", model.losses(), strict=True)))
    return opt


@pytest.mark.parametrize(
    ("losses", "error", "text"),
    [
        (lambda a, b: [], ValueError, "at least one loss"),
        (lambda a, b: {}, ValueError, "at least one loss"),
        (lambda a, b: torch.empty(0), ValueError, "at least one loss"),
        (lambda a, b: [a, b.expand(3)], ValueError, r"loss '1' has shape \[3\]"),
        (lambda a, b: a.expand(2, 3), ValueError, r"shape \[2, 3\]"),
        (lambda a, b: {"x": a.detach(), "y": b}, ValueError, "loss 'x' does not require grad"),
        (lambda a, b: [a, 3.0], TypeError, "loss '1' is a float"),
        (lambda a, b: [a, None], TypeError, "loss '1' is a NoneType"),
        (lambda a, b: [a, b * 1j], ValueError, "complex"),
        (lambda a, b: [a, b, a], ValueError, "'0' and '2' are the same tensor"),
        (lambda a, b: {1: a, 2: b}, TypeError, "task name as a string"),
        (lambda a, b: iter([a, b]), TypeError, "list, tuple or dict"),
        (lambda a, b: "ab", TypeError, "list, tuple or dict"),
        (lambda a, b: None, TypeError, "NoneType"),
        (lambda a, b: [a * k for k in range(129)], ValueError, "at most 128"),
        (lambda a, b: [a, nn.Parameter(torch.ones(())).square()], ValueError, "loss '1' reaches none"),
        (lambda a, b: [a, nn.Parameter(torch.ones(()))], ValueError, "loss '1' reaches none"),
    ],
)
def test_losses(model, opt, losses, error, text) -> None:  # type: ignore[no-untyped-def]
    before, pointers = [p.grad.clone() for p in model.parameters()], [p.grad for p in model.parameters()]
    rng, report = opt.method.state["rng"].clone(), opt.report
    with pytest.raises(error, match=text):
        opt.backward(losses(*model.losses()))
    for p, value, grad in zip(model.parameters(), before, pointers, strict=True):
        assert p.grad is grad and torch.equal(grad, value)
    assert opt.tasks == ("a", "b") and opt.report is report and torch.equal(opt.method.state["rng"], rng)
    opt.step()


def test_graph_freed(model: TwoHeads, opt: MultiTaskOptimizer) -> None:
    before = [p.grad.clone() for p in model.parameters()]
    losses = model.losses()
    losses[1].backward(inputs=[model.heads[1].weight])
    model.heads[1].weight.grad.copy_(before[6])
    with pytest.raises(RuntimeError, match=r"already freed.*one opt\.backward") as caught:
        opt.backward({"a": losses[0], "b": losses[1]})
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert not opt._training.pending.rows


def test_error_in_the_method(model: TwoHeads, opt: MultiTaskOptimizer) -> None:
    before = [p.grad.clone() for p in model.parameters()]

    class Failing(Sum):
        def solve(self, gram, *, losses=None, active=None):  # type: ignore[no-untyped-def]
            raise ArithmeticError("no")

    broken = MultiTaskOptimizer(opt.optimizer, Failing())
    with pytest.raises(ArithmeticError):
        broken.backward(model.losses())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert broken.tasks == () and not broken._training.pending.rows and broken.report is None


def test_outside_parameters_warn_once(model: TwoHeads) -> None:
    extra = nn.Parameter(torch.ones((), dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    with pytest.warns(UserWarning, match=r"reach 1 parameter\(s\)"):
        opt.backward([loss * extra for loss in model.losses()])
    assert torch.allclose(extra.grad, sum(model.losses()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward([loss * extra for loss in model.losses()])


def test_hidden_graph_is_judged_after_the_pass(model: TwoHeads, opt: MultiTaskOptimizer) -> None:
    """A custom function may hide parameters, so the loss is tried; it then still reaches nothing."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad

    before = [p.grad.clone() for p in model.parameters()]
    stray = Identity.apply(nn.Parameter(torch.ones((), dtype=torch.float64)))
    with (
        pytest.warns(UserWarning, match="not in the optimizer"),
        pytest.raises(ValueError, match="'stray' reaches none"),
    ):
        opt.backward({"a": model.losses()[0], "stray": stray})
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_step_without_capture(model: TwoHeads) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    with pytest.raises(RuntimeError, match=r"opt\.backward.*opt\.optimizer"):
        opt.step()
    opt.backward(model.losses())
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no task captured"):
        opt.step()
    with pytest.raises(RuntimeError, match="no task captured"):
        opt.step(lambda: sum(model.losses()))


def test_too_many_names(model: TwoHeads) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sum())
    opt._training.progress.tasks = tuple(str(k) for k in range(127))
    with pytest.raises(ValueError, match=r"129 task names.*made anew"):
        opt.backward(dict(zip("ab", model.losses(), strict=True)))


def test_several_devices() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="several devices"):
        MultiTaskOptimizer(sgd(a, b), Sum()).backward([a.sum(), a.prod()])


def test_nothing_requires_grad(model: TwoHeads) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sum())
    losses = model.losses()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the optimizer's requires grad"):
        opt.backward(losses)


def test_several_ranks(model: TwoHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sum())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one of 2 ranks"):
        opt.backward(model.losses())
    with pytest.raises(RuntimeError, match="mean gradient"), opt.task("a"):
        pass
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    opt.backward(model.losses())


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: MultiTaskOptimizer(sgd(), PCGrad), TypeError, r"PCGrad\(\)"),
        (lambda: MultiTaskOptimizer(sgd(), "pcgrd"), TypeError, "known methods: alignedmtl, .*constant, .*mgda"),
        (lambda: MultiTaskOptimizer(torch.optim.SGD, Sum()), TypeError, "build the optimizer first"),
        (lambda: MultiTaskOptimizer(MultiTaskOptimizer(sgd(), Sum()), Sum()), TypeError, "already"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), granularity="layer"), ValueError, "'group', 'parameter'"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), head_scaling=True), ValueError, "'none', 'weights'"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), refresh_every=0), ValueError, "refresh_every >= 1"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), refresh_every=True), TypeError, "integer"),
        (
            lambda: MultiTaskOptimizer(sgd(), Sum(), refresh_every=2, granularity="group"),
            ValueError,
            '"model"',
        ),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), tasks="ab"), TypeError, "sequence of names"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), tasks=[]), ValueError, "at least one name"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), tasks=["a", "a"]), ValueError, "distinct"),
        (lambda: MultiTaskOptimizer(sgd(), Sum(), tasks=[1]), TypeError, "task name"),
        (lambda: MultiTaskOptimizer(sgd(), MGDA(normalize="l3")), ValueError, "'loss\\+'"),
    ],
)
def test_constructor(build, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        build()


def test_sharded_parameters(tmp_path: Path) -> None:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh))
        with pytest.raises(ValueError, match="data_parallel= is for replicated parameters"):
            MultiTaskOptimizer(sgd(sharded), Sum(), data_parallel=torch.distributed.group.WORLD)
        opt = MultiTaskOptimizer(sgd(), Sum())
        with pytest.raises(RuntimeError, match=r"a DTensor beside plain tensors.*mtl=False"):
            opt.add_param_group({"params": [sharded]})
        assert len(opt.param_groups) == 1
        opt.add_param_group({"params": [sharded], "mtl": False})
    finally:
        torch.distributed.destroy_process_group()


def test_a_combination_of_losses_as_the_method() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"UncertaintyWeighting combines losses, .* transform="):
        MultiTaskOptimizer(torch.optim.SGD([parameter], lr=0.1), get_method("UW", tasks=2))
