"""Harvest: the gradient of one loss, taken out of ``.grad`` as autograd left it there, without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .grads import Row, RowKey, is_plain, memory_of, put_grads, take_grads

_requires_grad = attrgetter("requires_grad")
_ByStorage = dict[int, list[Tensor]]
"""Tensors by the address of their storage: only those in one storage can overlap."""


class Harvest:
    """Takes rows out of ``.grad`` so that each can be written to without touching another.

    Autograd may hand out gradients that are views of one buffer (two parameters reshaped and added share theirs). Rows
    are combined in place and other gradients added to, so a tensor that overlaps another of its pass, or one that stays
    in ``.grad``, is copied; all others are taken as they are. One that overlaps what an *earlier* pass left has
    overwritten it, and is refused.
    """

    def __init__(self) -> None:
        self._taken: _ByStorage = {}
        self._versions: dict[RowKey, list[int]] = {}
        self._before: tuple[_ByStorage, dict[RowKey, list[int]]] = ({}, {})
        self._task: RowKey = ""
        self._overwritten: list[Tensor] = []
        self._visible: dict[int, list[tuple[int, int]]] = {}
        self._warned_sparse = False

    def prepare(self, tasks: Sequence[RowKey], params: Sequence[Tensor]) -> None:
        """Notes where the gradients of earlier steps lie; autograd brings the memory for new ones."""
        self._before = (self._taken.copy(), self._versions.copy())
        grads = _by_storage(param.grad for param in params)
        self._visible = {storage: [_span(grad) for grad in found] for storage, found in grads.items()}

    def open(self, task: RowKey, params: Sequence[Tensor], previous: Row | None) -> None:
        self._task = task
        if previous is not None:
            self.check({task: previous})
            put_grads(params, previous)

    def take(self, params: Sequence[Tensor], previous: Row | None, others: Sequence[Tensor]) -> Row:
        """The row now in ``.grad``, which is None afterwards; sparse gradients become dense.

        Raises:
            RuntimeError: a gradient lies where an earlier one did.
        """
        row = take_grads(params)
        staying = _by_storage(other.grad for other in others)
        mine = self._each_by_itself(row, staying) if previous is None else None
        if mine is None:
            mine = self._made_separate(row, params, previous, staying)
        for key in self._taken.keys() & mine.keys():
            mine[key] = self._taken[key] + mine[key]
        self._taken.update(mine)
        self._versions[self._task] = _versions(row)
        return row

    def _each_by_itself(self, row: Row, staying: _ByStorage) -> _ByStorage | None:
        """The tensors of a row that has nothing to be done about: what is nearly always so, looked at quickly."""
        grads = [grad for grad in row if grad is not None]
        if not all([type(grad) is Tensor and grad.layout is torch.strided for grad in grads]):
            return None
        storages = list(map(Tensor.untyped_storage, grads))
        mine = {storage.data_ptr(): [grad] for storage, grad in zip(storages, grads, strict=True)}
        if (
            len(mine) < len(grads)
            or 0 in mine
            or any(map(_requires_grad, grads))
            or [grad.nbytes for grad in grads] != [storage.nbytes() for storage in storages]
            or any(not mine.keys().isdisjoint(known) for known in (self._taken, self._visible, staying))
        ):
            return None
        return mine

    def _made_separate(
        self, row: Row, params: Sequence[Tensor], previous: Row | None, staying: _ByStorage
    ) -> _ByStorage:
        """Makes the tensors of a row dense and apart from each other, in the row; see `take`."""
        mine = _ByStorage()
        spoiled: tuple[int, str] | None = None
        for p, grad in enumerate(row):
            before = None if previous is None else previous[p]
            if grad is None or grad is before:
                continue
            if grad.layout is not torch.strided:
                grad = row[p] = self._densify(grad)
            elif grad.requires_grad:
                grad = row[p] = grad.detach()
            memory = memory_of(grad)
            storage = memory.untyped_storage()
            key = storage.data_ptr()
            if key == 0:
                continue
            if key in self._taken or key in self._visible:
                lost = [
                    owner
                    for owner in self._taken.get(key, ())
                    if owner is not before and _overlap(memory, memory_of(owner))
                ]
                self._overwritten += lost
                if lost:
                    spoiled = spoiled or (p, "a row of this step")
                elif any(_meet(_span(memory), other) for other in self._visible.get(key, ())):
                    spoiled = spoiled or (p, "a gradient of an earlier step, which zero_grad() would let go of")
            if key in mine or key in staying:
                if any(_overlap(memory, memory_of(other)) for other in (*mine.get(key, ()), *staying.get(key, ()))):
                    grad = row[p] = grad.clone()
                    memory = memory_of(grad)
                    storage = memory.untyped_storage()
                    key = storage.data_ptr()
            if memory is grad and grad.nbytes < storage.nbytes():
                # Others may lie beside it: with a version counter of its own, a change to them is none to the row.
                grad = row[p] = grad.data
            mine.setdefault(key, []).append(grad)
        if spoiled is not None:
            raise _overwritten(*spoiled, params)
        return mine

    def check(self, rows: Mapping[RowKey, Row]) -> None:
        """Raise RuntimeError if a row was changed in place since it was taken.

        Where it is unknown which tensors outside the optimizer a loss reaches, one of their gradients may share the
        memory of a row, and autograd adds to it at the next pass.
        """
        for task, row in rows.items():
            found, expected = _versions(row), self._versions[task]
            if found != expected:
                present = [(p, grad) for p, grad in enumerate(row) if grad is not None]
                p, grad = next(pair for pair, a, b in zip(present, found, expected, strict=True) if a != b)
                raise RuntimeError(
                    f"the row of task {task!r} changed after it was captured: the gradient of parameter {p} of shape "
                    f"{list(grad.shape)} shares memory with one that was added to since, of a tensor outside the "
                    'optimizer or kept by a hook. Call opt.zero_grad() and use capture="arena", or put that parameter '
                    "into a param group with mtl=False"
                )

    def let_go(self, task: RowKey, row: Row, kept: Row) -> None:
        for grad, still in zip(row, kept, strict=True):
            if grad is not None and still is None:
                key = memory_of(grad).untyped_storage().data_ptr()
                if key in self._taken:
                    self._taken[key] = [owner for owner in self._taken[key] if owner is not grad]
        self._versions[task] = _versions(kept)

    def close(self) -> bool:
        (self._taken, self._versions), self._before = self._before, ({}, {})
        overwritten, self._overwritten = self._overwritten, []
        return any(lost is owner for lost in overwritten for owners in self._taken.values() for owner in owners)

    def forget(self) -> None:
        """Starts a new step: the rows taken so far are gone."""
        self._taken, self._versions, self._before, self._visible = {}, {}, ({}, {}), {}

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


def _overwritten(p: int, what: str, params: Sequence[Tensor]) -> RuntimeError:
    return RuntimeError(
        f"the gradient of parameter {p} of shape {list(params[p].shape)} came in the memory of {what}, and has "
        "overwritten it: the backward pass returns the same buffer every time, as that of "
        'torch.cuda.make_graphed_callables does. Use capture="arena", which copies every gradient at once'
    )


def _by_storage(grads: Iterable[Tensor | None]) -> _ByStorage:
    found: _ByStorage = {}
    for grad in grads:
        if grad is not None and is_plain(grad):
            found.setdefault(grad.untyped_storage().data_ptr(), []).append(grad)
    return found


def _versions(row: Row) -> list[int]:
    """The version counters of a row, by which a change in place shows."""
    return [grad._version for grad in row if grad is not None]


def _overlap(a: Tensor, b: Tensor) -> bool:
    return _meet(_span(a), _span(b))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses a tensor lies between."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + ((reach + 1) * tensor.element_size() if tensor.numel() else 0)


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
