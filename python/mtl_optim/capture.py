"""Harvest: the gradient of one loss, taken out of ``.grad`` as autograd left it there, without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = list[Tensor | None]
"""The gradient of one task: one tensor per managed parameter, None where the task does not reach it."""


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

    def finish(self) -> None:
        """Puts the managed gradients back; the others keep what autograd has added to them."""
        added = take_grads(self._others)
        self.undo()
        add_grads(self._others, added)


class Harvester:
    """Takes rows out of ``.grad`` so that each can be written to without touching another.

    Autograd may hand out gradients that are views of one buffer (two parameters reshaped and added share
    theirs). Rows are combined in place, so a tensor that overlaps one taken earlier is copied; all others
    are taken as they are.
    """

    def __init__(self) -> None:
        self._owners: dict[int, list[Tensor]] = {}
        self._warned_sparse = False

    def forget(self) -> None:
        """Starts a new step: the rows taken so far are gone."""
        self._owners.clear()

    def take(self, params: Sequence[Tensor], previous: Row | None = None) -> Row:
        """The row now in ``.grad``, which is None afterwards; sparse gradients become dense.

        Args:
            previous: the row that was in ``.grad`` before, to which autograd has added in place.
        """
        row = take_grads(params)
        for p, grad in enumerate(row):
            if grad is None or (previous is not None and grad is previous[p]):
                continue
            if grad.layout != torch.strided:
                grad = row[p] = self._densify(grad)
            elif grad.requires_grad:
                grad = row[p] = grad.detach()
            storage = grad.untyped_storage().data_ptr()
            if storage == 0:
                continue
            owners = self._owners.get(storage)
            if owners is None:
                self._owners[storage] = [grad]
            elif any(_overlap(grad, owner) for owner in owners):
                grad = row[p] = grad.clone()
                self._owners.setdefault(grad.untyped_storage().data_ptr(), []).append(grad)
            else:
                owners.append(grad)
        return row

    def _densify(self, grad: Tensor) -> Tensor:
        if not self._warned_sparse:
            self._warned_sparse = True
            warnings.warn(
                "a sparse gradient (nn.Embedding(sparse=True)?) is made dense to be combined; to keep it "
                "sparse, put the parameter in a param group with mtl=False",
                UserWarning,
                stacklevel=2,
            )
        return grad.to_dense()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors meet."""
    begin_a, begin_b = a.data_ptr(), b.data_ptr()
    return begin_a < begin_b + _extent(b) and begin_b < begin_a + _extent(a)


def _extent(tensor: Tensor) -> int:
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (span + 1) * tensor.element_size() if tensor.numel() else 0


def run_backward(run: Callable[[], Any]) -> None:
    """Runs a backward pass; errors of autograd that have a remedy here are raised again with it.

    Raises:
        RuntimeError: what autograd raised.
    """
    try:
        run()
    except RuntimeError as error:
        if (hint := autograd_hint(error)) is not None:
            raise RuntimeError(hint) from error
        raise


def autograd_hint(error: BaseException) -> str | None:
    """What to do about an error of autograd, or None if it is not one of those known here."""
    text = str(error)
    if "donated" in text:
        return (
            "a compiled graph refused retain_graph, which several losses over one graph need; set "
            "torch._functorch.config.donated_buffer = False before the model is first compiled"
        )
    if "retain_graph" in text or "have already been freed" in text:
        return (
            "the graph of a loss was already freed by an earlier backward(); pass all losses that share a "
            "forward pass to one opt.backward([...]), or call loss.backward(retain_graph=True) for all but "
            "the last of them"
        )
    return None
