"""DistributedDataParallel whose gradients are reduced by a `MultiTaskOptimizer` and not by itself."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def take_over(model: DistributedDataParallel, owner: object) -> None:
    """Keeps the reducer of a model out for as long as an object lives; its buffers go on being broadcast.

    This is what ``model.no_sync()`` does, without a block around every forward pass. Without it several retained
    backward passes raise, or with ``find_unused_parameters`` or ``static_graph`` are reduced for one task alone.
    A forward pass with gradients in the model's ``join()`` raises RuntimeError.
    """
    taken = _TAKEN.get(model)
    if taken is None:
        before, hook = model.require_backward_grad_sync, model.register_forward_pre_hook(_keep_out)
        taken = _TAKEN[model] = _Taken(before, hook)
    taken.owners += 1
    model.require_backward_grad_sync = False
    weakref.finalize(owner, _give_back, weakref.ref(model))


@dataclasses.dataclass
class _Taken:
    """A model that is taken over: what it was before, and by how many."""

    before: bool
    hook: Any
    owners: int = 0


_TAKEN: weakref.WeakKeyDictionary[DistributedDataParallel, _Taken] = weakref.WeakKeyDictionary()


def _keep_out(model: DistributedDataParallel, _: Any) -> None:
    if torch.is_grad_enabled() and model._join_config.enable:
        raise RuntimeError(
            "join() answers for a rank that is out of batches where DistributedDataParallel waits for it, and a "
            "MultiTaskOptimizer would wait for ever: give all ranks as many batches (drop_last=True, or stop where the "
            "first rank is out of them). join() stays on behind its block; with model.join(enable=False): pass "
            "turns it off"
        )
    model.require_backward_grad_sync = False
    # A forward pass without gradient synchronisation would leave out the buffers of the next one.
    model.require_forward_param_sync = True


def _give_back(model: weakref.ref[DistributedDataParallel]) -> None:
    if (found := model()) is None:
        return
    taken = _TAKEN[found]
    taken.owners -= 1
    if taken.owners == 0:
        taken.hook.remove()
        found.require_backward_grad_sync = taken.before
        del _TAKEN[found]
