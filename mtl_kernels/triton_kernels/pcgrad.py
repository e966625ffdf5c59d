"""PCGrad in Gram space, one program per problem; csrc/include/mtl_kernels/solvers/pcgrad.h has the derivation."""

import triton
import triton.language as tl
from torch import Tensor

from ..call import SolverCall
from .common import bound
from .problem import active_argument, configuration, count_bad, is_active


def solve(weights: Tensor, certificate: Tensor, gram: Tensor, call: SolverCall) -> None:
    """Solves ``gram`` float64 ``[..., K, K]``, and leaves ``certificate`` as it is; options: (random, mean)."""
    random, mean = (bool(option) for option in call.options)
    num_tasks = gram.shape[-1]
    batch = gram.numel() // num_tasks**2
    shape = configuration(num_tasks)
    mask, stride, has_active = active_argument(call.active, gram)
    _pcgrad_kernel[(batch,)](
        weights,
        gram,
        mask,
        stride,
        gram if call.rng is None else call.rng,
        num_tasks,
        TASKS=shape.tasks,
        ROWS=shape.rows,
        HAS_ACTIVE=has_active,
        RANDOM=random,
        MEAN=mean,
        num_warps=shape.warps,
    )


@triton.jit(do_not_specialize=["weights", "grams", "active", "active_stride", "rng", "num_tasks"])
def _pcgrad_kernel(
    weights,  # float64 [B, K]
    grams,  # float64 [B, K, K]
    active,  # uint8 [K] or [B, K]
    active_stride,
    rng,  # int64 [2], read only when RANDOM
    num_tasks,
    TASKS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    RANDOM: tl.constexpr,
    MEAN: tl.constexpr,
):
    problem = tl.program_id(0)
    gram = grams + problem.to(tl.int64) * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = is_active(active, problem, active_stride, task, num_tasks, HAS_ACTIVE)
    num_active = tl.sum(inside.to(tl.int32), axis=0)
    bad = count_bad(gram, active, problem, active_stride, num_tasks, TASKS, ROWS, HAS_ACTIVE)
    total = tl.zeros([TASKS], tl.float64)
    for first in range(0, bound(num_tasks), ROWS):
        row = first + tl.arange(0, ROWS)
        row_active = is_active(active, problem, active_stride, row, num_tasks, HAS_ACTIVE)
        others = row_active[:, None] & inside[None, :] & (row[:, None] != task[None, :])
        if RANDOM:
            keys = _order_keys(rng, problem, row, task)
        else:
            keys = tl.zeros([ROWS, TASKS], tl.int64) + task[None, :]
        total += tl.sum(_project(gram, row, task, others, keys, num_tasks), axis=0)
        total += tl.sum((row_active[:, None] & (row[:, None] == task[None, :])).to(tl.float64), axis=0)
    share = inside.to(tl.float64) / tl.maximum(num_active, 1).to(tl.float64)
    if MEAN:
        total = total * share
    tl.store(weights + problem.to(tl.int64) * num_tasks + task, tl.where(bad > 0, share, total), mask=task < num_tasks)


@triton.jit
def _project(gram, row, task, others, keys, num_tasks):
    """c_ij of each row i, 0 for j = i. All rows visit at the same time, each by ascending key.

    A value v_j = (G c_i)_j is not needed once j was met, so c_ij takes its place.
    """
    LAST: tl.constexpr = 1 << 32
    keys = tl.where(others, keys, LAST)
    values = tl.load(gram + row[:, None] * num_tasks + task[None, :], mask=others, other=0.0)
    for _ in range(1, bound(num_tasks)):
        key = tl.min(keys, axis=1)
        left = key < LAST
        met = (key & 127).to(tl.int32)
        here = (task[None, :] == met[:, None]) & left[:, None]
        product = tl.sum(tl.where(here, values, 0.0), axis=1)
        square = tl.load(gram + met * num_tasks + met, mask=left, other=0.0)
        conflict = (product < 0) & (square > 0)
        factor = tl.where(conflict, product / tl.where(conflict, square, 1.0), 0.0)
        keys = tl.where(here, LAST, keys)
        unmet = conflict[:, None] & (keys < LAST)
        other = tl.load(gram + met[:, None] * num_tasks + task[None, :], mask=unmet, other=0.0)
        values = tl.where(here, -factor[:, None], values - factor[:, None] * other)
    return values


@triton.jit
def _order_keys(rng, problem, row, task):
    """`mtl_kernels.rng.order_keys`, int64 [ROWS, TASKS]."""
    seed = tl.load(rng)
    step = tl.load(rng + 1)
    position = row[:, None] * 32 + task[None, :] // 4
    nothing = position - position
    low = (step & 0xFFFFFFFF).to(tl.uint32) + nothing.to(tl.uint32)
    high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32) + nothing.to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, low, high, (problem + nothing).to(tl.uint32), position.to(tl.uint32))
    which = (task % 4)[None, :]
    word = tl.where(which == 0, first, tl.where(which == 1, second, tl.where(which == 2, third, fourth)))
    return (word.to(tl.int64) & 0xFFFFFF80) | task[None, :]
