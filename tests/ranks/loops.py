"""What training loops do on several ranks: compile, checkpoint, leave tasks out, run out of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mtl_optim import MGDA, MultiTaskOptimizer, PCGrad
from ranks.scenarios import SHARE, STEPS, TASKS, Net, batch, losses, whole

Wrapped = tuple[nn.Module, dict[str, Any]]


class CheckpointedNet(Net):
    """The trunk runs again in every backward pass."""

    def forward(self, x: Tensor) -> list[Tensor]:
        near = checkpoint(self.trunk, x, use_reentrant=False)
        far = torch.tanh(self.bridge(near))
        return [head(near if k == 0 else far).squeeze(-1) for k, head in enumerate(self.heads)]


def _replicated(model: nn.Module, **options: Any) -> Wrapped:
    wrapped = DistributedDataParallel(model, **options)
    return wrapped, {"data_parallel": wrapped}


def _compiled_inside(model: nn.Module) -> Wrapped:
    return _replicated(torch.compile(model, backend="aot_eager"))


def _compiled_outside(model: nn.Module) -> Wrapped:
    wrapped = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    return wrapped, {"data_parallel": wrapped}


def _compiled_parts(model: nn.Module) -> Wrapped:
    for part in (model.trunk, model.bridge, *model.heads):
        part.compile(backend="aot_eager")
    return _replicated(model)


def _sharded(model: nn.Module, **options: Any) -> Wrapped:
    for part in (model.trunk[0], model.trunk[2], model.bridge):
        fully_shard(part, **options)
    return fully_shard(model, **options), {}


def _sharded_in_part(model: nn.Module) -> Wrapped:
    """Heads and a layer of the trunk are plain."""
    for part in (model.trunk[0], model.bridge):
        fully_shard(part)
    return model, {}


WAYS: dict[str, Callable[[nn.Module], Wrapped]] = {
    "one": lambda model: (model, {}),
    "ddp": _replicated,
    "ddp, views": lambda model: _replicated(model, gradient_as_bucket_view=True),
    "ddp, unused": lambda model: _replicated(model, find_unused_parameters=True),
    "ddp of a compiled model": _compiled_inside,
    "compiled ddp": _compiled_outside,
    "ddp of compiled parts": _compiled_parts,
    "fsdp": _sharded,
    "fsdp, in part": _sharded_in_part,
    "fsdp, kept whole": lambda model: _sharded(model, reshard_after_forward=False),
    "fsdp, offloaded": lambda model: _sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp, float32": lambda model: _sharded(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    ),
}


def train(
    how: str, checkpointed: bool = False, plain_heads: bool = False, blocks: bool = False, absent: bool = False
) -> dict[str, Any]:
    """Some steps on this rank's share of the batches; "one" is a process by itself with those of both ranks.

    Args:
        plain_heads: heads get the plain sum. absent: a task is left out of every second step.
    """
    torch._dynamo.reset()
    model = (CheckpointedNet if checkpointed else Net)().double()
    share = slice(None)
    if how != "one":
        share = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
    forward, told = WAYS[how](model)
    heads = list(model.heads.parameters())
    rest = [p for p in model.parameters() if all(p is not other for other in heads)]
    groups = [{"params": rest}, {"params": heads, "mtl": not plain_heads}]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), PCGrad(seed=7), **told)
    weights, grams = [], []
    for step in range(STEPS):
        x, y = (part[..., share, :] if part.shape[-1] == 5 else part[:, share] for part in batch(step, 2))
        names = [f"task{k}" for k in range(TASKS) if not (absent and step % 2 and k == 2)]
        optimizer.zero_grad()
        if blocks:
            for name in names:
                with optimizer.task(name):
                    losses(forward, x, y)[name].backward()
        else:
            found = losses(forward, x, y)
            optimizer.backward({name: found[name] for name in names})
        optimizer.step()
        weights.append(optimizer.report.weights.clone())
        grams.append(optimizer.report.gram)
    return {
        "params": [whole(p) for p in model.parameters()],
        "grads": [whole(p.grad) for p in model.parameters() if p.grad is not None],
        "weights": weights,
        "grams": grams,
    }


def joined(enable: bool, batches: list[int]) -> list[Tensor]:
    """Training in the context that DistributedDataParallel has for an uneven number of batches."""
    model = Net().double()
    forward, told = _replicated(model)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    with forward.join(enable=enable):
        for step in range(batches[dist.get_rank()]):
            optimizer.zero_grad()
            optimizer.backward(losses(forward, *batch(step, 1)))
            optimizer.step()
    return [whole(p) for p in model.parameters()]


def evaluated(batches: list[int]) -> None:
    """An evaluation on an uneven number of batches in that context, and a step behind it."""
    model = Net().double()
    forward, told = _replicated(model)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), **told)
    with torch.no_grad(), forward.join():
        for step in range(batches[dist.get_rank()]):
            forward(batch(step, 1)[0])
    with forward.join(enable=False):
        pass
    optimizer.backward(losses(forward, *batch(0, 1)))
    optimizer.step()
