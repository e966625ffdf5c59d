"""Moving gradients in and out of ``.grad``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Row = list[Tensor | None]
"""The gradient of one task: one tensor per managed parameter, None where the task does not reach it."""


class BatchOfTask(NamedTuple):
    """What a row goes by where a step takes several independent batches of every task."""

    task: str
    batch: int

    def __repr__(self) -> str:
        return f"{self.task!r} (batch {self.batch})"


RowKey = str | BatchOfTask
"""What a row goes by; the name of its task where a step takes one batch."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and of no subclass, so that its memory is all there is to it."""
    return type(tensor) is Tensor and tensor.layout is torch.strided


def grad_dtype(param: Tensor) -> torch.dtype:
    """That of a parameter's gradient."""
    return getattr(param, "grad_dtype", None) or param.dtype


def memory_of(tensor: Tensor) -> Tensor:
    """What holds the elements that are here: the shard of a DTensor, any other tensor itself."""
    found: Tensor = tensor if type(tensor) is Tensor or not hasattr(tensor, "to_local") else tensor.to_local()
    return found


def as_real(tensor: Tensor | None) -> Tensor | None:
    """A complex tensor as pairs of reals in the same memory, whose inner products are those that a step goes by."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor is not None and tensor.is_complex() else tensor


def same_tensors(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two sequences hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def take_grads(params: Sequence[Tensor]) -> Row:
    """The ``.grad`` of every parameter, which is None afterwards."""
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    return grads


def put_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Sets the ``.grad`` of every parameter."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def add_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Adds to every ``.grad`` as autograd does: in place if there is one, else by taking the tensor."""
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        present = param.grad
        if present is None:
            param.grad = grad
        elif present.layout == torch.strided:
            present.add_(grad)
        else:
            param.grad = present + grad if grad.layout == present.layout else grad.add_(present)


class Isolation:
    """Hides the gradients that are there while others are captured, and puts them back."""

    def __init__(self, managed: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._managed, self._others = managed, others
        self._managed_grads, self._other_grads = take_grads(managed), take_grads(others)

    def undo(self) -> None:
        """As if nothing had happened."""
        put_grads(self._managed, self._managed_grads)
        put_grads(self._others, self._other_grads)

    def finish(self, keep_others: bool = False, reduce: Callable[[Row], Row] | None = None) -> None:
        """Puts the managed gradients back; the others keep what autograd has added, unless they too are kept.

        Args:
            reduce: what becomes of what is added.
        """
        added = take_grads(self._others)
        self.undo()
        if not keep_others:
            add_grads(self._others, added if reduce is None else reduce(added))
