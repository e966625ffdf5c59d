"""Rows that update their states: one launch per pair of dtypes, and one that adds up what it left, in index order."""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import StateCall
from ..rows import ITEMSIZES, RowTable
from . import gram, tables
from .common import bound, narrow, row_pointers, widen

MAX_CHUNKS = 2112
"""About the most programs of one launch."""

BLOCK, TAIL, WARPS = 1024, 256, 4
"""Columns of a program at a time, the same where a row or state is not aligned, or ends, and its warps."""

AVERAGE = tl.constexpr(0)
SQUARES = tl.constexpr(1)
"""What becomes of a state, at the numbers of `call.STATE_OPERATIONS`."""


def update_state(table: RowTable, state: RowTable, call: StateCall, groups: Sequence[int], sums: Tensor) -> None:
    """Updates ``state`` in place, and writes what comes of it to ``sums``, float64 ``[S, K]``."""
    num_tasks, device = state.num_tasks, state.device
    # A row and its state stand alone: what is one parameter of K tasks elsewhere is K parameters of one task here.
    codes = [
        len(ITEMSIZES) * row_code + code for row_code, code in zip(table.codes, state.codes, strict=True)
    ] * num_tasks
    places = [group * num_tasks + k for k in range(num_tasks) for group in groups]
    work = tables.work(state.numels * num_tasks, codes, places, max(MAX_CHUNKS // num_tasks, 1), device)
    if not work.launches:
        return
    pointers = tables.pointers(table, [tensor for states in state.entries for tensor in states])
    partials = torch.empty(work.num_slots, dtype=torch.float64, device=device)
    for launch in work.launches:
        row_code, code = divmod(launch.code, len(ITEMSIZES))
        _state_kernel[(launch.num_chunks,)](
            partials,
            pointers,
            call.gain if call.keep is None else call.keep,
            call.gain,
            struct.unpack("q", struct.pack("d", call.epsilon))[0],  # the argument of a kernel may not be a double
            launch.segments,
            launch.chunks,
            num_tasks * state.num_params,
            **constants(row_code, code, call.code),
            num_warps=WARPS,
        )
    gram.add_partials(sums.view(-1, 1, 1)[: work.slots.numel() - 1], partials, work.slots)


def constants(row_code: int, code: int, operation: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "OPERATION": operation,
        "ROW_CODE": row_code,
        "ROW_ITEMSIZE": ITEMSIZES[row_code],
        "CODE": code,
        "ITEMSIZE": ITEMSIZES[code],
        "BLOCK": BLOCK,
        "TAIL": TAIL,
    }


@triton.jit(
    do_not_specialize=["partials", "pointers", "keeps", "gains", "epsilon_bits", "segments", "chunks", "num_states"]
)
def _state_kernel(
    partials,  # float64 [slots]
    pointers,  # int64 [2, K * P]: the rows, then the states
    keeps,  # float64 [S * K], read only for AVERAGE
    gains,  # float64 [S * K]
    epsilon_bits: tl.int64,
    segments,  # int64 [number, 4], see plan.Launch
    chunks,  # int64 [programs, 3]
    num_states,  # K * P
    OPERATION: tl.constexpr,
    ROW_CODE: tl.constexpr,
    ROW_ITEMSIZE: tl.constexpr,
    CODE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    epsilon = epsilon_bits.to(tl.int64).to(tl.float64, bitcast=True)
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    last = tl.load(chunks + 3 * chunk + 1)
    slot = tl.load(chunks + 3 * chunk + 2)
    block_sums = tl.zeros([BLOCK], tl.float64)
    tail_sums = tl.zeros([TAIL], tl.float64)
    for segment in range(bound(first), bound(last)):
        entry = pointers + tl.load(segments + 4 * segment)
        first_column = tl.load(segments + 4 * segment + 1)
        length = tl.load(segments + 4 * segment + 2).to(tl.int32)
        place = tl.load(segments + 4 * segment + 3)
        gain = tl.load(gains + place)
        keep = gain
        if OPERATION == AVERAGE:
            keep = tl.load(keeps + place)
        row = tl.load(entry)
        state = tl.load(entry + num_states)
        length = tl.where(state != 0, length, 0)
        aligned = tl.where(((row | state) & 15) == 0, length // BLOCK * BLOCK, 0)
        row += tl.where(row != 0, first_column * ROW_ITEMSIZE, 0)
        state += first_column * ITEMSIZE
        for start in range(0, bound(aligned), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            places = row_pointers(state, CODE, True) + columns
            g = tl.load(row_pointers(row, ROW_CODE, True) + columns, mask=row != 0, other=0)
            old = tl.load(places)
            new, term = _updated(widen(g, ROW_CODE), old, keep, gain, epsilon, OPERATION, CODE)
            tl.store(places, new)
            block_sums += term
        for start in range(bound(aligned), bound(length), TAIL):
            columns = start + tl.arange(0, TAIL)
            inside = columns < length
            places = row_pointers(state, CODE, False) + columns
            g = tl.load(row_pointers(row, ROW_CODE, False) + columns, mask=inside & (row != 0), other=0)
            old = tl.load(places, mask=inside, other=0)
            new, term = _updated(widen(g, ROW_CODE), old, keep, gain, epsilon, OPERATION, CODE)
            tl.store(places, new, mask=inside)
            tail_sums += tl.where(inside, term, 0.0)
    tl.store(partials + slot, tl.sum(block_sums, axis=0) + tl.sum(tail_sums, axis=0))


@triton.jit
def _updated(g, old, keep, gain, epsilon, OPERATION: tl.constexpr, CODE: tl.constexpr):
    """The new state as it is rounded, and what its elements add to the sum."""
    s = widen(old, CODE)
    if OPERATION == AVERAGE:
        exact = tl.where(keep == 0, 0.0, keep * s) + tl.where(gain == 0, 0.0, gain * g)
        new = tl.where((keep == 1) & (gain == 0), old, narrow(exact, CODE))
        s = widen(new, CODE)
        term = s * s
    else:
        new = tl.where(gain == 0, old, narrow(s + gain * (g * g), CODE))
        term = g * g / tl.sqrt(widen(new, CODE) + epsilon)
    return new, term
