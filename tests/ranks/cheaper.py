"""What ranks run of the ways to take a step that send less, and what that is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_optim import MultiTaskOptimizer, PCGrad, gram_groups
from mtl_optim.distributed import collectives
from ranks.scenarios import METHODS, STEPS, parallel, whole


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The elements of every tensor that is reduced or gathered in a block; twice of one that is both."""
    counts: list[int] = []
    originals = {name: getattr(collectives, name) for name in ("start_reduce_scatter", "all_gather", "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *given: Any) -> Any:
            counts.append(tensor.numel() * {"all_gather": given[0], "all_reduce": 2}.get(name, 1))
            return originals[name](tensor, *given)

        return call

    for name in originals:
        setattr(collectives, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)


class Wide(nn.Module):
    """An embedding, linear layers of more inputs than a batch has rows, one of them used twice, and a head each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(60, 40)
        self.first, self.again = nn.Linear(80, 96), nn.Linear(96, 96, bias=False)
        self.heads = nn.ModuleList(nn.Linear(96, 1) for _ in range(8))

    def forward(self, words: Tensor, guest: Callable[[Tensor, nn.Linear], Tensor] | None) -> list[Tensor]:
        x = torch.tanh(self.first(self.words(words).flatten(1)))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        if guest is not None:
            x = guest(x, self.again)
        return [head(x).squeeze(-1) for head in self.heads]


class Hidden(torch.autograd.Function):
    """Adds to the gradient of a weight in a pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.held = layer.weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.held.square().sum().backward()
        return grad, None


def wide(
    how: str, method: str, world: int = 0, sizes: tuple[int, int] = (6, 6), last: bool = False, guest: int = -1,
    dtype: torch.dtype = torch.float64, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Steps with rows that may be coordinates; one rank may have a guest that coordinates cannot be taken beside."""
    model = Wide().to(dtype)
    forward: nn.Module = model
    told: dict[str, Any] = {}
    rank = 0
    if how != "one":
        rank = dist.get_rank()
        forward, told = parallel(model, how)
    groups = gram_groups(model, model.again) if last else model.parameters()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.3), METHODS[method](), **told, **options)
    found: dict[str, Any] = {"weights": [], "grams": []}
    with counted_collectives() as counts:
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            words = torch.randint(0, 60, (sum(sizes), 2), generator=generator)
            y = torch.randn(8, sum(sizes), generator=generator, dtype=torch.float64).to(dtype)
            share = slice(None) if how == "one" else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            outputs = forward(words[share], Hidden.apply if rank == guest and how != "one" else None)
            optimizer.backward([(out - y[k, share]).square().mean() for k, out in enumerate(outputs)])
            optimizer.step()
            found["weights"].append(optimizer.report.weights.clone())
            found["grams"].append(optimizer.report.gram.clone())
    found["counted"] = sum(counts)
    found["params"] = [whole(p) for p in model.parameters()]
    found["grads"] = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    found["how"] = None if optimizer.report.factoring is None else optimizer.report.factoring.how
    return found


def elements_sent(how: str, tasks: int, steps: int = 1, mode: str = "") -> float:
    """What a rank sends by rings in the last of some steps, of 960 + 240 shared parameters and 10 of every task."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(40, 24, bias=False), nn.Linear(24, 10, bias=False)).double()
    heads = [nn.Linear(10, 1, bias=False).double() for _ in range(tasks)]
    first, *rest = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    groups = [{"params": [first], "gram": mode != "gram=False"}, {"params": rest}]
    _, told = parallel(trunk, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), PCGrad(), **told)
    for _ in range(steps):
        z = trunk(torch.randn(8, 40, dtype=torch.float64))
        with counted_collectives() as counts:
            features = {"features": z} if mode == "features" else {}
            optimizer.backward([head(z).square().mean() for head in heads], **features)
    return sum(counts) * (dist.get_world_size() - 1) / dist.get_world_size()
