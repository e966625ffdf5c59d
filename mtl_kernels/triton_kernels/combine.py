"""The weighted sum of the rows, one launch per pair of dtypes: the rows' and the output's."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..rows import DTYPE_CODES, ITEMSIZES, RowTable
from . import tables
from .common import bound, narrow, row_pointers, widen

MAX_CHUNKS = 1056
"""The most programs of one launch over the parameters of one group."""


class Configuration(NamedTuple):
    """The shape of one program: ``block`` columns at a time, of ``unroll`` rows in flight.

    Where rows are not aligned, or end, it is ``tail`` columns at a time.
    """

    unroll: int
    block: int
    tail: int
    warps: int


def configuration(num_tasks: int) -> Configuration:
    """The fixed table of shapes, by number of tasks; the same for every dtype."""
    return Configuration(2 if num_tasks <= 2 else 4 if num_tasks <= 4 else 8, 1024, 256, 4)


def combine_into(
    table: RowTable,
    weights: Tensor,
    groups: Sequence[int],
    out: Sequence[Tensor | None],
    accumulate: bool = False,
) -> None:
    """Writes sum_k weights[groups[p], k] * rows[k][p] to ``out[p]``, or adds it; weights float64 ``[S, K]``."""
    pairs = [
        len(ITEMSIZES) * code + (code if tensor is None else DTYPE_CODES[tensor.dtype])
        for code, tensor in zip(table.codes, out, strict=True)
    ]
    work = tables.work(table, pairs, groups, MAX_CHUNKS)
    if not work.launches:
        return
    pointers = tables.pointers(table, out)
    shape = configuration(table.num_tasks)
    for launch in work.launches:
        code, out_code = divmod(launch.code, len(ITEMSIZES))
        _combine_kernel[(launch.num_chunks,)](
            pointers,
            weights,
            launch.segments,
            launch.chunks,
            table.num_tasks,
            table.num_params,
            **constants(shape, code, out_code, accumulate),
            num_warps=shape.warps,
        )


def constants(
    shape: Configuration, code: int, out_code: int | None = None, accumulate: bool = False
) -> dict[str, int | bool]:
    """What the kernel is compiled for; the output has the dtype of the rows where ``out_code`` is None."""
    out_code = code if out_code is None else out_code
    return {
        "CODE": code,
        "ITEMSIZE": ITEMSIZES[code],
        "OUT_CODE": out_code,
        "OUT_ITEMSIZE": ITEMSIZES[out_code],
        "ACCUMULATE": accumulate,
        "UNROLL": shape.unroll,
        "BLOCK": shape.block,
        "TAIL": shape.tail,
    }


@triton.jit(do_not_specialize=["pointers", "weights", "segments", "chunks", "num_tasks", "num_params"])
def _combine_kernel(
    pointers,  # int64 [K + 1, P]: the rows, then the outputs
    weights,  # float64 [S, K]
    segments,  # int64 [number, 4], see plan.Launch
    chunks,  # int64 [programs, 3]
    num_tasks,
    num_params,
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
        for start in range(0, bound(aligned), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float64)
            for task in range(0, bound(num_tasks), UNROLL):
                for row in tl.static_range(UNROLL):
                    address, weight = _row(column, own_weights, task + row, num_tasks, num_params)
                    elements = tl.load(row_pointers(address + begin, CODE, True) + columns, mask=address != 0, other=0)
                    total += weight * widen(elements, CODE)
            target = row_pointers(out, OUT_CODE, True) + columns
            if ACCUMULATE:
                total += widen(tl.load(target), OUT_CODE)
            tl.store(target, narrow(total, OUT_CODE))
        for start in range(bound(aligned), bound(length), TAIL):
            columns = start + tl.arange(0, TAIL)
            inside = columns < length
            total = tl.zeros([TAIL], tl.float64)
            for task in range(0, bound(num_tasks), UNROLL):
                for row in tl.static_range(UNROLL):
                    address, weight = _row(column, own_weights, task + row, num_tasks, num_params)
                    elements = tl.load(
                        row_pointers(address + begin, CODE, False) + columns, mask=inside & (address != 0), other=0
                    )
                    total += weight * widen(elements, CODE)
            target = row_pointers(out, OUT_CODE, False) + columns
            if ACCUMULATE:
                total += widen(tl.load(target, mask=inside, other=0), OUT_CODE)
            tl.store(target, narrow(total, OUT_CODE), mask=inside)


@triton.jit
def _row(column, weights, task, num_tasks, num_params):
    """Address and weight of a task's row, 0 and 0 where it has none, so that no weight spreads from there."""
    address = tl.load(column + task * num_params, mask=task < num_tasks, other=0)
    return address, tl.load(weights + task, mask=address != 0, other=0.0)
