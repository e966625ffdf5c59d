"""What ranks run: training on a share of the batches, told by one process with all of them."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mtl_optim import (
    MGDA,
    CAGrad,
    GradDrop,
    Method,
    MultiTaskOptimizer,
    NashMTL,
    PCGrad,
    UPGrad,
)
from mtl_optim.distributed.checkpoint import TrainingState
from mtl_optim.distributed.replicated import Replicated

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

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 7), nn.Tanh())
        self.bridge = nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        near = self.near = self.trunk(x)
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
    if how == "tensor parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model.trunk, mesh["tensor"], plan)
        return fully_shard(model, mesh=mesh["data"]), {}
    raise ValueError(how)


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().double().clone()


def check(found: list[dict[str, Any]], expected: dict[str, Any], rtol: float = 1e-9) -> None:
    """What every rank found against one process, and the same weights on all of them to the bit."""
    for result in found:
        for name in ("weights", "grams", "grads", "params"):
            for a, b in zip(result[name], expected[name], strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max().clamp(min=1e-3)))
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], found[0]["weights"], strict=True))


def train(
    how: str, method: str, dtype: torch.dtype = torch.float64, autocast: bool = False, micro: int = 1,
    blocks: bool = False, scaled: bool = False, world: int = 0, width: int = 11, apart: str = "",
    features: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Some steps on this rank's share of the batches; "one" is a process by itself with those of a whole world."""
    model, share = Net(width).to(dtype), slice(None)
    forward: nn.Module = model
    told: dict[str, Any] = {}
    if how != "one":
        world, rank = dist.get_world_size(), dist.get_rank()
        if how == "tensor parallel":  # two ranks have a batch together
            world, rank = world // 2, rank // 2
        share = slice(rank * SHARE, (rank + 1) * SHARE)
        forward, told = parallel(model, how)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if apart:  # the first layer has a key of its own
        first, rest = list(model.trunk[0].parameters()), groups[0]["params"][2:]
        groups = [{"params": first, apart: False}, {"params": rest}]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), METHODS[method](), **told, **options)
    weights, grams = [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            x, y = batch(step * micro + part, world)
            x, y = x[share].to(dtype), y[:, share].to(dtype)
            if blocks:
                for k in range(TASKS):
                    with optimizer.task(f"task{k}", accumulate=part > 0):
                        scaler.scale(losses(forward, x, y, autocast)[f"task{k}"]).backward()
            else:
                found = {name: scaler.scale(loss) for name, loss in losses(forward, x, y, autocast).items()}
                through = {"features": model.near} if features else {"accumulate": part < micro - 1}
                optimizer.backward(found, **through)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.report is not None and optimizer.report.weights is not None
        weights.append(optimizer.report.weights.clone())
        grams.append(optimizer.report.gram / (2.0**20 if scaled else 1.0))
    return {
        "params": [whole(p) for p in model.parameters()],
        "grads": [whole(p.grad) for p in model.parameters() if p.grad is not None],
        "weights": weights,
        "grams": grams,
    }


def changing(how: str, world: int = 0, sends: bool = True) -> dict[str, Any]:
    """Steps of tasks and shared parameters that change, of rows that are sent as they come."""
    model, share, told = Net().double(), slice(None), {}
    forward: nn.Module = model
    if how != "one":
        world = dist.get_world_size()
        share = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
        forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    found: dict[str, Any] = {"weights": [], "grams": [], "sent": []}
    original = Replicated.sender
    Replicated.sender = (lambda *given: found["sent"].append(original(*given)) or found["sent"][-1]) if sends else _no
    try:
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(step, world)
            some = losses(forward, x[share], y[:, share])
            if step == 3:  # two tasks have one's head
                some["task1"] = some["task1"] + model.heads[2](model.near[:, :7]).square().mean()
            if step == 4:
                del some["task2"]
            if step == 5:  # one row was captured before
                with optimizer.task("task1"):
                    some.pop("task1").backward(retain_graph=True)
            optimizer.backward(some)
            optimizer.step()
            found["weights"].append(optimizer.report.weights.clone())
            found["grams"].append(optimizer.report.gram.clone())
    finally:
        Replicated.sender = original
    found["sent"] = [sender is not None for sender in found["sent"]]
    found["params"] = [whole(p) for p in model.parameters()]
    found["grads"] = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    return found


def _no(*given: Any) -> None:
    return None


def rows_that_are_gone() -> list[int]:
    """How many elements of earlier tasks' gradients are held when a pass begins, in a step whose rows are sent."""
    torch.manual_seed(0)
    trunk = nn.Linear(50, 40, bias=False).double()
    heads = [nn.Linear(40, 1).double() for _ in range(4)]
    params = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), PCGrad(), data_parallel=dist.group.WORLD)
    alive: list[weakref.ref[Tensor]] = []
    found: list[int] = []
    trunk.weight.register_post_accumulate_grad_hook(lambda p: alive.append(weakref.ref(p.grad)))
    for _ in range(2):
        alive.clear()
        optimizer.zero_grad()
        z = trunk(torch.randn(8, 50, dtype=torch.float64))
        z.register_hook(lambda grad: found.append(sum(one() is not None for one in alive)))
        optimizer.backward([head(z).square().mean() for head in heads])
    return found


