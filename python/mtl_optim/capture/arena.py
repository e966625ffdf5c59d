"""Arena: the gradients of all tasks in one buffer, at addresses that stay the same from step to step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..cuda_graphs import capturing, refuse_capture
from .grads import Row, RowKey, grad_dtype, is_plain, put_grads, same_tensors, take_grads

_ALIGNMENT = 256
"""Bytes that every row, and every parameter in it, starts at a multiple of: enough for any vector load."""


class Arena:
    """Rows in buffers ``[tasks, N]``, one per dtype; a row holds every managed parameter at a fixed place.

    A task's first gradient of a step is copied to its place as soon as autograd has finished it, and let go: 2 N
    elements of traffic, where presetting zeros for autograd to add to takes 4 N and hides what was not reached. Later
    ones (micro-batches) autograd adds in place. The combination is written to the first row that reaches a
    parameter, so that ``.grad`` has an address of its own as well.

    Every task ever seen keeps its row. Those seen together for the first time share a buffer; a task that comes later
    gets one of its own, and no row ever moves, until the parameters change and all rows are laid out anew.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[Any, ...]] = []
        self._params: list[Tensor] = []
        self._rows: dict[RowKey, list[Tensor]] = {}
        self._buffers: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._open: dict[int, Tensor] | None = None
        self._in_graph = False
        self._kept: list[Tensor] = []
        weakref.finalize(self, _remove, self._hooks)

    def prepare(self, tasks: Sequence[RowKey], params: Sequence[Tensor]) -> None:
        """Makes room for a row per task, and moves gradients of an earlier step out of the way.

        Raises:
            RuntimeError: memory would be needed while a CUDA graph is captured.
            TypeError: a parameter of a kind that has no plain memory.
        """
        self._in_graph = self._in_graph or capturing()
        layout = [(param.shape, param.stride(), grad_dtype(param), param.device) for param in params]
        if layout != self._layout or not same_tensors(params, self._params):
            self._lay_out(params, layout)
        new = [task for task in tasks if task not in self._rows]
        if new:
            refuse_capture(f'capture="arena" would need memory for {_listed(new)}')
            self._rows.update(zip(new, self._allocate(len(new)), strict=True))
        self._rescue(params)

    def open(self, task: RowKey, params: Sequence[Tensor], previous: Row | None) -> None:
        if previous is not None:
            put_grads(params, previous)
        self._open = {id(param): view for param, view in zip(params, self._rows[task], strict=True)}

    def take(self, params: Sequence[Tensor], previous: Row | None, others: Sequence[Tensor]) -> Row:
        """The row now in ``.grad``, which is None afterwards.

        Raises:
            TypeError: a gradient that is sparse or of a tensor subclass.
        """
        places, self._open = self._open or {}, None
        row = take_grads(params)
        for p, (param, grad) in enumerate(zip(params, row, strict=True)):
            if grad is None or grad is places[id(param)]:
                continue
            if not is_plain(grad):
                raise TypeError(
                    f'capture="arena" takes dense gradients, found {_kind(grad)} for parameter {p} of shape '
                    f'{list(param.shape)}; use capture="harvest", or a param group with mtl=False for it'
                )
            row[p] = places[id(param)].copy_(grad.detach())
        return row

    def check(self, rows: Mapping[RowKey, Row]) -> None:
        """Nothing to do: nobody else has this memory."""

    def let_go(self, task: RowKey, row: Row, kept: Row) -> None:
        """Nothing to do: the memory is the arena's."""

    def close(self) -> bool:
        self._open = None
        return False

    def forget(self) -> None:
        """Nothing to do: the next pass of a task overwrites its row."""

    def _settle(self, param: Tensor) -> None:
        """Moves a gradient that autograd has just finished to its place, so that its own memory is free."""
        grad = param.grad
        place = None if self._open is None else self._open.get(id(param))
        if grad is not None and place is not None and grad is not place and is_plain(grad):
            param.grad = place.copy_(grad.detach())

    def _lay_out(self, params: Sequence[Tensor], layout: list[tuple[Any, ...]]) -> None:
        refuse_capture('capture="arena" would lay out its memory')
        for p, param in enumerate(params):
            if not is_plain(param.detach()):
                raise TypeError(
                    f'capture="arena" needs parameters with plain memory, found {_kind(param.detach())} as parameter '
                    f'{p}; use capture="harvest", or a param group with mtl=False for it'
                )
        if self._in_graph:
            self._kept += self._buffers  # a graph that was captured goes on writing to them
            self._in_graph = False
        else:
            for device in {buffer.device for buffer in self._buffers if buffer.is_cuda}:
                torch.cuda.synchronize(device)  # another stream than that of the allocation may still use them
        _remove(self._hooks)
        self._rows, self._buffers = {}, []
        self._params, self._layout = list(params), layout
        hook = functools.partial(_settle, weakref.ref(self))
        self._hooks += [param.register_post_accumulate_grad_hook(hook) for param in params]

    def _allocate(self, num_rows: int) -> list[list[Tensor]]:
        """New rows, each as one tensor per parameter."""
        widths: dict[tuple[torch.device, torch.dtype], int] = {}
        offsets = []
        for shape, _, dtype, device in self._layout:
            offsets.append(widths.get((device, dtype), 0))
            step = _ALIGNMENT // dtype.itemsize
            widths[device, dtype] = offsets[-1] + -(-shape.numel() // step) * step
        # Memory made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffers = {
                (device, dtype): torch.empty((num_rows, width), dtype=dtype, device=device)
                for (device, dtype), width in widths.items()
            }
        self._buffers += buffers.values()
        strides = [torch.empty_like(param, device="meta").stride() for param in self._params]
        rows: list[list[Tensor]] = [[] for _ in range(num_rows)]
        for (shape, _, dtype, device), stride, offset in zip(self._layout, strides, offsets, strict=True):
            for k, row in enumerate(rows):
                start = k * widths[device, dtype] + offset
                # `.data` gives a view its own version counter: a change to one row is no change to the others.
                row.append(buffers[device, dtype].as_strided(shape, stride, start).data)
        return rows

    def _rescue(self, params: Sequence[Tensor]) -> None:
        """Copies gradients that still lie in a row, which the next pass overwrites."""
        owned = {buffer.untyped_storage().data_ptr() for buffer in self._buffers}
        for param in params:
            grad = param.grad
            if grad is not None and is_plain(grad) and grad.untyped_storage().data_ptr() in owned:
                refuse_capture("gradients of an earlier step would be copied", "call opt.zero_grad() first")
                param.grad = grad.clone()


def _settle(arena: weakref.ref[Arena], param: Tensor) -> None:
    if (found := arena()) is not None:
        found._settle(param)


def _remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def _kind(tensor: Tensor) -> str:
    return f"a {type(tensor).__name__} with layout {str(tensor.layout).removeprefix('torch.')}"


def _listed(tasks: Sequence[RowKey]) -> str:
    return ", ".join(f"task {task!r}" for task in tasks)
