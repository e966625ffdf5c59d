"""What ranks run: training on a share of the batches, told by one process with all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtl_optim import MGDA, CAGrad, GradDrop, Method, MultiTaskOptimizer, NashMTL, PCGrad, UPGrad

TASKS, SHARE, STEPS = 3, 4, 3

METHODS: dict[str, Callable[[], Method]] = {
    "pcgrad": lambda: PCGrad(seed=7),
    "mgda": MGDA,
    "cagrad": CAGrad,
    "upgrad": UPGrad,
    "nashmtl": NashMTL,
}


class Net(nn.Module):
    """A trunk of odd sizes, a bridge of two of three tasks, a head each, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh())
        self.bridge = nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        near = self.trunk(x)
        far = torch.tanh(self.bridge(near))
        return [head(near if k == 0 else far).squeeze(-1) for k, head in enumerate(self.heads)]


def batch(step: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ranks * SHARE, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(TASKS, ranks * SHARE, generator=generator, dtype=torch.float64) * 3


def losses(model: nn.Module, x: Tensor, y: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(x)
    return {f"task{k}": (out.to(y.dtype) - y[k]).square().mean() for k, out in enumerate(outputs)}


def parallel(model: nn.Module, how: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model on several ranks, and what the optimizer is told of it."""
    if how.startswith("ddp"):
        options = {"ddp": {}, "ddp, unused": {"find_unused_parameters": True}, "ddp, static": {"static_graph": True},
                   "ddp, views": {"gradient_as_bucket_view": True}}[how]  # fmt: skip
        wrapped = DistributedDataParallel(model, **options)
        return wrapped, {"data_parallel": wrapped}
    if how in ("group", "group, all"):
        return model, {"data_parallel": dist.group.WORLD, "reduce": "all" if how.endswith("all") else "scatter"}
    if how in ("fsdp", "hsdp", "2-d"):
        size = dist.get_world_size()
        shape = {"fsdp": (size,), "hsdp": (size // 2, 2), "2-d": (2, size // 2)}[how]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in (model.trunk[0], model.trunk[2], model.bridge):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh), {}
    raise ValueError(how)


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().double().clone()


def train(
    how: str, method: str, dtype: torch.dtype = torch.float64, autocast: bool = False, micro: int = 1,
    blocks: bool = False, world: int = 0, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Some steps on this rank's share of the batches; "one" is a process by itself with those of a whole world."""
    model, share = Net().to(dtype), slice(None)
    forward: nn.Module = model
    told: dict[str, Any] = {}
    if how != "one":
        world, rank = dist.get_world_size(), dist.get_rank()
        share = slice(rank * SHARE, (rank + 1) * SHARE)
        forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), METHODS[method](), **told, **options
    )
    weights, grams = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            x, y = batch(step * micro + part, world)
            x, y = x[share].to(dtype), y[:, share].to(dtype)
            if blocks:
                for k in range(TASKS):
                    with optimizer.task(f"task{k}", accumulate=part > 0):
                        losses(forward, x, y, autocast)[f"task{k}"].backward()
            else:
                optimizer.backward(losses(forward, x, y, autocast), accumulate=part < micro - 1)
        optimizer.step()
        assert optimizer.report is not None and optimizer.report.weights is not None
        weights.append(optimizer.report.weights.clone())
        grams.append(optimizer.report.gram.clone())
    return {
        "params": [whole(p) for p in model.parameters()],
        "grads": [whole(p.grad) for p in model.parameters() if p.grad is not None],
        "weights": weights,
        "grams": grams,
    }


def outcome(optimizer: MultiTaskOptimizer, model: nn.Module) -> dict[str, Any]:
    report = optimizer.report
    assert report is not None and report.weights is not None
    grads = [None if p.grad is None else whole(p.grad) for p in model.parameters()]
    return {"weights": report.weights.clone(), "grads": grads, "gram": report.gram.clone()}


def other_tasks_on_one_rank(how: str) -> None:
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), **told)
    found = losses(forward, *batch(0, 1))
    if dist.get_rank() == 1:
        del found["task2"]
    optimizer.backward(found)


