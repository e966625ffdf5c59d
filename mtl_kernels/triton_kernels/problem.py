"""What the solvers share: the active tasks of a problem, and the problems that are the same for every one of them.

One program solves one problem; vectors are of TASKS >= K entries, those beyond K inactive.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import bound


class Configuration(NamedTuple):
    """Room for ``tasks`` tasks, of which ``rows`` are worked on at a time where they are independent."""

    tasks: int
    rows: int
    warps: int


def configuration(num_tasks: int) -> Configuration:
    """The fixed table of shapes, by number of tasks."""
    if num_tasks <= 8:
        return Configuration(8, 8, 1)
    return Configuration(32, 32, 4) if num_tasks <= 32 else Configuration(128, 16, 8)


def active_argument(active: Tensor | None, gram: Tensor) -> tuple[Tensor, int, bool]:
    """A pointer for ``active``, the distance between problems, and whether it is there at all."""
    if active is None:
        return gram, 0, False
    return active.view(torch.uint8), 0 if active.dim() == 1 else gram.shape[-1], True


@triton.jit
def is_active(active, problem, stride, task, num_tasks, HAS_ACTIVE: tl.constexpr):
    """bool for each of the tasks of an index tensor."""
    inside = task < num_tasks
    if HAS_ACTIVE:
        inside = tl.load(active + problem * stride + task, mask=inside, other=0) != 0
    return inside


@triton.jit
def count_bad(
    gram, active, problem, stride, num_tasks, TASKS: tl.constexpr, ROWS: tl.constexpr, HAS_ACTIVE: tl.constexpr
):
    """The number of entries among the active tasks that are not finite."""
    task = tl.arange(0, TASKS)
    inside = is_active(active, problem, stride, task, num_tasks, HAS_ACTIVE)
    bad = tl.zeros([TASKS], tl.int32)
    for first in range(0, bound(num_tasks), ROWS):
        row = first + tl.arange(0, ROWS)
        pair = is_active(active, problem, stride, row, num_tasks, HAS_ACTIVE)[:, None] & inside[None, :]
        entries = tl.load(gram + row[:, None] * num_tasks + task[None, :], mask=pair, other=0.0)
        bad += tl.sum(tl.where(tl.abs(entries) < float("inf"), 0, 1), axis=0)
    return tl.sum(bad, axis=0)
