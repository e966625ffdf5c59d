"""The K x P table of per-task gradients that every kernel walks.

A row is the gradient of one task: one tensor per shared parameter, ``None`` where the task does not reach the
parameter. A dense ``[K, N]`` tensor is the case P = 1. Rows are never copied into one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .uploads import packed

MAX_TASKS = 128
"""The most tasks any kernel takes."""

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Row dtypes, and the numbers the kernels know them by."""

ITEMSIZES = tuple(dtype.itemsize for dtype in DTYPE_CODES)
"""Bytes of an element, by dtype number."""

Row = Sequence[Tensor | None]

_PLAIN = (Tensor,)
_layout, _requires_grad, _is_nested, _dtype, _device, _shape = map(
    attrgetter, ("layout", "requires_grad", "is_nested", "dtype", "device", "shape")
)


def check_num_tasks(num_tasks: int) -> None:
    """Raise unless 1 <= K <= MAX_TASKS."""
    if not 1 <= num_tasks <= MAX_TASKS:
        raise ValueError(
            f"expected 1 to {MAX_TASKS} tasks, found {num_tasks}; "
            + ("pass at least one row" if num_tasks < 1 else "combine the tasks in groups, or sum some of the losses")
        )


def _check_dtype(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in DTYPE_CODES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
        pairs = "pass torch.view_as_real(tensor), its pairs of reals"
        cure = pairs if tensor.is_complex() else "convert it with .to(dtype)"
        raise TypeError(f"{where} has dtype {tensor.dtype}; expected one of {names}: {cure}")
    if tensor.is_nested:
        raise TypeError(f"{where} is a nested tensor; expected a dense one: pass its parts as parameters")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _plain_and_alike(rows: Sequence[Row], captured: bool) -> bool:
    """Whether `RowTable._column` would leave every tensor as it is: what is nearly always so, looked at quickly."""
    flat = [tensor for row in rows for tensor in row if tensor is not None]
    everywhere = len(flat) == len(rows) * len(rows[0])
    if not captured and not (
        set(map(type, flat)) == {Tensor}
        and set(map(_layout, flat)) == {torch.strided}
        and not any(map(_is_nested, flat))
        and not any(map(_requires_grad, flat))
        and len(set(map(_device, flat))) == 1
        and _alike(rows, _shape, everywhere)
    ):
        return False
    if any(map(Tensor.is_neg, flat)) or not all(map(Tensor.is_contiguous, flat)):
        return False
    dtypes = set(map(_dtype, flat))
    return dtypes <= DTYPE_CODES.keys() and (len(dtypes) <= 1 or _alike(rows, _dtype, everywhere))


def _alike(rows: Sequence[Row], what: Callable[[Tensor], object], everywhere: bool) -> bool:
    """Whether all tensors of a parameter have the same of something; ``everywhere``: no entry is None."""
    if everywhere:
        first = list(map(what, rows[0]))  # type: ignore[arg-type]
        return all([list(map(what, row)) == first for row in rows[1:]])  # type: ignore[arg-type]
    return all(len({what(t) for t in column if t is not None}) <= 1 for column in zip(*rows, strict=True))


class Part(NamedTuple):
    """What makes a whole of rows of which a table has a part, as every rank of a distributed run has one.

    Attributes:
        total: from a Gram matrix (or products of rows) ``[..., K, K]`` of this part that of the whole. It is called
            once for every one that is taken, in the same order on all ranks.
        counted: length P, the parameters that this part has to count; others are counted in another part, and are
            combined here alone. None counts all.
    """

    total: Callable[[Tensor], Tensor]
    counted: Sequence[bool] | None = None


class RowTable:
    """K rows over P parameters, validated once and read by `gram` and `combine` alike.

    Args:
        rows: a tensor ``[K, N]`` (any row stride), or K sequences of P tensors or ``None``; the tensors of one
            parameter share shape and dtype, all tensors share the device. Dtypes: float32, float64, bfloat16, float16.
        captured: the rows are gradients as one capture took them: dense tensors that require no grad, those of a
            parameter of one shape and device, no two of which share memory. What follows from that is not checked, and
            `combine` need not look before it writes to one of them.
        part: where these rows are a part of longer ones: what `gram` and all that goes by it then take the Gram matrix
            of the whole from. Elementwise operations go by the part.

    A parameter whose tensors are laid out alike and fill their memory (contiguous, channels-last, ...) is read in
    place. Only tensors for which that does not hold (expanded, sliced, of differing layouts) are made contiguous.
    A table remembers where its tensors lie: their values may change while it is in use, their memory may not (no
    ``resize_``, no assignment to ``.data``).

    Attributes:
        num_tasks: K. num_params: P. device: of every tensor.
        entries: K lists of P tensors or ``None``; for a dense table each row is ``[J[k]]``.
        dense: whether the rows were given as one tensor.
        captured: as given.
        plain: whether every tensor is a `torch.Tensor` proper, not of a subclass.
        copied: whether some of ``entries`` are copies, of tensors that could not be read in place.

    Raises:
        TypeError: a row of another type, or of a dtype that is not supported.
        ValueError: no rows, too many, or rows whose lengths, shapes, dtypes or devices differ.
    """

    __slots__ = (
        "_addresses",
        "_codes",
        "_entries",
        "_matrix",
        "_numels",
        "_pointers",
        "_sizes",
        "captured",
        "copied",
        "dense",
        "device",
        "kept",
        "like",
        "num_params",
        "num_tasks",
        "part",
        "plain",
    )

    num_tasks: int
    num_params: int
    device: torch.device
    dense: bool
    captured: bool
    copied: bool
    plain: bool
    part: Part | None
    like: list[Tensor | None]
    """Per parameter, the first task's tensor that is there: the model of its output."""

    kept: dict[str, tuple[Hashable, Any]]
    """What a backend keeps of its last launches over the table."""

    def __init__(self, rows: Tensor | Sequence[Row], *, captured: bool = False, part: Part | None = None) -> None:
        self.captured, self.part = captured, part
        self.plain, self.copied = True, False
        self._matrix: Tensor | None = None
        self._entries: list[list[Tensor | None]] | None = None
        self._pointers: list[int] | None = None
        self._addresses: bytes | None = None
        self._numels: list[int] | None = None
        self._codes: list[int] | None = None
        self._sizes: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None
        self.kept = {}
        self.dense = isinstance(rows, Tensor)
        if isinstance(rows, Tensor):
            self._init_dense(rows)
        else:
            self._init_lists(rows, captured)

    def _init_dense(self, matrix: Tensor) -> None:
        if matrix.layout is not torch.strided:
            raise TypeError(f"expected a strided tensor, found layout {matrix.layout}: call .to_dense()")
        _check_dtype(matrix, "the row matrix")
        if matrix.dim() != 2:
            raise ValueError(f"expected rows of shape [K, N], found {list(matrix.shape)}: flatten each gradient")
        check_num_tasks(matrix.shape[0])
        self.copied = matrix.is_neg()
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            matrix, self.copied = matrix.contiguous(), True
        self.plain = type(matrix) in _PLAIN
        self.num_tasks, self.num_params = matrix.shape[0], 1
        self.device = matrix.device
        self._matrix = matrix.detach().resolve_neg()
        self.like = [self._matrix[0]]

    def _init_lists(self, rows: Sequence[Row], captured: bool) -> None:
        if not isinstance(rows, Sequence):
            raise TypeError(f"expected a tensor [K, N] or K sequences of tensors, found {type(rows).__name__}")
        check_num_tasks(len(rows))
        for k, row in enumerate(rows):
            if not isinstance(row, Sequence):
                raise TypeError(
                    f"row {k} is a {type(row).__name__}; expected a sequence with one tensor (or None) per parameter, "
                    "or one tensor [K, N] for all rows"
                )
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"row {k} has {len(row)} parameters where row 0 has {len(rows[0])}; use None for "
                    "a parameter that a task does not reach"
                )
        self.num_tasks, self.num_params = len(rows), len(rows[0])
        self._entries = [list(row) for row in rows]
        if not _plain_and_alike(rows, captured):
            alike = [self._column(list(column), p) for p, column in enumerate(zip(*rows, strict=True))]
            self._entries = [list(row) for row in zip(*alike, strict=True)] if alike else [[] for _ in rows]
        self.like = self._entries[0]
        if any([tensor is None for tensor in self.like]):
            columns = zip(*self._entries, strict=True)
            self.like = [next((t for t in column if t is not None), None) for column in columns]
        first = next((tensor for tensor in self.like if tensor is not None), None)
        self.device = first.device if first is not None else torch.device("cpu")
        if any([tensor is not None and tensor.device != self.device for tensor in self.like]):
            p, other = next((p, t.device) for p, t in enumerate(self.like) if t is not None and t.device != self.device)
            raise ValueError(
                f"parameter {p} is on {other}, others on {self.device}; move all rows to one "
                "device, or combine each device's parameters on their own"
            )

    def _column(self, column: list[Tensor | None], p: int) -> list[Tensor | None]:
        """The K entries of parameter p, checked and laid out alike."""
        like: Tensor | None = None
        for k, tensor in enumerate(column):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"row {k}, parameter {p} is a {type(tensor).__name__}; expected a tensor or None")
            if tensor.layout is not torch.strided:
                raise TypeError(
                    f"row {k}, parameter {p} has layout {tensor.layout}; expected a dense tensor: call .to_dense()"
                )
            if tensor.requires_grad:
                tensor = column[k] = tensor.detach()
            if type(tensor) not in _PLAIN:
                self.plain = False
            if tensor.is_neg():
                tensor = column[k] = tensor.resolve_neg()
                self.copied = True
            if like is None:
                _check_dtype(tensor, f"row {k}, parameter {p}")
                if not _is_dense(tensor):
                    tensor = column[k] = tensor.contiguous()
                    self.copied = True
                like, shape, dtype, device = tensor, tensor.shape, tensor.dtype, tensor.device
                stride = tensor.stride()
                continue
            if tensor.shape != shape:
                raise ValueError(
                    f"parameter {p} has shape {list(tensor.shape)} in row {k} and {list(shape)} in an earlier row; "
                    "every task's gradient has the shape of the parameter"
                )
            if tensor.dtype is not dtype:
                raise TypeError(
                    f"parameter {p} has dtype {tensor.dtype} in row {k} and {dtype} in an earlier row; dtypes may "
                    "differ between parameters, not between tasks"
                )
            if tensor.device != device:
                raise ValueError(
                    f"parameter {p} is on {tensor.device} in row {k} and on {device} in an earlier row; move all rows "
                    "to one device"
                )
            if tensor.stride() != stride:
                column[k] = torch.empty_like(like).copy_(tensor)
                self.copied = True
        return column

    def counted(self) -> RowTable:
        """The rows that a Gram matrix of this part is of: without what other parts count."""
        counted = None if self.part is None else self.part.counted
        if counted is None or all(counted):
            return self
        rows = [[t if here else None for t, here in zip(row, counted, strict=True)] for row in self.entries]
        return RowTable(rows, captured=self.captured)

    @property
    def entries(self) -> list[list[Tensor | None]]:
        """[K][P] tensors or None."""
        if self._entries is None:
            # Views of a matrix are made only for those who ask for them: the kernels go by address.
            self._entries = [[row] for row in self._matrix.unbind(0)] if self._matrix is not None else []
        return self._entries

    @property
    def reached(self) -> list[list[bool]]:
        """[K][P]: whether task k has a gradient for parameter p."""
        return [[tensor is not None for tensor in row] for row in self.entries]

    @property
    def pointers(self) -> list[int]:
        """[K * P] addresses, 0 for None."""
        if self._pointers is None:
            if self._matrix is not None:
                base, step = self._matrix.data_ptr(), self._matrix.stride(0) * self._matrix.element_size()
                self._pointers = [base + k * step for k in range(self.num_tasks)]
            else:
                self._pointers = [0 if t is None else t.data_ptr() for row in self.entries for t in row]
        return self._pointers

    @property
    def addresses(self) -> bytes:
        """`pointers` packed into 8 bytes each."""
        if self._addresses is None:
            self._addresses = packed(self.pointers)
        return self._addresses

    @property
    def numels(self) -> list[int]:
        """[P] elements of each parameter, 0 where no task reaches it."""
        if self._numels is None:
            self._numels = [0 if t is None else t.numel() for t in self.like]
        return self._numels

    @property
    def sizes(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """K, `numels` and `codes`: what a plan depends on, as a key."""
        if self._sizes is None:
            self._sizes = (self.num_tasks, tuple(self.numels), tuple(self.codes))
        return self._sizes

    @property
    def codes(self) -> list[int]:
        """[P] dtype numbers of each parameter."""
        if self._codes is None:
            self._codes = [0 if t is None else DTYPE_CODES[t.dtype] for t in self.like]
        return self._codes