def an_error_on_one_rank(how: str) -> None:
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), **told)
    found = losses(forward, *batch(0, 1))
    if dist.get_rank() == 1:
        found["task1"].register_hook(_raise)
    try:
        optimizer.backward(found)
    finally:
        assert all(p.grad is None for p in model.parameters())


def _raise(grad: Tensor) -> None:
    raise ValueError("no memory, say")


def a_rank_that_dies(how: str) -> None:
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), **told)
    optimizer.backward(losses(forward, *batch(0, 1)))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    optimizer.backward(losses(forward, *batch(1, 1)))


def nothing_said() -> None:
    model = Net().double()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    optimizer.backward(losses(model, *batch(0, 1)))


def apart() -> Tensor:
    """Each rank by itself."""
    model = Net().double()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), data_parallel=False)
    optimizer.backward(losses(model, *batch(dist.get_rank(), 1)))
    return model.trunk[0].weight.grad.clone()


def not_finite_on_one_rank(how: str) -> dict[str, Any]:
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), NashMTL(), **told)
    x, y = batch(0, 1)
    if dist.get_rank() == 1:
        y[0, 0] = float("nan")
    optimizer.backward(losses(forward, x, y))
    return outcome(optimizer, model) | {"state": optimizer.method.state_dict()}


def absent_on_one_rank(how: str) -> dict[str, Any]:
    """One task's loss reaches the bridge on one rank alone."""
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    x, y = batch(0, 2)
    mine = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
    found = losses(forward, x[mine], y[:, mine])
    if dist.get_rank() == 1:
        found["task0"] = found["task0"] + model.bridge.weight.sum()
    optimizer.backward(found)
    return outcome(optimizer, model)


def absent_on_one_rank_alone() -> dict[str, Any]:
    model = Net().double()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())
    found = losses(model, *batch(0, 2))
    found["task0"] = found["task0"] + model.bridge.weight.sum() / 2
    optimizer.backward(found)
    return outcome(optimizer, model)


def bytes_sent(how: str, tasks: int) -> dict[str, int]:
    """What a combination hands to collectives, in elements."""
    torch.manual_seed(0)
    trunk = nn.Linear(40, 25, bias=False).double()
    heads = [nn.Linear(25, 1, bias=False).double() for _ in range(tasks)]
    params = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    _, told = parallel(trunk, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), PCGrad(), **told)
    z = trunk(torch.randn(8, 40, dtype=torch.float64))
    counted: dict[str, int] = {}
    names = ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            counted[name] = counted.get(name, 0) + max(tensor.numel() for tensor in tensors)
            return originals[name](*tensors, **options)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        optimizer.backward([head(z).square().mean() for head in heads])
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counted


def buffers_of_a_model(how: str) -> list[Tensor]:
    """Running statistics, which a forward pass of DistributedDataParallel takes from the first rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), **told)
    seen = []
    for step in range(3):
        x = batch(10 * step + dist.get_rank(), 1)[0]
        out = forward(x)
        optimizer.zero_grad()
        optimizer.backward([out[:, k].square().mean() for k in range(2)])
        optimizer.step()
        model[1].running_mean.add_(0)
        before = model[1].running_mean.clone()
        seen.append(before)
    del optimizer
    return [*seen, torch.tensor(float(getattr(forward, "require_backward_grad_sync", True)))]


def another_model() -> None:
    wrapped = DistributedDataParallel(Net())
    MultiTaskOptimizer(torch.optim.SGD(Net().parameters()), PCGrad(), data_parallel=wrapped)


def a_bare_model() -> None:
    model = Net()
    MultiTaskOptimizer(torch.optim.SGD(model.parameters()), PCGrad(), data_parallel=model)


def elements() -> None:
    MultiTaskOptimizer(torch.optim.SGD(Net().parameters()), GradDrop(), data_parallel=dist.group.WORLD)


def factors() -> None:
    MultiTaskOptimizer(
        torch.optim.SGD(Net().parameters()), PCGrad(), capture="factored", data_parallel=dist.group.WORLD
    )
