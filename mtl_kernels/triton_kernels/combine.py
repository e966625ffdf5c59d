"""One value of the K values of every element, one launch per pair of dtypes: the rows' and the output's."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..call import ColumnCall
from ..rows import DTYPE_CODES, ITEMSIZES, RowTable
from . import tables
from .common import BFLOAT16, FLOAT64, bound, float_of_bfloat16, narrow, row_pointers, widen

MAX_CHUNKS = 1056
"""The most programs of one launch over the parameters of one group."""

WEIGHTED_SUM = tl.constexpr(0)
GRADDROP = tl.constexpr(1)
LEAKY_GRADDROP = tl.constexpr(2)
TRIMMED_MEAN = tl.constexpr(3)
"""What a kernel makes of a column."""


class Configuration(NamedTuple):
    """The shape of one program: ``block`` columns at a time, of ``unroll`` rows in flight.

    Where rows are not aligned, or end, it is ``tail`` columns at a time.
    """

    unroll: int
    block: int
    tail: int
    warps: int


def configuration(num_tasks: int, operation: int = WEIGHTED_SUM.value) -> Configuration:
    """The fixed table of shapes, by number of tasks and operation; the same for every dtype."""
    block = 1024
    if operation == TRIMMED_MEAN.value and num_tasks > 16:
        block = 512  # every row of a block is read K times, from the cache
    elif operation in (GRADDROP.value, LEAKY_GRADDROP.value):
        block = 512  # two sums a column, or four
    return Configuration(2 if num_tasks <= 2 else 4 if num_tasks <= 4 else 8, block, 256, 4)


def combine_into(
    table: RowTable,
    weights: Tensor,
    groups: Sequence[int],
    out: Sequence[Tensor | None],
    accumulate: bool = False,
) -> None:
    """Writes sum_k weights[groups[p], k] * rows[k][p] to ``out[p]``, or adds it; weights float64 ``[S, K]``."""
    _launch(WEIGHTED_SUM.value, table, weights, groups, out, accumulate)


def reduce_columns_into(table: RowTable, call: ColumnCall, out: Sequence[Tensor | None]) -> None:
    """Writes what ``call`` makes of the K values of every element to ``out[p]``."""
    groups = [0] * table.num_params
    if call.operation == "trimmed_mean":
        _launch(TRIMMED_MEAN.value, table, None, groups, out, trim=call.trim)
    else:
        operation = GRADDROP if call.leak is None else LEAKY_GRADDROP
        _launch(operation.value, table, call.leak, groups, out, rng=call.rng)


def _launch(
    operation: int,
    table: RowTable,
    weights: Tensor | None,
    groups: Sequence[int],
    out: Sequence[Tensor | None],
    accumulate: bool = False,
    rng: Tensor | None = None,
    trim: int = 0,
) -> None:
    pairs = [
        len(ITEMSIZES) * code + (code if tensor is None else DTYPE_CODES[tensor.dtype])
        for code, tensor in zip(table.codes, out, strict=True)
    ]
    work = tables.work(table.numels, pairs, groups, MAX_CHUNKS, table.device)
    if not work.launches:
        return
    first_elements = () if rng is None else [0, *itertools.accumulate(table.numels[:-1])]
    pointers = tables.pointers(table, out, first_elements)
    shape = configuration(table.num_tasks, operation)
    for launch in work.launches:
        code, out_code = divmod(launch.code, len(ITEMSIZES))
        _combine_kernel[(launch.num_chunks,)](
            pointers,
            pointers if weights is None else weights,
            pointers if rng is None else rng,
            launch.segments,
            launch.chunks,
            table.num_tasks,
            table.num_params,
            trim,
            **constants(shape, code, out_code, accumulate, operation),
            num_warps=shape.warps,
        )


def constants(
    shape: Configuration,
    code: int,
    out_code: int | None = None,
    accumulate: bool = False,
    operation: int = WEIGHTED_SUM.value,
) -> dict[str, int | bool]:
    """What the kernel is compiled for; the output has the dtype of the rows where ``out_code`` is None."""
    out_code = code if out_code is None else out_code
    return {
        "OPERATION": operation,
        "CODE": code,
        "ITEMSIZE": ITEMSIZES[code],
        "OUT_CODE": out_code,
        "OUT_ITEMSIZE": ITEMSIZES[out_code],
        "ACCUMULATE": accumulate,
        "UNROLL": shape.unroll,
        "BLOCK": shape.block,
        "TAIL": shape.tail,
    }


@triton.jit(do_not_specialize=["pointers", "weights", "rng", "segments", "chunks", "num_tasks", "num_params", "trim"])
def _combine_kernel(
    pointers,  # int64 [K + 1, P]: the rows, then the outputs; for GradDrop then the number of each first element
    weights,  # float64 [S, K], or what a row leaks
    rng,  # int64 [2], read only for GradDrop
    segments,  # int64 [number, 4], see plan.Launch
    chunks,  # int64 [programs, 3]
    num_tasks,
    num_params,
    trim,
    OPERATION: tl.constexpr,
    CODE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    OUT_CODE: tl.constexpr,
    OUT_ITEMSIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    # From the last chunk to the first: what the Gram matrix read last is still in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    last = tl.load(chunks + 3 * chunk + 1)
    entry = tl.arange(0, 256)  # K + 1 of them
    for segment in range(bound(first), bound(last)):
        column = pointers + tl.load(segments + 4 * segment)
        first_column = tl.load(segments + 4 * segment + 1)
        begin = first_column * ITEMSIZE
        length = tl.load(segments + 4 * segment + 2).to(tl.int32)
        own_weights = weights + tl.load(segments + 4 * segment + 3) * num_tasks
        addresses = tl.load(column + entry * num_params, mask=entry <= num_tasks, other=0)
        aligned = tl.where(tl.max(addresses & 15, axis=0) == 0, length // BLOCK * BLOCK, 0)
        out = tl.load(column + num_tasks * num_params) + first_column * OUT_ITEMSIZE
        number = first_column
        if OPERATION == GRADDROP or OPERATION == LEAKY_GRADDROP:
            number += tl.load(column + (num_tasks + 1) * num_params)
        for start in range(0, bound(aligned), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            total = _reduced(
                column, own_weights, rng, number, begin, columns, length, num_tasks, num_params, trim,
                OPERATION, CODE, True, BLOCK, UNROLL,
            )  # fmt: skip
            target = row_pointers(out, OUT_CODE, True) + columns
            if ACCUMULATE:
                total += widen(tl.load(target), OUT_CODE)
            tl.store(target, narrow(total, OUT_CODE))
        for start in range(bound(aligned), bound(length), TAIL):
            columns = start + tl.arange(0, TAIL)
            inside = columns < length
            total = _reduced(
                column, own_weights, rng, number, begin, columns, length, num_tasks, num_params, trim,
                OPERATION, CODE, False, TAIL, UNROLL,
            )  # fmt: skip
            target = row_pointers(out, OUT_CODE, False) + columns
            if ACCUMULATE:
                total += widen(tl.load(target, mask=inside, other=0), OUT_CODE)
            tl.store(target, narrow(total, OUT_CODE), mask=inside)


@triton.jit
def _reduced(
    column, weights, rng, number, begin, columns, length, num_tasks, num_params, trim,
    OPERATION: tl.constexpr, CODE: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """What the operation makes of ``columns``, float64 [SIZE]; those from ``length`` on are there if ALIGNED."""
    if OPERATION == TRIMMED_MEAN:
        result = _trimmed_mean(column, begin, columns, length, num_tasks, num_params, trim, CODE, ALIGNED, SIZE)
    elif OPERATION == WEIGHTED_SUM:
        result = tl.zeros([SIZE], tl.float64)
        for task in range(0, bound(num_tasks), UNROLL):
            for row in tl.static_range(UNROLL):
                address, weight = _row(column, weights, task + row, num_tasks, num_params, True)
                result += weight * widen(_elements(address, begin, columns, length, CODE, ALIGNED), CODE)
    else:
        LEAKS: tl.constexpr = OPERATION == LEAKY_GRADDROP
        positive = tl.zeros([SIZE], tl.float64)
        negative = positive
        up = positive
        down = positive
        for task in range(0, bound(num_tasks), UNROLL):
            for row in tl.static_range(UNROLL):
                address, leak = _row(column, weights, task + row, num_tasks, num_params, LEAKS)
                g = widen(_elements(address, begin, columns, length, CODE, ALIGNED), CODE)
                positive += tl.where(g < 0, 0.0, g)
                negative += tl.where(g < 0, g, 0.0)
                if LEAKS:
                    up += tl.where(g < 0, leak * g, g)
                    down += tl.where(g < 0, g, leak * g)
        if not LEAKS:
            up = positive
            down = negative
        # P > U for P = p / (p - n), as in elementwise.h: every backend keeps the same signs.
        threshold = _threshold(rng, number + columns)
        for_up = positive * (1.0 - threshold)
        for_down = -(negative * threshold)
        neither = (up + down) - (positive + negative)
        result = tl.where(for_up > for_down, up, tl.where(for_up < for_down, down, neither))
    return result


@triton.jit
def _trimmed_mean(
    column, begin, columns, length, num_tasks, num_params, trim,
    CODE: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """By the rank of each value among the K: equal ones are ranked by their tasks."""
    total = tl.zeros([SIZE], tl.float64)
    unordered = tl.zeros([SIZE], tl.int32)
    for i in range(0, bound(num_tasks)):
        own, _ = _row(column, column, i, num_tasks, num_params, False)
        x = _comparable(_elements(own, begin, columns, length, CODE, ALIGNED), CODE)
        rank = tl.zeros([SIZE], tl.int32)
        for j in range(0, bound(num_tasks)):
            other, _ = _row(column, column, j, num_tasks, num_params, False)
            y = _comparable(_elements(other, begin, columns, length, CODE, ALIGNED), CODE)
            rank += ((y < x) | ((y == x) & (j < i))).to(tl.int32)
        kept = (rank >= trim) & (rank < num_tasks - trim)
        total += tl.where(kept, x, 0.0).to(tl.float64)
        unordered += (x != x).to(tl.int32)
    return tl.where(unordered > 0, float("nan"), total / (num_tasks - 2 * trim).to(tl.float64))


@triton.jit
def _comparable(elements, CODE: tl.constexpr):
    """Row elements as float32 or, if they are longer, float64."""
    if CODE == FLOAT64:
        numbers = elements
    elif CODE == BFLOAT16:
        numbers = float_of_bfloat16(elements)
    else:
        numbers = elements.to(tl.float32)
    return numbers


@triton.jit
def _threshold(rng, number):
    """`mtl_kernels.rng.uniform` of elements by their numbers."""
    seed = tl.load(rng)
    step = tl.load(rng + 1)
    block = number >> 2
    nothing = block - block
    low = ((step & 0xFFFFFFFF) + nothing).to(tl.uint32)
    high = (((step >> 32) & 0xFFFFFFFF) + nothing).to(tl.uint32)
    first, second, third, fourth = tl.philox(
        seed, low, high, ((block >> 32) & 0xFFFFFFFF).to(tl.uint32), (block & 0xFFFFFFFF).to(tl.uint32)
    )
    which = number & 3
    word = tl.where(which == 0, first, tl.where(which == 1, second, tl.where(which == 2, third, fourth)))
    return (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)


@triton.jit
def _row(column, weights, task, num_tasks, num_params, WEIGHTED: tl.constexpr):
    """Address and weight of a task's row, 0 and 0 where it has none, so that no weight spreads from there."""
    address = tl.load(column + task * num_params, mask=task < num_tasks, other=0)
    weight = 0.0
    if WEIGHTED:
        weight = tl.load(weights + task, mask=address != 0, other=0.0)
    return address, weight


@triton.jit
def _elements(address, begin, columns, length, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of a row, zeros where there is none."""
    if ALIGNED:
        elements = tl.load(row_pointers(address + begin, CODE, True) + columns, mask=address != 0, other=0)
    else:
        elements = tl.load(
            row_pointers(address + begin, CODE, False) + columns, mask=(columns < length) & (address != 0), other=0
        )
    return elements
