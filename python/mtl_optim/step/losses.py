"""The losses of a step: what users pass in, checked, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_kernels import MAX_TASKS

from .names import check_task_name


def named_losses(losses: Any) -> dict[str, Tensor]:
    """The losses by task name; those of a list are named "0", "1", ...

    Raises:
        TypeError: not losses at all.
        ValueError: none, too many, one twice, one that is not a scalar or does not require grad.
    """
    named: dict[Any, Any]
    if isinstance(losses, Tensor):
        if losses.dim() > 1:
            raise ValueError(
                f"expected one scalar loss per task, found a tensor of shape {list(losses.shape)}; reduce it "
                "to one value per task, a tensor [K]"
            )
        parts = losses.unbind(0) if losses.dim() else (losses,)
        named = {str(k): loss for k, loss in enumerate(parts)}
    elif isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, Sequence) and not isinstance(losses, (str, bytes)):
        named = {str(k): loss for k, loss in enumerate(losses)}
    else:
        raise TypeError(
            f"expected a list, tuple or dict of scalar losses, or a tensor [K], found {type(losses).__name__}"
        )
    if not named:
        raise ValueError("expected at least one loss, found none; leave out backward() when no task is present")
    if len(named) > MAX_TASKS:
        raise ValueError(f"expected at most {MAX_TASKS} losses, found {len(named)}; sum some of them")
    first_name: dict[int, str] = {}
    for name, loss in named.items():
        check_task_name(name)
        _check_loss(name, loss)
        if id(loss) in first_name:
            raise ValueError(
                f"losses {first_name[id(loss)]!r} and {name!r} are the same tensor; pass each loss once, or "
                "multiply it by its weight"
            )
        first_name[id(loss)] = name
    return named


def check_loss_value(name: str, loss: object) -> None:
    """Raise TypeError or ValueError unless ``loss`` is a tensor with one real element."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss {name!r} is a {type(loss).__name__}; expected a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss {name!r} has shape {list(loss.shape)}; expected a scalar: reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ValueError(f"loss {name!r} is complex; expected a real scalar")


def _check_loss(name: str, loss: Tensor) -> None:
    check_loss_value(name, loss)
    if not loss.requires_grad:
        raise ValueError(
            f"loss {name!r} does not require grad; was it detached, computed under torch.no_grad(), or from "
            "frozen parameters only? Leave an absent task out instead"
        )


def is_stacked(losses: object) -> bool:
    """Whether several losses were put into one tensor just before."""
    if not isinstance(losses, Tensor) or losses.numel() < 2 or losses.grad_fn is None:
        return False
    return losses.grad_fn.name().startswith(("StackBackward", "CatBackward"))


def stack_losses(losses: Mapping[str, Tensor], tasks: Sequence[str], device: torch.device) -> Tensor:
    """Loss values in the order of the tasks, float64 ``[K]``; 1 for an absent task."""
    absent = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([losses[name].to(device) if name in losses else absent for name in tasks])


def reaches_nothing(name: object) -> ValueError:
    """The error for a loss without a gradient for any parameter of the optimizer."""
    return ValueError(
        f"loss {name!r} reaches none of the parameters of the optimizer: was backward() called, are its parameters in "
        "the optimizer, and do they require grad?"
    )
