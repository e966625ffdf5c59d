"""DistributedDataParallel whose gradients are reduced by a `MultiTaskOptimizer` and not by itself."""

from __future__ import annotations

import weakref
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


def take_over(model: DistributedDataParallel, owner: object) -> None:
    """Keeps the reducer of a model out for as long as an object lives; its buffers go on being broadcast.

    This is what ``model.no_sync()`` does, without a block around every forward pass. Without it several retained
    backward passes raise, or with ``find_unused_parameters`` or ``static_graph`` are reduced for one task alone.
    """
    before = model.require_backward_grad_sync
    model.require_backward_grad_sync = False
    hook = model.register_forward_pre_hook(_keep_out)
    weakref.finalize(owner, _give_back, weakref.ref(model), before, hook)


def _keep_out(model: Module, _: Any) -> None:
    model.require_backward_grad_sync = False  # type: ignore[assignment]
    # A forward pass without gradient synchronisation would leave out the buffers of the next one.
    model.require_forward_param_sync = True  # type: ignore[assignment]


def _give_back(model: weakref.ref[DistributedDataParallel], before: bool, hook: Any) -> None:
    hook.remove()
    if (found := model()) is not None:
        found.require_backward_grad_sync = before
