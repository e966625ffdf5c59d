"""torch.compile: models as a whole and in parts, steps, and where a compiled function breaks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.compiler.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mtl_optim import MGDA, MultiTaskOptimizer, PCGrad
from optim.oracle import TwoHeads, flatten, rows_of

FIXED = PCGrad(order="fixed")
SPLIT = "ignore:the losses use different outputs:UserWarning"


@pytest.fixture(autouse=True)
def as_torch_comes() -> Iterator[None]:
    """No graphs, and the configuration of a process in which no optimizer was built yet."""
    torch._dynamo.reset()
    counters.clear()
    stock = torch._functorch.config.patch(donated_buffer=True), torch.compiler.config.patch(cache_key_tag="")
    with stock[0], stock[1]:
        yield
    torch._dynamo.reset()


def wrap(model: TwoHeads, plain_heads: bool = False, **options) -> MultiTaskOptimizer:  # type: ignore[no-untyped-def]
    heads = {"params": list(model.heads.parameters()), "mtl": not plain_heads}
    inner = torch.optim.SGD([{"params": list(model.trunk.parameters())}, heads], lr=0.1)
    return MultiTaskOptimizer(inner, FIXED, **options)


def losses_of(outputs: list[Tensor], tasks: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    return {str(k): (outputs[k] - (-1) ** k * (k + 1)).square().mean() for k in tasks}


def batch(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64)


def train(
    how: Callable[[TwoHeads], Callable[[Tensor], list[Tensor]]],
    calls: list[tuple[int, tuple[int, ...]]],
    plain_heads: bool = False,
    blocks: bool = False,
    **options,  # type: ignore[no-untyped-def]
) -> list[Tensor]:
    """The weights of every step and the parameters after all, for batches of some sizes and some of the tasks."""
    model = TwoHeads(3)
    forward = how(model)
    opt = wrap(model, plain_heads, **options)
    found = []
    for size, tasks in calls:
        opt.zero_grad()
        if blocks:
            for k in tasks:
                with opt.task(str(k)):
                    losses_of(forward(batch(size)), (k,))[str(k)].backward()
        else:
            opt.backward(losses_of(forward(batch(size)), tasks))
        opt.step()
        found.append(opt.report.weights.clone())
    return [*found, *(p.detach() for p in model.parameters())]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def eager(model: TwoHeads) -> Callable[[Tensor], list[Tensor]]:
    return model


def whole(backend: str) -> Callable[[TwoHeads], Callable[[Tensor], list[Tensor]]]:
    return lambda model: torch.compile(model, backend=backend)


def in_parts(backend: str) -> Callable[[TwoHeads], Callable[[Tensor], list[Tensor]]]:
    def parts(model: TwoHeads) -> Callable[[Tensor], list[Tensor]]:
        for part in (model.trunk, *model.heads):
            part.compile(backend=backend)
        return model

    return parts


ALL = (0, 1, 2)
STEPS = [(8, ALL), (8, (0, 2)), (8, (0, 1)), (8, ALL), (8, (1, 2))]
"""Whose last pass, the one that is not retained, goes through other heads in turn."""
SIZES = [(8, ALL), (5, ALL), (3, ALL)]
"""From the second size on, backward passes are compiled ahead, and not in a retained pass."""


@pytest.mark.filterwarnings(SPLIT)
@pytest.mark.parametrize(
    ("backend", "calls", "capture"),
    [("inductor", STEPS, "harvest"), ("aot_eager", STEPS, "arena"), ("aot_eager", SIZES, "harvest")],
    ids=["inductor", "arena", "sizes"],
)
def test_a_whole_model(backend: str, calls: list[tuple[int, tuple[int, ...]]], capture: str) -> None:
    """With heads that get the plain sum, to which the zeros of other tasks add nothing.

    Without momentum, which zeros do not stop as absent gradients do.
    """
    expected = train(eager, calls, plain_heads=True)
    same(train(whole(backend), calls, plain_heads=True, capture=capture), expected)


@pytest.mark.parametrize("blocks", [False, True], ids=["calls", "blocks"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_parts(backend: str, blocks: bool) -> None:
    same(train(in_parts(backend), STEPS, blocks=blocks), train(eager, STEPS))


@pytest.mark.parametrize("options", [{"refresh_every": 2, "head_scaling": "weights"}, {"capture": "factored"}], ids=str)
def test_options_with_compiled_parts(options: dict[str, object]) -> None:
    calls = [(8, ALL)] * 4
    same(train(in_parts("aot_eager"), calls, **options), train(eager, calls, **options))


@pytest.mark.parametrize("together", [False, True])
def test_heads_compiled_with_the_trunk_count_as_shared(together: bool) -> None:
    model = TwoHeads(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward = (whole if together else in_parts)("aot_eager")(model)
        opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
        opt.backward(losses_of(forward(batch(8))))
    assert any("one torch.compile graph" in str(warning.message) for warning in caught) == together
    params = list(model.parameters()) if together else list(model.trunk.parameters())
    rows = rows_of(list(losses_of(TwoHeads.forward(model, batch(8))).values()), params)
    matrix = torch.stack([flatten(row, params) for row in rows])
    assert torch.allclose(opt.report.gram, matrix @ matrix.T)


class Sine(nn.Module):
    """Its backward pass can write its result over the product that it has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 32 * 64, dtype=torch.float64).view(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sin().sum(-1)

    def losses(self, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = forward(torch.linspace(-2, 3, 16 * 32, dtype=torch.float64).view(16, 32).cos())
        return [out[:8].square().sum(), (out[8:] - 1).square().sum() + out[0]]


def test_what_was_compiled_for_one_pass_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the graph, which raises, nor its kernels, which a cache on the disk holds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Sine()
    compiled = torch.compile(model)
    model.losses(compiled)[0].backward()
    model.weight.grad = None
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
        opt.backward(model.losses(compiled))
    assert model.weight.grad is None
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"), opt.task("0"):
        model.losses(compiled)[0].backward(retain_graph=True)
    torch.compiler.reset()
    opt.zero_grad()
    opt.backward(model.losses(compiled))
    matrix = torch.stack([flatten(row, [model.weight]) for row in rows_of(model.losses(model), [model.weight])])
    torch.testing.assert_close(opt.report.gram, matrix @ matrix.T, rtol=1e-9, atol=0)


def test_a_graph_that_was_only_run_forward_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Sine()
    compiled = torch.compile(model, backend="aot_eager")
    losses = model.losses(compiled)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    opt.backward(losses)
    matrix = torch.stack([flatten(row, [model.weight]) for row in rows_of(model.losses(model), [model.weight])])
    torch.testing.assert_close(opt.report.gram, matrix @ matrix.T, rtol=1e-9, atol=0)


def test_the_error_of_torch_is_explained() -> None:
    """As it comes from a graph that another thread has compiled, where the configuration is one of threads."""
    model = Sine()
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    torch._functorch.config.donated_buffer = True
    compiled = torch.compile(model, backend="aot_eager")
    model.losses(compiled)[0].backward()
    model.weight.grad = None
    with pytest.raises(RuntimeError, match="in the same thread"):
        opt.backward(model.losses(compiled))
    assert model.weight.grad is None


def test_what_an_optimizer_sets() -> None:
    torch.compiler.config.cache_key_tag = "mine"
    for _ in range(2):
        wrap(TwoHeads())
        assert torch._functorch.config.donated_buffer is False
        assert torch.compiler.config.cache_key_tag == "mine mtl_optim keeps buffers"


def stepped(how: str, make: Callable[[list[Tensor]], torch.optim.Optimizer], blocks: bool = False) -> list[Tensor]:
    model = TwoHeads()
    inner = make(list(model.parameters()))
    opt = MultiTaskOptimizer(inner, FIXED)
    step = opt.step
    if how == "step":
        step = torch.compile(opt.step, backend="eager")
    elif how == "inner":
        inner.step = torch.compile(inner.step, backend="eager")
    elif how == "around the inner":
        step = torch.compile(inner.step, backend="eager")
    for seed in range(4):
        opt.zero_grad()
        losses = {"a": model.losses(seed)[0], "b": model.losses(seed)[1]}
        if blocks:
            for name, loss in losses.items():
                with opt.task(name):
                    loss.backward()
        else:
            opt.backward(losses)
        step()
    return [p.detach() for p in model.parameters()]


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01, dtype=torch.float64)),
}


