"""Gram matrices: one launch per dtype writes a partial sum per program, a second kernel adds them in index order."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import ITEMSIZES, RowTable
from . import tables
from .common import BFLOAT16, FLOAT16, FLOAT64, INTERPRETED, bound, float_of_bfloat16, row_pointers

SUM_WARPS = 8

PANEL = 64
"""Above so many tasks the matrix is made of panels of so many rows."""


class Configuration(NamedTuple):
    """The shape of one program: ``split`` runs of ``block`` columns of ``tasks`` rows at a time.

    The runs of fewer than 16 tasks stand below each other as the 16 rows of a tensor core's operand; of their
    product only the blocks on the diagonal count. Where rows are not aligned, or end, runs are of ``tail`` columns.
    """

    tasks: int
    split: int
    block: int
    tail: int
    panels: int
    warps: int
    stages: int
    max_chunks: int


def configuration(num_tasks: int, code: int, blackwell: bool) -> Configuration:
    """The fixed table of shapes, by number of tasks, dtype and generation.

    On Blackwell GPUs Triton multiplies float64 without tensor cores, which takes more registers, and so more warps;
    for 4 or 8 warps and 64 rows it does not compile.
    """
    half = code in (BFLOAT16.value, FLOAT16.value)
    stages = 4 if half else 3
    more = blackwell and not half
    for tasks in (2, 8, 16):
        if num_tasks <= tasks:
            return Configuration(tasks, 16 // tasks, 32, 16, 1, 4 if more else 1, stages, 4224)
    if num_tasks <= 32:
        return Configuration(32, 1, 32, 16, 1, 8 if more else 4, stages, 1056)
    if num_tasks <= PANEL:
        return Configuration(PANEL, 1, 32, 16, 1, 16 if more else 8, stages, 264)
    block = 16 if blackwell or code == FLOAT64.value else 32
    return Configuration(PANEL, 1, block, 16, 2, 16 if more else 8, stages, 264)


def options(shape: Configuration) -> dict[str, int]:
    """How a kernel of partial sums is compiled: without the limit, ptxas rather spills than use more registers."""
    limit = {} if torch.version.hip or shape.warps > 8 else {"maxnreg": 255}
    return {"num_warps": shape.warps, "num_stages": shape.stages, **limit}


@functools.cache
def is_blackwell(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 10.0 or newer."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 10


def gram_into(table: RowTable, groups: Sequence[int], out: Tensor) -> None:
    """Writes the Gram matrix of each group of parameters to ``out``, zeroed float64 ``[S, K, K]``."""
    num_tasks, device = table.num_tasks, table.device
    blackwell = is_blackwell(device)
    shape = configuration(num_tasks, 0, blackwell)  # what the partial sums look like is the same for every dtype
    work = tables.work(table.numels, table.codes, groups, shape.max_chunks, device)
    if not work.launches:
        return
    pointers = tables.pointers(table)
    pairs = shape.panels * (shape.panels + 1) // 2
    partials = torch.empty(work.num_slots * pairs * shape.tasks**2, dtype=torch.float64, device=device)
    for launch in work.launches:
        shape = configuration(num_tasks, launch.code, blackwell)
        _partials_kernel[launch.num_chunks, pairs](
            partials,
            pointers,
            launch.segments,
            launch.chunks,
            num_tasks,
            table.num_params,
            **constants(shape, launch.code),
            **options(shape),
        )
    _add_partials(out, partials, work.slots, shape)


def add_partials(out: Tensor, partials: Tensor, slots: Tensor) -> None:
    """Writes the sum of each group's partials to ``out``, float64 ``[S, 1, 1]``."""
    _add_partials(out, partials, slots, Configuration(1, 1, 0, 0, 1, 0, 0, 0))


def _add_partials(out: Tensor, partials: Tensor, slots: Tensor, shape: Configuration) -> None:
    num_groups, num_tasks, _ = out.shape
    sums = sum_constants(shape)
    _sums_kernel[num_groups, triton.cdiv(num_tasks**2, sums["ENTRIES"])](
        out, partials, slots, num_tasks, **sums, num_warps=SUM_WARPS
    )


