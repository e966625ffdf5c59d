"""How the columns of a row table are dealt out to programs. Host code: needs neither triton nor a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64
"""A parameter is cut at multiples of so many elements, so that a piece is aligned if its parameter is."""

SEGMENT_COST = 512
"""What a piece of a parameter costs beside its columns, in columns."""

MIN_COLUMNS = 4096
"""Columns below which no program is added."""


class Launch(NamedTuple):
    """The work of one launch, over all the parameters of one dtype.

    Attributes:
        code: the dtype's number.
        segments: (param, first column, columns, group) of consecutive columns of one parameter.
        chunks: (first segment, last + 1, slot): what one program does, within one group, and its number among the
            programs of all launches.
    """

    code: int
    segments: list[tuple[int, int, int, int]]
    chunks: list[tuple[int, int, int]]


class Plan(NamedTuple):
    """All launches, and for every group the range of slots ``slots[s] .. slots[s + 1]`` of its chunks."""

    launches: list[Launch]
    slots: list[int]


def make_plan(numels: Sequence[int], codes: Sequence[int], groups: Sequence[int], max_chunks: int) -> Plan:
    """Deals the parameters out, group by group and dtype by dtype.

    The chunks of a group depend on nothing but its own parameters and ``max_chunks``, the most that one dtype of a
    group is cut into: so do the sums over it.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for p, (numel, code, group) in enumerate(zip(numels, codes, groups, strict=True)):
        if numel > 0:
            members.setdefault((group, code), []).append(p)
    launches: dict[int, Launch] = {}
    slots = [0] * (max(groups, default=0) + 2)
    slot = 0
    for group, code in sorted(members):
        launch = launches.setdefault(code, Launch(code, [], []))
        for pieces in _deal(members[group, code], numels, max_chunks):
            first = len(launch.segments)
            launch.segments.extend((p, begin, columns, group) for p, begin, columns in pieces)
            launch.chunks.append((first, len(launch.segments), slot))
            slot += 1
        slots[group + 1] = slot
    for group in range(1, len(slots)):
        slots[group] = max(slots[group], slots[group - 1])
    return Plan([launches[code] for code in sorted(launches)], slots)


def _deal(params: Sequence[int], numels: Sequence[int], max_chunks: int) -> list[list[tuple[int, int, int]]]:
    """Cuts the parameters into at most about ``max_chunks`` lists of (param, first column, columns)."""
    cost = sum(numels[p] + SEGMENT_COST for p in params)
    room_of_each = -(-max(MIN_COLUMNS, -(-cost // max_chunks)) // ALIGNMENT) * ALIGNMENT
    chunks: list[list[tuple[int, int, int]]] = [[]]
    room = room_of_each
    for p in params:
        begin = 0
        while begin < numels[p]:
            if room < SEGMENT_COST + ALIGNMENT and chunks[-1]:
                chunks.append([])
                room = room_of_each
            columns = min(numels[p] - begin, max(room - SEGMENT_COST, ALIGNMENT) // ALIGNMENT * ALIGNMENT)
            chunks[-1].append((p, begin, columns))
            begin += columns
            room -= columns + SEGMENT_COST
    return chunks
