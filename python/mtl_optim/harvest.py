"""Harvest: the gradient of one loss, taken out of ``.grad`` as autograd left it there, without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .grads import Row, put_grads, take_grads


class Harvest:
    """Takes rows out of ``.grad`` so that each can be written to without touching another.

    Autograd may hand out gradients that are views of one buffer (two parameters reshaped and added share
    theirs). Rows are combined in place, so a tensor that overlaps one taken earlier is copied; all others
    are taken as they are.
    """

    def __init__(self) -> None:
        self._owners: dict[int, list[Tensor]] = {}
        self._warned_sparse = False

    def prepare(self, tasks: Sequence[str], params: Sequence[Tensor]) -> None:
        """Nothing to do: autograd brings the memory."""

    def open(self, task: str, params: Sequence[Tensor], previous: Row | None) -> None:
        if previous is not None:
            put_grads(params, previous)

    def take(self, params: Sequence[Tensor], previous: Row | None) -> Row:
        """The row now in ``.grad``, which is None afterwards; sparse gradients become dense."""
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

    def close(self) -> None:
        """Nothing to do: what a pass left in ``.grad`` goes with it."""

    def forget(self) -> None:
        """Starts a new step: the rows taken so far are gone."""
        self._owners.clear()

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
