"""What stands in ``.grad`` between capture and combination, so that whoever looks there gets the combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..capture.grads import Row, is_plain

_READ_VALUES = ("__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "data_ptr", "numpy", "tolist")
"""Methods that come by the values without an operation."""


class LazyGrad(Tensor):
    """The gradient of a parameter whose rows were captured and not combined yet.

    The first operation on one (clipping, a norm, unscaling, printing) combines the rows, and then works on the real
    gradient in its place. What a backward pass adds to it meanwhile is kept, for the combination to be added to. It has
    no memory, and tells shape, dtype and device without combining.
    """

    _param: Tensor
    _combine: Callable[[], None]
    _real: Tensor | None
    added: Tensor | None
    """What ``.grad`` held before, and what plain backward passes have added since."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, param: Tensor, like: Tensor, combine: Callable[[], None], added: Tensor | None) -> LazyGrad:
        lazy: LazyGrad = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        lazy._param, lazy._combine, lazy._real, lazy.added = param, combine, None, added
        return lazy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func is torch.ops.aten.add_.Tensor and isinstance(args[0], cls) and args[0]._accumulates():
            args[0]._add(args[1], **(kwargs or {}))
            return args[0]
        args, kwargs = tree_map_only(cls, cls.combined, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _accumulates(self) -> bool:
        """Whether a backward pass adds a gradient, rather than somebody looking."""
        return torch._C._current_graph_task_id() != -1 and self._param.grad is self

    def _add(self, grad: Tensor, alpha: float = 1) -> None:
        if self.added is not None:
            self.added.add_(grad, alpha=alpha)
        elif alpha == 1 and grad.shape == self.shape and grad.dtype == self.dtype:
            self.added = grad.clone()
        else:
            self.added = torch.zeros(self.shape, dtype=self.dtype, device=self.device).add_(grad, alpha=alpha)

    def combined(self) -> Tensor:
        """The combined gradient.

        Raises:
            RuntimeError: what the combination raises, or ``.grad`` holds something else by now.
        """
        if self._real is None and self._param.grad is self:
            self._combine()
        if self._real is None:
            raise RuntimeError("the rows of this gradient were dropped, or are being captured; read .grad anew")
        return self._real

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        """That of the combined gradient."""
        return self.combined().data

    @data.setter
    def data(self, new: Tensor) -> None:
        self.combined().data = new

    def settle(self, grad: Tensor | None) -> None:
        """Says what the combination has put in its place."""
        self._real = grad


def _on_the_real_one(name: str) -> Callable[..., Any]:
    def call(self: LazyGrad, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.combined(), name)(*args, **kwargs)

    return call


for _name in _READ_VALUES:
    setattr(LazyGrad, _name, _on_the_real_one(_name))


def held(param: Tensor) -> Tensor | None:
    """What is in ``.grad``, beside rows that wait to be combined."""
    return param.grad.added if isinstance(param.grad, LazyGrad) else param.grad


def hold(param: Tensor, grad: Tensor | None) -> None:
    """Replaces that."""
    if isinstance(param.grad, LazyGrad):
        param.grad.added = grad
    else:
        param.grad = grad


def stand_in(params: Sequence[Tensor], rows: Sequence[Row], combine: Callable[[], None]) -> list[LazyGrad | None]:
    """Puts one in the ``.grad`` of every parameter that a row reaches, on top of what is there."""
    for p, param in enumerate(params):
        grad = param.grad
        if isinstance(grad, LazyGrad) or not (grad is None or is_plain(grad)):
            continue
        like = next((row[p] for row in rows if row[p] is not None), None)
        if like is not None:
            param.grad = LazyGrad(param, like, combine, grad)
    return standing(params)


def standing(params: Sequence[Tensor]) -> list[LazyGrad | None]:
    """Those that are in ``.grad`` now."""
    return [grad if isinstance(grad := param.grad, LazyGrad) else None for param in params]


def stand_aside(params: Sequence[Tensor]) -> list[LazyGrad | None]:
    """Takes them out of ``.grad``, which is then as if no row had been captured."""
    found = standing(params)
    for param, lazy in zip(params, found, strict=True):
        if lazy is not None:
            param.grad = lazy.added
    return found