@pytest.mark.parametrize(
    ("how", "blocks"), [("step", False), ("step", True), ("inner", True), ("around the inner", False)]
)
def test_compiled_steps(how: str, blocks: bool) -> None:
    same(stepped(how, OPTIMIZERS["sgd"], blocks), stepped("", OPTIMIZERS["sgd"]))


def test_a_compiled_step_of_adamw() -> None:
    """Against the wrapped optimizer, compiled by itself: rounded otherwise than where it is not."""
    same(stepped("step", OPTIMIZERS["adamw"]), stepped("around the inner", OPTIMIZERS["adamw"]))


def breaks() -> list[str]:
    """Why compiled functions broke, once for every time."""
    return [reason.split("\n")[0] for reason, times in counters["graph_break"].items() for _ in range(times)]


@pytest.mark.filterwarnings(SPLIT)
def test_a_compiled_model_does_not_break() -> None:
    train(whole("aot_eager"), [(8, ALL)] * 2)
    assert breaks() == [] and counters["stats"]["unique_graphs"] == 1


def test_a_compiled_function_breaks_once_around_backward() -> None:
    """Which is not for tracing: it runs autograd, looks at its graph and keeps the gradients."""
    model = TwoHeads(3)
    opt = wrap(model, plain_heads=True)

    def losses_and_backward(x: Tensor) -> Tensor:
        losses = losses_of(model(2 * x))
        opt.backward(losses)
        return sum(losses.values()).detach()

    compiled = torch.compile(losses_and_backward, backend="aot_eager")
    expected = TwoHeads(3)
    other = wrap(expected, plain_heads=True)
    for _ in range(2):
        opt.zero_grad()
        other.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(batch(8))
        other.backward(losses_of(expected(2 * batch(8))))
    same([p.grad for p in model.trunk.parameters()], [p.grad for p in expected.trunk.parameters()])
    assert len(breaks()) == 1 and counters["stats"]["unique_graphs"] == 2


def test_a_compiled_step_breaks_twice() -> None:
    """Around what is left to combine, and where every optimizer of torch does, to profile its step."""
    stepped("step", OPTIMIZERS["sgd"])
    assert len(breaks()) == 2
