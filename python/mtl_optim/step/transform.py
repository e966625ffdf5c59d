"""What stands between the losses of a step and their passes: a function from losses to as many losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import GradNorm, SumOfTerms
from ..monitor.report import Report
from .losses import is_stacked, named_losses, stack_losses

Transform = Callable[[Any], Any]


def transformed(
    transform: Transform, named: dict[str, Tensor], tasks: Sequence[str], by_name: bool
) -> tuple[dict[str, Tensor], bool]:
    """The losses that take the place of ``named``, under the same names.

    Args:
        tasks: all names known, in the order of the rows. by_name: whether the user gave the losses as a dict.

    Returns:
        The losses, and whether they came stacked into one tensor.

    Raises:
        TypeError, ValueError: the transform takes other losses, or returned no loss for each.
    """
    if isinstance(transform, SumOfTerms):
        given, names = _for_terms(transform, named, tasks, by_name)
        result: Any = transform.terms(given)
    else:
        names = list(named)
        result = transform(dict(named) if by_name else list(named.values()))
    owner = _name(transform)
    if isinstance(result, Mapping):
        if set(result) != set(named):
            raise ValueError(f"transform {owner} returned losses {list(result)} for {list(named)}; keep the names")
        found = {name: result[name] for name in named}
    else:
        count = len(result) if isinstance(result, Sequence) or (isinstance(result, Tensor) and result.dim() == 1) else 0
        if count != len(named):
            raise ValueError(
                f"transform {owner} returned {_found(result)} for {len(named)} losses; expected as many, as a list, a "
                "dict by their names or a tensor [K]"
            )
        found = dict(zip(names, list(result), strict=True))
    try:
        found = named_losses(found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"transform {owner} returned what is no loss: {error}") from error
    return {name: found[name] for name in named}, is_stacked(result)


def averaged(named: dict[str, Tensor], mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The losses with the graphs they have on this rank, and the values of their means over all.

    What a transform makes of them is then that of one process with all batches: its state is the same on all ranks, and
    so is the factor by which it multiplies a gradient.
    """
    with torch.no_grad():
        device = next(iter(named.values())).device
        means = mean(stack_losses(named, list(named), device).double())
    return {
        name: loss - loss.detach() + value.to(loss.device, loss.dtype)
        for (name, loss), value in zip(named.items(), means, strict=True)
    }


def tell_norms(transform: Transform | None, report: Report, present: Sequence[str]) -> None:
    """Hands the norms of the rows to a transform that goes by them."""
    if isinstance(transform, GradNorm) and transform.wants_norms:
        squares = report.gram.diagonal(dim1=-2, dim2=-1)
        norms = squares.sum(tuple(range(squares.dim() - 1))).sqrt() if squares.dim() > 1 else squares.sqrt()
        if transform.tasks is None or not set(present) <= set(transform.tasks):
            transform.update(norms, weighted=True)
        else:
            by_name = {task: norms[k] for k, task in enumerate(report.tasks) if task in present}
            transform.update(by_name, weighted=True)


def learned_parameters(transform: Transform | None) -> list[Tensor]:
    """The parameters of a transform, which are no part of the model."""
    return list(transform.parameters()) if isinstance(transform, nn.Module) else []


def state_of(transform: Transform | None) -> dict[str, Any] | None:
    """What a state dict of the optimizer holds of a transform; None where there is nothing to hold."""
    state = dict(transform.state_dict()) if isinstance(transform, nn.Module) else {}
    return {"type": type(transform).__name__, "state": copy.deepcopy(state)} if state else None


def restore(transform: Transform | None, saved: Mapping[str, Any] | None) -> None:
    """Loads what `state_of` returned."""
    if isinstance(transform, nn.Module) and saved is not None:
        transform.load_state_dict(saved["state"])


def _for_terms(
    transform: SumOfTerms, named: dict[str, Tensor], tasks: Sequence[str], by_name: bool
) -> tuple[dict[str, Tensor] | list[Tensor], list[str]]:
    """The losses as the module takes them, and their names.

    By name if it knows names; else all, in the order of the rows, which is that of its first call.
    """
    if transform.num_tasks is None or (transform.tasks is not None and by_name):
        return dict(named), list(named)
    missing = [task for task in tasks if task not in named]
    if missing:
        raise ValueError(
            f"transform {transform!r} was built without the names of its tasks, so that all come in every step; found "
            f"no loss of task {missing[0]!r}. Build it with names, {list(tasks)}, and pass the losses as a dict"
        )
    return [named[task] for task in tasks], list(tasks)


def _name(transform: Transform) -> str:
    return repr(transform) if isinstance(transform, nn.Module) else getattr(transform, "__name__", repr(transform))


def _found(result: object) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {list(result.shape)}"
    return f"{len(result)} losses" if isinstance(result, Sequence) else f"a {type(result).__name__}"