def constants(shape: Configuration, code: int) -> dict[str, int | bool]:
    """What a kernel of partial sums is compiled for."""
    return {
        "CODE": code,
        "ITEMSIZE": ITEMSIZES[code],
        "TASKS": shape.tasks,
        "SPLIT": shape.split,
        "BLOCK": shape.block,
        "TAIL": shape.tail,
        "PANELS": shape.panels,
        "FLOAT_OPERANDS": INTERPRETED,
    }


def sum_constants(shape: Configuration) -> dict[str, int]:
    """What the kernel that adds the partial sums is compiled for: few tasks have many sums of few entries."""
    entries, depth = (16, 512) if shape.tasks <= 16 else (128, 64)
    return {"TASKS": shape.tasks, "PANELS": shape.panels, "ENTRIES": entries, "DEPTH": depth}


@triton.jit(do_not_specialize=["partials", "pointers", "segments", "chunks", "num_tasks", "num_params"])
def _partials_kernel(
    partials,  # float64 [slots, pairs of panels, TASKS, TASKS]
    pointers,  # int64 [K, P]
    segments,  # int64 [number, 4], see plan.Launch
    chunks,  # int64 [programs, 3]
    num_tasks,
    num_params,
    CODE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    TASKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    PANELS: tl.constexpr,
    FLOAT_OPERANDS: tl.constexpr,
):
    ROWS: tl.constexpr = TASKS * SPLIT
    chunk = tl.program_id(0)
    pair = tl.program_id(1)  # (0, 0), (1, 0), (1, 1)
    row = tl.arange(0, ROWS)
    high_task = (pair + 1) // 2 * TASKS + row % TASKS
    low_task = pair // 2 * TASKS + row % TASKS
    wide = (row // TASKS * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    tail = (row // TASKS * TAIL)[:, None] + tl.arange(0, TAIL)[None, :]
    first = tl.load(chunks + 3 * chunk)
    last = tl.load(chunks + 3 * chunk + 1)
    slot = tl.load(chunks + 3 * chunk + 2)
    total = tl.zeros([ROWS, ROWS], tl.float64)
    for segment in range(bound(first), bound(last)):
        param = tl.load(segments + 4 * segment)
        begin = tl.load(segments + 4 * segment + 1) * ITEMSIZE
        length = tl.load(segments + 4 * segment + 2).to(tl.int32)
        high = tl.load(pointers + high_task * num_params + param, mask=high_task < num_tasks, other=0)
        low = high
        if PANELS > 1:
            low = tl.load(pointers + low_task * num_params + param, mask=low_task < num_tasks, other=0)
        misaligned = tl.max((high | low) & 15, axis=0)
        aligned = tl.where(misaligned == 0, length // (SPLIT * BLOCK) * (SPLIT * BLOCK), 0)
        # A sum of its own for each segment: where a task has no row, 0 times another's inf would leave a nan.
        part = tl.zeros([ROWS, ROWS], tl.float64)
        for start in range(0, bound(aligned), SPLIT * BLOCK):
            x = tl.load(
                row_pointers(high + begin, CODE, True)[:, None] + (start + wide), mask=(high != 0)[:, None], other=0
            )
            y = x
            if PANELS > 1:
                y = tl.load(
                    row_pointers(low + begin, CODE, True)[:, None] + (start + wide), mask=(low != 0)[:, None], other=0
                )
            part = _add_products(part, x, y, CODE, PANELS, FLOAT_OPERANDS)
        for start in tl.range(bound(aligned), bound(length), SPLIT * TAIL, num_stages=1):
            inside = start + tail < length
            x = tl.load(
                row_pointers(high + begin, CODE, False)[:, None] + (start + tail),
                mask=inside & (high != 0)[:, None],
                other=0,
            )
            y = x
            if PANELS > 1:
                y = tl.load(
                    row_pointers(low + begin, CODE, False)[:, None] + (start + tail),
                    mask=inside & (low != 0)[:, None],
                    other=0,
                )
            part = _add_products(part, x, y, CODE, PANELS, FLOAT_OPERANDS)
        total += tl.where((high != 0)[:, None] & (low != 0)[None, :], part, 0.0)
    if SPLIT > 1:
        total = tl.reshape(total, [SPLIT, TASKS, SPLIT, TASKS])
        run = tl.arange(0, SPLIT)
        same = run[:, None, None, None] == run[None, None, :, None]
        total = tl.sum(tl.sum(tl.where(same, total, 0.0), axis=2), axis=0)
    task = tl.arange(0, TASKS)
    place = (slot * (PANELS * (PANELS + 1) // 2) + pair) * (TASKS * TASKS)
    tl.store(partials + place + task[:, None] * TASKS + task[None, :], total)


@triton.jit
def _add_products(total, x, y, CODE: tl.constexpr, PANELS: tl.constexpr, FLOAT_OPERANDS: tl.constexpr):
    """total + x y', float64: products of 16-bit rows are summed in float32 over one run of columns."""
    if CODE == BFLOAT16:
        # The squares of what bfloat16 holds leave the range of float32: each run is scaled by a power of two.
        x, x_unit = _scaled(x, FLOAT_OPERANDS)
        if PANELS == 1:
            y = x
            y_unit = x_unit
        else:
            y, y_unit = _scaled(y, FLOAT_OPERANDS)
        products = tl.dot(x, tl.trans(y), out_dtype=tl.float32).to(tl.float64)
        total += products * x_unit[:, None] * y_unit[None, :]
    elif CODE == FLOAT16:
        total += tl.dot(x, tl.trans(y), out_dtype=tl.float32).to(tl.float64)
    else:
        total = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), total, out_dtype=tl.float64)
    return total


@triton.jit
def _scaled(bits, FLOAT_OPERANDS: tl.constexpr):
    """bfloat16 rows by their bits, brought to below 4 in magnitude, and the unit [rows] to multiply back."""
    exponent = tl.max((bits.to(tl.int32) >> 7) & 0xFF, axis=1)
    exponent = tl.where(exponent == 255, 127, tl.minimum(exponent, 253))
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent + 896).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    scaled = float_of_bfloat16(bits) * scale[:, None]
    if not FLOAT_OPERANDS:
        scaled = scaled.to(tl.bfloat16)
    return scaled, unit


@triton.jit(do_not_specialize=["gram", "partials", "slots", "num_tasks"])
def _sums_kernel(
    gram,  # float64 [S, K, K]
    partials,
    slots,  # int64 [S + 1]
    num_tasks,
    TASKS: tl.constexpr,
    PANELS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Adds DEPTH partials at a time, then their sums: an order that depends on their number alone."""
    group = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    i = entry // num_tasks
    j = entry % num_tasks
    high = tl.maximum(i, j)  # both triangles read the lower one: symmetric to the bit
    low = tl.minimum(i, j)
    pair = high // TASKS * (high // TASKS + 1) // 2 + low // TASKS
    place = pair * (TASKS * TASKS) + high % TASKS * TASKS + low % TASKS
    first = tl.load(slots + group)
    last = tl.load(slots + group + 1)
    total = tl.zeros([DEPTH, ENTRIES], tl.float64)
    inside = entry < num_tasks * num_tasks
    SLOT: tl.constexpr = PANELS * (PANELS + 1) // 2 * TASKS * TASKS
    for start in range(bound(first), bound(last), DEPTH):
        slot = start + tl.arange(0, DEPTH)
        mask = (slot < last)[:, None] & inside[None, :]
        total += tl.load(partials + slot[:, None] * SLOT + place[None, :], mask=mask, other=0.0)
    tl.store(gram + group * num_tasks * num_tasks + entry, tl.sum(total, axis=0), mask=inside)