def an_error_while_rows_are_sent(how: str) -> dict[str, Any]:
    """On one rank, in the second pass of the second step; then a step that goes well."""
    model = Net().double()
    forward, told = parallel(model, how)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    rank, said = dist.get_rank(), ""
    for step in range(3):
        x, y = batch(step, 2)
        found = losses(forward, x[rank * SHARE :][:SHARE], y[:, rank * SHARE :][:, :SHARE])
        if step == 1 and rank == 1:
            found["task1"].register_hook(_raise)
        before = [whole(p.grad) if p.grad is not None else None for p in model.parameters()]
        try:
            optimizer.backward(found)
            optimizer.step()
            optimizer.zero_grad()
        except (ValueError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
            assert before == [p.grad for p in model.parameters()]
    return {"said": said, "params": [whole(p) for p in model.parameters()]}


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


def skipped_together(how: str) -> dict[str, Any]:
    """A scaler's step where one rank alone has gradients that are not finite."""
    model = Net()
    forward, told = parallel(model, how)
    before = [whole(p) for p in model.parameters()]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = (tensor.float() for tensor in batch(0, 1))
    if dist.get_rank() == 1:
        y[0, 0] = float("inf")
    optimizer.backward({name: scaler.scale(loss) for name, loss in losses(forward, x, y).items()})
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    return {"same": same, "scale": scaler.get_scale()}


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


def train_and_save(how: str, folder: str, steps: int, kill_at: int | None = None) -> list[Tensor]:
    """Steps with a checkpoint after each, from the last one that is there; rank 1 may be killed in one of them."""
    model = Net().double()
    forward, told = parallel(model, how)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = MultiTaskOptimizer(inner, PCGrad(seed=3), **told)
    sharded = how in ("fsdp", "hsdp")
    done = max((int(name[4:]) for name in os.listdir(folder) if name.startswith("done")), default=0)
    if done:
        restore(sharded, os.path.join(folder, f"step{done}"), model, optimizer)
    for step in range(done, steps):
        x, y = batch(step, dist.get_world_size())
        share = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
        optimizer.zero_grad()
        optimizer.backward(losses(forward, x[share], y[:, share]))
        if step == kill_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        save(sharded, os.path.join(folder, f"step{step + 1}"), model, optimizer)
        dist.barrier()
        if dist.get_rank() == 0:
            open(os.path.join(folder, f"done{step + 1}"), "w").close()
    momentum = [whole(inner.state[p]["momentum_buffer"]) for p in model.parameters()]
    drawn = [torch.as_tensor(value) for value in optimizer.method.state_dict().values()]
    assert drawn, "the random orders of PCGrad"
    return [*(whole(p) for p in model.parameters()), *momentum, *drawn]


def save(sharded: bool, path: str, model: nn.Module, optimizer: MultiTaskOptimizer) -> None:
    if sharded:
        checkpoint.save({"training": TrainingState(model, optimizer)}, checkpoint_id=path)
    elif dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def restore(sharded: bool, path: str, model: nn.Module, optimizer: MultiTaskOptimizer) -> None:
    if sharded:
        checkpoint.load({"training": TrainingState(model, optimizer)}, checkpoint_id=path)
        return
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def load_with_another_method(path: str) -> None:
    model = Net().double()
    parallel(model, "fsdp")
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), NashMTL())
    restore(True, path, model, optimizer)
