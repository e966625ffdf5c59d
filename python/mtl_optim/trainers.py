"""Several losses in a training loop that calls ``backward()`` and ``step()`` by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optimizer import MultiTaskOptimizer
from .step.losses import check_loss_value, named_losses


def joint_loss(
    optimizer: Optimizer,
    losses: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    accumulate: bool = True,
    **options: Any,
) -> Tensor:
    """One loss to hand to a trainer, whose ``backward()`` is that of a `MultiTaskOptimizer` over several losses.

    ::

        def training_step(self, batch):
            return joint_loss(self.optimizers(), self.model(batch))  # a dict of losses

    Its value is the sum of the losses, for logs. What is multiplied with it (a gradient scaler's scale, one over the
    number of micro-batches) multiplies each of them. It is no part of their graph: add a regulariser to the losses,
    not to what is returned, or it is neither combined nor averaged over ranks.

    Args:
        optimizer: the `MultiTaskOptimizer`, or what a trainer has wrapped around it, each with the next one in its
            ``.optimizer``.
        losses: K scalar losses as a list, tuple or dict. Where gradients are disabled (evaluation) they are summed up,
            and the optimizer is not looked at.
        accumulate: leave the combination to whoever reads a ``.grad`` first (clipping, a scaler), or to ``step()``, so
            that micro-batches are added up before. With False every call of ``backward()`` is combined by itself,
            which the options that save passes (``gram=False``, ``refresh_every``, ``capture="factored"``) need.
        options: the others of `MultiTaskOptimizer.backward`.

    Returns:
        A scalar with the dtype that the losses have in common, on the device of the first.

    Raises:
        TypeError, ValueError: as `MultiTaskOptimizer.backward`, or an optimizer that is none. ``backward()`` of what is
            returned raises what that of the optimizer does.
    """
    total = _sum(losses)
    if not torch.is_grad_enabled():
        return total
    named_losses(losses)
    target = _multi_task(optimizer)

    def backward(factor: Tensor) -> None:
        with torch.enable_grad():
            if isinstance(losses, Mapping):
                scaled: Any = {name: loss * factor.to(loss.device) for name, loss in losses.items()}
            else:
                scaled = [loss * factor.to(loss.device) for loss in losses]
            target.backward(scaled, accumulate=accumulate, **options)

    total.requires_grad_().register_hook(backward)
    return total


def _sum(losses: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    if not isinstance(losses, (list, tuple, Mapping)) or not losses:
        raise TypeError(f"joint_loss(): expected a list, tuple or dict of scalar losses, found {losses!r}")
    values = []
    for name, loss in losses.items() if isinstance(losses, Mapping) else enumerate(losses):
        check_loss_value(str(name), loss)
        values.append(loss.detach().reshape(()))
    first = values[0]
    return sum((value.to(first.device) for value in values[1:]), first.clone())


def _multi_task(optimizer: object) -> MultiTaskOptimizer:
    found: Any = optimizer
    while not isinstance(found, MultiTaskOptimizer):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise TypeError(
                "joint_loss(): expected a MultiTaskOptimizer, or what a trainer has made of one, found "
                f"{type(optimizer).__name__}; wrap the optimizer in a MultiTaskOptimizer before the trainer takes it"
            )
    return found
