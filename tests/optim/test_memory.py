"""No copy of the rows: bytes that a combination allocates beyond them, and what is kept afterwards."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtl_kernels as mk
from mtl_optim import DBMTL, MGDA, ExcessMTL, GradDrop, MoCo, MultiTaskOptimizer, PCGrad, TrimmedMean
from optim.oracle import TwoHeads


class Model(nn.Module):
    def __init__(self, tasks: int, width: int = 256) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def losses(self) -> list[torch.Tensor]:
        hidden = self.trunk(torch.ones(2, self.trunk[0].in_features))
        return [(head(hidden) - k).square().mean() for k, head in enumerate(self.heads)]


def allocated(run) -> int:  # type: ignore[no-untyped-def]
    """Bytes that the CPU allocator handed out while ``run`` ran, whether or not they were given back."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    total = 0

    def visit(events) -> None:  # type: ignore[no-untyped-def]
        nonlocal total
        for event in events:
            if event.tag.name == "Allocation":
                total += max(0, event.extra_fields.alloc_size)
            visit(event.children)

    visit(profile.profiler.kineto_results.experimental_event_tree())
    return total


@pytest.mark.usefixtures("each_capture")
@pytest.mark.parametrize(
    "method", [PCGrad(), MGDA(), GradDrop(), TrimmedMean(1), ExcessMTL(), MoCo(), DBMTL()], ids=repr
)
@pytest.mark.parametrize("granularity", ["model", "parameter"])
def test_combine_allocates_next_to_nothing(method, granularity: str) -> None:  # type: ignore[no-untyped-def]
    if mk.available_backends()["cpu"] is not None:
        pytest.skip("the reference converts blocks to float64")
    tasks = 4
    model = Model(tasks)
    opt = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), copy.deepcopy(method), granularity=granularity
    )
    opt.backward(model.losses())
    opt.zero_grad()
    opt.backward(model.losses(), accumulate=True)
    rows = sum(p.numel() for p in model.trunk.parameters()) * tasks * 4
    control = allocated(lambda: torch.empty(1000, dtype=torch.float32))
    assert control >= 4000
    with mk.use_backend("cpu"):
        assert allocated(opt.combine) < rows // 100


def test_gradients_live_in_the_first_row() -> None:
    model = Model(3)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    opt.backward(model.losses(), accumulate=True)
    first = [g.untyped_storage().data_ptr() for g in opt._training.pending.rows["0"][:8]]
    opt.combine()
    assert [p.grad.untyped_storage().data_ptr() for p in model.trunk.parameters()] == first


def test_rows_are_freed_with_the_combination() -> None:
    model = Model(3)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad())
    opt.backward(model.losses(), accumulate=True)
    held = [[weakref.ref(g) for g in row if g is not None] for row in opt._training.pending.rows.values()]
    gc.disable()
    try:
        opt.combine()
        alive = [sum(ref() is not None for ref in row) for row in held]
    finally:
        gc.enable()
    # The shared tensors of the first row are the gradients now, and every head keeps its own two.
    assert alive == [10, 2, 2]


def test_nothing_is_read_back() -> None:
    """No operation that a GPU would have to wait for, in a step after the first."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = TwoHeads(3)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(), head_scaling="weights")
    opt.backward(model.losses())
    opt.backward(model.losses(), accumulate=True)
    names: list[str] = []
    with Watch():
        opt.combine()
    assert names and not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(names)
    assert "lift_fresh" not in names
