"""What ranks run: transforms, errors of one rank alone, several optimizers on one model."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mtl_optim import MGDA, MultiTaskOptimizer, PCGrad
from mtl_optim import losses as L
from mtl_optim.distributed.checkpoint import TrainingState
from ranks import scenarios
from ranks.scenarios import SHARE, Net, batch, losses, parallel, whole

NAMES = ["task0", "task1", "task2"]
TRANSFORMS: dict[str, Callable[[], L.SumOfTerms]] = {
    "log": lambda: L.LogSum(NAMES),
    "current": lambda: L.InverseCurrentLoss(NAMES),
    "initial": lambda: L.InverseInitialLoss(NAMES).double(),
    "lbtw": lambda: L.LossBalancedTaskWeighting(NAMES).double(),
    "dwa": lambda: L.DynamicWeightAverage(NAMES).double(),
    "gradnorm": lambda: L.GradNorm(NAMES, lr=0.3).double(),
    "famo": lambda: L.FAMO(NAMES).double(),
}


def train(how: str, transform: str, world: int = 0) -> dict[str, Any]:
    """`scenarios.train` with a transform that is made here: one that was sent would be in memory of all ranks."""
    return scenarios.train(how, "mgda", world=world, transform=TRANSFORMS[transform]())


def built(how: str, **options: Any) -> tuple[Net, nn.Module, MultiTaskOptimizer]:
    model = Net().double()
    forward, told = parallel(model, how)
    own = list(options["transform"].parameters()) if isinstance(options.get("transform"), nn.Module) else []
    inner = torch.optim.SGD([*model.parameters(), *own], lr=0.1)
    return model, forward, MultiTaskOptimizer(inner, options.pop("method", None) or MGDA(), **told, **options)


def mine(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, dist.get_world_size())
    share = slice(dist.get_rank() * SHARE, (dist.get_rank() + 1) * SHARE)
    return x[share], y[:, share]


def a_transform_that_fails(how: str, step: int) -> list[str]:
    """On one rank, in some step; before and after it everything goes on."""
    told = []

    def transform(found: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(told) == step and dist.get_rank() == 1:
            raise ValueError("no logarithm, say")
        return found

    model, forward, optimizer = built(how, transform=transform)
    for n in range(step + 2):
        optimizer.zero_grad()
        try:
            optimizer.backward(losses(forward, *mine(n)))
            optimizer.step()
            told.append("")
        except (RuntimeError, ValueError) as error:
            assert all(p.grad is None for p in model.parameters())
            told.append(f"{type(error).__name__}: {error}")
    return told


def a_new_task_that_reaches_nothing(how: str) -> list[str]:
    """On one rank, when the others would send rows as they come."""
    _, forward, optimizer = built(how)
    told = []
    for n in range(4):
        optimizer.zero_grad()
        found = losses(forward, *mine(n))
        if n == 2:
            found["new"] = found["task0"] * 2 if dist.get_rank() == 0 else torch.ones((), requires_grad=True) * 1.0
        try:
            optimizer.backward(found)
            optimizer.step()
            told.append("")
        except (RuntimeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def replaced() -> tuple[bool, Tensor]:
    """Two optimizers on one model, and then none."""
    model, forward, first = built("ddp")
    second = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), data_parallel=forward)
    del first
    gc.collect()
    assert not forward.require_backward_grad_sync
    second.backward(losses(forward, *mine(0)))
    second.step()
    del second
    gc.collect()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for n in range(2):
        plain.zero_grad()
        sum(losses(forward, *mine(n)).values()).backward()  # type: ignore[union-attr]
        plain.step()
    return forward.require_backward_grad_sync, model.trunk[0].weight.detach().clone()


def many_optimizers() -> tuple[int, int]:
    """Open files after few optimizers and after more."""
    counts = []
    for count in (2, 20):
        for _ in range(count):
            built("group")
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[0], counts[1]


def a_copy_on_one_rank() -> int:
    """Copies meet nobody."""
    _, _, optimizer = built("fsdp")
    return len(copy.deepcopy(optimizer).param_groups) if dist.get_rank() == 0 else 1


def part_of_the_world() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("member", "shard"))
    model = fully_shard(Net().double(), mesh=mesh["shard"])
    MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA())


def passes_that_end_early() -> list[str]:
    """What is said where a model has a function for gradients to pass through."""
    model = Net().double()
    forward, told = parallel(model, "ddp, unused")
    groups = [{"params": [*model.trunk.parameters()], "gram": False},
              {"params": [*model.bridge.parameters(), *model.heads.parameters()]}]  # fmt: skip
    optimizer = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), MGDA(), **told)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.backward(losses(forward, *mine(0)))
    return [str(one.message) for one in said]


def one_pass_for_all(how: str) -> None:
    _, forward, optimizer = built(how, capture="factored", passes="batched")
    x, y = mine(0)
    optimizer.backward(losses(forward, x[:2], y[:, :2]))


def save_with_a_transform(how: str, folder: str, together: bool) -> list[tuple[Tensor, Tensor]]:
    """A step after loading, and the same without."""
    runs = []
    for load in (False, True):
        transform = L.UncertaintyWeighting(NAMES).double()
        model, forward, optimizer = built(how, transform=transform)
        held = nn.ModuleList([forward, transform]) if together else forward
        if load:
            checkpoint.load({"training": TrainingState(held, optimizer)}, checkpoint_id=folder)
        else:
            optimizer.backward(losses(forward, *mine(0)))
            optimizer.step()
            checkpoint.save({"training": TrainingState(held, optimizer)}, checkpoint_id=folder)
        optimizer.zero_grad()
        optimizer.backward(losses(forward, *mine(1)))
        optimizer.step()
        runs.append([whole(p) for p in (*model.parameters(), *transform.parameters())])
    return list(zip(*runs, strict=True))
